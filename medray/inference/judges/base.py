"""A judge's verdict on two answers, and what all kinds of judge share (see
medray.inference.judges.judges).
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from medray.config import JudgeConfig
from medray.inference.completions import Usage
from medray.inference.judges.prompt import VerdictError, parse_scores
from medray.inference.row_worker import RowWorker
from medray.records import JUDGED


@dataclass
class Verdict:
    """A judge's opinion on one pair; the fields of records.VERDICT beside the ids."""

    first_score: float | None = None
    second_score: float | None = None
    order_agreement: bool | None = None
    raw: list[str] = field(default_factory=list)
    error: str | None = None


# (question_id, question, first answer, second answer, order) -> the judge's reply
Ask = Callable[[str, str, str, str, int], Awaitable[str]]


async def written_verdict(
    question: dict[str, Any], first: int, second: int, ask: Ask, both_orders: bool
) -> Verdict:
    """Ask for two written scores, in one or both orders, and average them after un-swapping.

    order_agreement: both orders prefer the same answer, or both tie. A reply that cannot be read makes the
        verdict
    an error; the words are kept in `raw`.
    """
    texts = [question["answers"][index]["text"] for index in (first, second)]
    orders = (0, 1) if both_orders else (0,)
    shown = [texts if order == 0 else texts[::-1] for order in orders]
    replies = await asyncio.gather(
        *(
            ask(question["question_id"], question["question"], *pair, order)
            for order, pair in zip(orders, shown, strict=True)
        ),
        return_exceptions=True,
    )
    verdict = Verdict(raw=["" if isinstance(reply, BaseException) else reply for reply in replies])
    scores: list[tuple[float, float]] = []
    for order, reply in zip(orders, replies, strict=True):
        if isinstance(reply, JudgeUnavailable):
            verdict.error = f"order {order + 1}: {reply}"
        elif isinstance(reply, BaseException):
            raise reply
        else:
            try:
                pair = parse_scores(reply)
                scores.append(pair if order == 0 else pair[::-1])
            except VerdictError as error:
                verdict.error = f"order {order + 1}: {error}"
    if verdict.error is None:
        verdict.first_score = sum(pair[0] for pair in scores) / len(scores)
        verdict.second_score = sum(pair[1] for pair in scores) / len(scores)
        if both_orders:
            preferred = {(a > b) - (a < b) for a, b in scores}
            verdict.order_agreement = len(preferred) == 1
    return verdict


class JudgeUnavailable(Exception):
    """The judge gave no reply, after all retries. Becomes the verdict's error."""


class Judge(RowWorker):
    """What all judges share: pairs of answers, and pairs that need no judge."""

    schema = JUDGED
    stage = "judge"
    config: JudgeConfig
    name: str

    async def row(self, row: dict[str, Any]) -> dict[str, Any]:
        if row.get("error") is not None:
            return {**row, "verdicts": None, "judge": self.name}
        usage = Usage()
        judged = await asyncio.gather(
            *(self._question(row, question, usage) for question in row["questions"] or [])
        )
        return {
            **row,
            "verdicts": list(itertools.chain.from_iterable(judged)),
            "judge": self.name,
            **vars(usage),
        }

    async def _question(
        self, row: dict[str, Any], question: dict[str, Any], usage: Usage
    ) -> list[dict[str, Any]]:
        answers = [candidate["text"].strip() for candidate in question["answers"]]
        places = list(itertools.combinations(range(len(answers)), 2))
        trivial = {
            (i, j): Verdict(error=EMPTY if not (answers[i] and answers[j]) else IDENTICAL)
            for i, j in places
            if not (answers[i] and answers[j]) or answers[i] == answers[j]
        }
        asked = [place for place in places if place not in trivial]
        verdicts = (
            dict(zip(asked, await self.verdicts(row, question, asked, usage), strict=True)) if asked else {}
        )
        return [
            {
                "question_id": question["question_id"],
                "first": place[0],
                "second": place[1],
                **vars({**trivial, **verdicts}[place]),
            }
            for place in places
        ]

    async def verdicts(
        self, row: dict[str, Any], question: dict[str, Any], places: list[tuple[int, int]], usage: Usage
    ) -> list[Verdict]:
        """One verdict per pair of answer indices."""
        raise NotImplementedError


# the judge's `error` for a pair that was not worth asking about
EMPTY, IDENTICAL = "empty answer", "identical answers"
