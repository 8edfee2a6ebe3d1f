"""Read any supported source format as a stream of index rows: small, without pixels, in any order.

An index row says what one record of the source holds and where its image lies; what comes after orders the
rows, loads the images and writes shards. A record that cannot be used becomes a row with `error`, never an
exception. The formats themselves are read in `medray.ingest.readers`, one small module per family.

Columns (INDEX): sample_id; image_id; image_file (a path, "path.tar#offset=<byte>&size=<bytes>" or
"path.dcm#frame=<n>") or image (bytes, where the source holds them inline); split (train, val, test; null: the
source knows none); group_id (what must not be spread over splits, such as the patient, hashed; null: the
image); modality (lower case); where (file and place, for the quarantine); error; image_name (the image's path
as errors show it, see medray.pseudonyms; null for inline images and DICOM); payload, JSON of exactly one of

- {"record": {...}}: WBCAtt attributes (the schema of medray.data.attribute_questions)
- {"qa": {question, reference, answer_type (open, closed, mcq), attribute, choices, language, context}}: one
  question; `context`, what a judge of the answers may know of the image, is there where there is one
- {"turns": [{role, text}, ...]}: a dialogue
- {"caption": text, "context": text or null}: a description of the image, and what a text says about it
- {"attributes": {name: value}}: other attributes
- {"preference": {prompt, chosen, rejected}}
- {}: an image alone
"""

from __future__ import annotations

import logging
import posixpath
import re
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import pyarrow as pa
from fsspec.core import url_to_fs

from medray.config import DataConfig
from medray.errors import BadRecord, DataError
from medray.images.decoding import ImageError
from medray.ingest.files.inline_images import PREFIX, named_file, take_out
from medray.ingest.files.notes import UNUSED, Notes
from medray.ingest.files.reading import failure, open_file
from medray.ingest.files.walk import subfolders
from medray.ingest.readers import (
    captions,
    concepts,
    conversations,
    folders,
    mammography,
    parquet,
    questions,
    vqa,
    webdataset,
)
from medray.ingest.readers.common import IMAGE_TOKEN, Place, Row, as_unicode, error_row, inside
from medray.ingest.readers.conversations import one_image
from medray.ingest.readers.files import Member, Rest, readable
from medray.ingest.readers.layout import HEAD_BYTES, layout_of, records
from medray.ingest.readers.skim import skim
from medray.ingest.readers.suffixes import compression_of, opened, suffix_of
from medray.ingest.readers.tracked import FieldUse
from medray.ingest.survey import PARQUET_KINDS, entries_of, in_threads, manifest_of, survey
from medray.pseudonyms import file_name, patient_key, patients_of, shortened, shown_path
from medray.split_names import UnknownSplit, record_split, split_of, split_of_folders
from medray.stable_draws import digest

logger = logging.getLogger("medray")

INDEX = pa.schema(
    [
        ("sample_id", pa.string()),
        ("image_id", pa.string()),
        ("image_file", pa.string()),
        ("image", pa.binary()),
        ("split", pa.string()),
        ("group_id", pa.string()),
        ("modality", pa.string()),
        ("payload", pa.string()),
        ("where", pa.string()),
        ("error", pa.string()),
        ("image_name", pa.string()),
    ]
)

READERS = {
    "wbcatt": concepts.wbcatt,
    "skincon": concepts.skincon,
    "cbis-ddsm": mammography.cbis_ddsm,
    "vqa-rad": vqa.vqa_rad,
    "slake": vqa.slake,
    "pmc-vqa": vqa.pmc_vqa,
    "omnimedvqa": vqa.omnimedvqa,
    "llava": conversations.llava,
    "preference": conversations.preference,
    "llava-med-captions": captions.llava_med_captions,
    "llava-med-qa": captions.llava_med_qa,
    "captions": captions.captions,
    "questions": questions.questions,
}

