"""Sources to shards through Ray Data: parts, splits by id, the quarantine, real data."""

import io
import json
import os
from collections import Counter

import numpy as np
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medray.config import DataConfig
from medray.ingest.source_index import read_index
from medray.methods.shared.training_sets import prepare, read_account
from medray.storage.resumable import write_resumable
from medray.storage.shards import count_rows, footer_readers, read_rows
from tests.images.test_decoding import bomb, noise, saved
from tests.ingest.test_source_index import CELL

SMALL = {"read_cpus": 0.5, "rows_per_shard": 16}


def table(folder, part, columns=None):
    return pyarrow.dataset.dataset(str(folder / part), format="parquet").to_table(columns=columns).to_pylist()


def wbcatt(folder, records, images):
    (folder / "images").mkdir(parents=True)
    for name, data in images.items():
        (folder / "images" / name).write_bytes(data)
    (folder / "records.jsonl").write_bytes(
        b"".join(r if isinstance(r, bytes) else json.dumps(r).encode() + b"\n" for r in records)
    )
    return str(folder)


def cell(number, split="train", **changes):
    return CELL | {"img_name": f"c{number}.png", "image": f"images/c{number}.png", "split": split} | changes


@pytest.fixture(scope="module")
def dirty(tmp_path_factory, ray_cluster):
    """Forty good cells and one of each kind of bad record."""
    good = [cell(i, "val" if i % 4 == 0 else "train") for i in range(40)]
    images = {f"c{i}.png": saved(noise((20 + i, 20))) for i in range(40)}
    images |= {
        "c100.png": saved(noise((400, 300)), "JPEG")[:2000],
        "c101.png": b"",
        "c102.png": bomb(),
        "c103.png": saved(noise().convert("CMYK"), "JPEG"),
        "c104.png": saved(Image.fromarray(np.linspace(0, 4000, 1200).reshape(30, 40).astype(np.uint16))),
        "c105.png": saved(Image.new("RGB", (1, 1))),
    }
    bad = [cell(number) for number in range(100, 107)]  # c106.png is missing
    bad += [
        b'{"img_name": "c107.png", \n',
        {"img_name": "c108.png"},
        b'{"img_name": "\xff"}\n',
        cell(1),
        cell(109, image="../c1.png"),
    ]
    images |= {
        "c107.heic": b"",
        "unnamed.PNG": saved(noise()),
        ".DS_Store": b"",
        "c110.gif": saved(noise(), "GIF", save_all=True, append_images=[noise(seed=1)]),
    }
    root = tmp_path_factory.mktemp("dirty")
    source = wbcatt(root / "source", [*good, cell(110, image="images/c110.gif"), *bad], images)
    counts = prepare(
        DataConfig(source=source, label_fraction=0.5, **SMALL), str(root / "out"), eval_conversations=4
    )
    return root / "out", counts


def test_each_bad_row_is_in_the_quarantine_with_its_reason(dirty):
    out, counts = dirty
    quarantine = {row["sample_id"]: row["reason"] for row in table(out, "quarantine")}
    reasons = {
        "c100.png": "decoded",
        "c101.png": "0 bytes",
        "c102.png": "max_image_pixels",
        "c105.png": "min_image_side",
        "c106.png": "does not exist",
        "c108.png": "label is None",
        "c1.png": "duplicate sample_id",
        "c109.png": "leads out of",
    }
    for sample, reason in reasons.items():
        assert reason in quarantine.pop(sample)
    assert sorted("JSON" in reason or "UTF-8" in reason for reason in quarantine.values()) == [True, True]
    assert counts["quarantine"] == 10
    assert read_account(str(out))["warnings"] == {"first-frame-of-animated-GIF": 1}
    places = {row["sample_id"]: row["file"] for row in table(out, "quarantine")}
    assert places["c106.png"].startswith("records.jsonl byte ") and places["c106.png"].endswith(
        "): images/c106.png"
    )


def test_files_that_no_record_names_are_counted(dirty):
    out, _ = dirty
    assert read_account(str(out))["unread"] == {"(none)": 1, ".heic": 1, ".png": 1}


def test_good_rows_all_arrive_once(dirty):
    """CMYK and 16-bit images are good; labelled and unlabelled images share no id and together are the
    train split.
    """
    out, counts = dirty
    labelled = [row["sample_id"] for row in table(out, "conversations", ["sample_id"])]
    unlabelled = [row["sample_id"] for row in table(out, "images", ["sample_id"])]
    train = [f"c{i}.png" for i in range(40) if i % 4] + ["c103.png", "c104.png", "c110.png"]
    assert sorted(labelled + unlabelled) == sorted(train)
    assert labelled
    assert unlabelled
    assert {row["image_id"] for row in table(out, "questions", ["image_id"])} == {
        f"c{i}.png" for i in range(0, 40, 4)
    }
    assert counts["questions"] == len(table(out, "questions", ["sample_id"]))


def test_same_inputs_same_shards_another_seed_other_labels(dirty, tmp_path):
    out, _ = dirty
    source = str(out.parent / "source")
    again, other = tmp_path / "again", tmp_path / "other"
    prepare(DataConfig(source=source, label_fraction=0.5, **SMALL), str(again), eval_conversations=4)
    prepare(DataConfig(source=source, label_fraction=0.5, **SMALL), str(other), seed=1)
    assert table(again, "conversations") == table(out, "conversations")
    assert table(other, "conversations", ["sample_id"]) != table(out, "conversations", ["sample_id"])
    assert table(other, "questions") == table(out, "questions")


