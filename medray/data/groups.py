"""Index rows to one row per image and split: the unit that is loaded, split, counted and resumed.

Rows are ordered by a hash of their image's id, so that order, samples and splits depend on ids alone and what belongs
to one image is in one block. The driver sees nothing but the lazy dataset.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from typing import Any

import pyarrow as pa

from medray.config import DataConfig
from medray.data.images import ImageError
from medray.data.sources import read_image_bytes, read_index

_FRAME = "#frame="  # of a DICOM file, in image_file

GROUP = pa.schema([
    ("sample_id", pa.string()),  # the image's id, with "@split" where the source has it in several splits
    ("image_id", pa.string()), ("image_file", pa.string()), ("image", pa.binary()),
    ("split", pa.string()), ("group_id", pa.string()), ("modality", pa.string()),
    ("members", pa.string()),  # JSON list of [sample_id, payload]
    ("bad", pa.list_(pa.string())),  # JSON objects {"sample_id", "file", "reason"}
    ("order", pa.int64()),
])


def unit(*keys: Any) -> float:
    """A number in [0, 1) fixed by the keys: the same on every machine."""
    return int.from_bytes(hashlib.sha256("|".join(map(str, keys)).encode()).digest()[:7], "big") / 2**56


def read_groups(config: DataConfig, notes: str | None = None) -> Any:
    """The source as a lazy ray.data.Dataset of GROUP rows, in an order that the images' ids fix; `notes` as in read_index."""
    return groups_of(read_index(config, config.read_cpus, notes), config)


def groups_of(index: Any, config: DataConfig) -> Any:
    """GROUP rows of a dataset of INDEX rows, in whatever order and blocks those come."""
    blocks = {"batch_size": None, "batch_format": "pyarrow", "num_cpus": config.read_cpus}
    # A sort by one column never parts rows of equal value: duplicates meet in one block, then the rows of an image.
    return index.sort("sample_id").map_batches(_prepared, **blocks).sort("order").map_batches(
        group_rows, fn_kwargs={"config": config.model_dump()}, **blocks,
    )


def _prepared(table: pa.Table) -> pa.Table:
    """INDEX rows with the `order` of their image; of equal sample_ids all but the first by `where` become bad rows."""
    rows = table.sort_by([("sample_id", "ascending"), ("where", "ascending")]).to_pylist()
    seen: set[str] = set()
    for row in rows:
        row["order"] = int(unit("order", row["image_id"]) * 2**62)
        if row["error"] is None:
            if row["sample_id"] in seen:
                row["error"] = "duplicate sample_id: the first row is kept"
            seen.add(row["sample_id"])
    return pa.Table.from_pylist(rows, schema=table.schema.append(pa.field("order", pa.int64())))


def split_of(row: dict[str, Any], config: DataConfig) -> str | None:
    """The row's split; where the source knows none, by a hash of its patient or else its image. None for a bad record."""
    if row["split"] is not None or row["error"] is not None:
        return row["split"]
    drawn = unit("split", row["group_id"] or row["image_id"])
    return config.eval_split if drawn < config.testbed_val_fraction else config.train_split


def group_rows(table: pa.Table, config: dict[str, Any]) -> pa.Table:
    """INDEX rows with their `order` to GROUP rows (pure). All rows of an image must be in the table."""
    settings = DataConfig.model_validate(config)
    groups: dict[tuple[str, str | None], dict[str, Any]] = {}
    for row in table.sort_by([("order", "ascending"), ("sample_id", "ascending"), ("where", "ascending")]).to_pylist():
        split = split_of(row, settings)
        group = groups.setdefault((row["image_id"], split), {
            **{name: row[name] for name in ("image_id", "image_file", "image", "group_id", "modality", "order")}, "split": split, "members": [], "bad": [],
        })
        if row["error"] is not None:
            group["bad"].append(json.dumps({"sample_id": row["sample_id"], "file": row["where"], "reason": row["error"]}))
            continue
        group["members"].append([row["sample_id"], json.loads(row["payload"])])
        for name in ("image_file", "image", "modality", "group_id"):
            if group[name] is None:
                group[name] = row[name]
    splits = Counter(image_id for image_id, _ in groups)
    for (image_id, split), group in groups.items():
        group["sample_id"] = image_id if splits[image_id] == 1 else f"{image_id}@{split or 'unknown'}"
        group["members"] = json.dumps(group["members"])
    return pa.Table.from_pylist(list(groups.values()), schema=GROUP)


def image_of(group: dict[str, Any], limits: DataConfig) -> tuple[bytes, list[str]]:
    """(encoded image, warnings) of a GROUP row: the image as the source holds it; a DICOM frame as PNG.

    Raises ImageError where it is missing, too large or cannot be read.
    """
    if group["image"] is not None:
        return group["image"], []
    path, marker, frame = (group["image_file"] or "").partition(_FRAME)
    if not marker:
        return read_image_bytes(path, limits.max_image_bytes), []
    from medray.data.dicom import frame_png, warnings_of

    try:
        data = read_image_bytes(path, limits.max_image_bytes)
    except ImageError:  # its reason names the file, and DICOM files are often named after the patient
        raise ImageError("the DICOM file is missing or over data.max_image_bytes") from None
    return frame_png(data, int(frame), limits), warnings_of(data)


def place_of(group: dict[str, Any]) -> str:
    """Where a GROUP row's image lies, for the quarantine; of DICOM the id, as paths often hold patients' names."""
    file = group["image_file"] or group["image_id"]
    return group["image_id"] if _FRAME in file else file