RANGE_BYTES = 4 * 2**20
INLINE_BYTES = 16 * 2**20  # of inline images, in a batch of rows
# Folders that images are in where data.images names none; else they lie where the source is.
_IMAGE_FOLDERS = {
    "slake": ("imgs",),
    "pmc-vqa": ("images", "figures"),
    "skincon": ("images",),
    "llava-med-captions": ("images",),
    "llava-med-qa": ("images",),
    "cbis-ddsm": ("CBIS-DDSM",),
}
_FRAME = "#frame="  # of a DICOM file, in image_file
# Folders that images are in, in the source, beside the file that names them, or in data.images.
_USUAL_FOLDERS = ("", "images", "VQA_RAD Image Folder", "imgs", "image", "img", "figures", "Images")
_COLUMNS = "the file holds columns and no records; write it with DataFrame.to_json(orient='records')"
_SHARD = re.compile(r"-\d{5,6}-of-\d{5,6}(?=\.[A-Za-z.]+$)")
_RANGE = re.compile(r"^(.*\.tar)#offset=(\d+)&size=(\d+)$", re.DOTALL)


def detect(config: DataConfig) -> tuple[str, list[str]]:
    """(format, files or folder to read) of data.source: see medray.ingest.survey."""
    found = survey(config)
    return found.kind, found.files


def read_index(config: DataConfig, num_cpus: float = 1.0, notes: str | None = None) -> Any:
    """The source as a lazy ray.data.Dataset of INDEX rows. JSON Lines are read in byte ranges by many tasks,
    Parquet by row groups, folders of files by a task for each subfolder, every other file by one task from
    begin to end.

    Args:
        notes: folder for what the tasks see and do not use (medray.ingest.files.notes); None to forget it.
    """
    import ray.data

    found = survey(config)
    passed = Notes()
    for file, why in found.passed.items():
        logger.warning("%s: %s", file, why)
        passed.add(UNUSED, file, why)
    passed.write(notes, "passed over")
    pieces = list(_pieces(found.kind, config, found.files))
    if not pieces:
        raise DataError(f"data.source: {config.source} is empty")
    # Of a great many pieces a task reads several.
    blocks = min(len(pieces), 10_000)
    settings = {
        "batch_size": 1,
        "batch_format": "pyarrow",
        "num_cpus": num_cpus,
        "fn_kwargs": {"patient_key": patient_key(), "notes_uri": notes},
    }
    return ray.data.from_items(pieces, override_num_blocks=blocks).map_batches(_read_piece, **settings)


def read_source(source: str, **fields: Any) -> Any:
    """The records of a dataset in any known format, as a lazy ray.data.Dataset of rows: sample_id, image_id,
    image_file or image, split, group_id, modality, payload (JSON: what the record says of its image), where,
    error (None, or why the record cannot be used).

    Args:
        source: folder, file, s3:// or gs:// prefix.
        fields: of DataConfig, such as format="llava" or images="path".

    Raises DataError for a source in no known format.
    """
    return read_index(DataConfig(source=source, **fields))


def _uri(fs: Any, path: str) -> str:
    """An address that other machines and working directories understand."""
    protocol = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
    return path if protocol == "file" else f"{protocol}://{path}"


def _pieces(kind: str, config: DataConfig, files: list[str]) -> Iterator[dict[str, Any]]:
    """Arguments of index_rows for each task."""
    fs, root = url_to_fs(config.source)
    root = root.rstrip("/") or root
    top = root if fs.isdir(root) else posixpath.dirname(root)
    if kind in ("images", "dicom"):
        common = {"start": 0, "kind": kind, "images": _uri(fs, top)}
        yield {**common, "path": _uri(fs, root), "end": 1}
        below = subfolders(_uri(fs, root)) if fs.isdir(root) else []
        yield from ({**common, "path": folder, "end": 0} for folder in below)
        return
    common = {"kind": kind, "root": _uri(fs, top), "splits": [config.train_split, config.eval_split]}
    named = _uri(*url_to_fs(config.images)) if config.images else _uri(fs, top)
    shards = [path for path in files if suffix_of(path) == ".parquet"]
    for path, ranges in zip(shards, in_threads(partial(parquet.row_group_ranges, fs), shards), strict=True):
        images = named if config.images else _beside_shard(fs, path, top)
        yield from (
            {**common, "path": _uri(fs, path), "images": images, "start": start, "end": end}
            for start, end in ranges
        )
    several = len({posixpath.dirname(path) for path in files}) > 1
    for path in files:
        size = fs.size(path)
        if suffix_of(path) == ".parquet":
            continue
        if suffix_of(path) == ".tar":
            step, images = max(size, 1), named
        else:
            step = (
                RANGE_BYTES if compression_of(path) is None and _in_ranges(_uri(fs, path)) else max(size, 1)
            )
            images = _uri(*_images_at(kind, config, fs, path, root))
        # Folders with a table each may call different images alike.
        own = _uri(fs, posixpath.dirname(path))
        prefix = (
            _relative(own, common["root"])
            if several and f"{images}/".startswith(f"{own}/") and own != common["root"]
            else ""
        )
        place = {**common, "path": _uri(fs, path), "images": images, "prefix": prefix}
        yield from ({**place, "start": at, "end": min(at + step, size)} for at in range(0, size, step))


