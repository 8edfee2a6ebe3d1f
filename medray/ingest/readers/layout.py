"""How the records of a table are laid out, read from its first bytes: encoding, delimiter, JSON or JSON
Lines whatever its name."""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

from medray.ingest.readers.detect import alike, table_format
from medray.ingest.readers.files import Found, csv_records, json_lines, json_records, top_keys
from medray.ingest.readers.skim import skim
from medray.ingest.readers.suffixes import compression_of, opened, suffix_of

HEAD_BYTES = 2**16  # of a file that are looked at
_DELIMITERS = (",", ";", "\t", "|")
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass(frozen=True)
class Layout:
    """Of a table's file.

    Args:
        kind: JSON Lines, JSON (one or several values), or a table of delimited columns.
        encoding: a codec's name.
        names: columns of the header, or keys of the first record; of JSON that holds lists in an object,
            those of the first list's first record that is in a known format, else the object's own.
        delimiter: of a table.
        skipped: lines before a table's header (Excel's "sep=;").
    """

    kind: Literal["lines", "json", "table"]
    encoding: str
    names: tuple[str, ...]
    delimiter: str = ","
    skipped: int = 0

    @property
    def ranges(self) -> bool:
        """Whether parts of the file can be read apart."""
        return self.kind == "lines" and self.encoding in ("utf-8", "utf-8-sig")


def layout_of(head: bytes, path: str) -> Layout:
    """The layout of a file that begins with `head` (HEAD_BYTES, or all of it)."""
    encoding = next((name for bom, name in _BOMS if head.startswith(bom)), None) or _without_bom(head)
    # The head may end within a letter.
    text = codecs.getincrementaldecoder(encoding)("replace").decode(head)
    if suffix_of(path) == ".csv":
        return _table(text, path, encoding)
    whole = len(head) < HEAD_BYTES
    kind = "lines" if _is_lines(text.lstrip(), suffix_of(path) == ".jsonl", whole, path) else "json"
    return Layout(kind, encoding, tuple(_json_names(text, path)))


def _without_bom(head: bytes) -> str:
    """UTF-16 without its mark has a zero in every second byte of Latin text."""
    pairs = max(1, len(head) // 2)
    if head[1::2].count(0) > 0.4 * pairs:
        return "utf-16-le"
    return "utf-16-be" if head[::2].count(0) > 0.4 * pairs else "utf-8"


def _table(text: str, path: str, encoding: str) -> Layout:
    marked = re.match(r"sep=(.)\r?\n", text)
    skipped = 1 if marked else 0
    lines = text.splitlines(keepends=True)[skipped:]
    headers = {
        mark: next(csv.reader(lines, delimiter=mark), [])
        for mark in ((marked[1],) if marked else _DELIMITERS)
    }
    # A delimiter that gives the columns of a format, else the one that gives most columns.
    delimiter = max(
        headers, key=lambda mark: (table_format(headers[mark], path) is not None, len(headers[mark]))
    )
    return Layout("table", encoding, tuple(headers[delimiter]), delimiter, skipped)


def _is_lines(text: str, named_lines: bool, whole: bool, path: str) -> bool:
    """Whether JSON text, without blanks before it, is JSON Lines: a record in each line."""
    if text[:1] != "{":
        return named_lines and text[:1] != "["
    line, feed, rest = text.partition("\n")
    if not feed and not whole:
        return named_lines  # the first line is longer than what is looked at
    if _is_json(line):
        rest = rest.lstrip()
        if rest:
            return named_lines or rest[0] == "{"
        # One line alone: a record, or an object of records.
        return table_format(top_keys(line), path) is not None or (
            named_lines and _first_records(line, path) is None
        )
    second = rest.lstrip().partition("\n")[0]
    try:
        json.JSONDecoder().raw_decode(text)
    except ValueError:
        # Broken, or a value that goes on after the head: lines if the next line is a record.
        return (second.startswith("{") and _is_json(second)) or (named_lines and line.strip() != "{")
    return False


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _json_names(text: str, path: str) -> list[str]:
    start = text.find("{")
    if start < 0:
        return []
    own = top_keys(text[start:])
    if table_format(own, path) is not None or text.lstrip()[:1] == "[":
        return own
    return _first_records(text[start:], path) or own


def _first_records(text: str, path: str) -> list[str] | None:
    """Keys of the first object within an object that is a record of a known format."""
    for number, match in enumerate(re.finditer(r"[\[:]\s*\{", text)):
        keys = top_keys(text[match.end() - 1 :])
        if table_format(keys, path) is not None:
            return keys
        if number == 200:
            break
    return None


def names_in(head: bytes, path: str) -> list[str]:
    """Column names of a table, or the keys of a JSON file's first record."""
    return list(layout_of(head, path).names)


def records(path: str, start: int, end: int, kind: str | None = None) -> Iterator[Found]:
    """(place, record, error) of each record of the file; of JSON Lines those that begin in the byte range
    [start, end).

    Args:
        kind: the format the records are in. An object whose keys are none of the format's is no record but
            holds some.
    """
    with opened(path) as handle:
        head = skim(handle, HEAD_BYTES)
        layout = layout_of(head, path)
        handle.seek(0)
        if layout.ranges:
            # Of a compressed file the size is not known before it is read.
            yield from json_lines(handle, start, end if compression_of(path) is None else 2**62)
        elif layout.kind == "table":
            yield from csv_records(handle, layout.encoding, layout.delimiter, layout.skipped)
        else:
            yield from json_records(handle, layout.encoding, is_record(kind))


def is_record(kind: str | None) -> Callable[[list[str]], bool] | None:
    return None if kind is None else partial(alike, kind)
