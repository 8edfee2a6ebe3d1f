"""Bootstrap intervals over images, for one model and for two models on the same questions (numpy only).

Questions on one image are not independent, so images are resampled, not questions. A mean over n questions is
a ratio of per-image sums; a resample of images is a vector of counts, so B resamples are one [B, images] x
[images, metrics] product, drawn once for all metrics. Letters of shapes: N questions, M metrics, C clusters
(images), B resamples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

_CHUNK = 4_000_000  # counts drawn at once; bounds memory to about 64 MB whatever the number of images
PERMUTATIONS = 10_000


def clustered_interval(
    values: Sequence[float],
    clusters: Sequence[Any],
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    weights: Sequence[float] | None = None,
) -> dict[str, float]:
    """Mean with a percentile bootstrap interval over clusters.

    Args:
        values: one per question, NaN not allowed.
        clusters: the question's image, as many as values.
        level: coverage.
        weights: of the questions in the mean, the same in every resample; None: all alike.

    Returns {"value", "low", "high"}; NaNs for no values, and no width for a single image.

    Raises ValueError where the lengths differ.
    """
    values = np.asarray(values, dtype=np.float64)
    _refuse_nan(values)
    return clustered_intervals(values[:, None], clusters, resamples, seed, level, weights)[0]


def clustered_intervals(
    values_NM: np.ndarray,
    clusters: Sequence[Any],
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    weights: Sequence[float] | None = None,
) -> list[dict[str, float]]:
    """`clustered_interval` of several metrics of the same questions, on one set of resamples.

    Args:
        values_NM: a column per metric. NaN: the question has no part in this metric (resamples without any
            part are left out of its interval).

    Raises ValueError where the lengths differ.
    """
    sums_CM, counts_CM = _by_cluster(values_NM, clusters, weights)
    if not len(sums_CM):
        return [
            {"value": float("nan"), "low": float("nan"), "high": float("nan")}
            for _ in range(sums_CM.shape[1])
        ]
    means_M = _ratio(sums_CM.sum(axis=0), counts_CM.sum(axis=0))
    means_BM = _resampled_means(sums_CM, counts_CM, resamples, seed)
    low_M, high_M = _quantiles(means_BM, [(1 - level) / 2, (1 + level) / 2])
    return [
        {"value": float(value), "low": float(low), "high": float(high)}
        for value, low, high in zip(means_M, low_M, high_M, strict=True)
    ]


def paired_difference(
    first: Sequence[float],
    second: Sequence[float],
    clusters: Sequence[Any],
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """Mean of second - first on the same questions, with its interval over images and two tests of no
    difference.

    Returns {"value", "low", "high", "p_better", "p_bootstrap", "p_permutation"}: see `paired_differences`.

    Raises ValueError where the lengths differ or a value is NaN.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} values are not pairs")
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    _refuse_nan(first)
    _refuse_nan(second)
    return paired_differences(first[:, None], second[:, None], clusters, resamples, seed)[0]


def paired_differences(
    first_NM: np.ndarray,
    second_NM: np.ndarray,
    clusters: Sequence[Any],
    resamples: int = 1000,
    seed: int = 0,
    permutations: int = PERMUTATIONS,
) -> list[dict[str, float]]:
    """Mean of second - first per metric, on one set of resamples.

    A question that is NaN for either model has no part in that metric.

    Returns per metric {"value", "low", "high", "p_better", "p_bootstrap", "p_permutation"}. p_better is the
    share of resamples in which second is ahead (equal counts half). p_bootstrap is two-sided: twice the share
    of resamples on the other side of zero. p_permutation is two-sided too: all differences of an image change
    their sign together, by chance (all sign patterns where there are no more than `permutations` of them).

    Raises ValueError where the shapes differ.
    """
    if first_NM.shape != second_NM.shape:
        raise ValueError(f"values of shapes {first_NM.shape} and {second_NM.shape} are not pairs")
    sums_CM, counts_CM = _by_cluster(second_NM - first_NM, clusters)
    metrics = sums_CM.shape[1]
    if not len(sums_CM):
        return [
            dict.fromkeys(("value", "low", "high", "p_better", "p_bootstrap", "p_permutation"), float("nan"))
            for _ in range(metrics)
        ]
    means_BM = _resampled_means(sums_CM, counts_CM, resamples, seed)
    low_M, high_M = _quantiles(means_BM, [0.025, 0.975])
    value_M = _ratio(sums_CM.sum(axis=0), counts_CM.sum(axis=0))
    p_M = _sign_flips(sums_CM, permutations, seed)
    return [
        {
            "value": float(value_M[m]),
            "low": float(low_M[m]),
            "high": float(high_M[m]),
            **_tails(means_BM[:, m]),
            "p_permutation": float(p_M[m]),
        }
        for m in range(metrics)
    ]


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction: p-values that may be read against one level although several were
    looked at.
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def _tails(means_B: np.ndarray) -> dict[str, float]:
    means_B = means_B[~np.isnan(means_B)]
    if not len(means_B):
        return {"p_better": float("nan"), "p_bootstrap": float("nan")}
    # One more on both sides of the fraction: B resamples cannot show a p of zero.
    sides = ((means_B <= 0).sum() + 1, (means_B >= 0).sum() + 1)
    better = (means_B > 0).mean() + 0.5 * (means_B == 0).mean()
    return {"p_better": float(better), "p_bootstrap": float(min(1.0, 2 * min(sides) / (len(means_B) + 1)))}