def _beside_shard(fs: Any, path: str, top: str) -> str:
    """The folder that the image files of a Parquet file lie in: its own, if the first that it names is
    there, else the source's.
    """
    own = posixpath.dirname(path)
    try:
        first = next(parquet.rows_of_groups(_uri(fs, path), 0, 1), None) if own != top else None
        name = named_file(one_image(first[1])) if first is not None else None
    except (pa.ArrowException, OSError, BadRecord):  # its rows say what is wrong
        name = None
    return _uri(fs, own if isinstance(name, str) and _exists(fs, posixpath.join(own, name)) else top)


def _in_ranges(path: str) -> bool:
    try:
        with opened(path) as handle:
            return layout_of(skim(handle, HEAD_BYTES), path).ranges
    except OSError:  # its reading says why
        return False


def _images_at(kind: str, config: DataConfig, fs: Any, path: str, root: str) -> tuple[Any, str]:
    """(filesystem, folder) of the images that a table names: the first of the usual folders that holds
    one of those that its first records name, else data.images or the folder that the set is published
    with.
    """
    own, top = posixpath.dirname(path), root if fs.isdir(root) else posixpath.dirname(root)
    if config.images:
        fs_images, default = url_to_fs(config.images)
        bases = [default.rstrip("/")]
    else:
        fs_images, default = fs, _image_folder(fs, kind, path, root)
        # Where the set is published with no folder for them, images lie beside the table that names them.
        bases = list(dict.fromkeys([default, own, top] if default != top else [own, top]))
    if kind == "cbis-ddsm":  # looks for a series, not for a file
        return fs_images, default
    wanted = _first_images(kind, fs, path)
    for base in bases if wanted else []:
        for folder in _USUAL_FOLDERS:
            at = posixpath.join(base, folder) if folder else base
            if any(_exists(fs_images, posixpath.join(at, name)) for name in wanted):
                return fs_images, at
    return fs_images, default


def _exists(fs: Any, path: str) -> bool:
    try:
        return fs.exists(path)
    except (OSError, ValueError):  # a name that no file can have: its row will say so
        return False


def _first_images(kind: str, fs: Any, path: str, most: int = 3) -> list[str]:
    """Paths of the images of a table's first records below the folder of the images."""
    names: list[str] = []
    place = Place("", path)
    for number, (_, record, error) in enumerate(readable(records(_uri(fs, path), 0, HEAD_BYTES, kind))):
        if len(names) == most or number == 20:
            break
        if error is not None or not isinstance(record, dict):
            continue
        try:
            made = next(iter(READERS[kind](take_out(record)[0], place)), None)
        except MemoryError:
            raise
        except Exception:  # its own row says what is wrong with it
            continue
        if (
            made is not None
            and made["image_file"]
            and len(made["image_file"]) < 1000
            and not made["image_file"].startswith(PREFIX)
        ):
            names.append(made["image_file"])
    return names


def _image_folder(fs: Any, kind: str, path: str, root: str) -> str:
    """The folder of the images that the set is published with."""
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


