"""Records of JSON Lines, JSON and CSV files, one after another: no file is held whole, and a broken part
is an error row.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from medray.errors import DataError
from medray.ingest.files.reading import failure
from medray.ingest.readers.common import is_empty
from medray.split_names import as_split, split_in, split_of_folder

CHUNK = 2**20
# A JSON value that is longer than this is taken for a broken file (characters).
LONGEST_VALUE = 64 * 2**20

# Characters that are looked at to tell a record from an object of records.
KEYS_AHEAD = 2**16

Found = tuple[str, Any, str | None]


class Rest(str):
    """An error that costs all that follows in a file, however much that is."""


@dataclass(frozen=True)
class Member:
    """What stands beside the records in a JSON file, such as {"info": ..., "data": [...]}: it is named,
    and not read.
    """

    name: str


def readable(found: Iterator[Found]) -> Iterator[Found]:
    """The records, and an error row in place of what follows if the file cannot be read on."""
    number = 0
    try:
        for one in found:
            number += 1
            yield one
    except OSError as error:
        yield f"after record {number}" if number else "whole file", None, Rest(f"the file {failure(error)}")


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
        except (ValueError, RecursionError) as error:
            # a number of thousands of digits, lists in lists without end
            yield where, None, f"the line cannot be read: {error}"


def csv_records(
    handle: BinaryIO, encoding: str = "utf-8-sig", delimiter: str = ",", skipped: int = 0
) -> Iterator[Found]:
    """Records by the header's names. A record that cannot be read is an error row, and the next one is read.

    Args:
        skipped: lines before the header.
    """
    csv.field_size_limit(LONGEST_VALUE)  # the default of 128 KiB is shorter than an image as base64
    # A byte that is not UTF-8 spoils its own record only (readers.common.row).
    errors = "surrogateescape" if encoding.startswith("utf-8") else "replace"
    text = io.TextIOWrapper(
        handle, encoding="utf-8-sig" if encoding == "utf-8" else encoding, errors=errors, newline=""
    )
    for _ in range(skipped):
        text.readline()
    reader = csv.DictReader(text, delimiter=delimiter, strict=True, skipinitialspace=True)
    number = 0
    while True:
        line = reader.reader.line_num
        try:
            record = next(reader, None)
        except csv.Error as error:
            last = reader.reader.line_num
            lines = f"line {line + 1}" if last <= line + 1 else f"lines {line + 1} to {last}"
            why = "a quotation mark is never closed" if "unexpected end" in str(error) else str(error)
            yield f"record {number}", None, f"{lines} cannot be read: {why}"
            number += 1
            continue
        except UnicodeError as error:
            yield (
                f"from record {number} on",
                None,
                Rest(f"cannot be read: not {encoding} ({error}); save the file as UTF-8"),
            )
            return
        if record is None:
            return
        more = None in record
        yield (
            f"record {number}",
            None if more else record,
            "the record has more fields than the header" if more else None,
        )
        number += 1


IsRecord = Callable[[list[str]], bool]


def json_records(
    handle: BinaryIO, encoding: str = "utf-8", is_record: IsRecord | None = None
) -> Iterator[Found]:
    """Items of a JSON list, or of every list (or object) in a JSON object, as LLaVA-Med groups records by
    domain; so of each of several values that follow each other. Records in an object's member that is named
    after a split get that split, and so do those after a member such as "split": "test".

    Args:
        is_record: whether an object with these keys is a record; others hold records, or are given as Member.
            None: an object that is the whole value holds records, and its members are records.

    Raises DataError if an object names the split of its records after them: they would have been read without
    it.
    """
    text = _Text(handle, encoding)
    try:
        first = text.peek()
        if not first or first not in "[{":
            yield "whole file", None, Rest("must hold a list of records")
            return
        number = 0
        while first := text.peek():
            if first == "[":
                yield from _items(text, "" if number == 0 else f"value {number} ", None, is_record)
            elif first == "{" and is_record is not None and is_record(text.keys()):
                text.place = f"from record {number} on"
                yield f"record {number}", text.value(), None
            elif first == "{":
                yield from _members(text, "", None, is_record)
            else:
                yield text.place, None, Rest(f"cannot be read: not JSON: {first!r} after the end of a value")
                return
            number += 1
            if text.peek() == ",":  # records with commas between them and no list around them
                text.at += 1
    except UnicodeDecodeError as error:
        yield (
            text.place,
            None,
            Rest(f"cannot be read: not {encoding} ({error.reason}); save the file as UTF-8"),
        )
    except json.JSONDecodeError as error:
        yield text.place, None, Rest(f"cannot be read: not JSON: {error.msg}")
    except (ValueError, RecursionError) as error:
        yield text.place, None, Rest(f"cannot be read: {error}")


def _items(text: _Text, name: str, split: str | None, is_record: IsRecord | None) -> Iterator[Found]:
    skipped = False
    for number, _ in enumerate(text.parts("[", "]")):
        text.place = f"from {name}record {number} on"
        if (
            number == 0
            and name
            and is_record is not None
            and text.peek() == "{"
            and not is_record(text.keys())
        ):
            skipped = True
            yield f"member {name.strip()}", Member(name.strip()), None
        value = text.value()
        if not skipped:
            yield f"{name}record {number}", _in_split(value, split), None


def _members(text: _Text, name: str, split: str | None, is_record: IsRecord | None) -> Iterator[Found]:
    read_as: set[str | None] = set()  # splits of the records so far
    for _ in text.parts("{", "}"):
        key = str(text.value())
        text.expect(":")
        full, section = f"{name}{key}", as_split(key) or split_of_folder(key) or split
        first = text.peek()
        if first in ("[", "{"):
            read_as.add(section)
        if first == "[":
            yield from _items(text, f"{full} ", section, is_record)
        elif first == "{" and is_record is not None and not is_record(text.keys()):
            if text.holds_objects():
                yield from _members(text, f"{full} ", section, is_record)
            else:
                text.value()
                yield f"member {full}", Member(full), None
        elif first == "{" or is_record is None:
            yield f"record {full}", _in_split(text.value(), split), None
        else:
            value = text.value()
            if not isinstance(value, str) or (own := split_in({key: value})) is None:
                yield f"member {full}", Member(full), None
            elif read_as - {as_split(own), own}:
                raise DataError(
                    f"field {full!r} is {value!r} and stands after the records that it is of; "
                    f"write it before them, or name the file after its split"
                )
            else:
                split = own


def _in_split(record: Any, split: str | None) -> Any:
    """The record with the split that the list around it is named after, unless it says its own."""
    if split is None or not isinstance(record, dict):
        return record
    own = [name for name in record if str(name).strip().lower() == "split"]
    if any(not is_empty(record[name]) for name in own):
        return record
    return {**{name: value for name, value in record.items() if name not in own}, "split": split}


class _Text:
    """Text of a JSON file, read on as far as the next value needs."""

    def __init__(self, handle: BinaryIO, encoding: str = "utf-8"):
        self.handle = handle
        # A byte that is not UTF-8 spoils its own record only (readers.common.row).
        utf8 = encoding.startswith("utf-8")
        self.decoder = codecs.getincrementaldecoder("utf-8-sig" if utf8 else encoding)(
            "surrogateescape" if utf8 else "strict"
        )
        self.text, self.at, self.ended = "", 0, False
        self.place = "whole file"  # where an error lies

    def more(self) -> bool:
        """Read on; False at the end of the file."""
        if self.ended:
            return False
        self.text, self.at = self.text[self.at :], 0
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

    def ahead(self) -> str:
        """The text from here on as far as KEYS_AHEAD, unread."""
        while len(self.text) - self.at < KEYS_AHEAD and self.more():
            pass
        return self.text[self.at : self.at + KEYS_AHEAD]

    def keys(self) -> list[str]:
        """Keys of the object that begins here, unread; of a long one the first."""
        return top_keys(self.ahead())

    def holds_objects(self) -> bool:
        """Whether the first value of the object that begins here, unread, is an object or a list of
        objects.
        """
        return re.match(r'\{\s*"(?:[^"\\]|\\.)*"\s*:\s*(\[\s*)?\{', self.ahead()) is not None

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


_STRING_OR_MARK = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:]')


def top_keys(text: str) -> list[str]:
    """Keys of the first object of a text that may be cut."""
    keys, depth, last = [], 0, None
    for match in _STRING_OR_MARK.finditer(text):
        token = match[0]
        if token in "{[":
            depth += 1
        elif token in "}]":
            depth -= 1
            if depth == 0:
                break
        elif token == ":" and depth == 1 and last is not None:
            keys.append(last)
        last = _string(token) if token[0] == '"' else None
    return keys


def _string(token: str) -> str:
    try:
        return json.loads(token)
    except ValueError:
        return token[1:-1]
