"""The clinicians' stage of clinician preference alignment, real or simulated, and checks against the truth.

Simulated clinicians, the checks, the arm of right answers, and captions made of attributes (medray.data.captioned) are all that reads the true
attributes of images.
"""

from __future__ import annotations

import logging
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from medray import records
from medray.config import ClinicianPreferenceConfig
from medray.config.section import without_passwords
from medray.data.clinicians import is_right, simulated_judgements
from medray.data.dialogues import ATTRIBUTES, asked_attribute
from medray.errors import DataError, StageError, Waiting
from medray.run import Stage
from medray.set_aside import check_set_aside, counted

logger = logging.getLogger("medray")

ROWS = 256  # written at once
TRUTH_IMAGES = 5000  # whose attributes are held in memory to check answers


def collect(stage: Stage, config: ClinicianPreferenceConfig, items: dict[str, Any], drawn: dict[str, Any]) -> dict[str, Any]:
    """What clinicians said of the items, as judgements, pairs and demonstrations.

    Raises Waiting where real clinicians have not judged enough.
    """
    from medray.data.judgements import demonstration_rows, preference_rows
    from medray.data.shards import count_rows, stored_rows
    from medray.evaluation.agreement import summary

    uri = items["outputs"]["items"]
    if not count_rows(uri):
        raise StageError(f"no question got two different answers ({items['outputs']['counts']}): there is nothing for clinicians to choose; draw more images (demonstrations.draw) or raise generate.answer.temperature")
    for part in ("exported", "judgements", "pairs", "demonstrations"):
        stage.reset(part)
    if config.clinicians.kind == "simulated":
        _write(stage, "judgements", records.JUDGEMENT, simulated(config, uri, drawn["outputs"]["drawn"]))
    else:
        _real_judgements(stage, config, uri)
    judgements = stage.path("judgements")
    counts: Counter[str] = Counter()
    _write(stage, "pairs", records.RATING_PAIR, preference_rows(stored_rows(uri), stored_rows(judgements), counts))
    _write(stage, "demonstrations", records.EXCHANGE, demonstration_rows(stored_rows(uri), stored_rows(judgements), counts))
    if config.with_demonstrations and not count_rows(stage.path("demonstrations")):
        logger.warning(
            "no answer is called good by more than half of those who judged it (%s): dialogues are written without demonstrations; have more questions judged "
            "(demonstrations.draw) if they should not be", dict(counts))
    return {
        **{part: stage.path(part) for part in ("judgements", "pairs", "demonstrations")}, "agreement": summary(stored_rows(judgements)),
        "counts": {"items": count_rows(uri), "judgements": count_rows(judgements), **counts},
    }


def simulated(config: ClinicianPreferenceConfig, items: str, drawn: str) -> Iterator[dict[str, Any]]:
    """Judgements of clinicians simulated from the true attributes of the drawn images."""
    from medray.data.shards import stored_rows

    truth = true_attributes(drawn)
    for item in stored_rows(items, ["item_id", "image_id", "question", "answer_a", "answer_b"]):
        yield from simulated_judgements(item, truth[item["image_id"]], config.clinicians)


def true_attributes(captioned: str, most: int | None = None) -> dict[str, dict[str, str]]:
    """The true attributes of the first `most` images of a folder of records.IMAGE_TEXT (None: all), by image; of few images only."""
    from medray.data.shards import stored_rows

    return {row["sample_id"]: dict(row["attributes"] or ()) for row in islice(stored_rows(captioned, ["sample_id", "attributes"]), most)}


def checkable(captioned: str) -> dict[str, dict[str, str]]:
    """The true attributes, by image, of those among the first TRUTH_IMAGES images that have all that answers are checked by."""
    return {image: values for image, values in true_attributes(captioned, TRUTH_IMAGES).items() if ATTRIBUTES.keys() <= values.keys()}


def rightness(captioned: str) -> Callable[[pa.Table], pa.Array]:
    """Scores for a table of exchanges: 1 of a right answer, 0 of a wrong one, 0.5 where it cannot be checked (or is of none of the first TRUTH_IMAGES images)."""
    truth = checkable(captioned)

    def scores(exchanges: pa.Table) -> pa.Array:
        rows = exchanges.select(["image_id", "question", "answer"]).to_pylist()
        found = (is_right(row["question"], row["answer"], truth[row["image_id"]]) if row["image_id"] in truth else None for row in rows)
        return pa.array([0.5 if right is None else float(right) for right in found], pa.float64())

    return scores


