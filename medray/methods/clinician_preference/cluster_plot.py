"""A picture of the clusters the demonstrations are drawn from, for the report."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow.compute as pc

from medray.config.clinician_preference_sections import DemonstrationsConfig
from medray.methods.clinician_preference.draw_images import Clusters, matrix
from medray.reporting.html_report import as_svg, new_figure
from medray.stable_draws import hash64
from medray.storage.shards import tables


def cluster_plot(
    embedded: str, clusters: Clusters, drawn: Iterable[Mapping[str, Any]], config: DemonstrationsConfig
) -> str:
    """Scatter plot (SVG) of the two leading principal components: config.picture_points images drawn by
    id, in the colours of their clusters, and all drawn images, ringed.
    """
    ringed = {row["sample_id"] for row in drawn}
    embeddings, rings = _sample(embedded, ringed, config)
    if not len(embeddings):
        return ""
    points = components(embeddings)
    figure, axes = new_figure(6.4, 4.2)
    axes.scatter(*points.T, c=clusters.of(embeddings), cmap="turbo", s=7, linewidths=0, alpha=0.7)
    axes.scatter(
        *points[rings].T,
        s=34,
        facecolors="none",
        edgecolors="#1c2733",
        linewidths=0.9,
        label=f"drawn ({rings.sum()})",
    )
    axes.set_title(
        f"{len(embeddings):,} images in {len(clusters.centres)} clusters, two principal components",
        fontsize=10,
        loc="left",
    )
    axes.legend(fontsize=8, frameon=False)
    return as_svg(figure)


def components(embeddings: np.ndarray) -> np.ndarray:
    """The two leading principal components of (N, D): (N, 2); of one-dimensional embeddings the second is
    zero.
    """
    centred = embeddings - embeddings.mean(0)
    directions = np.linalg.svd(centred, full_matrices=False)[2][:2]
    # A component's sign is arbitrary: its largest weight is made positive, so that the picture stays the
    # same.
    directions *= np.sign(directions[np.arange(len(directions)), np.abs(directions).argmax(1)])[:, None]
    points = centred @ directions.T
    return np.pad(points, ((0, 0), (0, 2 - points.shape[1])))


def _sample(embedded: str, ringed: set[str], config: DemonstrationsConfig) -> tuple[np.ndarray, np.ndarray]:
    """(embeddings (N, D), which of them are ringed (N,))."""
    held: list[tuple[int, str, np.ndarray]] = []
    kept: list[np.ndarray] = []
    for table in tables(embedded, ["sample_id", "embedding"]):
        known = table.filter(pc.is_valid(table["embedding"]))
        if not known.num_rows:
            continue
        for name, embedding in zip(known["sample_id"].to_pylist(), matrix(known), strict=True):
            if name in ringed:
                kept.append(embedding.copy())
                continue
            entry = (-hash64(name, config.seed), name, embedding.copy())
            (heapq.heappush if len(held) < config.picture_points else heapq.heappushpop)(held, entry)
    rows = [*(embedding for _, _, embedding in sorted(held, key=lambda entry: entry[:2])), *kept]
    return np.array(rows), np.arange(len(rows)) >= len(held)
