"""Which files of a source are read, and in which format: told by what is in them. What is not read is
named."""

from __future__ import annotations

import json
import logging
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from medray.config import DataConfig
from medray.errors import DataError
from medray.ingest.files.reading import failure, open_file
from medray.ingest.readers import folders
from medray.ingest.readers.common import IMAGE_SUFFIXES
from medray.ingest.readers.detect import (
    LOOKED_FOR,
    SUFFIXES,
    TABLES,
    chosen_files,
    missing_columns,
    parquet_format,
    table_format,
)
from medray.ingest.readers.layout import HEAD_BYTES, layout_of
from medray.ingest.readers.parquet import unread_labels
from medray.ingest.readers.skim import skim
from medray.ingest.readers.suffixes import UNREAD_TABLES, opened, suffix_of
from medray.pseudonyms import shown_path
from medray.split_names import split_of_folder

MANIFEST, DATASET = "manifest.json", "medray-dataset"  # of jobs/prepare_data.py, and its `kind`
PARQUET_KINDS = ("shards", "hf-parquet", "preference")
# A source is searched this many levels deep, and this many folders wide: below that lie images.
LEVELS, FOLDERS = 3, 1000
_REQUESTS_AT_ONCE = 16
_MOST_PASSED = 100
_MOST_OTHERS = (
    200  # tables of other suffixes that are looked at, to say what they are; all are counted by suffix
)

logger = logging.getLogger("medray")
_TEXT_SUFFIXES = (".txt", ".json", ".caption", ".xml")
_BROKEN = "broken"


