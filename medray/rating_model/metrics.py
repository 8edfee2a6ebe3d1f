"""How well a rating model orders pairs: metrics as in BioMed-VITAL's released evaluation, and whether its
margins are calibrated.

The metrics are pure functions of numpy arrays; `evaluate_rater` scores the held-out pairs of a run and
applies them. Letters: P pairs, 2P exchanges (each pair's better and worse one).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from medray.bootstrap import clustered_interval
from medray.config import DataConfig, RaterConfig, ScoreConfig
from medray.rating_model.pairs import on_side, right_order, side_of
from medray.rating_model.scoring import Score, score_options

SCORED_PAIR = pa.schema(
    [
        ("sample_id", pa.string()),
        ("origin", pa.string()),
        ("chosen_image_id", pa.string()),
        ("rejected_image_id", pa.string()),
        # null, or why a rating is missing
        ("chosen_rating", pa.float64()),
        ("rejected_rating", pa.float64()),
        ("error", pa.string()),
    ]
)
BINS = 10


def auc(chosen_P: np.ndarray, rejected_P: np.ndarray) -> float:
    """Chance that a better exchange, of any pair, is rated above a worse one, of any pair; ties count
    half (area under the ROC curve).
    """
    ranks = _ranks(np.concatenate([rejected_P, chosen_P]))[len(rejected_P) :]
    below = ranks.sum() - len(chosen_P) * (len(chosen_P) + 1) / 2
    return float(below / (len(chosen_P) * len(rejected_P)))


def mean_rank(chosen_P: np.ndarray, rejected_P: np.ndarray) -> float:
    """Mean place, from 0 for the highest rating, of the better exchanges among all 2P, over 2P: about 0.5 by
    chance, 0.25 - 0.25/P at best.

    Ties share the mean of their places.
    """
    places = _ranks(-np.concatenate([chosen_P, rejected_P]))[: len(chosen_P)] - 1
    return float(places.mean() / (2 * len(chosen_P)))


def mean_average_precision(chosen_P: np.ndarray, rejected_P: np.ndarray) -> float:
    """Mean, over the better exchanges, of the share of better ones among all that are rated at least as high.

    One list of all 2P exchanges, as in the released code, so this is its average precision.
    """
    chosen, rejected = np.sort(chosen_P), np.sort(rejected_P)
    better = len(chosen) - np.searchsorted(chosen, chosen_P, side="left")
    worse = len(rejected) - np.searchsorted(rejected, chosen_P, side="left")
    return float(np.mean(better / (better + worse)))


def _ranks(values: np.ndarray) -> np.ndarray:
    """From 1 for the lowest; ties share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def calibration(chosen_P: np.ndarray, rejected_P: np.ndarray, bins: int = BINS) -> list[dict[str, float]]:
    """Predicted against observed: of the pairs whose exchange with the higher rating is the better one with
    probability sigmoid(|f_i - f_j|) by the model, how many are so. The probability is at least 1/2, which
    bins of equal width divide.

    Returns, for each bin that has pairs, {"low", "high", "predicted": mean probability, "observed": share,
    "n"}.
    """
    predicted_P = 1 / (1 + np.exp(-np.abs(chosen_P - rejected_P)))
    observed_P = right_order(chosen_P, rejected_P)
    edges = np.linspace(0.5, 1.0, bins + 1)
    place_P = np.clip(np.searchsorted(edges, predicted_P, side="right") - 1, 0, bins - 1)
    return [
        {
            "low": float(edges[b]),
            "high": float(edges[b + 1]),
            "predicted": float(predicted_P[place_P == b].mean()),
            "observed": float(observed_P[place_P == b].mean()),
            "n": int((place_P == b).sum()),
        }
        for b in range(bins)
        if (place_P == b).any()
    ]


def expected_calibration_error(bins: Sequence[Mapping[str, float]]) -> float:
    """Mean over pairs of their bin's |predicted - observed|."""
    return float(sum(b["n"] * abs(b["predicted"] - b["observed"]) for b in bins) / sum(b["n"] for b in bins))


