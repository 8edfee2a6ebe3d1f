"""Shards into the clinicians' database and out of it: items, judgements, preference pairs, demonstrations.

    python -m medray.clinicians.import_export export --database sqlite:///judgements.db --to DIR

All of it works through a few rows at a time; images are read and written one by one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import xxhash
import yaml
from fsspec.core import url_to_fs
from sqlalchemy import Connection, Engine, delete, func, insert, select
from sqlalchemy.exc import IntegrityError

from medray.clinicians.database import (
    ID_LENGTH,
    assignments,
    counting,
    images,
    items,
    open_database,
    set_aside,
    studies,
    words,
    writing,
)
from medray.clinicians.judgements import FINGERPRINTED, demonstration_rows, item_fingerprint, preference_rows
from medray.config import DataConfig
from medray.errors import DataError, MedrayError
from medray.images.decoding import ImageError, decode
from medray.private_files import private_folder
from medray.records import CLINICIAN_ITEM, EXCHANGE, JUDGEMENT, RATING_PAIR, conform
from medray.running.run import Run
from medray.running.run_hold import held
from medray.storage.shards import READ_ROWS, count_rows, parquet_files, tables, tables_of, write_shard

Row = dict[str, Any]

_NEEDED = ("item_id", "image", "question", "answer_a", "answer_b")
_TEXTS = ("image_id", "modality", "caption", "context", "dialogue_id", "question", "answer_a", "answer_b")
_ATTEMPTS = 50  # at as many imports that run at the same time
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

log = logging.getLogger(__name__)


def import_items(
    uri: str, url: str, seed: int = 0, priority: int = 0, limits: DataConfig | None = None
) -> dict[str, int]:
    """Put records.CLINICIAN_ITEM shards into the database; the same call again changes nothing, also after a
    kill.

    Args:
        seed: of the order in which items are shown.
        priority: of these items; greater ones are shown before all others.
        limits: of the images (data.max_image_pixels, ...).

    Returns {"imported", "already" (were there), "set_aside"}: an item without texts or a usable image is set
    aside with its reason.

    Raises DataError where there are no items, or one that is there already has other contents now: a judged
    item must stay what it was.
    """
    if not parquet_files(uri):
        raise DataError(f"items: no Parquet files in {uri}; give the folder of the clinician items")
    limits = DataConfig() if limits is None else limits
    engine = open_database(url)
    counts = Counter({"imported": 0, "already": 0, "set_aside": 0})
    for table in tables(uri, rows=READ_ROWS):
        missing = [name for name in _NEEDED if name not in table.column_names]
        if missing:
            raise DataError(
                f"items: {uri} lacks the columns {', '.join(missing)}; give shards of "
                "medray.records.CLINICIAN_ITEM"
            )
        rows = conform(table, CLINICIAN_ITEM).to_pylist()
        good, bad = {}, {}
        for number, row in enumerate(rows, counts.total()):
            reason = why_unusable(row, limits)
            if reason is None:
                made = _item(row, seed, priority)
                if good.setdefault(row["item_id"], made)["fingerprint"] != made["fingerprint"]:
                    raise _changed(row["item_id"], uri)
            else:
                identity = (
                    row["item_id"] if _is_name(row["item_id"]) else f"row {number} of {uri}"[-ID_LENGTH:]
                )
                bad[identity] = reason
                log.warning("item %s is set aside: %s", identity, reason)
        new = _insert_new(engine, good, bad, uri)
        counts.update({"imported": new, "set_aside": len(bad), "already": len(rows) - new - len(bad)})
    engine.dispose()
    return dict(counts)


def why_unusable(row: Row, limits: DataConfig) -> str | None:
    """Why an item cannot be shown, or None."""
    if not _is_name(row["item_id"]):
        return f"item_id is empty, longer than {ID_LENGTH} characters or has a NUL character"
    for name in ("question", "answer_a", "answer_b"):
        if not (row[name] or "").strip():
            return f"{name} is empty"
    for name in _TEXTS:
        if "\0" in (row[name] or ""):
            return f"{name} has a NUL character"
    try:
        decode(row["image"], limits)
    except ImageError as error:
        return str(error)
    return None


def export_judgements(url: str, target: str) -> int:
    """Write records.JUDGEMENT shards, one row for each item and clinician, in place of an earlier export;
    returns the rows.

    What a clinician took back is left out; the database keeps it.
    """
    engine = open_database(url)
    written = _write(judgement_rows(engine), target, JUDGEMENT)
    engine.dispose()
    return written


def export_pairs(url: str, target: str) -> dict[str, int]:
    """Write records.RATING_PAIR shards in place of an earlier export; returns judgements.preference_rows'
    counts.
    """
    return _export(url, target, preference_rows, RATING_PAIR)


def export_demonstrations(url: str, target: str) -> dict[str, int]:
    """Write records.EXCHANGE shards in place of an earlier export; returns judgements.demonstration_rows'
    counts.
    """
    return _export(url, target, demonstration_rows, EXCHANGE)


def export_all(url: str, folder: str) -> dict[str, Any]:
    """judgements/, pairs/ and demonstrations/ under `folder`, with their counts."""
    private_folder(folder)
    return {
        "judgements": export_judgements(url, f"{folder}/judgements"),
        "pairs": export_pairs(url, f"{folder}/pairs"),
        "demonstrations": export_demonstrations(url, f"{folder}/demonstrations"),
    }


def ask_for(uri: str, url: str, judgements_per_item: int) -> None:
    """Note in the database how many clinicians a job waits for to judge each of the items in `uri`, so
    that the page asks as many.
    """
    engine = open_database(url)
    study = hashlib.sha256(uri.encode()).hexdigest()
    with writing(engine) as connection:
        connection.execute(delete(studies).where(studies.c.folder == study))
        connection.execute(insert(studies).values(folder=study, judgements_per_item=judgements_per_item))
    engine.dispose()


def asked_for(url: str, uri: str | None = None) -> int | None:
    """How many clinicians the jobs behind a database, and behind the items in `uri`, wait for to judge each
    item; the largest number, or None if neither says so.

    The items of a run lie in its folder stages/03-candidates/items; the run's config.yaml says what it waits
    for.
    """
    engine = open_database(url)
    with engine.connect() as connection:
        found = [connection.scalar(select(func.max(studies.c.judgements_per_item)))]
    engine.dispose()
    if uri is not None:
        fs, root = url_to_fs(uri)
        # of shared stages, the name goes on
        run, inside, _ = root.rstrip("/").partition("/stages/03-candidates")
        config = posixpath.join(run, "config.yaml")
        if inside and fs.exists(config):
            clinicians = (yaml.safe_load(fs.cat_file(config)) or {}).get("clinicians") or {}
            found.append(clinicians.get("judgements_per_item"))
    return max((number for number in found if isinstance(number, int)), default=None)


def progress_of(url: str, judgements_per_item: int = 1) -> dict[str, int]:
    """{"items", "complete" (items that as many clinicians have judged), "judgements", "set_aside"} of a
    database.
    """
    engine = open_database(url)
    done = (
        select(assignments.c.item_id)
        .where(assignments.c.state == "done")
        .group_by(assignments.c.item_id)
        .having(func.count() >= judgements_per_item)
    )
    wanted = {
        "items": select(items.c.item_id),
        "complete": done,
        "judgements": counting(),
        "set_aside": select(set_aside.c.item_id),
    }
    with engine.connect() as connection:
        found = {
            name: connection.scalar(select(func.count()).select_from(rows.subquery()))
            for name, rows in wanted.items()
        }
    engine.dispose()
    return found


def judgement_rows(engine: Engine) -> Iterator[Row]:
    """The judgements that count as records.JUDGEMENT rows, in order of item and clinician."""
    with engine.connect().execution_options(yield_per=256) as connection:
        about = (
            counting()
            .join(items, items.c.item_id == words.c.item_id)
            .add_columns(*[items.c[name] for name in FINGERPRINTED])
        )
        for row in connection.execute(about.order_by(words.c.item_id, words.c.clinician)).mappings():
            taken = {
                name: row[name] for name in JUDGEMENT.names if name not in ("item", "simulated", "judged_at")
            }
            yield {
                **taken,
                "item": item_fingerprint(row),
                "simulated": False,
                "judged_at": _EPOCH + timedelta(microseconds=row["judged_at"]),
            }


def item_rows(engine: Engine) -> Iterator[Row]:
    """The items as records.CLINICIAN_ITEM rows, images as they were found, in order of id."""
    joined = items.join(images, items.c.image_hash == images.c.image_hash)
    columns = [images.c.image if name == "image" else items.c[name] for name in CLINICIAN_ITEM.names]
    with engine.connect().execution_options(yield_per=READ_ROWS) as connection:
        for row in connection.execute(
            select(*columns).select_from(joined).order_by(items.c.item_id)
        ).mappings():
            yield dict(row)


def _is_name(text: str | None) -> bool:
    return bool(text) and len(text) <= ID_LENGTH and "\0" not in text


def _item(row: Row, seed: int, priority: int) -> Row:
    """The item's row in the database, with its image."""
    image_hash = hashlib.sha256(row["image"]).hexdigest()
    shown = {name: row[name] for name in (*_TEXTS, "turn")} | {"image_hash": image_hash}
    fingerprint = hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()
    # databases' integers have a sign
    place = xxhash.xxh64_intdigest(f"{seed}/{row['item_id']}".encode()) >> 1
    return {
        **shown,
        "item_id": row["item_id"],
        "image": row["image"],
        "fingerprint": fingerprint,
        "place": place,
        "priority": priority,
    }


