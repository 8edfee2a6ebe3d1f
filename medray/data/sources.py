"""Formats people have, as one stream of index rows: small, without pixels, in any order.

An index row says what one record of the source holds and where its image lies; what comes after orders the rows, loads
the images and writes shards. A record that cannot be used becomes a row with `error`, never an exception. The formats
themselves are read in `medray.data.readers`, one small module per family.

Columns (INDEX): sample_id; image_id; image_file (a path, "path.tar#offset=<byte>&size=<bytes>" or "path.dcm#frame=<n>") or
image (bytes, where the source holds them inline); split (train, val, test; null: the source knows none); group_id (what
must not be spread over splits, such as the patient, hashed; null: the image); modality (lower case); where (file and
place, for the quarantine); error; image_name (the image's path as errors show it, see medray.data.pseudonyms; null for
inline images and DICOM); payload, JSON of exactly one of

- {"record": {...}}: WBCAtt attributes (the schema of medray.data.dialogues)
- {"qa": {question, reference, answer_type (open, closed, mcq), attribute, choices, language, context}}: one question; `context`,
  what a judge of the answers may know of the image, is there where there is one
- {"turns": [{role, text}, ...]}: a dialogue
- {"caption": text, "context": text or null}: a description of the image, and what a text says about it
- {"attributes": {name: value}}: other attributes
- {"preference": {prompt, chosen, rejected}}
- {}: an image alone
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from medray.config import DataConfig
from medray.data.images import ImageError
from medray.data.inline_images import take_out
from medray.data.notes import Notes
from medray.data.pseudonyms import file_name, patient_key, patients_of, shortened, shown_path
from medray.data.readers import (
    captions,
    concepts,
    conversations,
    folders,
    mammography,
    parquet,
    vqa,
    webdataset,
)
from medray.data.readers.common import (
    IMAGE_SUFFIXES,
    IMAGE_TOKEN,
    BadRecord,
    Place,
    Row,
    error_row,
    inside,
    split_of,
)
from medray.data.readers.detect import (
    HEAD_BYTES,
    LOOKED_FOR,
    SUFFIXES,
    TABLES,
    chosen_files,
    names_in,
    parquet_format,
    table_format,
)
from medray.data.readers.files import readable, records
from medray.data.reading import failure, open_file
from medray.data.shards import read_rows
from medray.data.walk import subfolders
from medray.errors import DataError

INDEX = pa.schema([
    ("sample_id", pa.string()), ("image_id", pa.string()), ("image_file", pa.string()), ("image", pa.binary()), ("split", pa.string()),
    ("group_id", pa.string()), ("modality", pa.string()), ("payload", pa.string()), ("where", pa.string()), ("error", pa.string()),
    ("image_name", pa.string()),
])

READERS = {
    "wbcatt": concepts.wbcatt, "skincon": concepts.skincon, "cbis-ddsm": mammography.cbis_ddsm, "vqa-rad": vqa.vqa_rad, "slake": vqa.slake,
    "pmc-vqa": vqa.pmc_vqa, "omnimedvqa": vqa.omnimedvqa, "llava": conversations.llava, "preference": conversations.preference,
    "llava-med-captions": captions.llava_med_captions, "llava-med-qa": captions.llava_med_qa, "captions": captions.captions,
}

MANIFEST = "manifest.json"
RANGE_BYTES = 4 * 2**20
INLINE_BYTES = 16 * 2**20  # of inline images, in a batch of rows
# A source is searched this many levels deep, and this many folders wide: below that lie images.
LEVELS, FOLDERS = 3, 1000
# Folders that images are in where data.images names none; else they lie where the source is.
_IMAGE_FOLDERS = {
    "slake": ("imgs",), "pmc-vqa": ("images", "figures"), "skincon": ("images",), "llava-med-captions": ("images",), "llava-med-qa": ("images",),
    "cbis-ddsm": ("CBIS-DDSM",),
}
_FRAME = "#frame="  # of a DICOM file, in image_file
_RANGE = re.compile(r"^(.*\.tar)#offset=(\d+)&size=(\d+)$", re.DOTALL)


def detect(config: DataConfig) -> tuple[str, list[str]]:
    """(format, files or folder to read) of data.source.

    The files nearest to the top decide; of one level, Parquet before JSON and CSV before tars, and of these the first by
    name whose format is known. All files of that format and suffix are read (of LLaVA JSON the first only; see also
    `readers.detect.chosen_files`). A folder without any such file is one of DICOM, else of images. data.format names the
    format itself.

    Raises DataError naming what was looked for.
    """
    fs, root = url_to_fs(config.source)
    if not fs.exists(root):
        raise DataError(f"data.source: {config.source} does not exist")
    if fs.exists(f"{root}/{MANIFEST}") and config.format in ("auto", "shards"):
        root = f"{root}/shards"  # a directory of jobs/prepare_data.py
    if config.format in ("images", "dicom"):
        return config.format, [root]
    if config.format != "auto":
        return config.format, _named(fs, root, config)
    tables = False
    for files in _levels(fs, root):
        tables = tables or bool(files)
        for suffixes in ((".parquet",), (".json", ".jsonl", ".csv"), (".tar",)):
            for path in (p for p in files if p.endswith(suffixes)):
                kind = _format_of(fs, path)
                if kind is None:
                    continue
                same = [p for p in files if p.endswith(posixpath.splitext(path)[1]) and (p == path or suffixes == (".parquet",) or _format_of(fs, p) == kind)]
                return kind, [path] if kind == "llava" else chosen_files(kind, same)
    kind = None if tables else _folder_format(config.source)
    if kind is None:
        raise DataError(f"data.source: {config.source} is in no known format; looked for {LOOKED_FOR}; name it with data.format")
    return kind, [root]


def manifest_of(source: str) -> dict[str, Any] | None:
    """manifest.json of a directory of jobs/prepare_data.py; None where `source` is none."""
    fs, root = url_to_fs(source)
    path = f"{root}/{MANIFEST}"
    return json.loads(fs.cat_file(path)) if fs.exists(path) else None


def _named(fs: Any, root: str, config: DataConfig) -> list[str]:
    """The files of the format data.format names: those that look like it, else those with its suffixes."""
    wanted = SUFFIXES[config.format]
    levels = [[p for p in files if p.endswith(wanted)] for files in _levels(fs, root)]
    for files in levels:
        alike = [p for p in files if _format_of(fs, p) == config.format]
        if alike:
            return chosen_files(config.format, [p for p in alike if p.endswith(posixpath.splitext(alike[0])[1])])
    found = next((files for files in levels if files), None)
    if found is None:
        raise DataError(f"data.source: {config.source} has no {' or '.join(wanted)} file, which data.format {config.format} needs")
    return chosen_files(config.format, found)


def _levels(fs: Any, root: str) -> Iterator[list[str]]:
    """The JSON, CSV, Parquet and tar files of a folder, level by level, in order of name."""
    if fs.isfile(root):
        yield [root]
        return
    level = [root]
    for _ in range(LEVELS):
        entries = [entry for folder in level for entry in _entries(fs, folder) if not posixpath.basename(entry["name"]).startswith((".", "__MACOSX"))]
        yield sorted(e["name"] for e in entries if e["type"] != "directory" and e["name"].endswith(TABLES))
        level = sorted(e["name"] for e in entries if e["type"] == "directory")[:FOLDERS]


def _entries(fs: Any, folder: str) -> list[dict[str, Any]]:
    """What lies in a folder; some object stores list the folder itself too."""
    return [entry | {"name": name} for entry in fs.ls(folder, detail=True) if (name := entry["name"].rstrip("/")) != folder]


def _format_of(fs: Any, path: str) -> str | None:
    if path.endswith(".tar"):
        return "webdataset"
    with fs.open(path, "rb") as handle:
        if not path.endswith(".parquet"):
            return table_format(names_in(handle.read(HEAD_BYTES), path), path)
        try:
            return parquet_format(pq.read_schema(handle).names)
        except pa.ArrowInvalid as error:
            raise DataError(f"data.source: {path} cannot be read as Parquet: {error}") from None


def _folder_format(source: str) -> str | None:
    """dicom or images, by the first files of a folder."""
    kind = None
    for number, path in enumerate(folders.files_below(source)):
        if path.lower().endswith(IMAGE_SUFFIXES):
            kind = "images"
        elif path.lower().endswith(folders.DICOM_SUFFIXES) or folders.begins_as_dicom(path):
            return "dicom"
        if number == 1000:
            break
    return kind


def read_index(config: DataConfig, num_cpus: float = 1.0, notes: str | None = None) -> Any:
    """The source as a lazy ray.data.Dataset of INDEX rows. JSON Lines are read in byte ranges by many tasks, Parquet by
    Ray Data's own reader, folders of files by a task for each subfolder, every other file by one task from begin to end.

    Args:
        notes: folder for what the tasks see and do not use (medray.data.notes); None to forget it.
    """
    import ray.data

    kind, files = detect(config)
    if files[0].endswith(".parquet"):
        return _parquet_index(kind, config, files, num_cpus)
    pieces = list(_pieces(kind, config, files))
    if not pieces:
        raise DataError(f"data.source: {config.source} is empty")
    settings = {"batch_size": 1, "batch_format": "pyarrow", "num_cpus": num_cpus, "fn_kwargs": {"patient_key": patient_key(), "notes_uri": notes}}
    return ray.data.from_items(pieces, override_num_blocks=len(pieces)).map_batches(_read_piece, **settings)


def _uri(fs: Any, path: str) -> str:
    """An address that other machines and working directories understand."""
    protocol = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
    return path if protocol == "file" else f"{protocol}://{path}"


def _pieces(kind: str, config: DataConfig, files: list[str]) -> Iterator[dict[str, Any]]:
    """Arguments of index_rows for each task."""
    fs, root = url_to_fs(config.source)
    if kind in ("images", "dicom"):
        common = {"start": 0, "kind": kind, "images": _uri(fs, root if fs.isdir(root) else posixpath.dirname(root))}
        yield {**common, "path": _uri(fs, root), "end": 1}
        below = subfolders(_uri(fs, root)) if fs.isdir(root) else []
        yield from ({**common, "path": folder, "end": 0} for folder in below)
        return
    for path in files:
        size = fs.size(path)
        step = RANGE_BYTES if path.endswith(".jsonl") else max(size, 1)
        images = config.images and _uri(*url_to_fs(config.images))
        common = {"path": _uri(fs, path), "kind": kind, "images": images or _uri(fs, _image_folder(fs, kind, path, root))}
        yield from ({**common, "start": at, "end": min(at + step, size)} for at in range(0, size, step))


def _image_folder(fs: Any, kind: str, path: str, root: str) -> str:
    """Where the images of a file lie if data.images does not say it."""
    own = posixpath.dirname(path)
    root = root if fs.isdir(root) else own
    if kind == "captions":
        return own
    if kind == "omnimedvqa":  # QA_information/Open-access/*.json beside Images
        places = (root, own, posixpath.dirname(own), posixpath.dirname(posixpath.dirname(own)))
        return next((place for place in places if fs.exists(f"{place}/Images")), root)
    names = _IMAGE_FOLDERS.get(kind, ())
    if kind == "pmc-vqa" and path.endswith("_2.csv"):
        names = names[::-1]
    return next((f"{root}/{name}" for name in names if fs.exists(f"{root}/{name}")), root)


def _read_piece(table: pa.Table, patient_key: bytes | None, notes_uri: str | None) -> Iterator[pa.Table]:
    for piece in table.to_pylist():
        rows: list[Row] = []
        held = 0
        notes = Notes()
        for row in index_rows(**piece, patient_key=patient_key, notes=notes):
            rows.append(row)
            held += len(row["image"] or b"")
            if len(rows) == 1024 or held > INLINE_BYTES:
                yield pa.Table.from_pylist(rows, schema=INDEX)
                rows, held = [], 0
        notes.write(notes_uri, piece["path"], piece["start"])
        yield pa.Table.from_pylist(rows, schema=INDEX)


def index_rows(
    path: str, start: int, end: int, kind: str, images: str, patient_key: bytes | None = None,
    notes: Notes | None = None,
) -> Iterator[Row]:
    """INDEX rows of the records of one file; of JSON Lines those that begin in the byte range [start, end).

    Args:
        path: the file; for "images" and "dicom" the folder, of which `end` levels are read (0: all).
        images: the folder of the images; for "images" and "dicom" the folder that ids are relative to.
        patient_key: the secret of the pseudonyms of patients (see medray.data.pseudonyms).
        notes: takes what is seen and not used.
    """
    notes = Notes() if notes is None else notes
    if kind == "webdataset":
        yield from webdataset.tar_rows(path, notes, patient_key)
    elif kind == "images":
        yield from folders.image_rows(path, images, end or None, patient_key)
    elif kind == "dicom":
        yield from folders.dicom_rows(path, images, end or None, patient_key)
    else:
        fs, _ = url_to_fs(images)
        place = Place(images, path, lru_cache(256)(partial(_names, fs)), partial(_head, fs))
        for where, record, error in readable(records(path, start, end)):
            yield from _record_rows(kind, place, where, record, error, patient_key)


def _names(fs: Any, folder: str) -> list[str]:
    """Names of what lies in a folder, in their order; [] where it is none."""
    try:
        return sorted(posixpath.basename(entry["name"]) for entry in _entries(fs, fs._strip_protocol(folder)))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _head(fs: Any, path: str) -> bytes:
    return fs.read_block(fs._strip_protocol(path), 0, HEAD_BYTES)


def _record_rows(
    kind: str, place: Place, where: str, record: Any, error: str | None, key: bytes | None = None,
) -> Iterator[Row]:
    where = f"{place.name} {where}"
    if error is None and not isinstance(record, dict):
        error = f"the record is a {type(record).__name__}, not an object"
    if error is None:
        try:
            record, inline = take_out(record)
            # All rows of a record or none.
            made = list(READERS[kind](record, place))
        except BadRecord as bad:
            error = str(bad)
        else:
            patients = patients_of(record)
            for row in made:
                named = _with_image(row, place, inline, patients, key)
                yield {**named, "where": where, "error": None}
            return
    known = record if isinstance(record, dict) else {}
    own = next((known[name] for name in ("qid", "img_name", "sample_id", "id", "question_id", "pair_id") if known.get(name) is not None), None)
    yield error_row(where if own is None else shortened(str(own)), where, error)


def _with_image(row: Row, place: Place, inline: dict[str, bytes], patients: list[str], key: bytes | None) -> Row:
    """The row with its inline image, or with the name that its image file has in errors (none for DICOM frames: their
    paths begin with the patient)."""
    file = row["image_file"]
    if file is None:
        return row
    image = inline.get(posixpath.basename(file))
    if image is not None:
        return {**row, "image_file": None, "image": image}
    if _FRAME in file:
        return row
    return {**row, "image_name": shown_path(file.removeprefix(place.images).lstrip("/"), patients, key)}


def _parquet_index(kind: str, config: DataConfig, files: list[str], num_cpus: float) -> Any:
    fs, root = url_to_fs(config.source)
    if kind == "shards":
        return read_rows([_uri(fs, p) for p in files], num_cpus=num_cpus).map_batches(_shard_table, batch_format="pyarrow", num_cpus=num_cpus)
    images = _uri(*url_to_fs(config.images)) if config.images else _uri(fs, root if fs.isdir(root) else posixpath.dirname(root))
    by_split: dict[str | None, list[str]] = {}
    for path in files:
        by_split.setdefault(split_of(path), []).append(path)
    parts = []
    for split, paths in by_split.items():
        with fs.open(paths[0], "rb") as handle:
            columns = [name for name in pq.read_schema(handle).names if name in parquet.ROW_COLUMNS]
        rows = read_rows([_uri(fs, p) for p in paths], columns, num_cpus)
        # Images are inline: a batch of them is what a task holds.
        parts.append(rows.map_batches(_hf_table, fn_kwargs={"split": split, "images": images}, batch_size=128, batch_format="pyarrow", num_cpus=num_cpus))
    return parts[0].union(*parts[1:]) if len(parts) > 1 else parts[0]


def _shard_table(table: pa.Table) -> pa.Table:
    parquet.check_shard_columns(table.column_names)
    return pa.Table.from_pylist([row for record in table.to_pylist() for row in parquet.shards(record)], schema=INDEX)


def _hf_table(table: pa.Table, split: str | None, images: str) -> pa.Table:
    return pa.Table.from_pylist([parquet.hugging_face(record, split, images) for record in table.to_pylist()], schema=INDEX)


def read_image_bytes(image_file: str, max_bytes: int, name: str | None = None) -> bytes:
    """The encoded image of a path, or of the part of a tar that "path.tar#offset=<byte>&size=<bytes>" names.

    Args:
        name: what to call the file in errors (default: its name, see medray.data.pseudonyms.shown_path).

    Raises ImageError where it cannot be read, is larger than `max_bytes` (data.max_image_bytes) or cut short. A DICOM
    frame ("#frame=") or a page of TIFF ("#page=") is medray.data.groups.image_of's.
    """
    part = _RANGE.match(image_file)
    path, offset, size = (part[1], int(part[2]), int(part[3])) if part else (image_file, 0, None)
    name = name or file_name(path)
    try:
        data = _stored_bytes(path, offset, size, max_bytes)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # of any file system; the row is quarantined
        raise ImageError(f"image file {name!r} {failure(error)}") from None
    if size is not None and len(data) != size:
        raise ImageError(f"{name!r} ends within the image at byte {offset}")
    return data


def _stored_bytes(path: str, offset: int, size: int | None, max_bytes: int) -> bytes:
    if "://" in path:
        fs, inner = url_to_fs(path)
        _check_bytes(fs.size(inner) if size is None else size, max_bytes)
        return fs.cat_file(inner) if size is None else fs.cat_file(inner, start=offset, end=offset + size)
    _check_bytes(size, max_bytes)
    with open_file(path) as file:
        file.seek(offset)
        data = file.read(max_bytes + 1 if size is None else size)
        _check_bytes(len(data), max_bytes)
        return data


def _check_bytes(length: int | None, most: int) -> None:
    if length is not None and length > most:
        raise ImageError(f"image file is over data.max_image_bytes {most}")


__all__ = ["IMAGE_TOKEN", "INDEX", "BadRecord", "detect", "index_rows", "inside", "manifest_of", "read_image_bytes", "read_index"]
