"""Convert a dataset to canonical shards: index -> shards -> account -> leaks -> report.

    shards/       records.SAMPLE rows: an image once, with all that the source says of it
    quarantine/   records.QUARANTINE rows: everything set aside, with file and reason
    leaks/        images found in more than one split: pairs.parquet, pairs.png
    manifest.json what is inside, in numbers
    report.html

The directory is a run: the same command continues it, and `data.source` of any job reads it.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from medray.config import DataConfig, PrepareDataConfig
from medray.errors import DataError
from medray.ingest.uses import is_duplicate
from medray.methods.shared.data_report import write_report
from medray.records import QUARANTINE
from medray.running.ray_session import ray_session
from medray.running.run import Run, Stage
from medray.running.run_hold import held
from medray.running.set_aside import SetAside, check_set_aside
from medray.storage.shards import parquet_files, tables, tables_with_files

logger = logging.getLogger("medray")

SCHEMA_VERSION = 1
# A task that groups holds a block's rows as Python objects, several times their size in Arrow; smaller ones
# would be too many to sort.
INDEX_BLOCK_BYTES = 32 * 2**20
# fields that decide what a shard holds
LIMITS = {"max_image_bytes", "max_image_pixels", "max_aspect", "min_image_side", "rows_per_shard"}
# Fields that no index depends on: they say what images serve for in a method.
_NOT_INDEXED = {"label_fraction", "max_labelled", "max_unlabelled", "unlabelled_per_round", "turns"}
_TEXT_COLUMNS = [
    "sample_id",
    "split",
    "modality",
    "source",
    "image_format",
    "width",
    "height",
    "warnings",
    "captions",
    "dialogues",
    "questions",
    "preferences",
    "attributes",
    "set_aside",
    "error",
]
PARTS_OF_A_RECORD = ("attributes", "captions", "dialogues", "questions", "preferences")
FEW = 20  # records set aside never fail the job: it names each of them, and its product is looked at
_LEAK_COLUMNS = ["sample_id", "image_id", "split", "group_id", "image_hash", "phash"]


def prepare_dataset(config: PrepareDataConfig, run_uri: str) -> dict[str, Any]:
    """Convert `config.data.source` into the dataset directory `run_uri`, or continue.

    Returns the summary that the job prints: run, images, splits, questions, quarantined, duplicates,
    unread (files by suffix), unused (fields by file), warnings, leaks, seconds, report.

    Raises DataError where the source is in no known format or nothing in it can be used.
    """
    started = time.time()
    run = Run(run_uri)
    with held(run), ray_session(config.cluster):
        run.write_config(config)
        index, shards, account = run.reread(lambda: read_source(run, config), "01-index", "02-shards")
        kind = index["outputs"]["format"]
        if not account["outputs"]["counts"]["images"]:
            raise DataError(
                f"data.source: nothing in {config.data.source} can be used; {run.path('quarantine')} says "
                f"why: {account['outputs']['reasons']}"
            )
        leaks = run.stage(
            "04-leaks",
            {"shards": shards["hash"], "config": config.leaks},
            lambda stage: search_leaks(stage, config),
        )
        seen = {**index["outputs"]["account"], "warnings": account["outputs"]["tallies"]["warnings"]}
        manifest = {
            "schema": SCHEMA_VERSION,
            "kind": "medray-dataset",
            "format": kind,
            **account["outputs"]["counts"],
            **seen,
            "leaks": leaks["outputs"]["counts"],
        }
        run.write_json(manifest, "manifest.json")
        write_report(run, config, manifest, account["outputs"], leaks["outputs"])
    return {
        "run": run.uri,
        "format": kind,
        **account["outputs"]["counts"],
        **seen,
        "leaks": leaks["outputs"]["counts"],
        "seconds": round(sum(stage["seconds"] for stage in run.timeline), 1),
        "wall_seconds": round(time.time() - started, 1),
        "report": run.path("report.html"),
    }


def read_source(run: Run, config: PrepareDataConfig) -> tuple[dict[str, Any], ...]:
    """The manifests of the stages that read the source: index, shards, account."""
    index = run.stage("01-index", index_inputs(config.data), lambda stage: write_index(stage, config.data))
    kind, limits = index["outputs"]["format"], config.data.model_dump(include=LIMITS)

    def written(stage: Stage) -> dict[str, Any]:
        run.remove("manifest.json")  # until the end it would say that the dataset is whole
        return write_samples(stage, config.data, index["outputs"]["rows"], kind, run.path("shards"))

    shards = run.stage("02-shards", {"index": index["hash"], "limits": limits}, written)
    return (
        index,
        shards,
        run.stage(
            "03-account",
            {"shards": shards["hash"]},
            lambda stage: take_account(stage, config.max_quarantined),
        ),
    )


def index_inputs(data: DataConfig) -> dict[str, Any]:
    """What the index depends on."""
    return {"data": data.outcome(*LIMITS, *_NOT_INDEXED)}


def write_index(stage: Stage, data: DataConfig) -> dict[str, Any]:
    """What the source holds, without pixels, one row per image and split, in an order fixed by the ids."""
    from medray.ingest.group_by_image import read_groups
    from medray.ingest.source_index import detect
    from medray.ingest.unread import account_of, unread_line
    from medray.methods.shared.training_sets import rendered
    from medray.storage.shards import count_rows, small_blocks, write_in_order

    data = rendered(data, stage.dir)
    kind, _ = detect(data)
    stage.reset("rows")  # made anew by each attempt: it is small and ordered as a whole
    stage.reset("notes")
    with small_blocks(INDEX_BLOCK_BYTES):
        write_in_order(read_groups(data, stage.path("notes")), stage.path("rows"), data.read_cpus)
    images = count_rows(stage.path("rows"))
    account = account_of(data, stage.path("notes"), partial(_image_files, stage.path("rows")), images)
    if account["unread"]:
        logger.info("%s", unread_line(account["unread"]))
    return {"rows": stage.path("rows"), "format": kind, "counts": {"images": images}, "account": account}


def _image_files(rows: str) -> Iterator[list[str | None]]:
    for table in tables(rows, ["image_file"], 2**14):
        yield table["image_file"].to_pylist()


def write_samples(stage: Stage, data: DataConfig, index_uri: str, kind: str, out: str) -> dict[str, Any]:
    """Load, check, hash and write every image; continues shard by shard."""
    from medray.ingest.canonical_rows import ToSamples
    from medray.storage.resumable import write_converted

    if not stage.exists("done"):
        stage.run.remove(out.removeprefix(stage.run.uri).strip("/"))  # left by another source
    rows = write_converted(
        index_uri,
        out,
        stage.path("done"),
        ToSamples(data.model_dump(), kind),
        data.rows_per_shard,
        data.read_cpus,
    )
    return {"rows": out, "counts": {"rows": rows}}


def check_samples(uri: str, max_quarantined: float) -> None:
    """Raise StageError if more of the records of SAMPLE shards were set aside than the job allows."""
    found, good = SetAside(), 0
    for path, table in tables_with_files(uri, ["error", "set_aside", *PARTS_OF_A_RECORD]):
        for row in table.to_pylist():
            for one in row["set_aside"] or ():
                if not is_duplicate(one["reason"]):
                    found.add(one["reason"], one["sample_id"])
                    found.files.add(path)
            good += (
                0
                if row["error"] is not None
                else max(1, sum(len(row[name] or ()) for name in PARTS_OF_A_RECORD))
            )
    check_set_aside("records", good + found.total, found, max_quarantined)


def take_account(stage: Stage, max_quarantined: float = 1.0) -> dict[str, Any]:
    """Counts of everything in the shards, and the quarantine table; reads no image.

    Raises StageError if more of the records were set aside than `max_quarantined` allows, and more than FEW.
    If all were, the caller says so.
    """
    stage.run.remove("quarantine")
    stage.run.fs.makedirs(stage.run.path("quarantine"), exist_ok=True)
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    found = SetAside()
    tallies: dict[str, Counter[str]] = {
        name: Counter()
        for name in ("splits", "modalities", "formats", "answer_types", "attributes", "warnings", "languages")
    }
    sizes: Counter[int] = Counter()
    with (
        stage.run.fs.open(stage.run.path("quarantine", "part-000000.parquet"), "wb") as handle,
        pq.ParquetWriter(handle, QUARANTINE) as quarantine,
    ):
        for path, table in tables_with_files(stage.run.path("shards"), _TEXT_COLUMNS):
            bad = []
            for row in table.to_pylist():
                bad += [{**one, "stage": "prepare_data"} for one in row["set_aside"] or ()]
                if row["error"] is not None:
                    counts["images set aside"] += 1
                    continue
                tally_row(row, counts, tallies)
                counts["records"] += max(1, sum(len(row[name] or ()) for name in PARTS_OF_A_RECORD))
                sizes[max(row["width"], row["height"])] += 1
            for one in bad:
                duplicate = is_duplicate(one["reason"])
                counts["duplicates" if duplicate else "quarantined"] += 1
                if not duplicate:
                    found.add(one["reason"], one["sample_id"])
                    found.files.add(path)
                reasons[kind_of_reason(one["reason"])] += 1
            if bad:
                quarantine.write_table(pa.Table.from_pylist(bad, schema=QUARANTINE))
    if counts["images"]:
        check_set_aside(
            "records",
            counts["records"] + found.total,
            found,
            max_quarantined,
            stage.run.path("quarantine"),
            FEW,
        )
    fixed = {
        name: counts[name]
        for name in (
            "images",
            "attributes",
            "captions",
            "dialogues",
            "questions",
            "preferences",
            "quarantined",
            "duplicates",
            "images set aside",
        )
    }
    return {
        "counts": {**fixed, "splits": dict(sorted(tallies.pop("splits").items()))},
        "tallies": {name: dict(tally.most_common(200)) for name, tally in tallies.items()},
        "reasons": dict(reasons.most_common(50)),
        "longest_side": percentiles(sizes),
        "quarantine": stage.run.path("quarantine"),
    }


def tally_row(row: dict[str, Any], counts: Counter[str], tallies: dict[str, Counter[str]]) -> None:
    counts["images"] += 1
    tallies["splits"][row["split"] or "unknown"] += 1
    tallies["modalities"][row["modality"] or "unknown"] += 1
    tallies["formats"][row["image_format"]] += 1
    tallies["warnings"].update(row["warnings"] or ())
    for name in PARTS_OF_A_RECORD:
        counts[name] += len(row[name] or ())
    for question in row["questions"] or ():
        tallies["answer_types"][question["answer_type"]] += 1
        tallies["attributes"][question["attribute"] or "unknown"] += 1
        tallies["languages"][question["language"] or "unknown"] += 1


def kind_of_reason(reason: str) -> str:
    """A reason without its numbers and names, so that reasons can be counted."""
    import re

    return re.sub(r"'[^']*'|\d+", "…", reason)[:120]


def percentiles(sizes: Counter[int]) -> dict[str, int]:
    """Smallest, median and largest of counted values (pixels)."""
    total, seen, out = sizes.total(), 0, {}
    for value in sorted(sizes):
        seen += sizes[value]
        out.setdefault("smallest", value)
        if seen * 2 >= total:
            out.setdefault("median", value)
        out["largest"] = value
    return out


def search_leaks(stage: Stage, config: PrepareDataConfig) -> dict[str, Any]:
    """Images that stand in a held-out split and in another: leaks.parquet, counts, and a picture of the
    first pairs.
    """
    from medray.ingest.leaks import find_leaks, leak_picture, leak_table_markdown

    shards = stage.run.path("shards")
    leaks = find_leaks(
        lambda: tables(shards, _LEAK_COLUMNS),
        set(config.leaks.held_out),
        config.leaks.radius,
        config.leaks.max_pairs,
    )
    sink = pa.BufferOutputStream()
    pq.write_table(leaks.pairs, sink)
    stage.run.write_bytes(sink.getvalue().to_pybytes(), "leaks", "pairs.parquet")
    picture = None
    if leaks.pairs.num_rows:
        shown = leaks.pairs.slice(0, 12)
        wanted = {*shown["held_out_id"].to_pylist(), *shown["other_id"].to_pylist()}
        images = dict(images_of(shards, wanted))
        stage.run.write_bytes(leak_picture(leaks, images.__getitem__), "leaks", "pairs.png")
        picture = stage.run.path("leaks", "pairs.png")
    counts = {
        f"{held} also in {other}": {**asdict(found), "leaked": found.leaked}
        for (held, other), found in leaks.overlaps.items()
    }
    return {
        "counts": counts,
        "table": leak_table_markdown(leaks),
        "picture": picture,
        "folder": stage.run.path("leaks"),
    }


def images_of(uri: str, wanted: set[str]) -> Iterator[tuple[str, bytes]]:
    """(sample_id, image) of a few rows; row groups without them are not read."""
    for path in parquet_files(uri):
        fs, inner = url_to_fs(path)
        with fs.open(inner, "rb") as handle:
            file = pq.ParquetFile(handle)
            for group in range(file.num_row_groups):
                ids = file.read_row_group(group, columns=["sample_id"])["sample_id"].to_pylist()
                if wanted.isdisjoint(ids):
                    continue
                for identity, image in zip(
                    ids, file.read_row_group(group, columns=["image"])["image"].to_pylist(), strict=True
                ):
                    if identity in wanted:
                        yield identity, image
