"""Prepared shards out to the formats other tools read, as one stream: WebDataset tars, LLaVA JSON, TRL
preference rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from medray.errors import ConfigError, DataError
from medray.ingest.export import write_llava, write_preferences, write_webdataset
from medray.ingest.readers.canonical import members_of
from medray.private_files import private_folder
from medray.running.run import Run
from medray.running.run_hold import held
from medray.storage.shards import count_rows, parquet_files, stored_rows

# Writer, and the payloads it has a place for.
WRITERS = {
    "webdataset": (write_webdataset, ("caption", "turns", "question", "prompt", "attributes", "image")),
    "llava": (write_llava, ("caption", "turns", "question")),
    "trl": (write_preferences, ("prompt",)),
}


def check_export(kind: str, dataset: str) -> None:
    """Raise ConfigError for an unknown format or a directory that prepare_data has not written."""
    if kind not in WRITERS:
        raise ConfigError(f"--export: unknown format {kind!r}; there are {', '.join(WRITERS)}")
    if not parquet_files(f"{dataset.rstrip('/')}/shards"):
        raise ConfigError(f"--export: {dataset} has no shards/; give a directory of jobs/prepare_data.py")


def export_dataset(kind: str, dataset: str, target: str) -> dict[str, Any]:
    """Write every record of the prepared directory `dataset` that the format has a place for.

    Returns {"to", "format", "rows", "left_out": records without a place}. Raises DataError where nothing was
    written, RunHeld where another job writes there.
    """
    write, kinds = WRITERS[kind]
    left_out = 0

    def fitting() -> Iterator[dict[str, Any]]:
        nonlocal left_out
        for row in flat_rows(f"{dataset.rstrip('/')}/shards"):
            if row["kind"] in kinds:
                yield row
            else:
                left_out += 1

    private_folder(target)
    with held(Run(target), keep=False):
        rows = write(fitting(), target)
    if not rows:
        raise DataError(
            f"{dataset} holds nothing that {kind} has a place for ({left_out} records of other kinds)"
        )
    return {"to": target, "format": kind, "rows": rows, "left_out": left_out}


def flat_rows(shards_uri: str) -> Iterator[dict[str, Any]]:
    """One row per record of records.SAMPLE shards, with its image; `kind` says which payload it holds."""
    with tqdm(total=count_rows(shards_uri), unit="image", disable=None) as progress:
        for sample in stored_rows(shards_uri):
            progress.update()
            if sample["error"] is None:
                yield from _records(sample)


def _records(sample: dict[str, Any]) -> Iterator[dict[str, Any]]:
    base = {
        name: sample[name] for name in ("image_id", "image", "image_format", "split", "group_id", "modality")
    }
    for identity, payload in members_of(sample):
        flat = payload.get("qa") or payload.get("preference") or payload
        if "record" in flat:
            flat = {"attributes": flat["record"]}
        kind = next(
            (name for name in ("caption", "turns", "question", "prompt", "attributes") if name in flat),
            "image",
        )
        yield {**base, **flat, "sample_id": identity, "kind": kind}