def _sign_flips(sums_CM: np.ndarray, permutations: int, seed: int) -> np.ndarray:
    """Two-sided p per metric of the sum of differences under random signs of the images."""
    sums_CM = sums_CM[np.any(sums_CM != 0, axis=1)]
    whole_M = sums_CM.sum(axis=0)
    observed_M = np.abs(whole_M)
    slack_M = 1e-9 * np.maximum(1.0, np.abs(sums_CM).sum(axis=0))
    images = len(sums_CM)
    exact = images < 63 and 2**images <= permutations
    reached_M = np.zeros(sums_CM.shape[1])
    total = 0
    for kept_PC in _all_signs(images) if exact else _random_signs(images, permutations, seed):
        reached_M += (np.abs(2.0 * (kept_PC @ sums_CM) - whole_M) >= observed_M - slack_M).sum(axis=0)
        total += len(kept_PC)
    return reached_M / total if exact else (reached_M + 1) / (total + 1)


def _all_signs(images: int) -> Iterator[np.ndarray]:
    """1.0 for plus, 0.0 for minus, [permutations, images]."""
    yield ((np.arange(2**images)[:, None] >> np.arange(images)) & 1).astype(np.float64)


def _random_signs(images: int, permutations: int, seed: int) -> Iterator[np.ndarray]:
    """As `_all_signs`, some of them at a time."""
    rng = np.random.default_rng([seed, 1])  # not the stream of the resamples
    step = max(1, _CHUNK // images)
    for begin in range(0, permutations, step):
        rows = min(step, permutations - begin)
        bits = np.unpackbits(np.frombuffer(rng.bytes(-(-rows * images // 8)), np.uint8), count=rows * images)
        yield bits.reshape(rows, images).astype(np.float64)


def _refuse_nan(values: np.ndarray) -> None:
    if np.isnan(values).any():
        raise ValueError("a value is NaN; leave unanswered questions out or count them as wrong")


def _by_cluster(
    values_NM: np.ndarray, clusters: Sequence[Any], weights: Sequence[float] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Sums [C, M] and counts [C, M] (or [C, 1] where all metrics have all questions), weighted; clusters
    in sorted order.
    """
    values_NM = np.asarray(values_NM, dtype=np.float64)
    if len(values_NM) != len(clusters):
        raise ValueError(f"{len(values_NM)} values but {len(clusters)} clusters")
    if not len(values_NM):
        return np.empty(values_NM.shape), np.empty((0, 1))
    names, index_N = np.unique(np.asarray(clusters), return_inverse=True)
    missing_NM = np.isnan(values_NM)
    weights_N = np.ones(len(values_NM)) if weights is None else np.asarray(weights, np.float64)

    def added(columns_NM: np.ndarray) -> np.ndarray:
        return np.stack(
            [np.bincount(index_N, column * weights_N, minlength=len(names)) for column in columns_NM.T],
            axis=1,
        )

    if not missing_NM.any():
        return added(values_NM), np.bincount(index_N, weights_N)[:, None]
    return added(np.where(missing_NM, 0.0, values_NM)), added((~missing_NM).astype(np.float64))


def _resampled_means(sums_CM: np.ndarray, counts_CM: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    clusters = len(sums_CM)
    step = max(1, _CHUNK // clusters)
    means = []
    for begin in range(0, resamples, step):
        rows = min(step, resamples - begin)
        drawn_BC = rng.integers(0, clusters, size=(rows, clusters), dtype=np.int32)
        times_BC = np.empty((rows, clusters))
        for times_C, drawn_C in zip(times_BC, drawn_BC, strict=True):
            times_C[:] = np.bincount(drawn_C, minlength=clusters)
        means.append(_ratio(times_BC @ sums_CM, times_BC @ counts_CM))
    return np.concatenate(means)


def _ratio(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return sums / counts


def _quantiles(means_BM: np.ndarray, levels: list[float]) -> np.ndarray:
    if not np.isnan(means_BM).any():
        return np.quantile(means_BM, levels, axis=0)
    kept = [column[~np.isnan(column)] for column in means_BM.T]
    return np.stack(
        [np.quantile(column, levels) if len(column) else np.full(len(levels), np.nan) for column in kept],
        axis=1,
    )
