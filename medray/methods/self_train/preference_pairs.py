"""Judged rows to preference pairs. What is dropped is counted by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from medray.config import JudgeConfig
from medray.inference.judges.base import EMPTY, IDENTICAL
from medray.records import PREFERENCE
from medray.storage.shards import rows_of_file, tables_of, write_shard

DROP_REASONS = (
    EMPTY,
    IDENTICAL,
    "judge error",
    "order disagreement",
    "tie",
    "both answers poor",
    "row error",
)


def preference_rows(
    judged: dict[str, Any], config: JudgeConfig
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """At most one pair per question: the best against the worst answer of its accepted verdicts.

    A verdict is accepted when the judge gave both scores, both orders agree (where both were asked) and the
    scores differ by more than config.min_margin, the better one being at least config.min_chosen_score where
    that is set. With two answers there is one verdict per question; with more, the accepted verdict with the
    largest margin makes the pair.

    Args:
        judged: a row of records.JUDGED.

    Returns rows of records.PREFERENCE and the number of verdicts dropped per reason (DROP_REASONS).
    """
    drops: Counter[str] = Counter()
    if judged.get("error") is not None:
        return [], {"row error": 1}
    questions = {question["question_id"]: question for question in judged["questions"] or []}
    best: dict[str, dict[str, Any]] = {}
    for verdict in judged["verdicts"] or []:
        question = questions[verdict["question_id"]]
        first, second = (question["answers"][verdict[side]]["text"] for side in ("first", "second"))
        reason = _drop_reason(verdict, first, second, config)
        if reason is not None:
            drops[reason] += 1
            continue
        margin = verdict["first_score"] - verdict["second_score"]
        chosen, rejected = (first, second) if margin > 0 else (second, first)
        scores = sorted((verdict["first_score"], verdict["second_score"]), reverse=True)
        pair = {
            "sample_id": question["question_id"],
            "image_id": judged["sample_id"],
            "image": judged["image"],
            "prompt": question["question"],
            "chosen": chosen,
            "rejected": rejected,
            "chosen_score": scores[0],
            "rejected_score": scores[1],
            "judge": judged["judge"],
            "order_agreement": verdict["order_agreement"],
        }
        known = best.get(question["question_id"])
        if known is None or abs(margin) > known["chosen_score"] - known["rejected_score"]:
            best[question["question_id"]] = pair
    return list(best.values()), dict(drops)


def write_pairs(shards: pa.Table, out_uri: str, judge: dict[str, Any]) -> pa.Table:
    """The pairs of shards of judged rows, into a file of `out_uri` for each; for Ray Data's map_batches.

    Args:
        shards: `number` and `path` of each.
        judge: JudgeConfig as a dict.

    Returns what was counted: `name` ("pairs", "words, chosen", "words, rejected", "dropped: ..."), `number`.
    """
    counts: Counter[str] = Counter()
    config = JudgeConfig.model_validate(judge)

    def pairs(path: str) -> Iterator[dict[str, Any]]:
        for row in rows_of_file(path):
            made, drops = preference_rows(row, config)
            counts.update({f"dropped: {reason}": times for reason, times in drops.items()})
            for pair in made:
                counts.update(
                    {
                        "pairs": 1,
                        "words, chosen": len(pair["chosen"].split()),
                        "words, rejected": len(pair["rejected"].split()),
                    }
                )
                yield pair

    for shard in shards.to_pylist():
        write_shard(tables_of(pairs(shard["path"]), PREFERENCE, 64), out_uri, f"pairs-{shard['number']:05d}")
    return pa.table(
        {"name": list(counts), "number": list(counts.values())},
        schema=pa.schema([("name", pa.string()), ("number", pa.int64())]),
    )


def _drop_reason(verdict: dict[str, Any], first: str, second: str, config: JudgeConfig) -> str | None:
    if not first.strip() or not second.strip():
        return EMPTY
    if first.strip() == second.strip():
        return IDENTICAL
    if verdict["error"] is not None or verdict["first_score"] is None or verdict["second_score"] is None:
        return "judge error"
    if verdict["order_agreement"] is False:
        return "order disagreement"
    if abs(verdict["first_score"] - verdict["second_score"]) <= config.min_margin:
        return "tie"
    if (
        config.min_chosen_score is not None
        and max(verdict["first_score"], verdict["second_score"]) < config.min_chosen_score
    ):
        return "both answers poor"
    return None
