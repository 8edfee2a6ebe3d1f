"""Tell what other tools' logs leave open (pure): the kind of a question, its options, and the letter that a
target means.

Tasks of lmms-eval and lm-evaluation-harness give as target an option's letter, its text or its place (0, 1,
...); VLMEvalKit a letter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from medray.evaluation import metrics
from medray.evaluation.plain_text import plain

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_AS_LETTERS = str.maketrans(
    {chr(ord(first) + place): letter for first in "aＡａ" for place, letter in enumerate(LETTERS)}
)
# "A. x", "(A) x", "a) x", "**A:** x", "- A、x", "A - x"
_OPTION_LINE = re.compile(r"^[\s*•·-]*[(（]?([A-Za-zＡ-Ｚａ-ｚ])(?:\s?[.):、．）：]|\s[-–—]\s)\**\s*(.*)$")
_INLINE_MARK = re.compile(r"(?<!\w)(?:[(（]([A-Z])[)）]\s*|([A-Z])[.):．：]\s+)")
_WHOLE_NUMBER = re.compile(r"\d{1,2}")
_ONE_IN_A_LIST = re.compile(r"\[\s*(['\"])((?:(?!\1).)*)\1\s*\]", re.DOTALL)
_OPTION_FIELDS = ("choices", "options", "candidates")


class TargetError(ValueError):
    """A target that does not tell the right answer, with the reason."""


def question_of(text: str, target: Any, choices: Sequence[str] | None, answer: str = "") -> dict[str, Any]:
    """reference, answer_type and choices of a question whose kind no column says.

    Args:
        target: as the log holds it: a letter, a text, a place or a list of one of them.
        choices: the options, where a column holds them; else they are looked for in the text. An empty option
            is one whose text is lost.
        answer: the model's; a letter says that there were options.

    Raises TargetError for a target that fits none or several of the options, or is not one answer.
    """
    wanted = _single(target)
    choices = list(choices or lettered(text)[1])
    if choices:
        return {"reference": _letter(wanted, choices), "answer_type": "mcq", "choices": choices}
    if options := inline_options(text):
        try:
            return {"reference": _letter(wanted, options), "answer_type": "mcq", "choices": options}
        except TargetError:
            pass  # marks within a line may be something else than options
    if _WHOLE_NUMBER.fullmatch(wanted) and metrics.mcq_letter(answer, len(LETTERS)):
        raise TargetError(
            f"the target {wanted} may be the place of an option, but no options are in the question; "
            "the answer is a letter"
        )
    if re.fullmatch("[A-J]", wanted):
        return {"reference": wanted, "answer_type": "mcq", "choices": None}
    return {
        "reference": wanted,
        "answer_type": "closed" if metrics.normalise(wanted) in ("yes", "no") else "open",
        "choices": None,
    }


def _single(target: Any) -> str:
    """The one answer that a target holds."""
    if isinstance(target, list | tuple):
        texts = [_single(item) for item in target]
        if len({metrics.normalise(text) for text in texts}) != 1:
            raise TargetError(
                f"the target holds {len(texts)} answers; questions with one right answer are scored"
            )
        return texts[0]
    if isinstance(target, bool) or not isinstance(target, str | int | float):
        raise TargetError(
            f"the target is {'missing' if target is None else f'a {type(target).__name__}'}; "
            "it must be a text or an option's place"
        )
    if isinstance(target, float) and target.is_integer():
        target = int(target)
    text = str(target).strip()
    if (one := _ONE_IN_A_LIST.fullmatch(text)) is not None:  # a list that a tool has written as text
        text = one[2].strip()
    if not text:
        raise TargetError("the target is empty")
    return text


def _letter(target: str, choices: Sequence[str]) -> str:
    if not _WHOLE_NUMBER.fullmatch(target):
        letter = metrics.option_letter(target, choices)
        if letter is None:
            raise TargetError(f"the target {target[:80]!r} is not one of the {len(choices)} options")
        return letter
    by_text = {LETTERS[place] for place, choice in enumerate(choices) if plain(choice) == plain(target)}
    by_place = {LETTERS[int(target)]} if int(target) < len(choices) else set()
    if len(by_text | by_place) != 1:
        how = (
            "is the place of one option and the text of another"
            if by_text
            else f"is not the place of one of the {len(choices)} options (from 0)"
        )
        raise TargetError(f"the target {target} {how}")
    return next(iter(by_text | by_place))


def lettered(question: str) -> tuple[str, list[str]]:
    """(text before the options, options) of a question with lines "A. ...", "B. ..." in order; ("", [])
    without them.
    """
    lines = question.split("\n")
    for start in range(len(lines)):
        options: list[str] = []
        for line in lines[start:]:
            match = _OPTION_LINE.match(line.strip())
            if match is None and options and not line.strip():
                continue  # a blank line between two options
            if (
                match is None
                or len(options) == len(LETTERS)
                or match[1].translate(_AS_LETTERS) != LETTERS[len(options)]
            ):
                break
            options.append(match[2].strip())
        if len(options) >= 2:
            return "\n".join(lines[:start]).strip(), options
    return "", []


def inline_options(question: str) -> list[str]:
    """The options of a question that holds them within a line, as "Which? (A) lung (B) liver"; empty without
    them.
    """
    marks: list[re.Match[str]] = []
    for mark in _INLINE_MARK.finditer(question):
        if (mark[1] or mark[2]) == LETTERS[len(marks)] and (not marks or bool(mark[1]) == bool(marks[0][1])):
            marks.append(mark)
        if len(marks) == len(LETTERS):
            break
    if len(marks) < 2:
        return []
    ends = [*(mark.start() for mark in marks[1:]), len(question)]
    texts = [question[mark.end() : end] for mark, end in zip(marks, ends, strict=True)]
    return [text.partition("\n")[0].strip(" ,;\t") for text in texts]


def documented_options(doc: Mapping[str, Any]) -> list[str]:
    """The options in a log's copy of the data set's row: a list of texts, {"text": [...]}, {"A": ..., "B":
    ...}, or fields A, B, ...
    """
    for field in _OPTION_FIELDS:
        found = doc.get(field)
        if isinstance(found, Mapping):
            found = found["text"] if isinstance(found.get("text"), list) else _by_letter(found)
        if isinstance(found, list) and len(found) > 1 and all(isinstance(item, str) for item in found):
            return [_without_letter(place, text) for place, text in enumerate(found)]
    return _by_letter(doc)


def _by_letter(fields: Mapping[str, Any]) -> list[str]:
    found = []
    for letter in LETTERS:
        if not isinstance(fields.get(letter), str):
            break
        found.append(fields[letter])
    return found if len(found) > 1 else []


def _without_letter(place: int, text: str) -> str:
    match = _OPTION_LINE.match(text)
    return match[2].strip() if match and match[1].translate(_AS_LETTERS) == LETTERS[place] else text