def _relative(path: str, root: str | None) -> str:
    return path.removeprefix(root).lstrip("/") if root and path.startswith(root) else posixpath.basename(path)


def index_rows(
    path: str,
    start: int,
    end: int,
    kind: str,
    images: str,
    patient_key: bytes | None = None,
    root: str | None = None,
    splits: Sequence[str] = (),
    notes: Notes | None = None,
    prefix: str = "",
) -> Iterator[Row]:
    """INDEX rows of the records of one file; of JSON Lines those that begin in the byte range [start, end),
    of Parquet those of the row groups [start, end).

    Args:
        path: the file; for "images" and "dicom" the folder, of which `end` levels are read (0: all).
        images: the folder of the images; for "images" and "dicom" the folder that ids are relative to.
        patient_key: the secret of the pseudonyms of patients (see medray.pseudonyms).
        root: the source's folder; folders below it may be named after splits.
        splits: names of splits beside train, val and test.
        notes: takes what is seen and not used.
        prefix: of the ids of images: the file's folder below the source, if the images lie there and other
            folders hold others.
    """
    notes = Notes() if notes is None else notes
    use = FieldUse()
    if kind == "webdataset":
        yield from webdataset.tar_rows(path, notes, patient_key, root, splits)
    elif kind == "images":
        yield from folders.image_rows(path, images, end or None, patient_key)
    elif kind == "dicom":
        yield from folders.dicom_rows(path, images, end or None, patient_key)
    elif kind in PARQUET_KINDS and suffix_of(path) == ".parquet":
        yield from _parquet_rows(
            kind, path, start, end, images, split_of(path, root), splits, use, patient_key
        )
    else:
        fs, _ = url_to_fs(images)
        place = Place(images, path, lru_cache(256)(partial(_names, fs)), partial(_head, fs), root, prefix)
        for where, record, error in readable(records(path, start, end, kind)):
            if isinstance(record, Member):
                notes.add(
                    UNUSED,
                    _relative(path, root),
                    f"member {shown_path(as_unicode(record.name), key=patient_key)}",
                )
            else:
                if isinstance(error, Rest):
                    notes.add(UNUSED, _relative(path, root), f"what stands {as_unicode(where)}")
                yield from _record_rows(kind, place, where, record, error, splits, use, patient_key)
    use.note(notes, _relative(path, root))


@lru_cache(1024)
def _table_name(relative: str, key: bytes | None) -> str:
    """A table's path for messages, without patients' numbers; the numbers of shards
    (train-00000-of-00007) stay.
    """
    shard = _SHARD.search(relative)
    if shard is None:
        return shown_path(relative, key=key)
    before, after = relative[: shard.start()], relative[shard.end() :]
    return f"{shown_path(before, key=key)}{shard[0]}{shown_path(after, key=key)}"


def _names(fs: Any, folder: str) -> list[str]:
    """Names of what lies in a folder, in their order; [] where it is none."""
    try:
        return sorted(
            posixpath.basename(entry["name"]) for entry in entries_of(fs, fs._strip_protocol(folder))
        )
    except (OSError, ValueError):  # there is none, or its name is none that a folder can have
        return []


def _head(fs: Any, path: str) -> bytes:
    return fs.read_block(fs._strip_protocol(path), 0, HEAD_BYTES)


