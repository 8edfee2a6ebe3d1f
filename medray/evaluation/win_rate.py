"""Pairwise win rate of two models by a judge that sees image, question, reference and both answers (pure).

`judge_rows` makes what the judges of medray.inference.judges.judges take (with judge.both_orders, its
default, they ask for both orders), `win_rate` reads what they return::

    rows = judge_rows(questions, answers("a/predictions"), answers("b/predictions"))      # records.SELF_PLAY
    result = win_rate(judged, by_id("b/predictions", QUESTION_COLUMNS), EvaluateConfig())  # of records.JUDGED

Without those judges, `prompts` gives the two prompts of a row and `judged` takes the two replies. A pair
counts as a tie where the two orders disagree (reported), and is left out and counted where a verdict is
missing: nothing is assumed for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from medray.bootstrap import clustered_intervals, paired_difference
from medray.config import EvaluateConfig
from medray.inference.judges.base import IDENTICAL
from medray.inference.judges.prompt import VerdictError, judge_prompt, parse_scores

SCHEMA = 1
QUESTION_COLUMNS = ("image_id", "answer_type", "attribute", "modality")
NO_ANSWER = "(no answer)"  # judges skip empty texts; an empty answer is to be judged too
FAILURES = ("unparsed", "no reply", "row error")


def judge_rows(
    questions: Iterable[Mapping[str, Any]], first: Mapping[str, str], second: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """A row of records.SELF_PLAY per question that both models answered.

    Args:
        questions: rows of records.QUESTION with their images.
        first, second: sample_id -> answer (see exchange.answers).
    """
    for row in questions:
        identity = row["sample_id"]
        if identity in first and identity in second:
            yield judge_row(
                row, with_reference(row["question"], row["reference"]), (first[identity], second[identity])
            )


def judge_row(row: Mapping[str, Any], question: str, texts: Sequence[str]) -> dict[str, Any]:
    """One question with its answers as a row of records.SELF_PLAY."""
    answers = [
        {"text": text.strip() or NO_ANSWER, "seed": None, "finish_reason": None, "tokens": None}
        for text in texts
    ]
    asked = {"question_id": row["sample_id"], "question": question, "seed": None, "answers": answers}
    return {
        "sample_id": row["sample_id"],
        "image": row["image"],
        "description": None,
        "questions": [asked],
        "dropped_questions": [],
        "error": None,
    }


def with_reference(question: str, reference: str) -> str:
    """The question as the judge reads it."""
    return (
        f"{question.strip()}\n\nReference answer, written by an expert; an answer that contradicts it is "
        f"wrong:\n{reference.strip()}"
    )


def prompts(row: Mapping[str, Any]) -> list[str]:
    """The prompts of a row of `judge_rows` in both orders, for a judge that is not one of ours; its image
    goes with each.
    """
    question = row["questions"][0]
    texts = [answer["text"] for answer in question["answers"]]
    return [judge_prompt(question["question"], *texts), judge_prompt(question["question"], *texts[::-1])]


def judged(row: Mapping[str, Any], replies: Sequence[str], judge: str = "") -> dict[str, Any]:
    """The row with the verdict of the judge's replies to `prompts`, as records.JUDGED; an empty text: no
    reply came.

    Where just one order was asked there is one reply.
    """
    scores, error = [], None
    for order, reply in enumerate(replies):
        try:
            pair = parse_scores(reply)
            scores.append(pair[::-1] if order else pair)
        except VerdictError as bad:
            error = f"order {order + 1}: {bad}"
    verdict: dict[str, Any] = {
        "question_id": row["sample_id"],
        "first": 0,
        "second": 1,
        "raw": list(replies),
        "error": error,
    }
    means = (
        [None, None]
        if error or not scores
        else [sum(side) / len(scores) for side in zip(*scores, strict=True)]
    )
    agreement = (
        len({(a > b) - (a < b) for a, b in scores}) == 1 if error is None and len(scores) == 2 else None
    )
    verdict |= {"first_score": means[0], "second_score": means[1], "order_agreement": agreement}
    return {**row, "verdicts": [verdict], "judge": judge}


def win_rate(
    rows: Iterable[Mapping[str, Any]], questions: Mapping[str, Mapping[str, Any]], config: EvaluateConfig
) -> dict[str, Any]:
    """How often the second model's answer is preferred to the first's.

    Args:
        rows: judged rows (records.JUDGED) of `judge_rows`.
        questions: sample_id -> {"image_id", "answer_type", "modality"}, such as exchange.by_id(uri,
            QUESTION_COLUMNS).

    Returns (schema 1)::

        {"schema": 1, "judge", **R, "by_type": {answer type: R}, "by_modality": {name: R}}

    R is {"asked", "n", "images", "win": S, "tie": S, "loss": S, "win_rate": S, "p_permutation",
    "order_disagreement": share, "first_shown": share, "identical", "one_order", "failed": {reason: number}}.
    `n` pairs have a verdict and make the shares; `asked` is `n` and those of `failed`: "unparsed" (a reply
    without two scores), "no reply", "row error". `tie` holds pairs that got equal scores, whose orders
    disagree (`order_disagreement`), or whose answers are `identical` and were not shown to the judge.
    win_rate is win + tie / 2; S is a mean with its 95 % interval over images, null without verdicts;
    p_permutation tests wins against losses. `first_shown` is the share of decided replies that prefer the
    answer shown first (0.5 without position bias), null where the judge wrote none; `one_order` counts
    verdicts of one order alone.
    """
    outcomes, judges = [], set()
    for row in rows:
        judges.add(row.get("judge"))
        outcomes.append((questions[row["sample_id"]], outcome(row)))
    groups: dict[str, dict[str, list[Any]]] = {"by_type": {}, "by_modality": {}}
    for question, found in outcomes:
        groups["by_type"].setdefault(question["answer_type"] or "unknown", []).append((question, found))
        groups["by_modality"].setdefault(question["modality"] or "unknown", []).append((question, found))
    tables = {
        key: {name: _rates(members, config) for name, members in sorted(table.items())}
        for key, table in groups.items()
    }
    return {
        "schema": SCHEMA,
        "judge": next(iter(judges)) if len(judges) == 1 else None,
        **_rates(outcomes, config),
        **tables,
    }


def outcome(row: Mapping[str, Any]) -> dict[str, Any]:
    """{"failed": reason} or {"value": 1.0 the second answer wins, 0.5 tie, 0.0 it loses, ...} of one
    judged row.
    """
    failed = failure(row)
    if failed is not None:
        return {"failed": failed}
    verdict = row["verdicts"][0]
    if verdict["error"] == IDENTICAL:
        return {"value": 0.5, "identical": True}
    first, second = verdict["first_score"], verdict["second_score"]
    shown = [parse_scores(reply) for reply in verdict["raw"] or [] if reply]
    places = {"first_shown": sum(a > b for a, b in shown), "decided": sum(a != b for a, b in shown)}
    if verdict["order_agreement"] is False:
        return {"value": 0.5, "disagreement": True, **places}
    return {
        "value": 0.5 * ((second > first) - (second < first)) + 0.5,
        "one_order": verdict["order_agreement"] is None,
        **places,
    }


def failure(row: Mapping[str, Any]) -> str | None:
    """Why a judged row has no verdict (FAILURES), or None; identical answers are no failure."""
    if row.get("error") is not None or len(row["verdicts"] or []) != 1:
        return "row error"
    verdict = row["verdicts"][0]
    if verdict["error"] is None or verdict["error"] == IDENTICAL:
        return None
    return "unparsed" if verdict["raw"] and all(verdict["raw"]) else "no reply"


def _rates(
    members: Sequence[tuple[Mapping[str, Any], dict[str, Any]]], config: EvaluateConfig
) -> dict[str, Any]:
    failed = Counter(found["failed"] for _, found in members if "failed" in found)
    kept = [(question["image_id"], found) for question, found in members if "failed" not in found]
    values = np.array([found["value"] for _, found in kept])
    images = [image for image, _ in kept]
    names = ("win", "tie", "loss", "win_rate")
    columns = np.stack([values == 1.0, values == 0.5, values == 0.0, values], axis=1).astype(float)
    intervals = clustered_intervals(columns, images, config.bootstrap, config.seed)
    total = Counter()
    for _, found in kept:
        total.update(
            {
                name: int(found.get(name, False))
                for name in ("identical", "disagreement", "one_order", "first_shown", "decided")
            }
        )
    return {
        "asked": len(members),
        "n": len(kept),
        "images": len(set(images)),
        **{name: interval if kept else None for name, interval in zip(names, intervals, strict=True)},
        "p_permutation": paired_difference(1 - values, values, images, 1, config.seed)["p_permutation"]
        if kept
        else None,
        "order_disagreement": total["disagreement"] / len(kept) if kept else None,
        "first_shown": total["first_shown"] / total["decided"] if total["decided"] else None,
        "identical": total["identical"],
        "one_order": total["one_order"],
        "failed": {reason: failed[reason] for reason in FAILURES},
    }
