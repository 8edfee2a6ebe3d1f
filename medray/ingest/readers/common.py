"""What readers share: the row, ids that hold on every machine, image paths that stay in their folder,
questions.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from string import ascii_uppercase
from typing import Any

from medray.data.attribute_questions import MCQ_LETTER
from medray.errors import BadRecord
from medray.pseudonyms import LONGEST_SHOWN, shortened, shown_path
from medray.split_names import split_folder, split_of

Row = dict[str, Any]

IMAGE_TOKEN = "<image>"
IMAGE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".jif",
    ".png",
    ".apng",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".btf",
    ".tf8",
    ".ppm",
    ".pgm",
    ".pbm",
    ".pnm",
    ".pfm",
    ".jp2",
    ".j2k",
    ".j2c",
    ".jpc",
    ".jpf",
    ".jpx",
    ".avif",
)
"""Suffixes of the files of medray.images.decoding.FORMATS, in lower case."""


@dataclass(frozen=True)
class Place:
    """What a reader knows beside the record: the folder of the images, the path of the record's file and,
    for the few formats whose records do not name their image file, what lies in a folder (names; [] for
    no folder) and how a file begins.
    """

    images: str
    path: str
    names: Callable[[str], list[str]] = lambda folder: []
    head: Callable[[str], bytes] = lambda path: b""
    root: str | None = None  # the source's folder
    prefix: str = ""  # of images' ids, where each of several folders has its own

    @property
    def split(self) -> str | None:
        """train, val or test where the file's name or folder says it."""
        return split_of(self.path, self.root)

    @property
    def split_folder(self) -> str:
        """The folder that says the split, else ""."""
        return split_folder(self.path, self.root)

    @property
    def name(self) -> str:
        return posixpath.basename(self.path)

    @property
    def stem(self) -> str:
        return posixpath.splitext(self.name)[0]


def row(
    sample_id: str,
    image_id: str,
    image_file: str | None,
    payload: Mapping[str, Any],
    *,
    split: str | None = None,
    group_id: str | None = None,
    modality: str | None = None,
    image: bytes | None = None,
) -> Row:
    """An index row without its `where` and `error`, which the caller adds. Raises BadRecord for a text
    that is no Unicode (JSON and file names can hold half of a surrogate pair, Arrow cannot; bytes that
    are not UTF-8 are read as such halves).
    """
    made = {
        "sample_id": sample_id,
        "image_id": image_id,
        "image_file": image_file,
        "split": None if split is None else str(split),
        "group_id": group_id,
        "modality": None if is_empty(modality) else str(modality).strip().lower(),
        "payload": json.dumps(payload, ensure_ascii=False),
    }
    bad = next((text for text in made.values() if text is not None and text != as_unicode(text)), None)
    if bad is not None and any("\udc80" <= letter <= "\udcff" for letter in bad):
        raise BadRecord(
            "a text holds bytes that are not UTF-8 (read as half of a surrogate pair); write it as UTF-8"
        )
    if bad is not None:
        raise BadRecord("a text holds half of a surrogate pair, which is no Unicode")
    return {**made, "image": image}


def error_row(identity: str, where: str, error: str) -> Row:
    """The index row of a record that cannot be used."""
    identity = shortened(identity)
    return {
        **row(identity, identity, None, {}),
        "where": shortened(where),
        "error": shortened(error, 2 * LONGEST_SHOWN),
    }


def as_unicode(text: str) -> str:
    """The text with ? for what is no Unicode."""
    return text.encode("utf-8", "replace").decode("utf-8")


# Words that tables and libraries write for a missing value. "None" is missing from them: it is an answer
# people give.
_MISSING = {"", "nan", "<na>", "nat", "null", "#n/a"}


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: null, NaN, blank, or a word for those (pandas writes "nan" for a
    missing text).
    """
    if isinstance(value, str):
        return value.strip().lower() in _MISSING
    return value is None or (isinstance(value, float | Decimal) and value != value)


def need(record: Mapping[str, Any], field: str) -> Any:
    """The field's value. Raises BadRecord where it is missing or empty."""
    value = record.get(field)
    if is_empty(value):
        raise BadRecord(f"field {field!r} is {'missing' if field not in record else 'empty'}")
    return value


def given(record: Mapping[str, Any], field: str) -> Any:
    """The field's value, or None where it is missing or empty (see is_empty)."""
    value = record.get(field)
    return None if is_empty(value) else value


def need_text(record: Mapping[str, Any], field: str) -> str:
    """The field's text, or a number as text, without blanks at its ends. Raises BadRecord for anything
    else.
    """
    return text_of(need(record, field), field)


def text_of(value: Any, field: str) -> str:
    """A value as text, without blanks at its ends. Whole numbers are written without a fraction: a column
    of integers with a gap comes as floats. Raises BadRecord for anything but text and numbers, truth
    values included.
    """
    if isinstance(value, bool):
        raise BadRecord(f"field {field!r} is {str(value).lower()}, not text; write yes or no")
    if isinstance(value, float | Decimal) and value == value and abs(value) < 2**53 and value == int(value):
        value = int(value)
    if not isinstance(value, str | int | float | Decimal):
        raise BadRecord(f"field {field!r} is a {type(value).__name__}, not text")
    return str(value).strip()


def identity_of(value: Any) -> str | None:
    """A record's own id as text; None where it has none (null, NaN, blank)."""
    return (
        None
        if is_empty(value) or not isinstance(value, str | int | float | Decimal)
        else text_of(value, "id")
    )


def inside(folder: str, relative: str) -> str:
    """Path of an image in its folder. Raises BadRecord where the name leads out of the folder or to
    another address.
    """
    clean = posixpath.normpath(str(relative).replace("\\", "/"))
    if "://" in str(relative) or clean.startswith(("/", "..")):
        raise BadRecord(f"image path {shown_path(str(relative))!r} leads out of the image folder")
    return posixpath.join(folder, clean)


def yes_or_no(answer: str) -> bool:
    return answer.strip(" .").lower() in ("yes", "no")


def qa(
    question: str,
    reference: str,
    answer_type: str,
    attribute: str | None = None,
    language: str | None = None,
    choices: list[str] | None = None,
    context: str | None = None,
) -> dict[str, Any]:
    """The payload of one question and its reference answer; `context` is what a judge of answers may know
    of the image.
    """
    made = {
        "question": question,
        "reference": reference,
        "answer_type": answer_type,
        "attribute": None if attribute is None else str(attribute),
        "choices": choices,
        "language": language,
    }
    return {"qa": made | ({"context": context} if context else {})}


def mcq(
    stem: str, choices: Sequence[str], right: int, attribute: str | None = None, language: str | None = None
) -> dict[str, Any]:
    """The payload of a multiple-choice question: the text holds the lettered options as
    medray.data.attribute_questions writes them (with letters after D where there are more), the reference is
    the right option's letter.

    Raises BadRecord where no answer or more than one would be right.
    """
    if not 2 <= len(choices) <= len(ascii_uppercase):
        raise BadRecord(
            f"a multiple-choice question needs 2 to {len(ascii_uppercase)} options, not {len(choices)}"
        )
    if sum(choice.casefold() == choices[right].casefold() for choice in choices) > 1:
        raise BadRecord(f"the right option {choices[right]!r} stands there twice")
    text = "\n".join(
        [stem, *(f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices)), MCQ_LETTER[0]]
    )
    return qa(text, ascii_uppercase[right], "mcq", attribute, language, list(choices))