def _record_rows(
    kind: str,
    place: Place,
    where: str,
    record: Any,
    error: str | None,
    splits: Collection[str],
    use: FieldUse,
    key: bytes | None = None,
) -> Iterator[Row]:
    where = f"{_table_name(_relative(place.path, place.root), key)} {where}"
    if error is None and not isinstance(record, dict):
        error = f"the record is a {type(record).__name__}, not an object"
    if error is None:
        try:
            record, inline = take_out(record)
            tracked = use.tracked(record)
            own = record_split(tracked, splits)
            # All rows of a record or none.
            made = list(READERS[kind](tracked, place))
        except (BadRecord, UnknownSplit) as bad:
            error = _COLUMNS if _is_columns(record) else str(bad)
        except MemoryError:
            raise
        except Exception as odd:  # one record in a shape that no reader thought of
            error = f"the record cannot be read ({type(odd).__name__})"
        else:
            patients = patients_of(record)
            for row in made:
                named = _grouped(_with_image(row, place, inline, patients, key), patients)
                if place.prefix and kind != "captions":
                    named["image_id"] = posixpath.join(place.prefix, named["image_id"])
                split = own or row["split"] or place.split or _split_of_image(row, place)
                yield {**named, "split": split, "where": where, "error": None}
            return
    known = record if isinstance(record, dict) else {}
    own = next(
        (
            known[name]
            for name in ("qid", "img_name", "sample_id", "id", "question_id", "pair_id")
            if known.get(name) is not None
        ),
        None,
    )
    yield error_row(where if own is None else shortened(str(own)), where, error)


def _grouped(row: Row, patients: list[str]) -> Row:
    """The row with a hash of its patient as its group, where the reader knows no other: images of a
    patient share a split.
    """
    return (
        {**row, "group_id": digest(patients[0])}
        if patients and row.get("error") is None and row["group_id"] is None
        else row
    )


def _is_columns(record: dict[str, Any]) -> bool:
    """Whether an object holds columns, {"image": {"0": ...}, "answer": {"0": ...}}, as pandas writes a
    table.
    """
    return len(record) > 1 and all(
        isinstance(value, dict) and value.keys() == next(iter(record.values())).keys()
        for value in record.values()
    )


def _split_of_image(row: Row, place: Place) -> str | None:
    """The split that a folder of the image's path is named after."""
    file = row["image_file"]
    return split_of_folders(file.removeprefix(place.images).lstrip("/")) if file is not None else None


def _with_image(
    row: Row, place: Place, inline: dict[str, bytes], patients: list[str], key: bytes | None
) -> Row:
    """The row with its inline image, or with the name that its image file has in errors (none for DICOM
    frames: their paths begin with the patient).
    """
    file = row["image_file"]
    if file is None:
        return row
    image = inline.get(posixpath.basename(file))
    if image is not None:
        return {**row, "image_file": None, "image": image}
    if _FRAME in file:
        return row
    return {**row, "image_name": shown_path(file.removeprefix(place.images).lstrip("/"), patients, key)}


def _parquet_rows(
    kind: str,
    path: str,
    start: int,
    end: int,
    images: str,
    split: str | None,
    splits: Collection[str],
    use: FieldUse,
    key: bytes | None = None,
) -> Iterator[Row]:
    try:
        for number, record in parquet.rows_of_groups(path, start, end):
            if kind == "shards":
                yield from parquet.shards(record)
            else:
                where = f"{_table_name(posixpath.basename(path), key)} row {number}"
                made = parquet.hugging_face(use.tracked(record), split, images, splits, where)
                patients = patients_of(record)
                yield _grouped(_with_image(made, Place(images, path), {}, patients, key), patients)
    except pa.ArrowException as error:
        where = f"{_table_name(posixpath.basename(path), key)} row groups {start} to {end}"
        yield error_row(where, where, f"the file cannot be read on as Parquet: {str(error)[:200]}")
    except OSError as error:
        where = f"{_table_name(posixpath.basename(path), key)} row groups {start} to {end}"
        yield error_row(where, where, f"the file {failure(error)}")


def read_image_bytes(image_file: str, max_bytes: int, name: str | None = None) -> bytes:
    """The encoded image of a path, or of the part of a tar that "path.tar#offset=<byte>&size=<bytes>" names.

    Args:
        name: what to call the file in errors (default: its name, see medray.pseudonyms.shown_path).

    Raises ImageError where it cannot be read, is larger than `max_bytes` (data.max_image_bytes) or cut short.
    A DICOM frame ("#frame=") or a page of TIFF ("#page=") is medray.ingest.group_by_image.image_of's.
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


__all__ = [
    "IMAGE_TOKEN",
    "INDEX",
    "BadRecord",
    "detect",
    "index_rows",
    "inside",
    "manifest_of",
    "read_image_bytes",
    "read_index",
]