def test_own_shards_are_a_source_again(dirty):
    out, counts = dirty
    rows = read_index(DataConfig(source=str(out / "conversations")), 0.5).take_all()
    stored = {row["sample_id"]: row for row in table(out, "conversations")}
    assert len(rows) == len(stored) == counts["conversations"]
    for row in rows:
        assert (row["error"], json.loads(row["payload"])) == (
            None,
            {"turns": stored[row["sample_id"]]["turns"]},
        )
        assert (row["image_id"], row["image"]) == (
            stored[row["sample_id"]]["image_id"],
            stored[row["sample_id"]]["image"],
        )


def test_resumed_write_keeps_ids_exactly_once(ray_cluster, tmp_path):
    """The writer dies in the second of two folders; the second call does what is left of that one and of
    a third.
    """
    import pyarrow as pa

    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
        for part in range(2):
            rows = [{"sample_id": str(i), "key": f"{folder}-{part}{i}"} for i in range(8)]
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / folder / f"{part}.parquet")

    def stop_at(rows, marker=str(tmp_path / "died"), log=str(tmp_path / "log")):
        import os

        if "b-12" in rows["key"].to_pylist() and not os.path.exists(marker):
            open(marker, "w").close()
            raise RuntimeError("the writer dies")
        with open(log, "a") as handle:
            handle.writelines(f"{key}\n" for key in rows["key"].to_pylist())
        return rows

    def write(
        *folders,
        stage=lambda dataset: dataset.map_batches(
            stop_at, batch_size=8, batch_format="pyarrow", num_cpus=0.5
        ),
    ):
        return write_resumable(
            [str(tmp_path / name) for name in folders],
            str(tmp_path / "out"),
            str(tmp_path / "committed"),
            stage,
            8,
            0.5,
            "key",
        )

    with pytest.raises(Exception, match="the writer dies"):
        write("a", "b")
    committed = {
        row["key"]
        for path in (tmp_path / "committed").iterdir()
        if "pending" not in path.name
        for row in pq.read_table(path).to_pylist()
    }
    (tmp_path / "log").unlink()
    assert write("b", "c").rows == len(
        committed | {f"{folder}-{part}{i}" for folder in "bc" for part in range(2) for i in range(8)}
    )
    assert committed.isdisjoint((tmp_path / "log").read_text().split())
    assert write("a", "b", "c") == (48, {})
    assert write("c", "a", stage=lambda _: pytest.fail("there was nothing left to do")) == (48, {})
    assert sorted(row["key"] for row in table(tmp_path, "out", ["key"])) == [
        f"{folder}-{part}{i}" for folder in "abc" for part in range(2) for i in range(8)
    ]


@pytest.mark.parametrize(("files", "actors"), [(0, 1), (1, 1), (40, 3), (100_000, 32)])
def test_footers_are_read_by_as_many_actors_as_files_need(monkeypatch, files, actors):
    from ray.data._internal.datasource_v2.formats.parquet.footer_file_indexer import FooterFileIndexer

    monkeypatch.delenv("RAY_DATA_PARQUET_FOOTER_NUM_ACTORS", raising=False)
    with footer_readers(files):
        assert FooterFileIndexer(ignore_missing_paths=False)._num_actors == actors
    assert "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS" not in os.environ
    monkeypatch.setenv("RAY_DATA_PARQUET_FOOTER_NUM_ACTORS", "7")
    with footer_readers(files):
        assert FooterFileIndexer(ignore_missing_paths=False)._num_actors == 7
    assert os.environ["RAY_DATA_PARQUET_FOOTER_NUM_ACTORS"] == "7"


def test_read_rows_streams_in_order(ray_cluster, dirty):
    out, counts = dirty
    ids = [row["sample_id"] for row in read_rows(str(out / "images"), ["sample_id"], 0.5).iter_rows()]
    assert ids == [row["sample_id"] for row in table(out, "images", ["sample_id"])]
    assert count_rows(str(out / "images")) == counts["images"] == len(ids)


def test_real_wbcatt(ray_cluster, real_data, tmp_path):
    counts = prepare(
        DataConfig(source=str(real_data / "wbcatt"), read_cpus=0.5, max_labelled=60, max_unlabelled=120),
        str(tmp_path),
        max_eval_images=20,
    )
    assert counts["conversations"] == 60
    assert counts["images"] == 120
    assert 20 * 25 < counts["questions"] <= 20 * 36
    assert counts["quarantine"] == 0
    assert {Image.open(io.BytesIO(row["image"])).format for row in table(tmp_path, "images", ["image"])} == {
        "JPEG"
    }


def test_real_wbcatt_and_vqa_rad_counts(ray_cluster, real_data):
    """Every record of the files becomes one index row, none is bad; the split sizes are those of the
    files' sources.
    """
    splits = {}
    for name in ("wbcatt", "vqa_rad"):
        rows = (
            read_index(DataConfig(source=str(real_data / name), read_cpus=0.5))
            .select_columns(["split", "error"])
            .iter_rows()
        )
        splits[name] = Counter(row["split"] if row["error"] is None else row["error"] for row in rows)
    assert splits == {"wbcatt": {"train": 6151, "val": 1028}, "vqa_rad": {"train": 1797, "test": 451}}
