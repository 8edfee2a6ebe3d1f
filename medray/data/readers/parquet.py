"""Parquet tables to index tables: medray's own shards, Hugging Face's with images inline, TRL preferences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from medray.data.inline_images import inline_image, named_file
from medray.data.readers.canonical import members_of, payloads
from medray.data.readers.captions import TEXT_COLUMNS, column
from medray.data.readers.common import (
    BadRecord,
    Row,
    digest,
    error_row,
    image_digest,
    inside,
    known_split,
    need_text,
    qa,
    row,
    yes_or_no,
)
from medray.data.readers.conversations import one_image, preference_id, preference_pair
from medray.errors import DataError

ROW_COLUMNS = ("image", "images", "question", "answer", "split", "id", "sample_id", "prompt", "chosen", "rejected", *TEXT_COLUMNS)
"""The columns `hugging_face` looks at."""


def shards(record: dict[str, Any]) -> Iterator[Row]:
    """A row of records.CONVERSATION, QUESTION, IMAGE_TEXT, PREFERENCE or SAMPLE, told apart by its columns."""
    identity = record["sample_id"]
    if not identity:
        identity = f"image-{image_digest(record['image'] or b'')}"
        yield error_row(identity, f"shard row {identity}", "sample_id is empty")
        return
    image_id = record.get("image_id") or identity
    where = f"shard row {identity}"
    common = {name: record.get(name) for name in ("split", "group_id", "modality")}
    if record.get("error"):
        yield error_row(identity, where, record["error"])
        return
    try:
        found = members_of(record) if "captions" in record else [(identity + suffix, payload) for suffix, payload in payloads(record)]
    except BadRecord as bad:
        yield error_row(identity, where, str(bad))
        return
    for number, (sample, payload) in enumerate(found):
        # The image is needed once only: rows of one image are joined again.
        yield {**row(sample, image_id, None, payload, image=None if number else record["image"], **common), "where": where, "error": None}


def check_shard_columns(names: list[str]) -> None:
    """Raises DataError where a table is no shard."""
    if not {"sample_id", "image"} <= set(names):
        raise DataError(f"Parquet shards need the columns sample_id and image; found {sorted(names)}")


def hugging_face(record: dict[str, Any], split: str | None, images: str) -> Row:
    """A row of a Hugging Face data set: `image` {bytes, path} (or bytes, or a file's name; or `images` with one) and
    question and answer (PathVQA, VQA-RAD), chosen and rejected (TRL), one of TEXT_COLUMNS, or nothing.

    The image's id is the hash of its bytes; the data sets have no ids of their own. A question is closed where its answer
    is yes or no.
    """
    image_id, data, file = "unknown", None, None
    try:
        data, file = _image(record, images)
        image_id = image_digest(data) if data is not None else str(file).removeprefix(images).lstrip("/")
        sample, payload = _said(record, image_id)
        made = row(sample, image_id, file, payload, split=known_split(record.get("split")) or split, image=data)
    except BadRecord as bad:
        return error_row(f"image-{image_id}", f"Parquet row of image {image_id}", str(bad))
    return {**made, "where": f"Parquet row {sample}", "error": None}


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


def _said(record: dict[str, Any], image_id: str) -> tuple[str, dict[str, Any]]:
    if record.get("chosen") is not None:
        pair = preference_pair(record)
        return preference_id(record, image_id, pair), {"preference": pair}
    if record.get("question") is not None:
        question, answer = need_text(record, "question"), need_text(record, "answer")
        return f"{image_id}:{digest(question, answer)[:8]}", qa(question, answer, "closed" if yes_or_no(answer) else "open")
    field = column(record, TEXT_COLUMNS)
    if field is None:
        return image_id, {}
    text = need_text(record, field)
    return f"{image_id}:{digest(text)[:8]}", {"caption": text, "context": None}
