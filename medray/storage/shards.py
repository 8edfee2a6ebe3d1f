"""Reading Parquet shards with Ray Data, and stages that continue: read -> map -> write, each id exactly
once.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from medray.errors import DataError
from medray.files import files_in, remove_folder

logger = logging.getLogger("medray")

# Ray Data's own 128 MiB lets every reading task, every encoder and the queues between them hold hundreds of
# MiB of images: memory grew until gigabytes of rows were under way.
BLOCK_BYTES = 8 * 2**20
READ_ROWS = 32  # converted at once
# Of a row group, which a reader holds whole, and of a file; a group may pass its bytes by what READ_ROWS rows
# hold.
GROUP_ROWS, GROUP_BYTES, SHARD_BYTES = 64, 32 * 2**20, 512 * 2**20


def parquet_files(uri: str) -> list[str]:
    """URIs of the Parquet files of a folder, in order of name."""
    fs, root = url_to_fs(uri)
    return [fs.unstrip_protocol(p) if "://" in uri else p for p in files_in(fs, root, ".parquet")]


def count_rows(uri: str) -> int:
    """Rows of a folder of shards, from the files' footers."""
    fs, _ = url_to_fs(uri)
    total = 0
    for path in parquet_files(uri):
        with readable(path), fs.open(fs._strip_protocol(path), "rb") as handle:
            total += pq.read_metadata(handle).num_rows
    return total


@contextlib.contextmanager
def readable(path: str) -> Iterator[None]:
    """Turn what pyarrow and file systems raise for a cut, damaged or missing Parquet file into one sentence.

    Raises DataError.
    """
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(
            f"{path}: cannot be read as Parquet ({reason}); if it belongs to a run, rerun the same command "
            "to write it anew, "
            "otherwise restore the file"
        ) from error


def tables(uri: str, columns: list[str] | None = None, rows: int = 1024) -> Iterator[pa.Table]:
    """Columns of a folder of shards, in order of file name, `rows` at a time."""
    return (table for _, table in tables_with_files(uri, columns, rows))


def tables_with_files(
    uri: str, columns: list[str] | None = None, rows: int = 1024
) -> Iterator[tuple[str, pa.Table]]:
    """(address of the shard, some of its rows) of a folder of shards, in order of file name."""
    for path in parquet_files(uri):
        for table in _tables_of_file(path, columns, rows):
            yield path, table


def _tables_of_file(path: str, columns: list[str] | None, rows: int) -> Iterator[pa.Table]:
    fs, inner = url_to_fs(path)
    with readable(path):
        handle = fs.open(inner, "rb")
    with handle:
        with readable(path):
            batches = pq.ParquetFile(handle, page_checksum_verification=True).iter_batches(
                batch_size=rows, columns=columns
            )
        while True:
            with readable(path):
                batch = next(batches, None)
            if batch is None:
                return
            yield pa.Table.from_batches([batch])


def rows_of_file(path: str) -> Iterator[dict[str, Any]]:
    """The rows of one shard as dicts, few in memory at a time."""
    for table in _tables_of_file(path, None, 64):
        yield from table.to_pylist()


