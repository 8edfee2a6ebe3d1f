"""Rows of Parquet tables to index rows: medray's own shards, Hugging Face's with images inline,
preferences.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from medray.errors import BadRecord
from medray.ingest.files.inline_images import inline_image, named_file
from medray.ingest.files.reading import open_file
from medray.ingest.readers.canonical import members_of, payloads
from medray.ingest.readers.captions import TEXT_COLUMNS, caption_of, column
from medray.ingest.readers.common import Row, error_row, given, identity_of, inside, row
from medray.ingest.readers.conversations import one_image, preference_id, preference_pair
from medray.ingest.readers.messages import DIALOGUES, dialogue_turns
from medray.ingest.readers.questions import Named, question_of
from medray.split_names import UnknownSplit, as_split, record_split
from medray.stable_draws import digest, image_digest


def shards(record: dict[str, Any]) -> Iterator[Row]:
    """A row of records.CONVERSATION, QUESTION, IMAGE_TEXT, PREFERENCE or SAMPLE, told apart by its
    columns.
    """
    identity = identity_of(record["sample_id"])
    if identity is None:
        identity = f"image-{image_digest(record['image'] or b'')}"
        yield error_row(identity, f"shard row {identity}", "sample_id is empty")
        return
    image_id = identity_of(record.get("image_id")) or identity
    where = f"shard row {identity}"
    common = {name: record.get(name) for name in ("split", "group_id", "modality")}
    common["split"] = as_split(common["split"] or "") or common["split"]
    if record.get("error"):
        yield error_row(identity, where, record["error"])
        return
    try:
        found = (
            members_of(record)
            if "captions" in record
            else [(identity + suffix, payload) for suffix, payload in payloads(record)]
        )
    except BadRecord as bad:
        yield error_row(identity, where, str(bad))
        return
    for number, (sample, payload) in enumerate(found):
        # The image is needed once only: rows of one image are joined again.
        yield {
            **row(sample, image_id, None, payload, image=None if number else record["image"], **common),
            "where": where,
            "error": None,
        }


# Bytes of row groups, as they lie in the file, that one task reads.
PIECE_BYTES = 64 * 2**20
ROWS_AT_ONCE = 32


def row_group_ranges(fs: Any, path: str) -> list[tuple[int, int]]:
    """[start, end) of the row groups of a file for each task; of a file that cannot be read one range,
    whose reading says so.
    """
    try:
        with open_file(path if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(path)) as handle:
            metadata = pq.read_metadata(handle)
    except (pa.ArrowException, OSError):
        return [(0, 1)]
    ranges, first, size = [], 0, 0
    for group in range(metadata.num_row_groups):
        size += sum(
            metadata.row_group(group).column(number).total_compressed_size
            for number in range(metadata.num_columns)
        )
        if size >= PIECE_BYTES or group == metadata.num_row_groups - 1:
            ranges.append((first, group + 1))
            first, size = group + 1, 0
    return ranges


def rows_of_groups(path: str, start: int, end: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number in the file, row) of the row groups [start, end) of a file, few in memory at a time.

    Each file is read by its own schema: shards of one set differ in the types of columns, and in the columns
    that they have.
    """
    with open_file(path) as handle:
        file = pq.ParquetFile(handle, buffer_size=2**20)
        groups = list(range(start, min(end, file.num_row_groups)))
        number = sum(file.metadata.row_group(group).num_rows for group in range(start))
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, row_groups=groups) if groups else ():
            yield from enumerate(batch.to_pylist(), number)
            number += batch.num_rows