def _changed(item_id: str, uri: str) -> DataError:
    return DataError(
        f"items: {item_id!r} of {uri} has other contents than before; give changed items new ids, or use "
        "another database"
    )


def _insert_new(engine: Engine, good: dict[str, Row], bad: dict[str, str], uri: str) -> int:
    """Insert what is not there yet; returns how many items that were. Raises DataError for an item with
    other contents.
    """
    for _ in range(_ATTEMPTS):
        try:
            with writing(engine) as connection:
                return _insert_in(connection, good, bad, uri)
        except IntegrityError as error:
            # Another import put one of them there between our look and our insert; what it wrote is seen now.
            clash = error
    raise DataError(
        f"items: the database takes some ids of {uri} for the same, such as ids that differ only in case; "
        "give them ids that differ more"
    ) from clash


def _insert_in(connection: Connection, good: dict[str, Row], bad: dict[str, str], uri: str) -> int:
    there = dict(
        connection.execute(select(items.c.item_id, items.c.fingerprint).where(items.c.item_id.in_(good)))
        .tuples()
        .all()
    )
    for item_id, fingerprint in there.items():
        if fingerprint != good[item_id]["fingerprint"]:
            raise _changed(item_id, uri)
    new = [row for item_id, row in good.items() if item_id not in there]
    by_hash = {row["image_hash"]: row["image"] for row in new}
    known = set(connection.scalars(select(images.c.image_hash).where(images.c.image_hash.in_(by_hash))))
    for image_hash in by_hash.keys() - known:
        connection.execute(insert(images).values(image_hash=image_hash, image=by_hash[image_hash]))
    if new:
        connection.execute(
            insert(items), [{name: row[name] for name in row if name != "image"} for row in new]
        )
    named = set(connection.scalars(select(set_aside.c.item_id).where(set_aside.c.item_id.in_(bad))))
    reasons = [
        {"item_id": item_id, "reason": reason} for item_id, reason in bad.items() if item_id not in named
    ]
    if reasons:
        connection.execute(insert(set_aside), reasons)
    return len(new)


