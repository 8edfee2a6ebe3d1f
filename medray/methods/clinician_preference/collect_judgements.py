"""The clinicians' stage of clinician preference alignment, real or simulated, and checks against the truth.

Simulated clinicians, the checks, the arm of right answers, and captions made of attributes
(medray.methods.clinician_preference.training_sets) are all that reads the true attributes of images.
"""

from __future__ import annotations

import logging
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from medray import records
from medray.clinicians.simulated import simulated_judgements
from medray.config import ClinicianPreferenceConfig
from medray.config.section import without_passwords
from medray.errors import DataError, StageError, Waiting
from medray.methods.clinician_preference.ground_truth import true_attributes
from medray.running.run import Stage
from medray.running.set_aside import check_set_aside, counted

logger = logging.getLogger("medray")

ROWS = 256  # written at once


def collect(
    stage: Stage, config: ClinicianPreferenceConfig, items: dict[str, Any], drawn: dict[str, Any]
) -> dict[str, Any]:
    """What clinicians said of the items, as judgements, pairs and demonstrations.

    Raises Waiting where real clinicians have not judged enough.
    """
    from medray.clinicians.agreement import summary
    from medray.clinicians.judgements import demonstration_rows, preference_rows
    from medray.storage.shards import count_rows, stored_rows

    uri = items["outputs"]["items"]
    if not count_rows(uri):
        raise StageError(
            f"no question got two different answers ({items['outputs']['counts']}): there is nothing for "
            "clinicians to choose; draw more images (demonstrations.draw) or raise "
            "generate.answer.temperature"
        )
    for part in ("exported", "judgements", "pairs", "demonstrations"):
        stage.reset(part)
    if config.clinicians.kind == "simulated":
        _write(stage, "judgements", records.JUDGEMENT, simulated(config, uri, drawn["outputs"]["drawn"]))
    else:
        _real_judgements(stage, config, uri)
    judgements = stage.path("judgements")
    counts: Counter[str] = Counter()
    _write(
        stage,
        "pairs",
        records.RATING_PAIR,
        preference_rows(stored_rows(uri), stored_rows(judgements), counts),
    )
    _write(
        stage,
        "demonstrations",
        records.EXCHANGE,
        demonstration_rows(stored_rows(uri), stored_rows(judgements), counts),
    )
    if config.with_demonstrations and not count_rows(stage.path("demonstrations")):
        logger.warning(
            "no answer is called good by more than half of those who judged it (%s): dialogues are written "
            "without demonstrations; have more questions judged "
            "(demonstrations.draw) if they should not be",
            dict(counts),
        )
    return {
        **{part: stage.path(part) for part in ("judgements", "pairs", "demonstrations")},
        "agreement": summary(stored_rows(judgements)),
        "counts": {"items": count_rows(uri), "judgements": count_rows(judgements), **counts},
    }


def simulated(config: ClinicianPreferenceConfig, items: str, drawn: str) -> Iterator[dict[str, Any]]:
    """Judgements of clinicians simulated from the true attributes of the drawn images."""
    from medray.storage.shards import stored_rows

    truth = true_attributes(drawn)
    for item in stored_rows(items, ["item_id", "image_id", "question", "answer_a", "answer_b"]):
        yield from simulated_judgements(item, truth[item["image_id"]], config.clinicians)


def _real_judgements(stage: Stage, config: ClinicianPreferenceConfig, items: str) -> None:
    """Copy what clinicians have judged into the stage. Raises Waiting where it is not
    enough.
    """
    from medray.clinicians.import_export import ask_for, export_judgements, import_items, why_unusable
    from medray.clinicians.judgements import FINGERPRINTED, item_fingerprint, judged
    from medray.storage.shards import count_rows, stored_rows

    clinicians = config.clinicians
    if clinicians.kind == "export":
        source = exported_judgements(clinicians.source)
    else:
        import_items(items, clinicians.source, seed=clinicians.seed, limits=config.data)
        ask_for(items, clinicians.source, clinicians.judgements_per_item)
        source = stage.path("exported")
        export_judgements(clinicians.source, source)
    # What the page cannot show nobody can judge, also where the page is elsewhere: such items are not waited
    # for.
    found = counted((row["item_id"], why_unusable(row, config.data)) for row in stored_rows(items))
    unusable = found.total
    check_set_aside("questions", count_rows(items), found, config.max_quarantined, items)
    asked = {row["item_id"]: item_fingerprint(row) for row in stored_rows(items, ["item_id", *FINGERPRINTED])}
    # a database may hold other runs' items too
    said = [row for row in judged(stored_rows(source)) if row["item_id"] in asked]
    other = [row["item_id"] for row in said if row.get("item") not in (None, asked[row["item_id"]])]
    if other:
        raise DataError(
            f"clinicians.source: {len(other)} of the judgements in {source} are of other questions or "
            f"answers than this run's, {other[0]} first; give those that were made for {items}"
        )
    words = Counter(row["item_id"] for row in said if row["status"] != "skipped")
    complete = {name for name, number in words.items() if number >= clinicians.judgements_per_item}
    skipped = len({row["item_id"] for row in said if row["status"] == "skipped"} - complete)
    wanted = max(1, round((len(asked) - unusable) * clinicians.enough))
    if len(complete) < wanted:
        database = (
            without_passwords(clinicians.source)
            if clinicians.kind == "database"
            else "sqlite:///judgements.db"
        )
        few = (
            (
                f"{skipped} more were skipped: another clinician can judge them, or a lower "
                "clinicians.enough "
                "goes on without.\n"
            )
            if skipped
            else ""
        )
        raise Waiting(
            f"{len(complete)} of {len(asked) - unusable} questions are judged by "
            f"{clinicians.judgements_per_item} clinicians each, {wanted} are needed "
            f"(clinicians.enough).\n{few}"
            f"a token for each clinician:  python -m serve.tokens clinicians.txt NAME\n"
            f"the page:  serve run serve.annotate:build items={items} database={database} "
            f"tokens=clinicians.txt judgements_per_item={clinicians.judgements_per_item}"
        )
    _write(stage, "judgements", records.JUDGEMENT, said)


def exported_judgements(folder: str) -> str:
    """The judgements in what `python -m medray.clinicians.import_export export` wrote: `folder` itself or its
    folder judgements.

    Raises DataError where there are none.
    """
    from medray.storage.shards import parquet_files

    for uri in (posixpath.join(folder, "judgements"), folder):
        for path in parquet_files(uri)[:1]:
            fs, inner = url_to_fs(path)
            with fs.open(inner, "rb") as handle:
                missing = {"item_id", "clinician", "status", "good_a", "good_b"} - set(
                    pq.read_schema(handle).names
                )
            if missing:
                raise DataError(
                    f"clinicians.source: {path} holds no judgements (it lacks {', '.join(sorted(missing))}); "
                    "give the folder that the export of judgements wrote"
                )
            return uri
    raise DataError(
        f"clinicians.source: {folder} holds no judgements: neither it nor its folder judgements has a "
        "Parquet file (docs/clinician_page.md says how to export)"
    )


def _write(stage: Stage, part: str, schema: pa.Schema, rows: Iterable[dict[str, Any]]) -> None:
    """Rows as shards of one folder of the stage, few in memory at a time."""
    from medray.storage.shards import tables_of, write_shard

    stage.run.fs.makedirs(stage.path(part), exist_ok=True)
    write_shard(tables_of(rows, schema, ROWS), stage.path(part), "part-000000")
