import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medray.config.clinician_preference_sections import DemonstrationsConfig
from medray.methods.clinician_preference.cluster_plot import cluster_plot, components
from medray.methods.clinician_preference.draw_images import Clusters
from medray.records import EMBEDDED


def test_components_are_those_of_the_covariance():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(500, 2)) * [3, 1]
    turned = points @ np.linalg.qr(rng.normal(size=(6, 6)))[0][:2]
    found = components(turned + 7)
    values = np.linalg.eigvalsh(np.cov(points.T, bias=True))[::-1]
    assert found.var(0) == pytest.approx(values, rel=1e-6)
    assert components(turned) == pytest.approx(components(turned[::-1])[::-1], abs=1e-9), "the signs stay"
    assert components(np.ones((3, 1))).shape == (3, 2)


def test_the_picture_shows_a_sample_and_every_drawn_image(tmp_path):
    rng = np.random.default_rng(0)
    rows = [{"sample_id": f"i{number}", "embedding": rng.normal(size=3)} for number in range(200)]
    pq.write_table(
        pa.Table.from_pylist([*rows, {"sample_id": "broken", "error": "e"}], schema=EMBEDDED),
        tmp_path / "a.parquet",
    )
    clusters = Clusters(rng.normal(size=(4, 3)).astype(np.float32))
    drawn = [{"sample_id": f"i{number}"} for number in range(7)]
    few, many = (
        cluster_plot(str(tmp_path), clusters, drawn, DemonstrationsConfig(picture_points=points))
        for points in (20, 50)
    )
    assert many.startswith("<svg") and "57 images in 4 clusters" in many and "drawn (7)" in many
    # The lines of the grid count too, and their number follows from the points.
    assert 28 <= many.count('clip-path="') - few.count('clip-path="') <= 32
