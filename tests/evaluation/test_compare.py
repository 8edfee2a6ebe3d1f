import time

import numpy as np
import pytest

from medray.evaluation.compare import clustered_interval, paired_difference


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


def test_pairing_removes_what_both_models_share():
    rng = np.random.default_rng(2)
    first = (rng.random(3000) < 0.5).astype(float)
    second = np.where((rng.random(3000) < 0.03) & (first == 0), 1.0, first)
    difference = paired_difference(first, second, np.arange(3000), resamples=1000)
    assert difference["low"] > 0 and difference["value"] == pytest.approx((second - first).mean())
    assert difference["p_better"] == 1.0
    assert paired_difference(first, first, np.arange(3000), resamples=100)["p_better"] == 0.5


def test_same_seed_same_interval_and_bad_input():
    values, clusters = [1, 0, 1, 1], ["a", "a", "b", "c"]
    assert clustered_interval(values, clusters) == clustered_interval(values, clusters)
    assert clustered_interval([1, 1], ["a", "a"]) == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert np.isnan(clustered_interval([], [])["value"])
    with pytest.raises(ValueError, match="clusters"):
        clustered_interval([1.0], [])
    with pytest.raises(ValueError, match="NaN"):
        clustered_interval([float("nan")], ["a"])


def test_a_hundred_thousand_predictions_take_seconds():
    rng = np.random.default_rng(3)
    started = time.perf_counter()
    clustered_interval(rng.random(100_000) < 0.6, rng.integers(0, 8000, 100_000), resamples=1000)
    assert time.perf_counter() - started < 10
