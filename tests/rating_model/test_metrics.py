"""The rating model's metrics against hand-computed cases and brute force."""

import numpy as np
import pytest

from medray.rating_model.metrics import (
    auc,
    calibration,
    calibration_plot,
    expected_calibration_error,
    mean_average_precision,
    mean_rank,
    rating_metrics,
    right_order,
)

CHOSEN, REJECTED = np.array([3.0, 1.0, 2.0]), np.array([0.0, 2.0, 2.0])


def test_hand_computed():
    """All six in order: 3 chosen, then 2 (one chosen, two rejected), 1 chosen, 0 rejected."""
    assert right_order(CHOSEN, REJECTED).tolist() == [1.0, 0.0, 0.5]
    # Of 9 comparisons: 3 beats three; 1 beats one; 2 beats one and ties with two.
    assert auc(CHOSEN, REJECTED) == pytest.approx((3 + 1 + 2) / 9)
    # Places: 3 is 0; the three 2s share 1, 2, 3, so 2; 1 is 4.
    assert mean_rank(CHOSEN, REJECTED) == pytest.approx((0 + 2 + 4) / 3 / 6)
    # Precision at 3: 1/1; at the 2s: 2 of 4; at 1: 3 of 5.
    assert mean_average_precision(CHOSEN, REJECTED) == pytest.approx((1 + 2 / 4 + 3 / 5) / 3)


def test_best_worst_and_constant_ratings():
    best, worst = np.arange(4) + 10.0, np.arange(4.0)
    flat = np.ones(4)
    assert [auc(best, worst), auc(worst, best), auc(flat, flat)] == [1.0, 0.0, 0.5]
    assert [mean_rank(best, worst), mean_rank(worst, best), mean_rank(flat, flat)] == [
        1.5 / 8,
        5.5 / 8,
        3.5 / 8,
    ]
    assert mean_average_precision(best, worst) == 1.0 and mean_average_precision(flat, flat) == 0.5
    constant = rating_metrics(flat, flat, list("abcd"), 50)
    assert constant["pair_accuracy"]["value"] == 0.5 and constant["ties"] == 1.0, (
        "a model that says nothing is no better than chance"
    )


def test_against_brute_force():
    rng = np.random.default_rng(0)
    chosen, rejected = rng.integers(0, 12, 60).astype(float) + 1, rng.integers(0, 12, 60).astype(float)
    wins = [(c > r) + 0.5 * (c == r) for c in chosen for r in rejected]
    assert auc(chosen, rejected) == pytest.approx(np.mean(wins))
    everyone = np.concatenate([chosen, rejected])
    places = [
        np.mean([place for place, value in enumerate(sorted(everyone, reverse=True)) if value == c])
        for c in chosen
    ]
    assert mean_rank(chosen, rejected) == pytest.approx(np.mean(places) / 120)
    assert mean_average_precision(chosen, rejected) == pytest.approx(
        np.mean([(chosen >= c).sum() / (everyone >= c).sum() for c in chosen])
    )


def test_calibration_bins():
    """Margins of +-log 3 say a little over 3/4, 0 says 1/2, and huge ones say 1."""
    margin = np.log(3.01)
    chosen = np.array([margin, margin, 0.0, 0.0, 800.0])
    rejected = np.array([0.0, 0.0, margin, 0.0, -800.0])
    bins = calibration(chosen, rejected, bins=4)
    assert [(b["low"], b["high"], b["n"]) for b in bins] == [
        (0.5, 0.625, 1),
        (0.75, 0.875, 3),
        (0.875, 1.0, 1),
    ]
    assert [b["predicted"] for b in bins] == pytest.approx([0.5, 3.01 / 4.01, 1.0])
    assert [b["observed"] for b in bins] == pytest.approx([0.5, 2 / 3, 1.0])
    assert expected_calibration_error(bins) == pytest.approx(3 / 5 * (3.01 / 4.01 - 2 / 3))


def test_calibrated_margins_lie_on_the_diagonal():
    rng = np.random.default_rng(1)
    margins = rng.normal(0, 2, 20_000)
    right = rng.random(20_000) < 1 / (1 + np.exp(-np.abs(margins)))
    gap = np.where(right, np.abs(margins), -np.abs(margins))
    assert expected_calibration_error(calibration(gap, np.zeros_like(gap))) < 0.01
    assert expected_calibration_error(calibration(5 * gap, np.zeros_like(gap))) > 0.1


def test_interval_resamples_images():
    """Ten pairs of one image are no more certain than one."""
    rng = np.random.default_rng(2)
    rated = rng.normal(0.3, 1, 20)
    chosen, rejected, images = (
        np.repeat(rated, 10),
        np.zeros(200),
        [str(number // 10) for number in range(200)],
    )
    wide = rating_metrics(chosen, rejected, images, 400)["pair_accuracy"]
    narrow = rating_metrics(chosen, rejected, [str(number) for number in range(200)], 400)["pair_accuracy"]
    assert wide["value"] == narrow["value"] and wide["high"] - wide["low"] > 2 * (
        narrow["high"] - narrow["low"]
    )


def test_the_plot_names_its_lines():
    bins = calibration(CHOSEN, REJECTED)
    drawn = calibration_plot({"clinician": bins, "model": []})
    assert drawn.startswith("<svg") and "clinician" in drawn and "perfect" in drawn and "model<" not in drawn
    assert calibration_plot({"clinician": []}) == ""