def _export(url: str, target: str, make: Any, schema: pa.Schema) -> dict[str, int]:
    engine = open_database(url)
    counts: Counter = Counter()
    _write(make(item_rows(engine), judgement_rows(engine), counts), target, schema)
    engine.dispose()
    return dict(counts)


def _write(rows: Iterable[Row], target: str, schema: pa.Schema) -> int:
    """Write rows as shards in place of those that are there; returns how many."""
    fs, root = url_to_fs(target)
    private_folder(target)  # demonstrations hold patients' images
    fs.makedirs(root, exist_ok=True)
    for path in parquet_files(target):
        fs.rm_file(fs._strip_protocol(path))
    write_shard(tables_of(rows, schema, READ_ROWS), target, "part")
    return count_rows(target)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m medray.clinicians.import_export",
        description="Clinician items into the page's database, judgements out of it.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    into = commands.add_parser("import", help="put shards of clinician items into the database")
    into.add_argument("--items", required=True, metavar="URI")
    into.add_argument("--seed", type=int, default=0, help="of the order in which items are shown")
    into.add_argument(
        "--priority", type=int, default=0, help="items of a greater priority are shown before all others"
    )
    out = commands.add_parser("export", help="write judgements/, pairs/ and demonstrations/")
    out.add_argument("--to", required=True, metavar="DIR")
    for command in (into, out):
        command.add_argument(
            "--database", required=True, metavar="URL", help="such as sqlite:///judgements.db"
        )
    given = parser.parse_args(arguments)
    try:
        if given.command == "import":
            done = import_items(given.items, given.database, given.seed, given.priority)
        else:
            with held(Run(given.to), keep=False):
                done = export_all(given.database, given.to)
    except MedrayError as error:
        raise SystemExit(str(error)) from None
    print(json.dumps(done))


if __name__ == "__main__":
    main()