def stored_rows(uri: str, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a folder of shards as dicts, few in memory at a time."""
    return (row for _, row in rows_with_files(uri, columns))


def rows_with_files(uri: str, columns: list[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(address of the shard, row) of a folder of shards, few in memory at a time."""
    for path, table in tables_with_files(uri, columns, 64):
        for row in table.to_pylist():
            yield path, row


@contextlib.contextmanager
def footer_readers(files: int) -> Iterator[None]:
    """Let Ray Data read the footers of Parquet files in as many actors as `files` files need: one for every
    20, 32 at most.

    Its default is 32 for however few files. Each is a process of its own, and on two cores most of the time
    of a small stage goes into starting them. A number that the user has set stays.
    """
    name = "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(min(32, 1 + files // 20))
    try:
        yield
    finally:
        del os.environ[name]


def read_rows(
    uri: str | list[str], columns: list[str] | None = None, num_cpus: float = 1.0, readers: int | None = None
) -> Any:
    """Lazy ray.data.Dataset over a folder of shards, in order of file name, or over the files of a list.

    Args:
        readers: tasks that read at once, at most; else as many as the cluster has CPUs for.
    """
    import ray.data

    files = parquet_files(uri) if isinstance(uri, str) else uri
    # File metadata (sizes, schema) is fetched lazily by read tasks, so any number of shards starts at once.
    with footer_readers(len(files)):
        return ray.data.read_parquet(files, columns=columns, num_cpus=num_cpus, concurrency=readers)


@contextlib.contextmanager
def small_blocks(size: int = BLOCK_BYTES) -> Iterator[None]:
    """Datasets made under this move their rows in blocks of at most `size` bytes."""
    import ray.data

    context = ray.data.DataContext.get_current()
    before = context.target_max_block_size
    context.target_max_block_size = size
    try:
        yield
    finally:
        context.target_max_block_size = before


def write_in_order(dataset: Any, uri: str, num_cpus: float = 1.0) -> None:
    """Write a Ray dataset as shards whose rows keep the dataset's order, so that equal inputs give equal
    files' contents.
    """
    from medray.storage.ordered_sink import OrderedParquetSink

    dataset.write_datasink(OrderedParquetSink(uri), ray_remote_args={"num_cpus": num_cpus})


def tables_of(rows: Iterable[dict[str, Any]], schema: pa.Schema, size: int) -> Iterator[pa.Table]:
    """Rows as tables of at most `size` of them; no table where there is no row."""
    left = iter(rows)
    while part := list(itertools.islice(left, size)):
        yield pa.Table.from_pylist(part, schema=schema)


def empty_folder(uri: str) -> None:
    """Make the folder, without whatever an earlier attempt left in it."""
    fs, root = url_to_fs(uri)
    if fs.exists(root):
        remove_folder(fs, root)
    fs.makedirs(root, exist_ok=True)


def write_shard(tables: Iterable[pa.Table], out_uri: str, stem: str) -> dict[str, int]:
    """Write <stem>-00.parquet in row groups of about `GROUP_ROWS` rows or `GROUP_BYTES`; after `SHARD_BYTES`
    comes <stem>-01.parquet, ...

    Returns the size in bytes by name of what was written.
    """
    fs, root = url_to_fs(out_uri)
    written: dict[str, int] = {}
    groups = _row_groups(tables)
    group = next(groups, None)
    while group is not None:
        name, size = f"{stem}-{len(written):02d}.parquet", 0
        texts = [leaf for leaf in _leaves(group.schema) if leaf != "image"]
        # Images are compressed already, all different, and in no order.
        options = {
            "write_page_checksum": True,
            "compression": dict.fromkeys(texts, "SNAPPY") | {"image": "NONE"},
            "use_dictionary": texts,
            "write_statistics": texts,
        }
        with (
            whole_file(fs, f"{root}/{name}") as handle,
            pq.ParquetWriter(handle, group.schema, **options) as writer,
        ):
            while group is not None and size < SHARD_BYTES:
                writer.write_table(group)
                size += group.nbytes
                group = next(groups, None)
        written[name] = fs.size(f"{root}/{name}")
    return written


def _leaves(schema: pa.Schema) -> list[str]:
    """Names of the columns that Parquet makes of nested ones, such as dialogues.list.element.sample_id."""
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    columns = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    return [columns.column(number).path for number in range(len(columns))]


def _row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if (
            sum(part.num_rows for part in held) >= GROUP_ROWS
            or sum(part.nbytes for part in held) >= GROUP_BYTES
        ):
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)


@contextlib.contextmanager
def whole_file(fs: Any, path: str) -> Iterator[Any]:
    """A file to write that is there whole or not at all: on a disk it is written beside its place and
    moved there; an object store shows an upload only when it is complete.
    """
    if not isinstance(fs, LocalFileSystem):
        with fs.open(path, "wb") as handle:
            yield handle
        return
    part = f"{path}.{uuid.uuid4().hex[:8]}.part"
    with open(part, "wb") as handle:
        yield handle
    os.replace(part, path)
