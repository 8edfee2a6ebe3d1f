"""Rows that a stage set aside: counted by reason, and too many of them fail the stage.

A row that cannot be used never stops a stage by itself. A stage that loses more than `max_quarantined` of its
rows, or has nothing left to work with, is not done: what comes after it would be made of the rest, without a
word.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from medray.errors import TooManySetAside
from medray.pseudonyms import shown_path

SHOWN = 5  # reasons in a message
_KINDS = 1000  # reasons held, so that memory has a bound where every row has one of its own
_OTHER = "other reasons"
_LONGEST = 240  # characters of an example

_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
_PATH = re.compile(
    r"\S*[/\\]\S*|\S+\.(?:a?png|jpe?g|jfif|jpe|jp2|j2k|bmp|gif|tiff?|webp|avif|p[bgpn]m|dcm|dicom|npy)\b"
    r"|\S+\.(?:jsonl?|[ct]sv|parquet)\b",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"\d[\d.,]*")


def kind_of(reason: str, sample_id: str | None = None) -> str:
    """A reason without what differs from row to row (its id, paths, numbers, quoted text), to count by."""
    text = reason.replace(sample_id, "...") if sample_id and len(sample_id) > 2 else reason
    text = _NUMBER.sub("#", _PATH.sub("...", _QUOTED.sub("'...'", text)))
    return " ".join(text.split())[:160]


def _size(reason: str) -> float:
    """The first number of a reason: of rows that are too long, large or many, how much."""
    found = re.search(r"\d[\d,]*(?:\.\d+)?", reason)
    return float(found[0].replace(",", "")) if found else -1.0


@dataclass
class Reason:
    """Rows that were set aside for one reason, and the most extreme of them as an example."""

    number: int = 0
    sample_id: str | None = None
    example: str = ""
    size: float = -2.0


@dataclass
class SetAside:
    """Rows set aside by kind of reason. Memory has a bound, whatever the number of rows and reasons.

    Attributes:
        files: that hold such rows, where they were read from files.
    """

    total: int = 0
    reasons: dict[str, Reason] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)

    def add(self, reason: str, sample_id: str | None = None, number: int = 1) -> None:
        kind = kind_of(reason, sample_id)
        if kind not in self.reasons and len(self.reasons) >= _KINDS:
            kind = _OTHER
        held = self.reasons.setdefault(kind, Reason())
        held.number += number
        self.total += number
        if (size := _size(reason)) > held.size:
            held.sample_id, held.example, held.size = sample_id, reason, size

    @property
    def counts(self) -> dict[str, int]:
        """Rows by kind of reason, the most frequent first."""
        return {
            kind: held.number for kind, held in sorted(self.reasons.items(), key=lambda item: -item[1].number)
        }

    def lines(self, most: int = SHOWN) -> str:
        """A line for each of the most frequent reasons, with the row that has the largest number in it."""
        ranked = sorted(self.reasons.values(), key=lambda held: -held.number)
        lines = [
            f"  {held.number:,} x {held.example[:_LONGEST]}"
            + (f" (row {shown_path(held.sample_id[:80])})" if held.sample_id else "")
            for held in ranked[:most]
        ]
        if rest := sum(held.number for held in ranked[most:]):
            lines.append(f"  {rest:,} x other reasons")
        return "\n".join(lines)


def counted(reasons: Iterable[tuple[str, str | None]]) -> SetAside:
    """SetAside of (sample_id, reason) pairs; rows whose reason is None are not set aside."""
    found = SetAside()
    for sample_id, reason in reasons:
        if reason is not None:
            found.add(reason, sample_id)
    return found


def set_aside_in(
    uri: str,
    reasons: Callable[[Mapping[str, Any]], Iterable[str | None]] = lambda row: (row["error"],),
    columns: tuple[str, ...] = ("error",),
    id_column: str = "sample_id",
) -> SetAside:
    """SetAside of a folder of shards, read a few rows at a time.

    Args:
        reasons: why a row, or a part of it, was set aside; None for each that was not.
        columns: what `reasons` reads.
    """
    from medray.storage.shards import rows_with_files

    found = SetAside()
    for file, row in rows_with_files(uri, [id_column, *columns]):
        for reason in reasons(row):
            if reason is not None:
                found.add(reason, row[id_column])
                found.files.add(file)
    return found


def check_set_aside(
    what: str,
    rows: int,
    found: SetAside,
    limit: float,
    where: str | None = None,
    few: int = 0,
    number: int | None = None,
) -> None:
    """Raise TooManySetAside if more than the share `limit` of `rows` was set aside.

    Args:
        what: the rows, in the plural: "images".
        rows: all of them, those set aside included.
        limit: the job's max_quarantined. Strictly more fails, however few they are: one of ten rows is 0.1.
        where: the folder or file that names every row.
        few: up to so many rows set aside are no failure.
        number: of the rows set aside, if `found` holds others too.
    """
    lost = found.total if number is None else number
    if lost <= few or lost <= limit * rows:
        return
    share = lost / rows if rows else 1.0
    raise TooManySetAside(
        f"{lost:,} of {rows:,} {what} were set aside ({_percent(share)}), max_quarantined allows "
        f"{_percent(limit)}. "
        f"Why (with the largest):\n{found.lines()}\n{f'{where} names all of them; ' if where else ''}"
        "fix the rows, or what the reasons name; to go on without these rows: "
        f"--set max_quarantined={min(1.0, math.ceil(share * 100) / 100):g}",
        found.files,
    )


def check_something(what: str, number: int, found: SetAside | None = None, hint: str = "") -> None:
    """Raise TooManySetAside if a stage made nothing, whatever max_quarantined allows.

    Args:
        what: what it made, as in "no answer": "answer".
        number: how many.
        hint: what to do about it.
    """
    if number:
        return
    why = f". Rows were set aside:\n{found.lines()}\n" if found is not None and found.total else "; "
    raise TooManySetAside(
        f"the stage made no {what}{why}{hint or 'look at the rows that it was given'}",
        found.files if found is not None else (),
    )


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