def _real_judgements(stage: Stage, config: ClinicianPreferenceConfig, items: str) -> None:
    """What people have said of the items, as the stage's judgements. Raises Waiting where it is not enough."""
    from medray.data.judgement_files import ask_for, export_judgements, import_items, why_unusable
    from medray.data.judgements import FINGERPRINTED, item_fingerprint, judged
    from medray.data.shards import count_rows, stored_rows

    clinicians = config.clinicians
    if clinicians.kind == "export":
        source = exported_judgements(clinicians.source)
    else:
        import_items(items, clinicians.source, seed=clinicians.seed, limits=config.data)
        ask_for(items, clinicians.source, clinicians.judgements_per_item)
        source = stage.path("exported")
        export_judgements(clinicians.source, source)
    # What the page cannot show nobody can judge, also where the page is elsewhere: such items are not waited for.
    found = counted((row["item_id"], why_unusable(row, config.data)) for row in stored_rows(items))
    unusable = found.total
    check_set_aside("questions", count_rows(items), found, config.max_quarantined, items)
    asked = {row["item_id"]: item_fingerprint(row) for row in stored_rows(items, ["item_id", *FINGERPRINTED])}
    said = [row for row in judged(stored_rows(source)) if row["item_id"] in asked]  # a database may hold other runs' items too
    other = [row["item_id"] for row in said if row.get("item") not in (None, asked[row["item_id"]])]
    if other:
        raise DataError(
            f"clinicians.source: {len(other)} of the judgements in {source} are of other questions or answers than this run's, {other[0]} first; give those that were made for {items}")
    words = Counter(row["item_id"] for row in said if row["status"] != "skipped")
    complete = {name for name, number in words.items() if number >= clinicians.judgements_per_item}
    skipped = len({row["item_id"] for row in said if row["status"] == "skipped"} - complete)
    wanted = max(1, round((len(asked) - unusable) * clinicians.enough))
    if len(complete) < wanted:
        database = without_passwords(clinicians.source) if clinicians.kind == "database" else "sqlite:///judgements.db"
        few = f"{skipped} more were skipped: another clinician can judge them, or a lower clinicians.enough goes on without.\n" if skipped else ""
        raise Waiting(
            f"{len(complete)} of {len(asked) - unusable} questions are judged by {clinicians.judgements_per_item} clinicians each, {wanted} are needed (clinicians.enough).\n{few}"
            f"a token for each clinician:  python -m serve.tokens clinicians.txt NAME\n"
            f"the page:  serve run serve.annotate:build items={items} database={database} tokens=clinicians.txt judgements_per_item={clinicians.judgements_per_item}")
    _write(stage, "judgements", records.JUDGEMENT, said)


def exported_judgements(folder: str) -> str:
    """The judgements in what `python -m medray.data.judgement_files export` wrote: `folder` itself or its folder judgements.

    Raises DataError where there are none.
    """
    from medray.data.shards import parquet_files

    for uri in (posixpath.join(folder, "judgements"), folder):
        for path in parquet_files(uri)[:1]:
            fs, inner = url_to_fs(path)
            with fs.open(inner, "rb") as handle:
                missing = {"item_id", "clinician", "status", "good_a", "good_b"} - set(pq.read_schema(handle).names)
            if missing:
                raise DataError(f"clinicians.source: {path} holds no judgements (it lacks {', '.join(sorted(missing))}); give the folder that the export of judgements wrote")
            return uri
    raise DataError(f"clinicians.source: {folder} holds no judgements: neither it nor its folder judgements has a Parquet file (docs/clinician_page.md says how to export)")


def _write(stage: Stage, part: str, schema: pa.Schema, rows: Iterable[dict[str, Any]]) -> None:
    """Rows as shards of one folder of the stage, few in memory at a time."""
    from medray.data.shards import tables_of, write_shard

    stage.run.fs.makedirs(stage.path(part), exist_ok=True)
    write_shard(tables_of(rows, schema, ROWS), stage.path(part), "part-000000")


def against_truth(config: ClinicianPreferenceConfig, made: dict[str, dict[str, Any]], kept: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """How many answers of the dialogues are right by the true attributes, and how well scores tell right from wrong.

    Over the first TRUTH_IMAGES images, which are in an order that a hash of their ids fixes.

    Returns {"images", "right": {"written" | arm: share of the answers that can be checked}, "auc": {"rating VLM" | "rating model": on images that
    the rating model was not trained on}, "auc, not in the caption": the same of answers to what the caption does not state}; a number is
    None where nothing can be checked. {} where the source has no such attributes.
    """
    from medray.data.rater_pairs import held_out
    from medray.data.shards import stored_rows

    truth = checkable(made["data"]["outputs"]["captioned"])
    if not truth:
        return {}

    def checked(uri: str) -> Iterator[tuple[bool, float, bool]]:
        for row in stored_rows(uri, ["image_id", "context", "question", "answer", "score"]):
            if row["score"] is not None and row["image_id"] in truth and held_out(row["image_id"], config.rater):
                right = is_right(row["question"], row["answer"], truth[row["image_id"]])
                if right is not None:
                    yield right, row["score"], _stated(row["context"] or "", row["question"], truth[row["image_id"]])

    dialogues = {"written": made["written"], **{arm: one for arm, one in kept.items() if arm != "all"}}
    scored = {name: list(checked(made[part]["outputs"]["rows"])) for name, part in (("rating VLM", "rated"), ("rating model", "scored"))}
    return {
        "images": len(truth), "right": {name: _share_right(one["outputs"]["conversations"], truth) for name, one in dialogues.items()},
        "auc": {name: _auc((right, score) for right, score, _ in found) for name, found in scored.items()},
        "auc, not in the caption": {name: _auc((right, score) for right, score, stated in found if not stated) for name, found in scored.items()},
    }


def _stated(context: str, question: str, attributes: dict[str, str]) -> bool:
    """Whether what is written about an image states what is asked for: a rating model that reads both need not see the image."""
    name = asked_attribute(question)
    return name is not None and (name.replace("_", " ") in context or attributes[name] in context.replace("\n", ", ").split(", "))


def _share_right(conversations: str, truth: dict[str, dict[str, str]]) -> float | None:
    from medray.data.exchanges import rounds_of
    from medray.data.shards import stored_rows

    found: Counter[bool | None] = Counter()
    for row in stored_rows(conversations, ["image_id", "turns"]):
        if row["image_id"] in truth:
            found.update(is_right(question, answer, truth[row["image_id"]]) for question, answer in rounds_of(row["turns"]))
    known = found[True] + found[False]
    return found[True] / known if known else None


def _auc(scored: Iterable[tuple[bool, float]]) -> float | None:
    from medray.evaluation.rating import auc

    by_truth: dict[bool, list[float]] = {True: [], False: []}
    for right, score in scored:
        by_truth[right].append(score)
    return auc(by_truth[True], by_truth[False]) if all(by_truth.values()) else None
