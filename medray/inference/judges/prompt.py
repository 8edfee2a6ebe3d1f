"""What a judge is asked and how its reply is read (pure).

STLLaVA-Med's own rule text is not public; prompts/judge.txt is ours, after the criteria its paper names.
"""

from __future__ import annotations

import re

from medray.inference.prompting import fill, first_line
from medray.inference.thinking import UNFINISHED, said

LOWEST, HIGHEST = 1.0, 10.0
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?!\w|\.\d)")


class VerdictError(ValueError):
    """A reply without two valid scores on its first line."""


def judge_prompt(question: str, first: str, second: str) -> str:
    """The user turn that goes with the image."""
    return fill("judge.txt", question=question.strip(), first=first.strip(), second=second.strip())


def parse_scores(reply: str) -> tuple[float, float]:
    """The two scores of a reply's first line, after the judge's thinking where it wrote any.

    Raises VerdictError unless that line holds exactly two numbers, both from 1 to 10: a missing score is
    missing.
    """
    answer, thinking = said(reply)
    if thinking == UNFINISHED:
        raise VerdictError("unfinished thinking: the reply never closes it; raise judge.max_tokens")
    line = first_line(answer)
    numbers = [float(number) for number in _NUMBER.findall(line)]
    if len(numbers) != 2:
        raise VerdictError(f"the first line holds {len(numbers)} numbers instead of two")
    first, second = numbers
    for score in (first, second):
        if not LOWEST <= score <= HIGHEST:
            raise VerdictError(f"score {score:g} is not from 1 to 10")
    return first, second
