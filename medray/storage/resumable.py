"""Rows through workers into shards, resumably: a killed job resumes with the rows that are left."""

from __future__ import annotations

import logging
import posixpath
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from medray.errors import DataError, StageError
from medray.files import files_in, seal, unseal, write_whole
from medray.ids import contains, digests
from medray.storage.begun import begun_rows, counted
from medray.storage.pieces import reconcile
from medray.storage.shards import (
    READ_ROWS,
    count_rows,
    footer_readers,
    parquet_files,
    read_rows,
    readable,
    tables,
    write_in_order,
    write_shard,
)

logger = logging.getLogger("medray")


class Written(NamedTuple):
    """`rows` of the output; `again` {"rows done again": number} where processes died in the middle of
    their work, else {}.
    """

    rows: int
    again: dict[str, int]


def write_resumable(
    rows_uri: str | list[str],
    out_uri: str,
    checkpoint_uri: str,
    stage: Any,
    rows_per_task: int,
    num_cpus: float = 1.0,
    id_column: str = "sample_id",
    keeps: Callable[[dict[str, Any]], bool] | None = None,
    keep_columns: Sequence[str] = (),
) -> Written:
    """Read shards, pass them through `stage(dataset) -> dataset`, write them; the same call after a kill
    finishes.

    Rows are known by `id_column`; one input row gives one output row with the same id. Ray Data commits each
    written file together with the ids it holds (two phases), and a restarted call reads only ids that are not
    committed. A folder without such an id is not read, and where no folder has one, no actor of `stage`
    starts. Ids whose rows are gone or damaged are not trusted: see medray.storage.pieces.

    Args:
        rows_uri: a folder, or several whose ids differ; later calls may name others for the same `out_uri`.
        rows_per_task: rows that are worked on, written and committed together: what a lost process costs at
            most.
        keeps: of a stage that leaves out some of its input, whether it keeps a row; called with its id and
            `keep_columns`.

    Actors of `stage` that make a medray.storage.begun.Begun and call it have the rows counted that were
    worked on more than once.

    Raises DataError for a file of `rows_uri` that cannot be read, StageError where an id comes twice in
    `rows_uri`, or has no row or several in the output.
    """
    import ray.data
    from ray.data.checkpoint import CheckpointConfig

    folders = [rows_uri] if isinstance(rows_uri, str) else rows_uri
    wanted = {uri: _ids(uri, id_column, keeps, keep_columns) for uri in folders}
    everything = np.sort(np.concatenate([*wanted.values(), np.empty(0, "S16")]))
    if len(np.unique(everything)) < len(everything):
        raise StageError(
            f"{', '.join(folders)}: {len(everything) - len(np.unique(everything))} of {len(everything)} rows "
            f"repeat a {id_column}; "
            "ids name rows, so make them unique in the source"
        )
    # A list of folders may change from call to call, and rows of a folder that is gone stay.
    known = everything if isinstance(rows_uri, str) else None
    committed = reconcile(out_uri, checkpoint_uri, id_column, known, whole_rows=True)
    unfinished = [uri for uri, ids in wanted.items() if not contains(committed, ids).all()]
    fs, root = url_to_fs(out_uri)
    fs.makedirs(root, exist_ok=True)
    context = ray.data.DataContext.get_current()
    before, begun = context.checkpoint_config, checkpoint_uri.rstrip("/") + "-begun"
    context.checkpoint_config = CheckpointConfig(
        id_column=id_column, checkpoint_path=checkpoint_uri, delete_checkpoint_on_success=False
    )
    try:
        if unfinished:
            files = [path for uri in unfinished for path in parquet_files(uri)]
            rows_to_do = sum(len(wanted[uri]) for uri in unfinished)
            with counted(begun):
                # A shard would else be one task, and committed only as a whole.
                rows = read_rows(files, num_cpus=num_cpus).repartition(
                    target_num_rows_per_block=rows_per_task
                )
                # the files of committed ids, which the write reads first
                with footer_readers(rows_to_do // rows_per_task):
                    write_in_order(stage(rows), out_uri, num_cpus)
    finally:
        context.checkpoint_config = before
    if unfinished:
        committed = reconcile(out_uri, checkpoint_uri, id_column, known)
    missing = int((~contains(committed, everything)).sum())
    written = count_rows(out_uri)
    if missing or written != len(committed):
        raise StageError(
            f"{out_uri}: {written} rows in the files, {missing} of {len(everything)} input rows have none; "
            "rerun the same command to make them"
        )
    again = begun_rows(begun) - written
    return Written(written, {"rows done again": again} if again > 0 else {})


def _ids(
    uri: str, id_column: str, keeps: Callable[[dict[str, Any]], bool] | None, columns: Sequence[str]
) -> np.ndarray:
    """Digests of a folder's ids, sorted."""
    rows = tables(uri, list({id_column, *columns}), 2**16)
    if keeps is None:
        return digests(
            identity for table in rows for identity in table[id_column].cast(pa.string()).to_pylist()
        )
    return digests(str(row[id_column]) for table in rows for row in table.to_pylist() if keeps(row))


def write_converted(
    rows_uri: str,
    out_uri: str,
    done_uri: str,
    convert: Callable[[pa.Table], pa.Table],
    rows_per_shard: int,
    num_cpus: float = 1.0,
) -> int:
    """Read shards, pass their rows through `convert`, write them; the same call after a kill finishes.

    For work that needs no actors: a task reads `rows_per_shard` rows piece by piece, converts and writes
    them, and holds no more than a row group; no row goes through the object store. Which rows a shard holds
    follows from the files read, so a task that runs again writes the same files again. A shard is done when
    its record is under `done_uri`, and its files are there with the sizes that the record names; else it is
    written again.

    Args:
        convert: one output row for each input row; pickled to the tasks.

    Returns the number of rows in `out_uri`.

    Raises DataError where that is not the number of rows read.
    """
    import ray.data

    fs, root = url_to_fs(out_uri)
    fs.makedirs(root, exist_ok=True)
    done_fs, done = url_to_fs(done_uri)
    done_fs.makedirs(done, exist_ok=True)
    ready = _ready(done_fs, done, fs, root)
    wanted, waiting = 0, []
    for number, pieces in enumerate(_pieces(rows_uri, rows_per_shard)):
        wanted += sum(piece["rows"] for piece in pieces)
        if f"{number:06d}" not in ready:
            waiting.append({"number": number, "pieces": pieces})
    if waiting:
        settings = {"out_uri": out_uri, "done_uri": done_uri, "convert": convert}
        shards = ray.data.from_items(waiting, override_num_blocks=min(len(waiting), 1000))
        shards.map_batches(
            _write_converted, fn_kwargs=settings, batch_size=1, batch_format="pyarrow", num_cpus=num_cpus
        ).materialize()
    for path in files_in(fs, root, ".part"):
        fs.rm_file(path)
    written = count_rows(out_uri)
    if written != wanted:
        known = set().union(*_ready(done_fs, done, fs, root).values())
        added = [path for path in files_in(fs, root, ".parquet") if posixpath.basename(path) not in known]
        cause = f"remove {added[0]}, which is not of this stage" if added else "remove the run's folder"
        raise DataError(
            f"{out_uri}: {written} rows in the shards, but {wanted} were read from {rows_uri}; {cause}, then "
            "rerun the same command"
        )
    return written


def _ready(done_fs: Any, done: str, fs: Any, root: str) -> dict[str, set[str]]:
    """By the number of a shard that is written, and whose files are as they were written, their names."""
    sizes = {posixpath.basename(path): fs.size(path) for path in files_in(fs, root, ".parquet")}
    ready = {}
    for path in files_in(done_fs, done):
        number = posixpath.basename(path)
        try:
            files = unseal(done_fs.cat_file(path))["files"]
        except (ValueError, KeyError):
            continue
        changed = [name for name, size in files.items() if sizes.get(name) != size]
        if changed:
            logger.warning("%s/%s is missing or cut; writing it again", root, changed[0])
            for name in files.keys() & sizes.keys():  # the new ones may be fewer
                fs.rm_file(f"{root}/{name}")
        else:
            ready[number] = set(files)
    return ready


def _pieces(uri: str, rows_per_shard: int) -> Iterator[list[dict[str, Any]]]:
    """For each shard to write the parts of the files of `uri` that it is made of: path, start, rows."""
    shard: list[dict[str, Any]] = []
    room = rows_per_shard
    for path in parquet_files(uri):
        fs, inner = url_to_fs(path)
        with readable(path), fs.open(inner, "rb") as handle:
            total = pq.read_metadata(handle).num_rows
        start = 0
        while start < total:
            rows = min(room, total - start)
            shard.append({"path": path, "start": start, "rows": rows})
            start, room = start + rows, room - rows
            if not room:
                yield shard
                shard, room = [], rows_per_shard
    if shard:
        yield shard


def _write_converted(
    table: pa.Table, out_uri: str, done_uri: str, convert: Callable[[pa.Table], pa.Table]
) -> pa.Table:
    for shard in table.to_pylist():
        rows = (convert(part) for piece in shard["pieces"] for part in _part_of(**piece))
        written = write_shard(rows, out_uri, f"part-{shard['number']:06d}")
        fs, done = url_to_fs(done_uri)
        write_whole(fs, f"{done}/{shard['number']:06d}", seal({"files": written}))
    return table.select(["number"])


def _part_of(path: str, start: int, rows: int) -> Iterator[pa.Table]:
    """Rows [start, start + rows) of a Parquet file, few at a time; row groups before and after are not
    read.
    """
    fs, inner = url_to_fs(path)
    with readable(path):
        handle = fs.open(inner, "rb")
    with handle:
        with readable(path):
            file = pq.ParquetFile(handle, page_checksum_verification=True)
        first = 0
        for group in range(file.num_row_groups):
            length = file.metadata.row_group(group).num_rows
            low, high = max(start, first), min(start + rows, first + length)
            if low < high:
                with readable(path):
                    table = file.read_row_group(group)
                table = table.slice(low - first, high - low)
                yield from (table.slice(at, READ_ROWS) for at in range(0, table.num_rows, READ_ROWS))
            first += length
