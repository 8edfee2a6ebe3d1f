"""The synthetic cells: reproducible, in WBCAtt's schema, with every attribute visible in the pixels."""

import itertools
import json
import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from medray.data.attribute_questions import ATTRIBUTES, MORPHOLOGY
from medray.testbed.cell_statistics import LABEL_COUNTS
from medray.testbed.cells import render_cell, sample_record, write_cells

PLAIN = {
    "label": "Lymphocyte",
    "cell_size": "big",
    "cell_shape": "round",
    "nucleus_shape": "unsegmented-round",
    "nuclear_cytoplasmic_ratio": "low",
    "chromatin_density": "densely",
    "cytoplasm_vacuole": "no",
    "cytoplasm_texture": "clear",
    "cytoplasm_colour": "light blue",
    "granule_type": "small",
    "granule_colour": "pink",
    "granularity": "yes",
}


def pixels(record, seed):
    """The picture as the model sees it: 64 px, float."""
    return np.asarray(
        render_cell(record, random.Random(seed)).resize((64, 64), Image.Resampling.BICUBIC), dtype=float
    )


def centre(record, count=30):
    """Mean (R, G, B) over pictures of the middle (24 px) of the cell."""
    return np.mean([pixels(record, seed)[20:44, 20:44].mean((0, 1)) for seed in range(count)], 0)


def test_same_seed_same_pixels_other_seed_other_picture():
    first, again, other = (render_cell(PLAIN, random.Random(seed)) for seed in (5, 5, 6))
    assert first.size == (160, 160) and first.mode == "RGB"
    assert first.tobytes() == again.tobytes()
    assert np.abs(np.asarray(first, float) - np.asarray(other, float)).mean() > 5


@pytest.mark.parametrize("name", MORPHOLOGY)
def test_every_value_of_an_attribute_looks_different(name):
    """Averaged over pictures, two values differ far more than two halves of the same value do."""
    pictures = {}
    for value in ATTRIBUTES[name].values:
        pictures[value] = np.stack([pixels({**PLAIN, name: value}, seed) for seed in range(24)])
    values = list(pictures)
    for a, b in itertools.pairwise(values):
        change = np.abs(pictures[a] - pictures[b])[:, 16:48, 16:48].mean()
        assert change > 1.5, f"{name}: {a} and {b} differ by {change:.2f} grey levels"


def test_pixels_follow_the_attributes():
    rgb = centre(PLAIN)
    loose = centre({**PLAIN, "chromatin_density": "loosely"})
    assert loose.mean() > rgb.mean() + 8, "loose chromatin is lighter"
    big_nucleus = centre({**PLAIN, "nuclear_cytoplasmic_ratio": "high"})
    assert big_nucleus.mean() < rgb.mean() - 8, "a big nucleus is darker than cytoplasm"
    red = centre({**PLAIN, "granule_type": "round", "granule_colour": "red"})
    assert red[0] - red[2] > rgb[0] - rgb[2] + 5, "red granules are redder than pink ones"
    vacuoles = centre({**PLAIN, "cytoplasm_vacuole": "yes", "nuclear_cytoplasmic_ratio": "high"})
    assert vacuoles.mean() > big_nucleus.mean(), "vacuoles are white"
    small = centre({**PLAIN, "cell_size": "small"})
    assert small.mean() > rgb.mean(), "around a small cell there is bright plasma"


def test_records_hold_the_schemas_values_in_the_published_proportions():
    rng = random.Random(0)
    records = [sample_record(rng) for _ in range(4000)]
    for name, attribute in ATTRIBUTES.items():
        assert {r[name] for r in records} <= set(attribute.values)
    counts, total = Counter(r["label"] for r in records), sum(LABEL_COUNTS.values())
    assert total == 6151
    for label, count in LABEL_COUNTS.items():
        assert counts[label] / 4000 == pytest.approx(count / total, abs=0.03)
    monocytes = [r for r in records if r["label"] == "Monocyte"]
    # 388 of WBCAtt's 828 training monocytes have vacuoles.
    assert sum(r["cytoplasm_vacuole"] == "yes" for r in monocytes) / len(monocytes) == pytest.approx(
        388 / 828, abs=0.08
    )


def test_an_unknown_value_is_named():
    with pytest.raises(ValueError, match="cell_size is 'huge'; allowed values: big, small"):
        render_cell({**PLAIN, "cell_size": "huge"}, random.Random(0))


def test_written_sets_have_the_wanted_rows_and_longer_ones_begin_with_shorter(tmp_path):
    write_cells(tmp_path / "short", 20, seed=3)
    write_cells(tmp_path / "long", 30, seed=3)
    short, long = (
        [json.loads(line) for line in (tmp_path / name / "records.jsonl").open()]
        for name in ("short", "long")
    )
    assert (len(short), len(long)) == (20, 30) and long[:20] == short
    assert [row["split"] for row in long].count("val") == 3
    assert set(short[0]) == {"img_name", *ATTRIBUTES, "path", "split", "image"}
    assert len(list((tmp_path / "long" / "images").glob("*.jpg"))) == 30
    image = short[7]["image"]
    assert (tmp_path / "short" / image).read_bytes() == (tmp_path / "long" / image).read_bytes()
