"""Chat score in the manner of LLaVA-Med: a judge rates the reference answer and the model's from 1 to 10
(pure).

The score is 100 * mean(model's / reference's) (LLaVA-Med: llava/eval/summarize_gpt_review.py). The judges of
medray.inference.judges.judges do the rating: with judge.both_orders false the reference is always shown
first, as there; with it the two orders' scores are averaged. Their prompt is prompts/judge.txt. LLaVA-Med's
judge reads the figure's caption and the sentences that mention it, and no image
(eval_multimodal_chat_gpt_score.py); ours read the same, which is the question's `context`, and see the image
too::

    rows = chat_rows(questions, answers("predictions"))                                    # records.SELF_PLAY
    result = chat_score(judged, by_id("predictions", QUESTION_COLUMNS), EvaluateConfig())  # of records.JUDGED
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from medray.bootstrap import clustered_intervals
from medray.config import EvaluateConfig
from medray.evaluation.win_rate import FAILURES, failure, judge_row
from medray.inference.judges.base import IDENTICAL

SCHEMA = 1


def chat_rows(questions: Iterable[Mapping[str, Any]], answers: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """A row of records.SELF_PLAY per answered question: answer 0 is the reference, answer 1 the model's.

    Args:
        questions: rows of records.QUESTION with their images; a `context` is put after the question.
        answers: sample_id -> answer (see exchange.answers).
    """
    for row in questions:
        if row["sample_id"] in answers:
            yield judge_row(
                row,
                with_context(row["question"], row.get("context")),
                (row["reference"], answers[row["sample_id"]]),
            )


def with_context(question: str, context: str | None) -> str:
    """The question as the judge reads it."""
    return question.strip() + (f"\n\nWhat is known of the image:\n{context.strip()}" if context else "")


def chat_score(
    rows: Iterable[Mapping[str, Any]], questions: Mapping[str, Mapping[str, Any]], config: EvaluateConfig
) -> dict[str, Any]:
    """The score, whole, by question type and by modality.

    Args:
        rows: judged rows (records.JUDGED) of `chat_rows`.
        questions: sample_id -> {"image_id", "answer_type", "attribute", "modality"}, such as
            exchange.by_id(uri, win_rate.QUESTION_COLUMNS). The type of a question is its attribute
            (LLaVA-Med: conversation or detailed_description), else its answer type.

    Returns {"schema": 1, "judge", **C, "by_type": {name: C}, "by_modality": {name: C}}. C is {"asked", "n",
    "images", "score": S, "reference_mean", "answer_mean", "identical", "zero_reference", "failed": {reason:
    number}}. `n` rows make the score; the others of `asked` are `failed` (see win_rate.win_rate) or have a
    reference rated zero or less (`zero_reference`: nothing can be divided by it). Answers that equal their
    reference are not shown to the judge and count 100. S is a mean with its 95 % interval over images; S and
    the mean ratings are null without any.
    """
    groups: dict[str, dict[str, list[Any]]] = {"whole": {"": []}, "by_type": {}, "by_modality": {}}
    judges = set()
    for row in rows:
        question = questions[row["sample_id"]]
        member = (question["image_id"], _rated(row))
        judges.add(row.get("judge"))
        groups["whole"][""].append(member)
        groups["by_type"].setdefault(
            question["attribute"] or question["answer_type"] or "unknown", []
        ).append(member)
        groups["by_modality"].setdefault(question["modality"] or "unknown", []).append(member)
    tables = {
        key: {name: _score(members, config) for name, members in sorted(groups[key].items())}
        for key in ("by_type", "by_modality")
    }
    return {
        "schema": SCHEMA,
        "judge": next(iter(judges)) if len(judges) == 1 else None,
        **_score(groups["whole"][""], config),
        **tables,
    }


def _rated(row: Mapping[str, Any]) -> dict[str, Any]:
    failed = failure(row)
    if failed is not None:
        return {"left_out": failed}
    verdict = row["verdicts"][0]
    if verdict["error"] == IDENTICAL:
        return {"ratio": 1.0}
    reference, answer = verdict["first_score"], verdict["second_score"]
    if reference <= 0:
        return {"left_out": "zero_reference"}
    return {"ratio": answer / reference, "reference": reference, "answer": answer}


def _score(members: Sequence[tuple[str, dict[str, Any]]], config: EvaluateConfig) -> dict[str, Any]:
    left_out = Counter(rated["left_out"] for _, rated in members if "left_out" in rated)
    kept = [(image, rated) for image, rated in members if "ratio" in rated]
    rated = [rating for _, rating in kept if "reference" in rating]
    images = [image for image, _ in kept]
    ratios = np.array([100 * rating["ratio"] for _, rating in kept])[:, None]
    return {
        "asked": len(members),
        "n": len(kept),
        "images": len(set(images)),
        "score": clustered_intervals(ratios, images, config.bootstrap, config.seed)[0] if kept else None,
        **{
            f"{side}_mean": float(np.mean([rating[side] for rating in rated])) if rated else None
            for side in ("reference", "answer")
        },
        "identical": len(kept) - len(rated),
        "zero_reference": left_out["zero_reference"],
        "failed": {reason: left_out[reason] for reason in FAILURES},
    }
