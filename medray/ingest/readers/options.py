"""Multiple-choice questions as tables hold them: options as a list, an object or columns; the answer as
letter, text or index."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from medray.errors import BadRecord
from medray.ingest.readers.common import is_empty, text_of
from medray.ingest.readers.messages import listed

OPTION_FIELDS = ("options", "choices", "candidates", "answer_choices", "multiple_choices")
_OPTION_COLUMN = re.compile(r"(?:options?|choices?|op|opt)?[ _-]?([a-j])", re.IGNORECASE)
_NUMBERED_COLUMN = re.compile(r"(?:options?|choices?|op|opt|candidates?)[ _-]?([0-9])", re.IGNORECASE)
_LETTER = re.compile(r"\(?\s*([A-Za-z])\s*\)?\s*[.:)]?")
_LETTERED = re.compile(r"^\s*\(?\s*([A-Za-z])\s*[.:)]\)?\s*")


def option_columns(names: Sequence[str]) -> list[str]:
    """Columns that hold an option each (A, B, ...; option_a; Choice A; opa; option1), in the order of their
    letters or numbers; [] unless the first two are there."""
    by_letter: dict[str, str] = {}
    for name in names:
        match = _OPTION_COLUMN.fullmatch(name.strip())
        if match:
            by_letter.setdefault(match[1].lower(), name)
    if {"a", "b"} <= by_letter.keys():
        return [by_letter[letter] for letter in sorted(by_letter)]
    by_number = {
        match[1]: name for name in reversed(names) if (match := _NUMBERED_COLUMN.fullmatch(name.strip()))
    }
    if {"1", "2"} <= by_number.keys() or {"0", "1"} <= by_number.keys():
        return [by_number[number] for number in sorted(by_number)]
    return []


def options_of(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(letter, text) of each option of a record; [] if it has none. Letters stay with their texts if an
    option is empty.

    Raises BadRecord for options in no known form.
    """
    lower = {str(name).strip().lower(): name for name in record}
    for field in OPTION_FIELDS:
        value = record.get(lower.get(field, field))
        if not is_empty(value):
            found = _listed_options(listed(value), field)
            if found:
                return found
    columns = option_columns(list(record))
    found = [
        (
            end if (end := column.strip()[-1].upper()).isalpha() else ascii_uppercase[number],
            text_of(record[column], column),
        )
        for number, column in enumerate(columns)
        if not is_empty(record[column])
    ]
    return _without_letters(found)


def _listed_options(value: Any, field: str) -> list[tuple[str, str]]:
    if (
        isinstance(value, dict)
        and isinstance(value.get("text"), list)
        and isinstance(value.get("label"), list)
    ):
        pairs = list(zip(map(str, value["label"]), value["text"]))  # ARC's form
    elif isinstance(value, dict):
        pairs = [(str(key), text) for key, text in value.items()]
    elif isinstance(value, list) and all(isinstance(one, dict) for one in value) and value:
        keys = [
            next((one[name] for name in ("label", "key", "letter", "id") if one.get(name) is not None), None)
            for one in value
        ]
        texts = [
            next((one[name] for name in ("text", "value", "content") if one.get(name) is not None), None)
            for one in value
        ]
        pairs = [
            (str(key) if key is not None else ascii_uppercase[n % 26], text)
            for n, (key, text) in enumerate(zip(keys, texts))
        ]
    elif isinstance(value, list):
        pairs = [(ascii_uppercase[number % 26], text) for number, text in enumerate(value)]
    else:
        raise BadRecord(
            f"field {field!r} is {str(value)[:60]!r}; it must be a list of options, or an object of letters "
            "and options"
        )
    return _without_letters(
        [(key.strip(), text_of(text, field)) for key, text in pairs if not is_empty(text)]
    )


def options_in(question: str) -> tuple[str, list[tuple[str, str]]]:
    """(the question without them, options) of a question that ends in lines "A. ...", "B. ..."; no
    options if it does not.
    """
    lines = question.splitlines()
    found: list[tuple[str, str]] = []
    while lines and (match := _LETTERED.match(lines[-1])) and lines[-1][match.end() :].strip():
        found.insert(0, (match[1].upper(), lines.pop()[match.end() :].strip()))
    wanted = list(ascii_uppercase[: len(found)])
    stem = "\n".join(lines).strip()
    return (
        (stem, found) if len(found) > 1 and [key for key, _ in found] == wanted and stem else (question, [])
    )


def _without_letters(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Options without the letter before their text ("A. liver") if each has its own."""
    matches = [_LETTERED.match(text) for _, text in pairs]
    if not pairs or not all(
        match and match[1].upper() == key.upper() and text[match.end() :]
        for match, (key, text) in zip(matches, pairs)
    ):
        return pairs
    return [(key, text[match.end() :].strip()) for match, (key, text) in zip(matches, pairs)]


def right_option(
    record: Mapping[str, Any], answer: Any, options: Sequence[tuple[str, str]], field: str = "answer"
) -> int:
    """Place in `options` of the right one: the answer is an option's text, its letter, or its text with the
    letter before it.

    Raises BadRecord for another answer; so for a number, since tables count from 0 or from 1 and do not say
    which.
    """
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if is_empty(answer):
        raise BadRecord(f"field {field!r} is empty")
    text = text_of(answer, field)
    _check_one_meaning(answer, text, options, field)
    for same in (text.__eq__, lambda option: _plain(option) == _plain(text)):
        found = [number for number, (_, option) in enumerate(options) if same(option)]
        if found:
            return found[0]
    keys = [key.upper() for key, _ in options]
    letter = _LETTER.fullmatch(text)
    if letter and letter[1].upper() in keys:
        return keys.index(letter[1].upper())
    lettered = _LETTERED.match(text)
    if (
        lettered
        and lettered[1].upper() in keys
        and _plain(text[lettered.end() :]) == _plain(options[keys.index(lettered[1].upper())][1])
    ):
        return keys.index(lettered[1].upper())
    if text.upper() in keys:
        return keys.index(text.upper())
    if re.fullmatch(r"-?\d+", text):
        raise BadRecord(
            f"field {field!r} is the number {text} and no option is {text}: options may be counted from 0 "
            "or from 1; write the option's letter or text"
        )
    raise BadRecord(f"field {field!r} is {text[:60]!r}, which is none of the {len(options)} options")


def _check_one_meaning(answer: Any, text: str, options: Sequence[tuple[str, str]], field: str) -> None:
    """Raise BadRecord for an answer that is an option's text and another option's letter or number."""
    texts = [_plain(option) for _, option in options]
    if _plain(text) not in texts:
        return
    place = texts.index(_plain(text))
    keys = [key.upper() for key, _ in options]
    if text.upper() in keys and keys.index(text.upper()) != place:
        raise BadRecord(
            f"field {field!r} is {text!r}, the text of option {keys[place]} and the letter of another; write "
            "the option's text with its letter"
        )
    if (
        isinstance(answer, int)
        and not isinstance(answer, bool)
        and all(option.isdigit() for option in texts)
        and answer not in (place, place + 1)
    ):
        raise BadRecord(
            f"field {field!r} is the number {text}, which may be an option's text or its place; write it as "
            "text, in quotation marks, or write the option's letter"
        )


def _plain(text: str) -> str:
    return text.strip().rstrip(".").casefold()
