"""Rows in another order, through files on the local disk: shuffling, grouping and joining more rows than
memory holds.

Everything here is an external bucket sort by an unsigned 64-bit key that is spread evenly over its range:
rows go to one of many files by the key's leading bits, then file after file is read whole and sorted.
`hashed` makes such keys of ids, so that the order depends on the ids alone, whatever the shards and their
order, and rows of an equal id are neighbours.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from medray.stable_draws import hash64

PART_BYTES = 4 * 2**20  # of a file that is sorted in memory
MOST_PARTS = 512  # open files at once; beyond 2 GiB of rows parts grow
HELD_BYTES = 8 * 2**20  # of rows collected before they are dealt out

Key = Callable[[pa.Table], np.ndarray]  # table -> uint64 (rows,)


def hashed(column: str, seed: int = 0) -> Key:
    """Key of `ordered`: the hash of a text column; of null as of the empty text."""

    def key(table: pa.Table) -> np.ndarray:
        return np.fromiter(
            (hash64(text or "", seed) for text in table[column].to_pylist()), np.uint64, table.num_rows
        )

    return key


def evenly(column: str, total: int) -> Key:
    """Key of `ordered`: a column of integers in [0, total), in their order. Below 2**32 of them."""
    scale = np.uint64(2**64 // max(total, 1) if total > 1 else 1)

    def key(table: pa.Table) -> np.ndarray:
        return table[column].to_numpy().astype(np.uint64) * scale

    return key


class Ordered:
    """The rows of `tables` in ascending order of their key; iterable any number of times inside its `with`
    block.

    Args:
        key: of each row.
        rows: how many there will be, or somewhat more: with the size of the first ones it says how many files
            are needed.
        then: columns that order rows of equal keys.

    Yields tables of one file each. The files lie in the folder for temporary files (TMPDIR) and hold the rows
    once; memory holds PART_BYTES of them, and HELD_BYTES while they are dealt out.
    """

    def __init__(self, tables: Iterable[pa.Table], key: Key, rows: int, then: Sequence[str] = ()):
        self.rows, self.key, self.then = rows, key, then
        self.parts = 1
        self._tables = tables

    def __enter__(self) -> Ordered:
        self._folder = Path(tempfile.mkdtemp(prefix="medray-ordered-"))
        try:
            self._deal()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def __iter__(self) -> Iterator[pa.Table]:
        for part in range(self.parts):
            path = self._path(part)
            if path.exists():
                with pa.ipc.open_stream(path.open("rb")) as stream:
                    table = stream.read_all()
                orders = [("__key", "ascending"), *((name, "ascending") for name in self.then)]
                yield (
                    table.append_column("__key", pa.array(self.key(table)))
                    .sort_by(orders)
                    .drop_columns(["__key"])
                )

    def _path(self, part: int) -> Path:
        return self._folder / f"{part:04d}.arrow"

    def _deal(self) -> None:
        with ExitStack() as files:
            writers: dict[int, Any] = {}
            for table in _held(self._tables):
                if not writers:
                    self.parts = min(
                        MOST_PARTS,
                        math.ceil(
                            max(self.rows, table.num_rows) * table.nbytes / table.num_rows / PART_BYTES
                        ),
                    )
                # floor(key * parts / 2**64) without overflow: parts are few, so the leading 32 bits decide.
                part_of = ((self.key(table) >> np.uint64(32)) * np.uint64(self.parts)) >> np.uint64(32)
                order = np.argsort(part_of, kind="stable")
                parts, starts = np.unique(part_of[order], return_index=True)
                for part, rows in zip(parts.tolist(), np.split(order, starts[1:]), strict=True):
                    if part not in writers:
                        writers[part] = files.enter_context(
                            pa.ipc.new_stream(files.enter_context(self._path(part).open("wb")), table.schema)
                        )
                    writers[part].write_table(table.take(pa.array(rows)))


def _held(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Tables joined until they hold HELD_BYTES, so that a part gets many rows at once."""
    held: list[pa.Table] = []
    size = 0
    for table in tables:
        if table.num_rows:
            held.append(table)
            size += table.nbytes
        if size >= HELD_BYTES:
            yield pa.concat_tables(held)
            held, size = [], 0
    if held:
        yield pa.concat_tables(held)


def batches_of(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of exactly `rows` rows; the last may have fewer."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        while sum(one.num_rows for one in held) >= rows:
            joined = pa.concat_tables(held)
            yield joined.slice(0, rows)
            held = [joined.slice(rows)]
    rest = sum(one.num_rows for one in held)
    if rest:
        yield pa.concat_tables(held)


def groups_of(tables: Iterable[pa.Table], column: str) -> Iterator[list[dict[str, Any]]]:
    """Rows of one value of `column` together, for tables in which they are neighbours."""
    rows = (
        row for table in tables for batch in table.to_batches(max_chunksize=1024) for row in batch.to_pylist()
    )
    for _, group in groupby(rows, itemgetter(column)):
        yield list(group)
