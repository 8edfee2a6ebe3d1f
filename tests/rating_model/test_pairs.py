"""Pairs are split by image, weighted by origin and mixed by id."""

import pytest

from medray.config import DataConfig, RaterConfig
from medray.errors import DataError
from medray.rating_model.pairs import held_out, pair_counts, pairs_of, side_of
from tests.support.rating_pairs import pair, stored

CONFIG = RaterConfig(held_out_fraction=0.3, clinician_weight=50.0)
IMAGES = [f"cell-{number:04d}" for number in range(40)]


def test_a_side_is_fixed_by_the_image_alone():
    sides = [held_out(image, CONFIG) for image in IMAGES]
    assert 4 <= sum(sides) <= 20
    assert sides == [
        held_out(image, CONFIG.model_copy(update={"seed": 9, "clinician_weight": 1.0})) for image in IMAGES
    ]
    assert sides != [held_out(image, CONFIG.model_copy(update={"split_seed": 1})) for image in IMAGES]
    many = [held_out(f"image {number}", CONFIG) for number in range(2000)]
    assert 0.26 < sum(many) / len(many) < 0.34


def test_a_pair_across_the_sides_is_on_none():
    train = next(image for image in IMAGES if not held_out(image, CONFIG))
    test = next(image for image in IMAGES if held_out(image, CONFIG))
    assert (
        side_of(train, train, CONFIG),
        side_of(test, test, CONFIG),
        side_of(train, test, CONFIG),
        side_of(test, train, CONFIG),
    ) == ("train", "held_out", None, None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model pairs of one and of two images, clinicians' pairs on some of the same images."""
    root = tmp_path_factory.mktemp("pairs")
    model = [pair(number, other=number + 1 if number % 2 else None) for number in range(40)]
    return [
        stored(model, root / "model"),
        stored([pair(number, "clinician") for number in range(0, 40, 3)], root / "clinician"),
    ]


def test_pairs_are_counted_by_side_and_origin(folders):
    counts = pair_counts(folders, CONFIG)
    expected = dict.fromkeys(counts, 0)
    for number in range(40):
        side = side_of(IMAGES[number], f"cell-{number + 1:04d}" if number % 2 else IMAGES[number], CONFIG)
        expected[f"{side or 'dropped'}, model"] += 1
        if number % 3 == 0:
            expected[f"{side_of(IMAGES[number], IMAGES[number], CONFIG)}, clinician"] += 1
    assert counts == expected
    assert counts["dropped, model"] > 0 and counts["dropped, clinician"] == 0


def test_an_unknown_origin_is_named(tmp_path):
    uri = stored([{**pair(0), "origin": "gpt"}], tmp_path / "pairs")
    with pytest.raises(DataError, match=r"pair model-0000 has origin 'gpt'"):
        pair_counts([uri], CONFIG)


@pytest.mark.whole_job
@pytest.mark.ray
def test_no_image_is_on_both_sides_and_clinicians_are_mixed_in(ray_cluster, folders):
    data = DataConfig(read_cpus=0.5)
    sides = {}
    for side, trained in (("train", True), ("held_out", False)):
        sides[side] = (
            pairs_of(folders, side, CONFIG, data, trained=trained)
            .select_columns(["sample_id", "origin", "weight", "chosen_image_id", "rejected_image_id"])
            .take_all()
        )
    images = {
        side: {row[f"{which}_image_id"] for row in rows for which in ("chosen", "rejected")}
        for side, rows in sides.items()
    }
    assert images["train"] and images["held_out"] and not images["train"] & images["held_out"]
    counts = pair_counts(folders, CONFIG)
    for side, rows in sides.items():
        assert [sum(row["origin"] == origin for row in rows) for origin in ("clinician", "model")] == [
            counts[f"{side}, {origin}"] for origin in ("clinician", "model")
        ]
        assert {row["weight"] for row in rows if row["origin"] == "clinician"} == {50.0} and {
            row["weight"] for row in rows if row["origin"] == "model"
        } == {1.0}
    origins = [row["origin"] for row in sides["train"]]
    assert origins.index("clinician") < len(origins) // 2, (
        "they lie in the second folder, and are yet among the first"
    )
    assert "model" in origins[: origins.index("clinician") + 6]
    measured = [row["origin"] for row in sides["held_out"]]
    assert measured == sorted(measured), "clinicians' pairs are measured first"
    only = (
        pairs_of(folders, "train", CONFIG.model_copy(update={"train_on": "clinician"}), data, trained=True)
        .select_columns(["sample_id", "origin"])
        .take_all()
    )
    assert {row["origin"] for row in only} == {"clinician"} and len(only) == counts["train, clinician"]
