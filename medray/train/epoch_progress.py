"""Track the samples finished in the current epoch: named in a checkpoint's files, and looked up
by digests after a restart.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

ROWS = pa.schema([("sample_id", pa.string()), ("error", pa.string())])
BEFORE = "rows-before.parquet"


def write_done(folder: Path, rank: int, done: dict[str, str | None], before: Path | None) -> None:
    """This worker's part of a checkpoint's rows; `before`, of rank 0, holds those of earlier starts."""
    rows = {"sample_id": list(done), "error": list(done.values())}
    pq.write_table(pa.table(rows, schema=ROWS), folder / f"rows-{rank:05d}.parquet")
    if before is not None:
        os.link(before, folder / BEFORE)  # it is never written to again


def done_rows(folder: str | os.PathLike) -> Iterator[pa.RecordBatch]:
    """What is done of a checkpoint's epoch (ROWS), over all workers and starts, some thousand rows at a
    time.
    """
    world_size = json.loads(Path(folder, "progress.json").read_text())["world_size"]
    files = [Path(folder, f"rows-{rank:05d}.parquet") for rank in range(world_size)]
    if (before := Path(folder, BEFORE)).exists():
        files.append(before)
    for file in files:
        yield from pq.ParquetFile(file).iter_batches(8192)


def keep_done(folder: str | os.PathLike, to: Path) -> Path:
    """All of `done_rows` in one file, for the checkpoints of a start that goes on from this one."""
    with pq.ParquetWriter(to, ROWS) as writer:
        for batch in done_rows(folder):
            writer.write_batch(batch)
    return to


def count_done(folder: str | os.PathLike) -> tuple[int, dict[str, str]]:
    """How many samples of a checkpoint's epoch are done, and the reason of each that was set aside."""
    number, quarantine = 0, {}
    for batch in done_rows(folder):
        number += batch.num_rows
        bad = batch.filter(batch["error"].is_valid())
        quarantine.update(zip(bad["sample_id"].to_pylist(), bad["error"].to_pylist(), strict=True))
    return number, quarantine


class Ids:
    """A set of ids that takes 16 bytes for each (XXH3-128), so that every worker can hold those of an
    epoch of a hundred million.
    """

    def __init__(self, batches: Iterable[pa.RecordBatch] = ()):
        parts = [
            np.frombuffer(b"".join(map(_digest, batch["sample_id"].to_pylist())), "S16") for batch in batches
        ]
        self._sorted = np.sort(np.concatenate(parts)) if parts else np.empty(0, "S16")

    def __len__(self) -> int:
        return len(self._sorted)

    def __contains__(self, sample_id: str) -> bool:
        wanted = np.frombuffer(_digest(sample_id), "S16")
        place = int(np.searchsorted(self._sorted, wanted)[0])
        return place < len(self._sorted) and self._sorted[place] == wanted[0]


def _digest(sample_id: str) -> bytes:
    return xxhash.xxh3_128_digest(sample_id.encode())
