"""Bootstrap intervals over images, for one model and for two models on the same questions (numpy only).

Questions on one image are not independent, so images are resampled, not questions. A mean over n questions is a ratio
of per-image sums; a resample of images is a vector of counts, so B resamples are one [B, images] x [images] product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_CHUNK = 4_000_000  # counts drawn at once; bounds memory to about 32 MB whatever the number of images


def clustered_interval(
    values: Sequence[float], clusters: Sequence[Any], resamples: int = 1000, seed: int = 0, level: float = 0.95,
) -> dict[str, float]:
    """Mean with a percentile bootstrap interval over clusters.

    Args:
        values: one per question, NaN not allowed.
        clusters: the question's image, as many as values.
        level: coverage.

    Returns {"value", "low", "high"}; NaNs for no values, and no width for a single image.

    Raises ValueError where the lengths differ.
    """
    sums_C, counts_C = _by_cluster(values, clusters)
    if not len(sums_C):
        return {"value": float("nan"), "low": float("nan"), "high": float("nan")}
    means_B = _resampled_means(sums_C, counts_C, resamples, seed)
    low, high = np.quantile(means_B, [(1 - level) / 2, (1 + level) / 2])
    return {"value": float(sums_C.sum() / counts_C.sum()), "low": float(low), "high": float(high)}


def paired_difference(
    first: Sequence[float], second: Sequence[float], clusters: Sequence[Any], resamples: int = 1000, seed: int = 0,
) -> dict[str, float]:
    """Mean of second - first on the same questions, with its interval over images.

    Returns {"value", "low", "high", "p_better"}: p_better is the share of resamples in which second is ahead
    (equal counts half).

    Raises ValueError where the lengths differ.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} values are not pairs")
    differences = np.asarray(second, float) - np.asarray(first, float)
    interval = clustered_interval(differences, clusters, resamples, seed)
    sums_C, counts_C = _by_cluster(differences, clusters)
    if not len(sums_C):
        return {**interval, "p_better": float("nan")}
    means_B = _resampled_means(sums_C, counts_C, resamples, seed)
    return {**interval, "p_better": float((means_B > 0).mean() + 0.5 * (means_B == 0).mean())}


def _by_cluster(values: Sequence[float], clusters: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    values = np.asarray(values, dtype=np.float64)
    if len(values) != len(clusters):
        raise ValueError(f"{len(values)} values but {len(clusters)} clusters")
    if np.isnan(values).any():
        raise ValueError("a value is NaN; leave unanswered questions out or count them as wrong")
    if not len(values):
        return np.empty(0), np.empty(0)
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    return np.bincount(index, values), np.bincount(index).astype(np.float64)


def _resampled_means(sums_C: np.ndarray, counts_C: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    clusters = len(sums_C)
    step = max(1, _CHUNK // clusters)
    means = []
    for begin in range(0, resamples, step):
        rows = min(step, resamples - begin)
        drawn = rng.integers(0, clusters, size=(rows, clusters))
        means.append(sums_C[drawn].sum(axis=1) / counts_C[drawn].sum(axis=1))
    return np.concatenate(means)
