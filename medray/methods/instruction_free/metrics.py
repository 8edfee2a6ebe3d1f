"""Metrics of description tuning besides accuracy: does the model still follow instructions, and
how well does it describe?

Numbers of written predictions (records.PREDICTION); no model, no Ray. S is {"value", "low", "high"}: a mean
with its 95 % interval over images (compare.clustered_interval).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from medray.bootstrap import clustered_interval, clustered_intervals
from medray.config import EvaluateConfig
from medray.data.attribute_descriptions import LEAD, Form, leaks_description, stated_choices
from medray.data.description_shuffling import separated
from medray.evaluation.plain_text import plain
from medray.evaluation.prediction_files import read_predictions
from medray.evaluation.prediction_table import load
from medray.evaluation.scores import matched

OVERLAP = ("precision", "recall", "f1")


def stated_options(row: dict[str, Any]) -> list[str]:
    """The answers whose log-likelihood is taken (evaluation.predict.Predict): "The correct answer is A."
    and so on, where the question asks for an answer in this form; none for other questions.
    """
    return stated_choices(len(row["choices"])) if row.get("choices") and LEAD in row["question"] else []


def leakage(predictions: Iterable[str], form: Form, config: EvaluateConfig) -> dict[str, float]:
    """S of the share of answers, in several sets of predictions, that are attribute lists, as the
    descriptions tuned on are (descriptions.leaks_description).
    """
    rows = [
        (float(leaks_description(row["answer"], form)), row["image_id"])
        for uri in predictions
        for row in _answered(uri)
    ]
    return clustered_interval(
        [leaked for leaked, _ in rows], [image for _, image in rows], config.bootstrap, config.seed
    )


def balanced_accuracy(choices: str, config: EvaluateConfig) -> dict[str, float]:
    """S of the mean over attributes of the mean over their true options of the share answered rightly.

    A model that gives every question of an attribute the same letter has 1 / (options that are true of some
    image), whichever letter: unlike strict accuracy it tells knowledge from a lucky preference.

    Args:
        choices: predictions of multiple-choice questions. Those without an answer do not count.
    """
    table = load(choices)
    hits_N = table.values["accuracy"]
    attributes_N, letters_N = (table.labels[label][1] for label in ("attribute", "right_letter"))
    kept = ~np.isnan(hits_N)
    weights_N = np.zeros(len(hits_N))
    for attribute in np.unique(attributes_N[kept]):
        of_attribute = kept & (attributes_N == attribute)
        letters = np.unique(letters_N[of_attribute])
        for letter in letters:
            same = of_attribute & (letters_N == letter)
            weights_N[same] = 1 / (len(letters) * same.sum())
    names, images_N = table.labels["image_id"]
    return clustered_interval(
        hits_N[kept],
        [names[image] for image in images_N[kept]],
        config.bootstrap,
        config.seed,
        weights=weights_N[kept],
    )


def retention(before: str, after: str, config: EvaluateConfig) -> dict[str, Any]:
    """What is left, after tuning, of the answers that were right before it.

    Args:
        before, after: predictions of the base and of the tuned model. Questions that only one of them
            answered do not count.

    Returns {"questions", "could" (of them, right before), "before": S, "after": S (strict accuracy),
    "retained": S (of those right before, the share right after), "gained": S (of those wrong before)}; null
    where there are no such questions.

    Raises what table.load does, and StageError where one id is another question in the other.
    """
    first, second = load(before), load(after)
    own, other = matched(first, second)
    hits_NM = np.stack(
        [table.values["accuracy"][rows] == 1 for table, rows in ((first, own), (second, other))], axis=1
    ).astype(float)
    images = first.labels["image_id"][1][own]
    could_N = hits_NM[:, 0] == 1
    kept_NM = np.stack(
        [np.where(could_N, hits_NM[:, 1], np.nan), np.where(could_N, np.nan, hits_NM[:, 1])], axis=1
    )
    found = clustered_intervals(
        np.concatenate([hits_NM, kept_NM], axis=1), images, config.bootstrap, config.seed
    )
    shares = [None if math.isnan(share["value"]) else share for share in found]
    return {
        "questions": len(own),
        "could": int(could_N.sum()),
        **dict(zip(("before", "after", "retained", "gained"), shares, strict=True)),
    }


def attribute_overlap(answer: str, reference: str) -> dict[str, float]:
    """precision, recall and f1 of the attributes an answer lists against those of the true description:
    parts between commas, equal but for capitals and punctuation, each counted once. All are 0 where
    nothing is shared.
    """
    said, true = ({plain(part) for part in separated(text)[0]} - {""} for text in (answer, reference))
    shared = len(said & true)
    if not shared:
        return dict.fromkeys(OVERLAP, 0.0)
    precision, recall = shared / len(said), shared / len(true)
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / (precision + recall)}


def description_overlap(predictions: str, config: EvaluateConfig) -> dict[str, dict[str, float]]:
    """S of attribute_overlap's numbers over described images."""
    rows = [
        (attribute_overlap(row["answer"], row["reference"]), row["image_id"])
        for row in _answered(predictions)
    ]
    values_NM = np.array([[overlap[name] for name in OVERLAP] for overlap, _ in rows]).reshape(
        -1, len(OVERLAP)
    )
    return dict(
        zip(
            OVERLAP,
            clustered_intervals(values_NM, [image for _, image in rows], config.bootstrap, config.seed),
            strict=True,
        )
    )


def _answered(uri: str) -> Iterator[dict[str, Any]]:
    columns = ["image_id", "reference", "answer", "error"]
    return (
        row for row in read_predictions(uri, columns) if row["error"] is None and row["answer"] is not None
    )
