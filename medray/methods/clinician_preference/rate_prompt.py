"""What a rater of single question-answer pairs is asked, and how its reply is read (pure).

prompts/rate.txt names the criteria of BioMed-VITAL's model preference. Its released script took the score of
the sample before where a reply had no digit; here a reply without a score has none.
"""

from __future__ import annotations

import re

from medray.inference.prompting import fill, first_line, known
from medray.inference.thinking import UNFINISHED, said

LOWEST, HIGHEST = 0.0, 10.0
# The score alone on its line, named or not: "8", "Score: 8.5", "**Rating - 7**", "[9]", "8/10", "8 out of
# 10."
_SCORE = re.compile(
    r"[*_#\s\[(]*(?:(?:overall\s+)?(?:score|rating)[*_\s]*[:=-]?[*_\s]*)?"
    r"[\[(]?(-?\d+(?:\.\d+)?)(?:\s*(?:/|out "
    r"of)\s*(\d+(?:\.\d+)?))?[\])*_.。\s]*",
    re.IGNORECASE,
)


class RatingError(ValueError):
    """A reply without one valid score on its first line."""


def rate_prompt(question: str, answer: str, context: str | None) -> str:
    """The user turn that goes with the image."""
    return fill("rate.txt", known=known(context, None), question=question.strip(), answer=answer.strip())


def parse_score(reply: str) -> float:
    """The score, from 0 to 10, of a reply's first line, after the rater's thinking where it wrote any.

    The line must hold the score and nothing else but its name: "8", "8.5" and "Score: 8" are read as they
    stand. "8/10" is 8, as it says itself that the scale ends at 10; over another number ("4/5") it is on
    another scale and no score.

    Raises RatingError for anything else: a score that cannot be read is missing.
    """
    answer, thinking = said(reply)
    if thinking == UNFINISHED:
        raise RatingError("unfinished thinking: the reply never closes it; raise rate.max_tokens")
    line = first_line(answer)
    found = _SCORE.fullmatch(line)
    if not found:
        raise RatingError("the first line is not one number from 0 to 10")
    if found[2] is not None and float(found[2]) != HIGHEST:
        raise RatingError(f"the score is out of {found[2]}, not out of 10")
    score = float(found[1])
    if not LOWEST <= score <= HIGHEST:
        raise RatingError(f"score {found[1]} is not from 0 to 10")
    return score
