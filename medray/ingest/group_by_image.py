"""Index rows to one row per image and split: the unit that is loaded, split, counted and resumed.

Rows are ordered by a hash of their image's id, so that order, samples and splits depend on ids alone and what
belongs to one image is in one block. The driver sees nothing but the lazy dataset.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from typing import Any

import pyarrow as pa

from medray.config import DataConfig
from medray.images.decoding import ImageError, other_frames, page_png
from medray.ingest.files.reading import is_dicom
from medray.ingest.source_index import read_image_bytes, read_index
from medray.pseudonyms import file_name
from medray.stable_draws import unit

_PART = re.compile(r"^(.*)#(frame|page)=(\d+)$", re.DOTALL)

GROUP = pa.schema(
    [
        ("sample_id", pa.string()),  # the image's id, with "@split" where the source has it in several splits
        ("image_id", pa.string()),
        ("image_file", pa.string()),
        ("image", pa.binary()),
        ("split", pa.string()),
        ("group_id", pa.string()),
        ("modality", pa.string()),
        ("members", pa.string()),  # JSON list of [sample_id, payload]
        ("places", pa.string()),  # JSON object: sample_id of a member -> its place in the source
        ("image_name", pa.string()),  # the image's path as errors show it
        ("bad", pa.list_(pa.string())),  # JSON objects {"sample_id", "file", "reason"}
        ("order", pa.int64()),
    ]
)


def read_groups(config: DataConfig, notes: str | None = None) -> Any:
    """The source as a lazy ray.data.Dataset of GROUP rows, in an order that the images' ids fix; `notes`
    as in read_index.
    """
    return groups_of(read_index(config, config.read_cpus, notes), config)


def groups_of(index: Any, config: DataConfig) -> Any:
    """GROUP rows of a dataset of INDEX rows, in whatever order and blocks those come."""
    blocks = {"batch_size": None, "batch_format": "pyarrow", "num_cpus": config.read_cpus}
    # A sort by one column never parts rows of equal value: duplicates meet in one block, then the rows of an
    # image.
    return (
        index.sort("sample_id")
        .map_batches(_prepared, **blocks)
        .sort("order")
        .map_batches(
            group_rows,
            fn_kwargs={"config": config.model_dump()},
            **blocks,
        )
    )


def _prepared(table: pa.Table) -> pa.Table:
    """INDEX rows with the `order` of their image. Rows of one sample_id and content are duplicates: all
    but one become bad rows, and the one that stays is held out if any is. Rows of one sample_id and
    different content are different records, as LLaVA's ids are those of images: each gets an id with a
    hash of its content, the same in every run.
    """
    rows = table.sort_by([("sample_id", "ascending"), ("where", "ascending")]).to_pylist()
    by_id: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        row["order"] = int(unit("order", row["image_id"]) * 2**62)
        if row["error"] is not None:
            continue
        kept = by_id.setdefault(row["sample_id"], {})
        content = _content(row)
        first = kept.setdefault(content, row)
        if first is row:
            continue
        if _held_out(row) > _held_out(first):
            kept[content], first, row = row, row, first
        row["error"] = f"duplicate sample_id: the same record is in {first['where']}"
    for kept in by_id.values():
        if len(kept) > 1:
            for content, row in kept.items():
                row["sample_id"] = f"{row['sample_id']}:{content[:12]}"
    return pa.Table.from_pylist(rows, schema=table.schema.append(pa.field("order", pa.int64())))


def _content(row: dict[str, Any]) -> str:
    """A hash of what a record says, wherever it stands."""
    return hashlib.sha256(f"{row['image_id']}\0{row['payload']}".encode()).hexdigest()


def _held_out(row: dict[str, Any]) -> int:
    return {"test": 2, "val": 1}.get(row["split"], 0)


def split_of(row: dict[str, Any], config: DataConfig) -> str | None:
    """The row's split; where the source knows none, by a hash of its patient or else its image. None for
    a bad record.
    """
    if row["split"] is not None or row["error"] is not None:
        return row["split"]
    drawn = unit("split", row["group_id"] or row["image_id"])
    return config.eval_split if drawn < config.testbed_val_fraction else config.train_split


def group_rows(table: pa.Table, config: dict[str, Any]) -> pa.Table:
    """INDEX rows with their `order` to GROUP rows (pure). All rows of an image must be in the table."""
    settings = DataConfig.model_validate(config)
    groups: dict[tuple[str, str | None], dict[str, Any]] = {}
    for row in table.sort_by(
        [("order", "ascending"), ("sample_id", "ascending"), ("where", "ascending")]
    ).to_pylist():
        split = split_of(row, settings)
        group = groups.setdefault(
            (row["image_id"], split),
            {
                **{
                    name: row[name]
                    for name in ("image_id", "image_file", "image", "group_id", "modality", "order")
                },
                "split": split,
                "members": [],
                "places": {},
                "image_name": row.get("image_name"),
                "bad": [],
            },
        )
        if row["error"] is not None:
            group["bad"].append(
                json.dumps({"sample_id": row["sample_id"], "file": row["where"], "reason": row["error"]})
            )
            continue
        group["members"].append([row["sample_id"], json.loads(row["payload"])])
        group["places"][row["sample_id"]] = row["where"]
        for name in ("image_file", "image", "modality", "group_id", "image_name"):
            if group[name] is None:
                group[name] = row.get(name)
    splits = Counter(image_id for image_id, _ in groups)
    for (image_id, split), group in groups.items():
        group["sample_id"] = image_id if splits[image_id] == 1 else f"{image_id}@{split or 'unknown'}"
        group["members"] = json.dumps(group["members"])
        group["places"] = json.dumps(group["places"])
    return pa.Table.from_pylist(list(groups.values()), schema=GROUP)


def image_of(group: dict[str, Any], limits: DataConfig) -> tuple[bytes, list[str]]:
    """(encoded image, warnings) of a GROUP row: the image as the source holds it; a frame of DICOM or a page
    of TIFF as PNG. What a file holds decides, not its name: a record may name a DICOM file like any other
    image.

    The warnings are categories to be counted: what may still show a person, frames that are left out.

    Raises ImageError where it is missing, too large or cannot be read.
    """
    from medray.images.dicom import frame_png, other_frames_of, warnings_of

    path, kind, number = _place_in(group["image_file"])
    if kind == "frame":
        try:
            data = read_image_bytes(path, limits.max_image_bytes)
        except ImageError:  # its reason names the file, and DICOM files are often named after the patient
            raise ImageError("the DICOM file is missing or over data.max_image_bytes") from None
        return frame_png(data, number, limits), warnings_of(data)
    data = group["image"]
    if data is None:
        data = read_image_bytes(path, limits.max_image_bytes, group.get("image_name"))
    if kind == "page":
        return page_png(data, number, limits), []
    if is_dicom(data):
        return frame_png(data, 0, limits), [*warnings_of(data), *other_frames_of(data)]
    return data, other_frames(data)


def _place_in(image_file: str | None) -> tuple[str, str | None, int]:
    """(path, "frame", "page" or None, its number) of an image_file."""
    part = _PART.match(image_file or "")
    return (part[1], part[2], int(part[3])) if part else (image_file or "", None, 0)


def place_of(group: dict[str, Any], identity: str | None = None) -> str:
    """Where a record (the member `identity`, else the first) of a GROUP row stands in the source, and its
    image there, for the quarantine; of DICOM the id, as paths often hold patients' names.
    """
    path, kind, _ = _place_in(group["image_file"])
    apart = path and kind != "frame" and "#offset=" not in path  # a tar's member is named by its place
    name = group.get("image_name") or (file_name(path) if apart else None)
    places = json.loads(group.get("places") or "{}")
    where = places.get(identity) or next(iter(places.values()), None) or name or group["image_id"]
    return where if name is None or name in where else f"{where}: {name}"
