"""Clinicians, ratings and selections against the true attributes of images, where there are some."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import pyarrow as pa

from medray.clinicians.simulated import is_right
from medray.config import ClinicianPreferenceConfig
from medray.data.attribute_questions import ATTRIBUTES, asked_attribute

TRUTH_IMAGES = 5000  # whose attributes are held in memory to check answers


def true_attributes(captioned: str, most: int | None = None) -> dict[str, dict[str, str]]:
    """The true attributes of the first `most` images of a folder of records.IMAGE_TEXT (None: all), by
    image; of few images only.
    """
    from medray.storage.shards import stored_rows

    return {
        row["sample_id"]: dict(row["attributes"] or ())
        for row in islice(stored_rows(captioned, ["sample_id", "attributes"]), most)
    }


def checkable(captioned: str) -> dict[str, dict[str, str]]:
    """The true attributes, by image, of those among the first TRUTH_IMAGES images that have all that
    answers are checked by.
    """
    return {
        image: values
        for image, values in true_attributes(captioned, TRUTH_IMAGES).items()
        if ATTRIBUTES.keys() <= values.keys()
    }


def correctness_scorer(captioned: str) -> Callable[[pa.Table], pa.Array]:
    """Scores for a table of exchanges: 1 of a right answer, 0 of a wrong one, 0.5 where it cannot be
    checked (or is of none of the first TRUTH_IMAGES images).
    """
    truth = checkable(captioned)

    def scores(exchanges: pa.Table) -> pa.Array:
        rows = exchanges.select(["image_id", "question", "answer"]).to_pylist()
        found = (
            is_right(row["question"], row["answer"], truth[row["image_id"]])
            if row["image_id"] in truth
            else None
            for row in rows
        )
        return pa.array([0.5 if right is None else float(right) for right in found], pa.float64())

    return scores


def against_truth(
    config: ClinicianPreferenceConfig, made: dict[str, dict[str, Any]], kept: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """How many answers of the dialogues are right by the true attributes, and how well scores tell right from
    wrong.

    Over the first TRUTH_IMAGES images, which are in an order that a hash of their ids fixes.

    Returns {"images", "right": {"written" | arm: share of the answers that can be checked}, "auc": {"rating
    VLM" | "rating model": on images that the rating model was not trained on}, "auc, not in the caption": the
    same of answers to what the caption does not state}; a number is None where nothing can be checked. {}
    where the source has no such attributes.
    """
    from medray.rating_model.pairs import held_out
    from medray.storage.shards import stored_rows

    truth = checkable(made["data"]["outputs"]["captioned"])
    if not truth:
        return {}

    def checked(uri: str) -> Iterator[tuple[bool, float, bool]]:
        for row in stored_rows(uri, ["image_id", "context", "question", "answer", "score"]):
            if (
                row["score"] is not None
                and row["image_id"] in truth
                and held_out(row["image_id"], config.rater)
            ):
                right = is_right(row["question"], row["answer"], truth[row["image_id"]])
                if right is not None:
                    yield (
                        right,
                        row["score"],
                        _stated(row["context"] or "", row["question"], truth[row["image_id"]]),
                    )

    dialogues = {"written": made["written"], **{arm: one for arm, one in kept.items() if arm != "all"}}
    scored = {
        name: list(checked(made[part]["outputs"]["rows"]))
        for name, part in (("rating VLM", "rated"), ("rating model", "scored"))
    }
    return {
        "images": len(truth),
        "right": {
            name: _share_right(one["outputs"]["conversations"], truth) for name, one in dialogues.items()
        },
        "auc": {name: _auc((right, score) for right, score, _ in found) for name, found in scored.items()},
        "auc, not in the caption": {
            name: _auc((right, score) for right, score, stated in found if not stated)
            for name, found in scored.items()
        },
    }


def _stated(context: str, question: str, attributes: dict[str, str]) -> bool:
    """Whether what is written about an image states what is asked for: a rating model that reads both
    need not see the image.
    """
    name = asked_attribute(question)
    return name is not None and (
        name.replace("_", " ") in context or attributes[name] in context.replace("\n", ", ").split(", ")
    )


def _share_right(conversations: str, truth: dict[str, dict[str, str]]) -> float | None:
    from medray.data.exchanges import rounds_of
    from medray.storage.shards import stored_rows

    found: Counter[bool | None] = Counter()
    for row in stored_rows(conversations, ["image_id", "turns"]):
        if row["image_id"] in truth:
            found.update(
                is_right(question, answer, truth[row["image_id"]])
                for question, answer in rounds_of(row["turns"])
            )
    known = found[True] + found[False]
    return found[True] / known if known else None


def _auc(scored: Iterable[tuple[bool, float]]) -> float | None:
    from medray.rating_model.metrics import auc

    by_truth: dict[bool, list[float]] = {True: [], False: []}
    for right, score in scored:
        by_truth[right].append(score)
    return auc(by_truth[True], by_truth[False]) if all(by_truth.values()) else None
