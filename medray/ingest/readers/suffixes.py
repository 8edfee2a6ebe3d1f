"""What a file's name says of it: its suffix in one spelling, and whether it is compressed."""

from __future__ import annotations

import errno
import lzma
import posixpath
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from fsspec.compression import compr

from medray.ingest.files.reading import open_file

_COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz"}  # fsspec's names
_SAME = {
    ".ndjson": ".jsonl",
    ".jsonlines": ".jsonl",
    ".jl": ".jsonl",
    ".tsv": ".csv",
    ".tab": ".csv",
    ".psv": ".csv",
    ".pq": ".parquet",
    ".parq": ".parquet",
}
TEXTS = (".json", ".jsonl", ".csv")
UNREAD_TABLES = (
    ".xlsx",
    ".xls",
    ".xlsm",
    ".xlsb",
    ".ods",
    ".numbers",
    ".feather",
    ".arrow",
    ".orc",
    ".avro",
    ".pkl",
    ".pickle",
    ".h5",
    ".hdf5",
    ".sav",
    ".dta",
    ".rds",
)
"""Tables that are not read."""


def suffix_of(path: str) -> str:
    """The suffix in lower case, one for all that mean the same: .csv for .TSV, .jsonl for .ndjson; of a
    compressed table
    (.json.gz) that of the table."""
    stem, suffix = posixpath.splitext(path.lower())
    if suffix in _COMPRESSED:
        inner = suffix_of(stem)
        return inner if inner in TEXTS else posixpath.splitext(stem)[1] + suffix
    return _SAME.get(suffix, suffix)


def compression_of(path: str) -> str | None:
    """fsspec's name of the compression of a table; None for a plain file."""
    return _COMPRESSED.get(posixpath.splitext(path.lower())[1])


@contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """A table's bytes, decompressed. Raises OSError where it cannot be read, damaged compression included."""
    with open_file(path) as handle:
        kind = compression_of(path)
        if kind is None:
            yield handle
            return
        try:
            with compr[kind](handle, mode="r") as plain:
                yield plain
        except (EOFError, zlib.error, lzma.LZMAError) as error:
            raise OSError(errno.EIO, f"its compression is damaged ({error})") from None