def hugging_face(
    record: Mapping[str, Any],
    split: str | None,
    images: str,
    more: Collection[str] = (),
    where: str = "Parquet row",
) -> Row:
    """A row of a Hugging Face data set: `image` {bytes, path} (or bytes, or a file's name; or `images` with
    one) and a preference (see preference_pair), a dialogue (see dialogue_turns), question and answer, with
    options or without (PathVQA, VQA-RAD), one of TEXT_COLUMNS, or nothing. Column names are read in any case.

    The image's id is the hash of its bytes; the data sets have no ids of their own. A question is closed
    where its answer is yes or no.

    Args:
        split: of the file; a record's own comes first.
        more: names that are splits too.
        where: the row's place in the source.
    """
    image_id, data, file = "unknown", None, None
    try:
        named = Named(record)
        data, file = _image(named, images)
        image_id = image_digest(data) if data is not None else str(file).removeprefix(images).lstrip("/")
        sample, payload = _said(named, image_id)
        made = row(sample, image_id, file, payload, split=record_split(record, more) or split, image=data)
    except (BadRecord, UnknownSplit) as bad:
        return error_row(f"image-{image_id}", where, str(bad))
    except MemoryError:
        raise
    except Exception as odd:  # one row in a shape that no reader thought of
        return error_row(f"image-{image_id}", where, f"the row cannot be read ({type(odd).__name__})")
    return {**made, "where": where, "error": None}


def _image(record: dict[str, Any], images: str) -> tuple[bytes | None, str | None]:
    """(bytes, None) of an inline image, (None, file) of one that is named."""
    value = one_image(record)
    data = inline_image(value)
    if data is not None:
        return data, None
    value = named_file(value)
    if isinstance(value, str) and value.strip():
        return None, inside(images, value.strip())
    raise BadRecord("field 'image' is empty")


def _said(record: Mapping[str, Any], image_id: str) -> tuple[str, dict[str, Any]]:
    """(sample_id, payload) of the first of these that the row has: a preference, a dialogue, a question,
    a text.
    """
    readers = [
        ("chosen", _preference),
        *((field, _dialogue) for field in (*DIALOGUES, "completion")),
        ("question", _question),
    ]
    readers += [(field, _caption) for field in (column(record, TEXT_COLUMNS),) if field is not None]
    there = [(field, read) for field, read in readers if field in record]
    # Of a row in which all of them are empty the first names what is missing: it is no image alone.
    chosen = next((one for one in there if given(record, one[0]) is not None), there[0] if there else None)
    return chosen[1](record, image_id) if chosen else (image_id, {})


def _preference(record: Mapping[str, Any], image_id: str) -> tuple[str, dict[str, Any]]:
    pair = preference_pair(record)
    return preference_id(record, image_id, pair), {"preference": pair}


def _dialogue(record: Mapping[str, Any], image_id: str) -> tuple[str, dict[str, Any]]:
    turns = dialogue_turns(record)
    return f"{image_id}:{digest(*(turn['text'] for turn in turns))[:8]}", {"turns": turns}


def _question(record: Mapping[str, Any], image_id: str) -> tuple[str, dict[str, Any]]:
    name, payload = question_of(record)
    return f"{image_id}:{name}", payload


def _caption(record: Mapping[str, Any], image_id: str) -> tuple[str, dict[str, Any]]:
    text = caption_of(record, column(record, TEXT_COLUMNS))
    return f"{image_id}:{digest(text)[:8]}", {"caption": text, "context": None}


# Columns that say nothing of what an image shows.
_PLAIN_COLUMNS = {
    "id",
    "idx",
    "index",
    "uid",
    "uuid",
    "sample_id",
    "image_id",
    "img_id",
    "split",
    "subset",
    "path",
    "file_name",
    "filename",
    "image_path",
    "image_name",
    "width",
    "height",
    "size",
    "format",
    "source",
    "dataset",
    "license",
    "url",
    "md5",
    "sha256",
    "hash",
}
_READ_COLUMNS = {"image", "images", "question", "completion", "chosen", "rejected", *DIALOGUES, *TEXT_COLUMNS}


def unread_labels(names: Iterable[str]) -> list[str]:
    """Columns beside the image that may hold labels, if no column of the table is one that is read; else
    [].
    """
    lower = {name.strip().lower(): name for name in names}
    if _READ_COLUMNS & lower.keys() - {"image", "images"}:
        return []
    return [
        name
        for low, name in lower.items()
        if low not in _PLAIN_COLUMNS | {"image", "images"} and not low.startswith("__")
    ]
