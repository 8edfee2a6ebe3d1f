import numpy as np
import pytest

from medray.bootstrap import (
    clustered_interval,
    clustered_intervals,
    holm,
    paired_difference,
    paired_differences,
)


def test_interval_of_independent_questions_is_the_binomial_one():
    rng = np.random.default_rng(0)
    values = rng.random(4000) < 0.7
    interval = clustered_interval(values, np.arange(4000), resamples=2000)
    half = 1.96 * np.sqrt(values.mean() * (1 - values.mean()) / 4000)
    assert interval["value"] == pytest.approx(values.mean())
    assert interval["high"] - interval["low"] == pytest.approx(2 * half, rel=0.06)


def test_questions_of_one_image_that_agree_count_once():
    rng = np.random.default_rng(1)
    per_image = rng.random(400) < 0.7
    values, clusters = np.repeat(per_image, 10), np.repeat(np.arange(400), 10)
    interval = clustered_interval(values, clusters, resamples=2000)
    half = 1.96 * np.sqrt(per_image.mean() * (1 - per_image.mean()) / 400)
    assert interval["high"] - interval["low"] == pytest.approx(2 * half, rel=0.06)


def test_against_a_loop_over_resamples_question_by_question():
    rng = np.random.default_rng(2)
    images = rng.integers(0, 12, 60)
    values = np.stack([rng.random(60), (rng.random(60) < 0.5).astype(float)], axis=1)
    values[images == 3, 1] = np.nan  # an image without part in the second metric
    names = np.unique(images)
    drawn = np.random.default_rng(7).integers(0, len(names), size=(200, len(names)), dtype=np.int32)
    means = np.array(
        [
            np.nanmean(np.concatenate([values[images == names[place]] for place in row]), axis=0)
            for row in drawn
        ]
    )
    found = clustered_intervals(values, images, resamples=200, seed=7)
    for column in (0, 1):
        low, high = np.quantile(means[:, column], [0.025, 0.975])
        assert found[column] == pytest.approx(
            {"value": np.nanmean(values[:, column]), "low": low, "high": high}
        )


def test_metrics_share_their_resamples():
    rng = np.random.default_rng(3)
    values, images = rng.random(50), rng.integers(0, 9, 50)
    together = clustered_intervals(np.stack([values, values, 2 * values], axis=1), images, seed=5)
    alone = clustered_interval(values, images, seed=5)
    assert together[0] == together[1] == pytest.approx(alone)
    assert together[2]["low"] == pytest.approx(2 * alone["low"])


def test_resamples_without_any_part_in_a_metric_are_left_out():
    found = clustered_intervals(np.array([[1.0, np.nan], [0.0, 0.5]]), ["a", "b"], resamples=100)
    assert found[1] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert np.isnan(clustered_intervals(np.full((2, 1), np.nan), ["a", "b"])[0]["value"])


def test_weights():
    values, clusters = [1.0, 0.0, 1.0, 1.0, 0.0], ["a", "a", "b", "c", "c"]
    assert clustered_interval(values, clusters, 500, 3, weights=[2.0] * 5) == pytest.approx(
        clustered_interval(values, clusters, 500, 3)
    )
    assert clustered_interval(values, clusters, weights=[1, 1, 4, 1, 1])["value"] == pytest.approx(6 / 8)
    doubled = clustered_interval(values, clusters, 500, 3, weights=[1, 1, 2, 1, 1])
    # a weight of two is the same question twice
    assert doubled == pytest.approx(clustered_interval([*values, 1.0], [*clusters, "b"], 500, 3))


def test_pairing_removes_what_both_models_share():
    rng = np.random.default_rng(2)
    first = (rng.random(3000) < 0.5).astype(float)
    second = np.where((rng.random(3000) < 0.03) & (first == 0), 1.0, first)
    difference = paired_difference(first, second, np.arange(3000), resamples=1000)
    assert difference["low"] > 0 and difference["value"] == pytest.approx((second - first).mean())
    assert difference["p_better"] == 1.0
    assert difference["p_bootstrap"] == pytest.approx(2 / 1001)  # no resample on the other side
    assert difference["p_permutation"] == pytest.approx(1 / 10_001)  # no sign pattern as far out
    equal = paired_difference(first, first, np.arange(3000), resamples=100)
    assert (equal["p_better"], equal["p_bootstrap"], equal["p_permutation"]) == (0.5, 1.0, 1.0)


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([2, 1, 1], 2 / 8),  # sums of +-2 +-1 +-1 as far from zero as 4
        ([2, 1, -1], 6 / 8),  # as far as 2: all but +2 -1 -1 and its mirror
        ([1, 0, 0], 1.0),
    ],
)
def test_sign_flips_of_few_images_are_enumerated(differences, p):
    first, second = np.zeros(6), np.array(differences * 2) / 2  # two questions per image
    assert paired_difference(first, second, [0, 1, 2] * 2)["p_permutation"] == pytest.approx(p)


def test_random_sign_flips_come_close_to_all_of_them():
    differences = np.array([1.0, 2.0, -1.0, 3.0, 1.0, 1.0, -2.0, 1.0])[:, None]
    zero = np.zeros_like(differences)
    every = paired_differences(zero, differences, range(8), permutations=256)[0]["p_permutation"]
    drawn = paired_differences(zero, differences, range(8), permutations=255)[0]["p_permutation"]
    assert drawn == pytest.approx(every, abs=0.08) and drawn != every


def test_without_a_difference_a_small_p_is_as_rare_as_it_says():
    rng = np.random.default_rng(4)
    p = [
        paired_difference(*rng.random((2, 40)), np.arange(40) // 2, resamples=10)["p_permutation"]
        for _ in range(400)
    ]
    assert np.mean(np.array(p) <= 0.2) == pytest.approx(0.2, abs=0.06)


def test_holm():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_same_seed_same_interval_and_bad_input():
    values, clusters = [1, 0, 1, 1], ["a", "a", "b", "c"]
    assert clustered_interval(values, clusters) == clustered_interval(values, clusters)
    assert clustered_interval([1, 1], ["a", "a"]) == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert np.isnan(clustered_interval([], [])["value"])
    with pytest.raises(ValueError, match="clusters"):
        clustered_interval([1.0], [])
    with pytest.raises(ValueError, match="NaN"):
        clustered_interval([float("nan")], ["a"])
    with pytest.raises(ValueError, match="not pairs"):
        paired_difference([1.0], [1.0, 0.0], ["a"])


def test_order_of_questions_does_not_matter():
    rng = np.random.default_rng(5)
    values, images = rng.random(1000), rng.integers(0, 70, 1000)
    shuffled = rng.permutation(1000)
    assert clustered_interval(values[shuffled], images[shuffled]) == pytest.approx(
        clustered_interval(values, images)
    )


def test_a_hundred_thousand_questions_in_chunks():
    rng = np.random.default_rng(3)
    values, images = rng.random(100_000) < 0.6, rng.permutation(100_000)
    interval = clustered_interval(values, images, resamples=200)
    half = 1.96 * np.sqrt(0.24 / 100_000)
    assert interval["high"] - interval["low"] == pytest.approx(2 * half, rel=0.15)
