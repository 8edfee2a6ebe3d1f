"""Groups to canonical samples (records.SAMPLE): an image once, with all that the source says of it.

Inverse: medray.ingest.readers.canonical.members_of.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pyarrow as pa

from medray.config import DataConfig
from medray.data.attribute_questions import ATTRIBUTES
from medray.images.decoding import ImageError, decode, image_format
from medray.ingest.group_by_image import image_of, place_of
from medray.ingest.leaks import fingerprint
from medray.records import SAMPLE

REQUESTS_AT_ONCE = 16  # of a task, to an object store
# The list column each kind of payload goes to.
_KINDS = {"caption": "captions", "turns": "dialogues", "question": "questions", "prompt": "preferences"}


class ToSamples:
    """Callable for Dataset.map_batches(batch_format="pyarrow"): GROUP rows in, SAMPLE rows out, one for one.

    Args:
        data_config: limits, as a dict.
        source: the format's name, for the column `source`.
    """

    def __init__(self, data_config: dict[str, Any], source: str):
        self.limits = DataConfig.model_validate(data_config)
        self.source = source

    def __call__(self, table: pa.Table) -> pa.Table:
        groups = table.to_pylist()
        loads = [partial(image_of, group, self.limits) for group in groups]
        if not any("://" in (group["image_file"] or "") for group in groups):
            return pa.Table.from_pylist(list(map(self.sample, groups, loads)), schema=SAMPLE)
        # An object store takes tens of milliseconds to answer, and many questions at once.
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            coming = [pool.submit(load) for load in loads]
            return pa.Table.from_pylist(
                [self.sample(group, image.result) for group, image in zip(groups, coming)], schema=SAMPLE
            )

    def sample(self, group: dict[str, Any], load: Callable[[], tuple[bytes, list[str]]]) -> dict[str, Any]:
        """One SAMPLE row; an image that cannot be used gives its reason in `error` and sets all its records
        aside.

        Args:
            load: groups.image_of for this row.
        """
        members = json.loads(group["members"])
        row = {name: group[name] for name in ("sample_id", "image_id", "split", "group_id", "modality")}
        row |= {
            "source": self.source,
            "set_aside": [json.loads(bad) for bad in group["bad"]],
            "warnings": [],
            "error": None,
        }
        if not members:
            return {**row, "error": "every record of this image was set aside"}
        try:
            image, row["warnings"] = load()
            pixels = decode(image, self.limits)
        except ImageError as error:
            reason = str(error)
            row["set_aside"] += [
                {"sample_id": identity, "file": place_of(group, identity), "reason": reason}
                for identity, _ in members
            ]
            return {**row, "error": str(error)}
        row["image_hash"], row["phash"] = fingerprint(pixels)
        return {
            **row,
            "image": image,
            "image_format": image_format(image),
            "width": pixels.width,
            "height": pixels.height,
            **_texts(members),
        }


def _texts(members: list[list[Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {
        "attributes": [],
        "captions": [],
        "dialogues": [],
        "questions": [],
        "preferences": [],
    }
    for identity, payload in members:
        values = (
            {name: payload["record"][name] for name in ATTRIBUTES}
            if "record" in payload
            else payload.get("attributes")
        )
        if values:
            out["attributes"].append({"sample_id": identity, "values": values})
        flat = payload.get("qa") or payload.get("preference") or payload
        for key, column in _KINDS.items():
            if key in flat:
                out[column].append({**flat, "sample_id": identity})
    return out
