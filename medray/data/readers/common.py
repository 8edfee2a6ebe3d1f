"""What readers share: the row, ids that hold on every machine, image paths that stay in their folder, questions."""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from medray.data.dialogues import MCQ_LETTER
from medray.data.pseudonyms import LONGEST_SHOWN, shortened, shown_path

Row = dict[str, Any]

IMAGE_TOKEN = "<image>"
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".btf", ".tf8",
    ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".avif",
)
"""Suffixes of the files of medray.data.images.FORMATS, in lower case."""

_SPLITS = {
    "train": "train", "training": "train", "trainset": "train", "val": "val", "valid": "val", "validation": "val", "validate": "val", "dev": "val",
    "test": "test", "testing": "test", "testset": "test",
}


class BadRecord(ValueError):
    """One record that cannot be used, with the reason."""


@dataclass(frozen=True)
class Place:
    """What a reader knows beside the record: the folder of the images, the path of the record's file and, for the few
    formats whose records do not name their image file, what lies in a folder (names; [] for no folder) and how a file begins."""

    images: str
    path: str
    names: Callable[[str], list[str]] = lambda folder: []
    head: Callable[[str], bytes] = lambda path: b""

    @property
    def name(self) -> str:
        return posixpath.basename(self.path)

    @property
    def stem(self) -> str:
        return posixpath.splitext(self.name)[0]


def row(
    sample_id: str, image_id: str, image_file: str | None, payload: Mapping[str, Any], *, split: str | None = None,
    group_id: str | None = None, modality: str | None = None, image: bytes | None = None,
) -> Row:
    """An index row without its `where` and `error`, which the caller adds. Raises BadRecord for a text that is no Unicode
    (JSON and file names can hold half of a surrogate pair, Arrow cannot)."""
    made = {
        "sample_id": sample_id, "image_id": image_id, "image_file": image_file, "split": None if split is None else str(split),
        "group_id": group_id, "modality": str(modality or "").strip().lower() or None, "payload": json.dumps(payload, ensure_ascii=False),
    }
    if any(text != as_unicode(text) for text in made.values() if text is not None):
        raise BadRecord("a text holds half of a surrogate pair, which is no Unicode")
    return {**made, "image": image}


def error_row(identity: str, where: str, error: str) -> Row:
    """The index row of a record that cannot be used."""
    identity = shortened(identity)
    return {**row(identity, identity, None, {}), "where": shortened(where), "error": shortened(error, 2 * LONGEST_SHOWN)}


def as_unicode(text: str) -> str:
    """The text with ? for what is no Unicode."""
    return text.encode("utf-8", "replace").decode("utf-8")


def digest(*keys: Any) -> str:
    """16 hex digits fixed by the keys: the same on every machine."""
    return hashlib.sha256("|".join(map(str, keys)).encode()).hexdigest()[:16]


def image_digest(image: bytes) -> str:
    """16 hex digits of an encoded image: its id where the source gives none."""
    return hashlib.sha256(image).hexdigest()[:16]


def drawn(items: Iterable[str], *keys: Any) -> list[str]:
    """The items in a random order that the keys and the items alone fix."""
    return sorted(items, key=lambda item: digest(*keys, item))


def need(record: Mapping[str, Any], field: str) -> Any:
    """The field's value. Raises BadRecord where it is missing or blank."""
    value = record.get(field)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BadRecord(f"field {field!r} is {'missing' if field not in record else 'empty'}")
    return value


def need_text(record: Mapping[str, Any], field: str) -> str:
    """The field's text, or a number as text, without blanks at its ends. Raises BadRecord for anything else."""
    value = need(record, field)
    if not isinstance(value, str | int | float):
        raise BadRecord(f"field {field!r} is a {type(value).__name__}, not text")
    return str(value).strip()


def inside(folder: str, relative: str) -> str:
    """Path of an image in its folder. Raises BadRecord where the name leads out of the folder or to another address."""
    clean = posixpath.normpath(str(relative).replace("\\", "/"))
    if "://" in str(relative) or clean.startswith(("/", "..")):
        raise BadRecord(f"image path {shown_path(str(relative))!r} leads out of the image folder")
    return posixpath.join(folder, clean)


def split_of(path: str) -> str | None:
    """train, val or test where the file's name says one of them (train-00000-of-00007.parquet, validate.json), or else
    the whole name of its folder (test/metadata.csv)."""
    found = {_SPLITS[word] for word in re.split(r"[^a-z]+", posixpath.basename(path).lower()) if word in _SPLITS}
    if found:
        return found.pop() if len(found) == 1 else None
    return _SPLITS.get(split_folder(path).lower())


def split_folder(path: str) -> str:
    """The name of the file's folder where that is a split's name, else ""."""
    name = posixpath.basename(posixpath.dirname(path))
    return name if name.lower() in _SPLITS else ""


def known_split(value: Any) -> str | None:
    """A record's own word for its split as train, val or test; an unknown word as it is; null for none."""
    word = str(value or "").strip().lower()
    return _SPLITS.get(word, word) or None


def yes_or_no(answer: str) -> bool:
    return answer.strip(" .").lower() in ("yes", "no")


def qa(
    question: str, reference: str, answer_type: str, attribute: str | None = None, language: str | None = None, choices: list[str] | None = None,
    context: str | None = None,
) -> dict[str, Any]:
    """The payload of one question and its reference answer; `context` is what a judge of answers may know of the image."""
    made = {
        "question": question, "reference": reference, "answer_type": answer_type, "attribute": None if attribute is None else str(attribute),
        "choices": choices, "language": language,
    }
    return {"qa": made | ({"context": context} if context else {})}


def mcq(stem: str, choices: Sequence[str], right: int, attribute: str | None = None, language: str | None = None) -> dict[str, Any]:
    """The payload of a multiple-choice question: the text holds the lettered options as medray.data.dialogues writes
    them (with letters after D where there are more), the reference is the right option's letter.

    Raises BadRecord where no answer or more than one would be right.
    """
    if not 2 <= len(choices) <= len(ascii_uppercase):
        raise BadRecord(f"a multiple-choice question needs 2 to {len(ascii_uppercase)} options, not {len(choices)}")
    if sum(choice.casefold() == choices[right].casefold() for choice in choices) > 1:
        raise BadRecord(f"the right option {choices[right]!r} stands there twice")
    text = "\n".join([stem, *(f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices)), MCQ_LETTER[0]])
    return qa(text, ascii_uppercase[right], "mcq", attribute, language, list(choices))