def rating_metrics(
    chosen: Sequence[float],
    rejected: Sequence[float],
    images: Sequence[str],
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """All metrics of the ratings of P >= 1 pairs.

    Args:
        images: each pair's (first) image; the interval of the pair accuracy resamples images.

    Returns {"pairs", "pair_accuracy": {"value", "low", "high"}, "ties": share, "auc", "mean_rank", "map",
    "calibration", "ece"}.
    """
    chosen_P, rejected_P = np.asarray(chosen, np.float64), np.asarray(rejected, np.float64)
    bins = calibration(chosen_P, rejected_P)
    return {
        "pairs": len(chosen_P),
        "pair_accuracy": clustered_interval(right_order(chosen_P, rejected_P), images, bootstrap, seed),
        "ties": float((chosen_P == rejected_P).mean()),
        "auc": auc(chosen_P, rejected_P),
        "mean_rank": mean_rank(chosen_P, rejected_P),
        "map": mean_average_precision(chosen_P, rejected_P),
        "calibration": bins,
        "ece": expected_calibration_error(bins),
    }


class ScorePairs(Score):
    """Callable for map_batches: rows of records.RATING_PAIR to SCORED_PAIR, one for one."""

    def __call__(self, table: pa.Table) -> pa.Table:
        self.begun(table.num_rows)
        pairs = table.to_pylist()
        sides = {
            side: [
                {
                    part: pair[f"{side}_{part}"]
                    for part in ("image_id", "image", "context", "question", "answer")
                }
                for pair in pairs
            ]
            for side in ("chosen", "rejected")
        }
        rated = self.ratings([*sides["chosen"], *sides["rejected"]])
        rows = []
        for pair, chosen, rejected in zip(pairs, rated[: len(pairs)], rated[len(pairs) :], strict=True):
            ratings = {
                "chosen_rating": chosen["score"],
                "rejected_rating": rejected["score"],
                "error": chosen["error"] or rejected["error"],
            }
            rows.append({name: pair[name] for name in SCORED_PAIR.names if name in pair} | ratings)
        return pa.Table.from_pylist(rows, schema=SCORED_PAIR)


def evaluate_rater(
    pairs: str | list[str],
    target: str,
    committed: str,
    rater: str,
    config: RaterConfig,
    score_config: ScoreConfig,
    data_config: DataConfig,
    bootstrap: int = 1000,
) -> dict[str, Any]:
    """Rate the held-out pairs of `pairs` (folders of records.RATING_PAIR) into `target`, and measure; the
    same call after a kill finishes.

    Args:
        committed: where the ids that are done are kept.
        rater: path of the rating model.
        config: the one it was trained with: which images are held out.

    Returns {"clinician": rating_metrics or None, "model": rating_metrics or None, "pairs": held out, "without
    rating": pairs}, and after interruptions "rows done again"; each rating_metrics of those pairs that have
    both ratings.
    """
    from medray.storage.resumable import write_resumable
    from medray.storage.shards import tables

    def rated_pairs(rows: Any) -> Any:
        held_out = rows.map_batches(
            on_side,
            fn_kwargs={"side": "held_out", "config": config.model_dump()},
            batch_format="pyarrow",
            batch_size=256,
            num_cpus=data_config.read_cpus,
        )
        return held_out.map_batches(ScorePairs, **score_options(score_config, rater, data_config))

    def is_held_out(row: dict[str, Any]) -> bool:
        return side_of(row["chosen_image_id"], row["rejected_image_id"], config) == "held_out"

    rows, again = write_resumable(
        pairs,
        target,
        committed,
        rated_pairs,
        score_config.rows_per_task,
        data_config.read_cpus,
        keeps=is_held_out,
        keep_columns=["chosen_image_id", "rejected_image_id"],
    )
    columns: dict[str, dict[str, list]] = {}
    for table in tables(target, ["origin", "chosen_image_id", "chosen_rating", "rejected_rating", "error"]):
        for row in table.to_pylist():
            if row["error"] is None:
                of_origin = columns.setdefault(row["origin"], {"chosen": [], "rejected": [], "images": []})
                for name, value in (
                    ("chosen", row["chosen_rating"]),
                    ("rejected", row["rejected_rating"]),
                    ("images", row["chosen_image_id"]),
                ):
                    of_origin[name].append(value)
    measured = {
        origin: rating_metrics(**columns[origin], bootstrap=bootstrap) if origin in columns else None
        for origin in ("clinician", "model")
    }
    rated = sum(len(of_origin["chosen"]) for of_origin in columns.values())
    return {**measured, "pairs": rows, "without rating": rows - rated, **again}


def calibration_plot(
    bins: Mapping[str, Sequence[Mapping[str, float]]], title: str = "calibration of the rating model"
) -> str:
    """Observed share against predicted probability, a line per name (such as clinician, model), as SVG;
    empty for no bins.
    """
    from medray.reporting.html_report import curve

    lines = {
        name: [(b["predicted"], b["observed"]) for b in of_name] for name, of_name in bins.items() if of_name
    }
    if not lines:
        return ""
    return curve(
        {**lines, "perfect": [(0.5, 0.5), (1.0, 1.0)]},
        title,
        "predicted probability that the higher rated is better",
    )