@dataclass(frozen=True)
class Survey:
    """The format, the files to read (a folder of images or DICOM files as the only one), and {file: why} of
    tables beside them
    that are not read, relative to the source."""

    kind: str
    files: list[str]
    passed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A file that may hold records: its format (None: unknown, _BROKEN: it cannot be read) and its columns
    or keys."""

    path: str
    kind: str | None
    names: tuple[str, ...]


def survey(config: DataConfig) -> Survey:
    """What is to be read of data.source.

    The files nearest to the top decide; of one level, Parquet before JSON and CSV before tars, and of these
    the first by name whose format is known. All files of that format are read, whatever their suffix (see
    also `readers.detect.chosen_files`), and those in folders beside them that are named after other splits. A
    folder without any table is one of DICOM, else of images. data.format names the format itself.

    Raises DataError naming the files that were found, with their columns, and what was looked for.
    """
    fs, root = url_to_fs(config.source)
    if not fs.exists(root):
        raise DataError(f"data.source: {config.source} does not exist")
    root = root.rstrip("/") or root
    if config.format in ("auto", "shards") and manifest_of(config.source) is not None:
        root = f"{root}/shards"  # a directory of jobs/prepare_data.py
    if config.format in ("images", "dicom"):
        return Survey(config.format, [root])
    if config.format != "auto":
        return _named(fs, root, config)
    unknown: list[Table] = []
    unread: list[str] = []
    deeper: list[str] = []
    for depth, level in enumerate(_levels(fs, root)):
        # Beside tables that are read, deeper ones are counted among the files that are not read.
        (deeper if depth else unread).extend(path for path in level if suffix_of(path) in UNREAD_TABLES)
        level = [path for path in level if suffix_of(path) in TABLES]
        for suffixes in ((".parquet",), (".json", ".jsonl", ".csv"), (".tar",)):
            tables = _tables(fs, [path for path in level if suffix_of(path) in suffixes])
            first = next((table for table in tables if table.kind not in (None, _BROKEN)), None)
            if first is None:
                unknown += tables
                continue
            _check_columns(config, tables, first.kind)
            return _chosen(
                fs,
                root,
                first.kind,
                tables,
                [
                    *unknown,
                    *_tables(fs, [path for path in level if suffix_of(path) not in suffixes][:_MOST_OTHERS]),
                ],
                unread,
            )
    for table in unknown:
        if table.kind == _BROKEN:
            raise DataError(f"data.source: {table.path} cannot be read as Parquet: {' '.join(table.names)}")
    unread += deeper
    kind = None if unknown or unread else _folder_format(config.source)
    if kind is None:
        raise DataError(_unknown_source(config.source, root, unknown, unread))
    return Survey(kind, [root])


def manifest_of(source: str) -> dict[str, Any] | None:
    """manifest.json of a directory of jobs/prepare_data.py; None where `source` is none (other sets have
    files of that name)."""
    fs, root = url_to_fs(source)
    path = f"{root}/{MANIFEST}"
    if not fs.isfile(path) or not fs.isdir(f"{root}/shards"):
        return None
    try:
        manifest = json.loads(fs.cat_file(path))
    except ValueError as error:
        raise DataError(
            f"data.source: {path} is damaged ({error}); run jobs/prepare_data.py --to {source} again"
        ) from None
    return manifest if isinstance(manifest, dict) and manifest.get("kind") == DATASET else None


def _named(fs: Any, root: str, config: DataConfig) -> Survey:
    """The files of the format data.format names: those that look like it, else those with its suffixes."""
    suffixes = SUFFIXES[config.format]
    levels = [[path for path in level if suffix_of(path) in suffixes] for level in _levels(fs, root)]
    for level in levels:
        tables = _tables(fs, level)
        if any(table.kind == config.format for table in tables):
            _check_columns(config, tables, config.format, labels=False)
            return _chosen(fs, root, config.format, tables, [], [])
    found = next((level for level in levels if level), None)
    if found is None:
        raise DataError(
            f"data.source: {config.source} has no {' or '.join(suffixes)} file, which data.format "
            f"{config.format} needs"
        )
    if suffix_of(found[0]) == ".parquet":
        for table in _tables(fs, found):
            if table.kind == _BROKEN:
                raise DataError(
                    f"data.source: {table.path} cannot be read as Parquet: {' '.join(table.names)}"
                )
            raise DataError(
                f"data.source: {table.path} is not in the format {config.format}: "
                f"{missing_columns(table.names)}; looked for {LOOKED_FOR}"
            )
    return Survey(config.format, chosen_files(config.format, found))


def _chosen(
    fs: Any, root: str, kind: str, tables: list[Table], others: list[Table], unread: list[str]
) -> Survey:
    files = [table.path for table in tables if table.kind == kind]
    chosen = chosen_files(kind, files)
    chosen += [path for path in _in_other_splits(fs, root, kind, chosen) if path not in chosen]
    passed = {}
    for table in [*tables, *others]:
        if table.path in chosen:
            continue
        if table.kind == _BROKEN and table in tables:
            # A broken part of the set is an error row; it is not passed over.
            chosen.append(table.path)
        elif table.kind == _BROKEN:
            passed[_below(table.path, root)] = "not read: it cannot be read as Parquet"
        elif table.kind is None:
            passed[_below(table.path, root)] = (
                f"not read: in no known format ({missing_columns(table.names)})"
            )
        elif table.kind == kind:
            passed[_below(table.path, root)] = (
                "not read: another version of the set; name the file itself to read it"
            )
        else:
            passed[_below(table.path, root)] = (
                f"not read: it is in the format {table.kind}, and {kind} was found first; name the file "
                "itself or data.format to read it"
            )
    passed |= {_below(path, root): "not read: save it as CSV" for path in unread}
    more = len(passed) - _MOST_PASSED
    if more > 0:
        passed = dict(list(passed.items())[:_MOST_PASSED]) | {f"{more} more tables": "not read"}
    return Survey(kind, sorted(chosen), passed)


def _below(path: str, root: str) -> str:
    return shown_path(path.removeprefix(root).lstrip("/") or posixpath.basename(path))


def _in_other_splits(fs: Any, root: str, kind: str, chosen: Sequence[str]) -> Iterator[str]:
    """Files of the format in folders named after splits that hold none of the chosen files: beside those of
    the chosen files,
    or in the source."""
    if not fs.isdir(root):
        return
    held = {posixpath.dirname(path) for path in chosen}
    parents = {root} | {posixpath.dirname(folder) for folder in held if len(folder) > len(root)}
    for parent in sorted(parents):
        for entry in entries_of(fs, parent):
            folder = entry["name"]
            if entry["type"] != "directory" or not split_of_folder(posixpath.basename(folder)):
                continue
            if any(f"{one}/".startswith(f"{folder}/") for one in held):
                continue
            for level in _levels(fs, folder, LEVELS - 1, 50):
                tables = _tables(fs, [path for path in level if suffix_of(path) in SUFFIXES[kind]])
                yield from chosen_files(kind, [table.path for table in tables if table.kind == kind])


def _check_columns(config: DataConfig, tables: Iterable[Table], kind: str, labels: bool = True) -> None:
    """Raise DataError for a table of the set that could be read only in part, without a word about the
    rest."""
    for table in tables:
        if table.kind != kind:
            continue
        twice = [name for name, count in Counter(table.names).items() if count > 1 and name.strip()]
        if twice:
            raise DataError(f"data.source: {table.path} names the column {twice[0]!r} twice; rename one")
        unread = unread_labels(table.names) if labels and kind == "hf-parquet" else []
        if unread:
            raise DataError(
                f"data.source: {table.path} has the columns {', '.join(unread[:20])} beside the image, and "
                "none that is read (question and answer, messages, "
                "conversations, prompt and completion, chosen and rejected, caption, text, report); rename "
                "them, or read the images alone with data.format hf-parquet"
            )


def _unknown_source(source: str, root: str, unknown: list[Table], unread: list[str]) -> str:
    said = [f"{_below(table.path, root)}: {missing_columns(table.names)}" for table in unknown[:5]]
    said += [f"{_below(path, root)}: {suffix_of(path)} is not read; save it as CSV" for path in unread[:5]]
    more = len(unknown) + len(unread) - len(said)
    said += [f"{more} more tables"] if more > 0 else []
    if not said:
        said = _other_files(source)
    return (
        f"data.source: {source} is in no known format{' (' + '; '.join(said) + ')' if said else ''}; looked "
        f"for {LOOKED_FOR}; name it with data.format"
    )


def _other_files(source: str) -> list[str]:
    """Suffixes of the first files of a folder that holds neither tables nor images."""
    suffixes: Counter[str] = Counter()
    for number, path in enumerate(folders.files_below(source)):
        suffixes[posixpath.splitext(path)[1].lower() or "no suffix"] += 1
        if number == 1000:
            break
    return (
        [f"found files with {', '.join(f'{suffix} ({count})' for suffix, count in suffixes.most_common(8))}"]
        if suffixes
        else ["it holds no file"]
    )


def _levels(fs: Any, root: str, levels: int = LEVELS, wide: int = FOLDERS) -> Iterator[list[str]]:
    """The tables and tars of a folder, level by level, in order of name; tables that are not read too."""
    if fs.isfile(root):
        yield [root]
        return
    level = [root]
    for _ in range(levels):
        entries = [
            entry
            for folder in level
            for entry in _listed(fs, folder, root)
            if not posixpath.basename(entry["name"]).startswith((".", "__MACOSX"))
        ]
        yield sorted(
            e["name"]
            for e in entries
            if e["type"] != "directory" and suffix_of(e["name"]) in (*TABLES, *UNREAD_TABLES)
        )
        level = sorted(e["name"] for e in entries if e["type"] == "directory")[:wide]


def _listed(fs: Any, folder: str, root: str) -> list[dict[str, Any]]:
    try:
        return entries_of(fs, folder)
    except OSError as error:
        if folder == root:
            raise DataError(f"data.source: {folder} {failure(error)}") from None
        logger.warning("data.source: the folder %s %s", _below(folder, root), failure(error))
        return []


def entries_of(fs: Any, folder: str) -> list[dict[str, Any]]:
    """What lies in a folder; some object stores list the folder itself too."""
    return [
        entry | {"name": name}
        for entry in fs.ls(folder, detail=True)
        if (name := entry["name"].rstrip("/")) != folder.rstrip("/")
    ]


def in_threads(work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """`work` of each item, in order; an object store takes tens of milliseconds to answer, and many
    questions at once."""
    if len(items) < 2:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        yield from pool.map(work, items)


def _tables(fs: Any, paths: Sequence[str]) -> list[Table]:
    return list(in_threads(partial(_table, fs), paths))


def _table(fs: Any, path: str) -> Table:
    suffix = suffix_of(path)
    if suffix == ".tar":
        return Table(path, "webdataset", ())
    if suffix == ".parquet":
        try:
            with open_file(_address(fs, path)) as handle:
                names = pq.read_schema(handle).names
        except (pa.ArrowException, OSError) as error:
            return Table(path, _BROKEN, (str(error)[:200],))
        return Table(path, parquet_format(names), tuple(names))
    try:
        with opened(_address(fs, path)) as handle:
            names = layout_of(skim(handle, HEAD_BYTES), path).names
    except OSError as error:
        return Table(path, None, (f"(it {failure(error)})",))
    return Table(path, table_format(names, path), names)


def _address(fs: Any, path: str) -> str:
    return path if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(path)


def _folder_format(source: str) -> str | None:
    """dicom or images, by the first files of a folder. Raises DataError if texts beside the images look
    like their labels."""
    kind = None
    stems: set[str] = set()
    texts: dict[str, str] = {}
    for number, path in enumerate(folders.files_below(source)):
        stem, suffix = posixpath.splitext(path.lower())
        if path.lower().endswith(IMAGE_SUFFIXES):
            kind = "images"
            stems.add(stem)
        elif path.lower().endswith(folders.DICOM_SUFFIXES) or folders.begins_as_dicom(path):
            return "dicom"
        elif suffix in _TEXT_SUFFIXES:
            texts[stem] = path
        if number == 1000:
            break
    if kind == "images":
        _check_texts(source, stems, texts)
    return kind


def _check_texts(source: str, stems: set[str], texts: dict[str, str]) -> None:
    # 1.txt beside 1.png, or in a folder of its own (reports/1.txt).
    by_name = {posixpath.basename(stem): stem for stem in sorted(texts)}
    both = sorted(stems & texts.keys()) or [
        by_name[name] for name in sorted(by_name.keys() & {posixpath.basename(stem) for stem in stems})
    ]
    if both:
        raise DataError(
            f"data.source: {source} has texts beside its images, such as "
            f"{shown_path(posixpath.basename(texts[both[0]]))}, which are not read; write them into a table "
            "with the columns file_name and text (metadata.csv), or read the images alone with data.format "
            "images"
        )
    names = {posixpath.basename(stem) for stem in stems if len(posixpath.basename(stem)) > 2}
    for path in list(texts.values())[:20]:
        try:
            with open_file(path) as handle:
                text = handle.read(HEAD_BYTES).decode("utf-8", "replace").lower()
        except OSError:
            continue
        words = set(re.split(r"[\s,;|/\\]+|\.(?=[a-z]{2,5}\b)", text))
        if names & words:
            raise DataError(
                f"data.source: {shown_path(posixpath.basename(path))} names images of {source}, and is not "
                "read; save "
                "it as CSV with a header (file_name and text), or read "
                f"the images alone with data.format images"
            )
