"""Canonical rows out to formats that other tools read: WebDataset tars, LLaVA JSON, TRL preference rows.

Rows are dicts with sample_id and image (encoded bytes), and what they say of the image in the names of
medray.records: turns, question and reference, prompt with chosen and rejected, caption and context,
attributes; split, group_id, modality and image_id where they are known. They are streamed: no writer holds
more than one.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fsspec.core import url_to_fs

from medray.data.attribute_questions import DESCRIBE_PHRASINGS, turns_of
from medray.errors import DataError
from medray.images.decoding import image_format
from medray.ingest.readers.common import IMAGE_TOKEN
from medray.stable_draws import image_digest

_SUFFIXES = {
    "JPEG": "jpg",
    "PNG": "png",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
    "WEBP": "webp",
    "JPEG2000": "jp2",
    "PPM": "ppm",
    "AVIF": "avif",
}
_LLAVA_ROLES = {"user": "human", "assistant": "gpt", "questioner": "vuser", "system": "system"}
_TEXTS = (
    "sample_id",
    "image_id",
    "split",
    "group_id",
    "modality",
    "turns",
    "question",
    "reference",
    "answer_type",
    "attribute",
    "choices",
    "language",
    "prompt",
    "chosen",
    "rejected",
    "caption",
    "context",
    "attributes",
)


def write_webdataset(rows: Iterable[Mapping[str, Any]], folder: str, rows_per_tar: int = 1000) -> int:
    """Write <folder>/data-000000.tar, ... with key.jpg (or .png, ...) and key.json for each row; returns the
    rows written.

    The JSON holds everything but the image, under the row's own names, so that `data.format: webdataset`
    gives the rows back. The same rows give the same bytes.
    """
    fs, root = url_to_fs(folder)
    fs.makedirs(root, exist_ok=True)
    written = 0
    rows = iter(rows)
    row = next(rows, None)
    while row is not None:
        with (
            fs.open(f"{root}/data-{written // rows_per_tar:06d}.tar", "wb") as handle,
            tarfile.open(fileobj=handle, mode="w|") as tar,
        ):
            while row is not None:
                key = f"{written:09d}"
                _add(tar, f"{key}.{_suffix(row)}", row["image"])
                _add(tar, f"{key}.json", json.dumps(_texts(row), ensure_ascii=False).encode())
                written += 1
                row = next(rows, None)
                if written % rows_per_tar == 0:
                    break
    return written


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _texts(row: Mapping[str, Any]) -> dict[str, Any]:
    said = {name: row[name] for name in _TEXTS if row.get(name) is not None}
    if "attributes" in said:  # Arrow gives a map as pairs
        said["attributes"] = dict(said["attributes"])
    return said


def _suffix(row: Mapping[str, Any]) -> str:
    kind = row.get("image_format") or image_format(row["image"] or b"")
    if kind not in _SUFFIXES:
        raise DataError(
            f"{row['sample_id']}: image format {kind!r} has no file suffix; allowed: {', '.join(_SUFFIXES)}"
        )
    return _SUFFIXES[kind]


def write_llava(rows: Iterable[Mapping[str, Any]], folder: str) -> int:
    """Write <folder>/data.json (LLaVA's conversations) and <folder>/images; returns the rows written.

    A question becomes one exchange, a caption the answer to a request for a description. Raises DataError for
    a row with neither, nor turns.
    """
    fs, root = url_to_fs(folder)
    fs.makedirs(root, exist_ok=True)
    written = 0
    with fs.open(f"{root}/data.json", "w", encoding="utf-8") as out:
        out.write("[")
        for row in rows:
            record = {
                "id": row["sample_id"],
                "image": _write_image(fs, root, row),
                "conversations": _conversations(row),
            }
            if row.get("split"):
                record["split"] = row["split"]
            out.write(f"{',' if written else ''}\n{json.dumps(record, ensure_ascii=False)}")
            written += 1
        out.write("\n]\n")
    return written


def _conversations(row: Mapping[str, Any]) -> list[dict[str, str]]:
    if row.get("turns"):
        turns = row["turns"]
    elif row.get("question"):
        turns = turns_of([row])
    elif row.get("caption"):
        turns = turns_of([{"question": DESCRIBE_PHRASINGS[0], "reference": row["caption"]}])
    else:
        raise DataError(
            f"{row['sample_id']}: LLaVA JSON holds dialogues; the row has no turns, question or caption"
        )
    first = next(number for number, turn in enumerate(turns) if turn["role"] != "system")
    return [
        {
            "from": _LLAVA_ROLES[turn["role"]],
            "value": f"{IMAGE_TOKEN}\n{turn['text']}" if number == first else turn["text"],
        }
        for number, turn in enumerate(turns)
    ]


def write_preferences(rows: Iterable[Mapping[str, Any]], folder: str) -> int:
    """Write <folder>/preferences.jsonl (TRL's conversational preference rows, `images` naming the file) and
    <folder>/images; returns the rows written. Raises DataError for a row without prompt, chosen and
    rejected."""
    fs, root = url_to_fs(folder)
    fs.makedirs(root, exist_ok=True)
    written = 0
    with fs.open(f"{root}/preferences.jsonl", "w", encoding="utf-8") as out:
        for row in rows:
            missing = [name for name in ("prompt", "chosen", "rejected") if not row.get(name)]
            if missing:
                raise DataError(f"{row['sample_id']}: a preference row needs {', '.join(missing)}")
            record = {"id": row["sample_id"], "images": [_write_image(fs, root, row)], **dict(_messages(row))}
            if row.get("split"):
                record["split"] = row["split"]
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
            written += 1
    return written


def _messages(row: Mapping[str, Any]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    for name, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")):
        yield name, [{"role": role, "content": row[name]}]


def _write_image(fs: Any, root: str, row: Mapping[str, Any]) -> str:
    """The image's path below the folder; rows with the same image share a file."""
    name = f"images/{image_digest(row['image'])}.{_suffix(row)}"
    fs.makedirs(f"{root}/images", exist_ok=True)
    fs.pipe_file(f"{root}/{name}", row["image"])
    return name
