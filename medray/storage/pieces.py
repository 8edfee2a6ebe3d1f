"""The pieces of a stage that resumes: which rows are really there, each id once.

Ray Data writes a piece in two phases: the ids it will hold (`<name>.pending.parquet`), its rows
(`<name>-0.parquet` in another folder), then it renames the ids to `<name>.parquet`. A disk that was full, a
second job, or a person with `rm` can break the pair. What Ray trusts is the ids alone; `reconcile` holds them
against the rows.
"""

from __future__ import annotations

import logging
import posixpath
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from medray.files import files_in
from medray.ids import contains, digests

logger = logging.getLogger("medray")

_PENDING = ".pending.parquet"
_BATCH_ROWS = 64  # read at once by each of the threads: some rows hold images
_READERS = 16  # files opened at once, against the latency of object stores


def reconcile(
    out_uri: str,
    checkpoint_uri: str,
    id_column: str,
    known: np.ndarray | None = None,
    whole_rows: bool = False,
) -> np.ndarray:
    """Remove every piece whose committed ids are not exactly the ids of its rows, and those that repeat an
    id.

    Args:
        out_uri, checkpoint_uri: folders of rows and of committed ids.
        known: digests of the ids that may be there, sorted; None for any.
        whole_rows: on a file system, read every column of the rows and compare the pages' checksums; object
            stores have checksums of their own.

    Returns the digests of the ids whose rows are there, sorted. What is removed is named in the log; the
    caller makes it anew.
    """
    fs, root = url_to_fs(out_uri)
    commit_fs, commits = url_to_fs(checkpoint_uri)
    rows: dict[str, list[str]] = {}
    for path in files_in(fs, root, ".parquet"):
        rows.setdefault(posixpath.basename(path).rpartition("-")[0], []).append(path)
    names = files_in(commit_fs, commits, ".parquet")
    committed = {
        posixpath.basename(path).removesuffix(".parquet"): path
        for path in names
        if not path.endswith(_PENDING)
    }
    pending = [path for path in names if path.endswith(_PENDING)]

    def ids(name: str) -> np.ndarray | None:
        """The ids of one piece; None if they are not those of its rows, or a file cannot be read."""
        of_commit = _ids(commit_fs, [committed[name]], id_column)
        of_rows = _ids(fs, rows.get(name, []), id_column, whole_rows and isinstance(fs, LocalFileSystem))
        return (
            of_rows
            if of_commit is not None and of_rows is not None and np.array_equal(of_commit, of_rows)
            else None
        )

    whole: list[np.ndarray] = []
    seen = np.empty(0, "S16")
    bad = []
    with ThreadPoolExecutor(_READERS) as pool:
        for name, found in zip(committed, pool.map(ids, committed)):
            if (
                found is None
                or len(np.unique(found)) < len(found)
                or (known is not None and not contains(known, found).all())
            ):
                bad.append(name)
            else:
                whole.append(found)
    if whole:
        seen = np.sort(np.concatenate(whole))
    if len(np.unique(seen)) < len(seen):  # pieces that repeat each other's ids: the first by name stays
        seen, repeated = _first_of_each(sorted(set(committed) - set(bad)), ids)
        bad += repeated
    uncommitted = [name for name in rows if name not in committed]
    for name in bad:
        _remove(
            commit_fs, [committed[name]]
        )  # the ids first: rows without them are dropped by the next start
    _remove(commit_fs, pending)
    for name in [*bad, *uncommitted]:
        _remove(fs, rows.get(name, []))
    if bad:
        logger.warning(
            "%s: %d piece(s) damaged, incomplete or repeated, for example %s; making their rows again",
            out_uri,
            len(bad),
            bad[0],
        )
    return seen


def _ids(fs: Any, paths: list[str], column: str, whole_rows: bool = False) -> np.ndarray | None:
    try:
        parts = []
        for path in paths:
            with fs.open(path, "rb") as handle:
                file = pq.ParquetFile(handle, page_checksum_verification=True)
                for batch in file.iter_batches(_BATCH_ROWS, columns=None if whole_rows else [column]):
                    parts.append(batch[column].cast(pa.string()))
        return digests(identity for part in parts for identity in part.to_pylist())
    # AttributeError: an id that is null; ValueError: one that is not UTF-8.
    except (OSError, pa.ArrowException, KeyError, AttributeError, ValueError):
        return None


def _first_of_each(names: Iterable[str], ids: Any) -> tuple[np.ndarray, list[str]]:
    seen, repeated = np.empty(0, "S16"), []
    for name in names:
        found = ids(name)
        if contains(seen, found).any():
            repeated.append(name)
        else:
            seen = np.sort(np.concatenate([seen, found]))
    return seen, repeated


def _remove(fs: Any, paths: list[str]) -> None:
    for path in paths:
        fs.rm_file(path)
