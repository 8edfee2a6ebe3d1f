"""k-means over shards, and the draw of demonstrations."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medray.config.clinician_preference_sections import DemonstrationsConfig
from medray.errors import DataError
from medray.methods.clinician_preference.draw_images import assign, draw, fit_clusters, spread, take_rows
from medray.records import EMBEDDED

CENTRES = np.array([[5, 0, 0], [0, 5, 0], [0, 0, 5], [-5, 0, 0]], float)


def embedded(count=400, modalities=("ct", "ct", "ct", "mri")):
    """Rows around four centres, the centre's number in the id; the last centre holds another modality."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        centre = number % 4
        rows.append(
            {
                "sample_id": f"{number:04d}-c{centre}",
                "modality": modalities[centre],
                "embedding": CENTRES[centre] + rng.normal(0, 0.3, 3),
                "error": None,
            }
        )
    return rows


def write(folder, rows, files):
    folder.mkdir()
    for number in range(files):
        pq.write_table(
            pa.Table.from_pylist(rows[number::files], schema=EMBEDDED), folder / f"{number}.parquet"
        )
    return str(folder)


def test_clusters_are_found_and_do_not_depend_on_how_shards_are_cut(tmp_path):
    config = DemonstrationsConfig(clusters=4, kmeans_batch=64)
    rows = embedded()
    first = fit_clusters(write(tmp_path / "a", rows, 1), config)
    again = fit_clusters(write(tmp_path / "b", rows[::-1], 7), config)
    assert np.array_equal(first.centres, again.centres)
    nearest = np.abs(first.centres[:, None] - CENTRES[None]).sum(-1).argmin(1)
    assert sorted(nearest) == [0, 1, 2, 3]
    assert np.abs(first.centres - CENTRES[nearest]).max() < 0.15
    assert not np.array_equal(
        first.centres, fit_clusters(str(tmp_path / "a"), config.model_copy(update={"seed": 1})).centres
    )


def test_rows_without_an_embedding_are_counted_and_belong_nowhere(tmp_path):
    rows = [
        *embedded(40),
        {"sample_id": "broken", "modality": "ct", "embedding": None, "error": "image cannot be decoded"},
    ]
    source = write(tmp_path / "a", rows, 2)
    clusters = fit_clusters(source, DemonstrationsConfig(clusters=4))
    assert assign(source, clusters, str(tmp_path / "out")) == {
        "images": 40,
        "without embedding": 1,
        "clusters used": 4,
    }
    found = pq.read_table(tmp_path / "out").to_pylist()
    assert len(found) == 40
    assert all(
        len({row["cluster"] for row in found if row["sample_id"].endswith(f"c{centre}")}) == 1
        for centre in range(4)
    )


def test_fewer_images_than_clusters(tmp_path):
    source = write(tmp_path / "a", embedded(3), 1)
    assert fit_clusters(source, DemonstrationsConfig()).centres.shape == (3, 3)
    with pytest.raises(DataError, match="no image has an embedding"):
        fit_clusters(
            write(tmp_path / "b", [{"sample_id": "x", "embedding": None, "error": "e"}], 1),
            DemonstrationsConfig(),
        )


def test_embeddings_of_two_encoders_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"embeddings of \[2, 3\] numbers"):
        fit_clusters(
            write(tmp_path / "a", [*embedded(4), {"sample_id": "x", "embedding": [1.0, 2.0]}], 1),
            DemonstrationsConfig(clusters=2),
        )


def clustered(folder, sizes):
    """CLUSTERED rows: {(modality, cluster): how many}."""
    rows = [
        {"sample_id": f"{modality}{cluster}-{number}", "modality": modality, "cluster": cluster}
        for (modality, cluster), size in sizes.items()
        for number in range(size)
    ]
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    return str(folder)


def test_the_draw_is_even_over_modalities_and_their_clusters(tmp_path):
    """A thousand CTs do not push out three histologies, nor a large cluster a small one."""
    source = clustered(
        tmp_path / "a",
        {
            ("ct", 0): 900,
            ("ct", 1): 100,
            ("ct", 2): 2,
            ("mri", 0): 50,
            ("mri", 3): 50,
            ("histology", 4): 3,
            (None, 5): 40,
        },
    )
    drawn = draw(source, DemonstrationsConfig(draw=31))
    of_modality = Counter(row["modality"] for row in drawn)
    assert of_modality["histology"] == 3 and sorted(
        of_modality[name] for name in ("ct", "mri", "unknown")
    ) == [9, 9, 10]
    of_cluster = Counter(row["cluster"] for row in drawn if row["modality"] == "ct")
    assert of_cluster[2] == 2 and abs(of_cluster[0] - of_cluster[1]) <= 1
    assert len({row["sample_id"] for row in drawn}) == 31
    assert drawn == draw(source, DemonstrationsConfig(draw=31))
    other = draw(source, DemonstrationsConfig(draw=31, seed=1))
    assert {row["sample_id"] for row in other} != {row["sample_id"] for row in drawn}
    assert spread(drawn)["histology"] == {"images": 3, "clusters": 1}


def test_all_are_drawn_where_there_are_no_more_and_their_rows_taken_as_they_are(tmp_path):
    source = clustered(tmp_path / "a", {("ct", 0): 5, ("mri", 1): 1})
    drawn = draw(source, DemonstrationsConfig(draw=60))
    assert len(drawn) == 6
    assert (
        take_rows(
            source,
            {row["sample_id"] for row in drawn if row["modality"] == "ct"} | {"not there"},
            str(tmp_path / "out"),
        )
        == 5
    )
    taken = pq.read_table(tmp_path / "out")
    assert taken.schema.names == ["sample_id", "modality", "cluster"] and set(
        taken["modality"].to_pylist()
    ) == {"ct"}
