"""Records of JSON Lines, JSON and CSV files, one after another: no file is held whole, and a broken part is an error row."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from medray.data.reading import failure, open_file

CHUNK = 2**20
# A JSON value that is longer than this is taken for a broken file (characters).
LONGEST_VALUE = 64 * 2**20

Found = tuple[str, Any, str | None]


def records(path: str, start: int, end: int) -> Iterator[Found]:
    """(place, record, error) of each record of the file; of JSON Lines those that begin in the byte range [start, end)."""
    with open_file(path) as handle:
        if path.endswith(".jsonl"):
            yield from json_lines(handle, start, end)
        elif path.endswith(".csv"):
            yield from csv_records(handle)
        else:
            yield from json_records(handle)


def readable(found: Iterator[Found]) -> Iterator[Found]:
    """The records, and an error row in place of what follows if the file cannot be read on."""
    number = 0
    try:
        for one in found:
            number += 1
            yield one
    except OSError as error:
        yield f"after record {number}" if number else "whole file", None, f"the file {failure(error)}"


def json_lines(handle: BinaryIO, start: int, end: int) -> Iterator[Found]:
    if start:
        handle.seek(start - 1)
        handle.readline()  # the line that began before the range is another task's
    number = 0
    while (at := handle.tell()) < end:
        line = handle.readline()
        if not line:  # the file has become shorter
            return
        number += 1
        # Lines before another task's range are not counted.
        where = f"byte {at}" if start else f"byte {at} (line {number})"
        if not line.strip():
            continue
        try:
            yield where, json.loads(line.decode("utf-8-sig" if at == 0 else "utf-8")), None
        except UnicodeDecodeError as error:
            yield where, None, f"the line is not UTF-8: {error.reason} at byte {at + error.start}"
        except json.JSONDecodeError as error:
            yield where, None, f"the line is not JSON: {error.msg}"
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists without end
            yield where, None, f"the line cannot be read: {error}"


def csv_records(handle: BinaryIO) -> Iterator[Found]:
    """Records by the header's names. What follows a part that cannot be read is lost with one error row."""
    csv.field_size_limit(LONGEST_VALUE)  # the default of 128 KiB is shorter than an image as base64
    reader = csv.DictReader(io.TextIOWrapper(handle, encoding="utf-8-sig", newline=""))
    number = 0
    while True:
        try:
            record = next(reader, None)
        except UnicodeDecodeError as error:
            yield f"from record {number} on", None, f"cannot be read: not UTF-8 ({error.reason}); save the file as UTF-8"
            return
        except csv.Error as error:
            yield f"from record {number} on", None, f"cannot be read: {error}"
            return
        if record is None:
            return
        more = None in record
        yield f"record {number}", None if more else record, "the record has more fields than the header" if more else None
        number += 1


def json_records(handle: BinaryIO) -> Iterator[Found]:
    """Items of a JSON list, or of every list (or object) in a JSON object, as LLaVA-Med groups records by domain."""
    text = _Text(handle)
    try:
        first = text.peek()
        if first == "[":
            yield from _items(text, "")
        elif first == "{":
            yield from _members(text)
        else:
            yield "whole file", None, "must hold a list of records"
    except UnicodeDecodeError as error:
        yield text.place, None, f"cannot be read: not UTF-8 ({error.reason})"
    except json.JSONDecodeError as error:
        yield text.place, None, f"cannot be read: not JSON: {error.msg}"
    except (ValueError, RecursionError) as error:
        yield text.place, None, f"cannot be read: {error}"


def _items(text: _Text, name: str) -> Iterator[Found]:
    for number, _ in enumerate(text.parts("[", "]")):
        text.place = f"from {name}record {number} on"
        yield f"{name}record {number}", text.value(), None


def _members(text: _Text) -> Iterator[Found]:
    for _ in text.parts("{", "}"):
        key = str(text.value())
        text.expect(":")
        if text.peek() == "[":
            yield from _items(text, f"{key} ")
        else:
            yield f"record {key}", text.value(), None


class _Text:
    """Text of a JSON file, read on as far as the next value needs."""

    def __init__(self, handle: BinaryIO):
        self.handle = handle
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.ended = "", 0, False
        self.place = "whole file"  # where an error lies

    def more(self) -> bool:
        """Read on; False at the end of the file."""
        if self.ended:
            return False
        self.text, self.at = self.text[self.at:], 0
        # As much again as is pending: a long value is tried a few times only.
        data = self.handle.read(max(CHUNK, len(self.text)))
        self.ended = not data
        self.text += self.decoder.decode(data, final=self.ended)
        return True

    def peek(self) -> str:
        """The next character that is no blank; "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at].isspace():
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def expect(self, character: str) -> None:
        if self.peek() != character:
            raise json.JSONDecodeError(f"expecting {character!r}", self.text, self.at)
        self.at += 1

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.text, self.at)
            except json.JSONDecodeError:
                if len(self.text) - self.at > LONGEST_VALUE or not self.more():
                    raise
                continue
            if end < len(self.text) or not self.more():  # a number may go on in what is not read yet
                self.at = end
                return value

    def parts(self, opening: str, closing: str) -> Iterator[None]:
        """Stops in front of each part of a list or object, so that the caller reads it."""
        self.expect(opening)
        if self.peek() != closing:
            yield
            while self.peek() == ",":
                self.at += 1
                yield
        self.expect(closing)
