"""The clinicians' stage of clinician preference alignment, real or simulated, and checks against the truth.

Simulated clinicians and the checks are all that reads the true attributes of images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice, pairwise
from typing import Any

import pyarrow as pa

from medray import records
from medray.config import ClinicianPreferenceConfig
from medray.data.clinicians import is_right, simulated_judgements
from medray.data.dialogues import ATTRIBUTES
from medray.errors import StageError, Waiting
from medray.run import Stage

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


def _real_judgements(stage: Stage, config: ClinicianPreferenceConfig, items: str) -> None:
    """What people have said of the items, as the stage's judgements. Raises Waiting where it is not enough."""
    from medray.data.judgement_files import export_judgements, import_items
    from medray.data.judgements import judged
    from medray.data.shards import stored_rows

    clinicians = config.clinicians
    source, unusable = clinicians.source, 0
    if clinicians.kind == "database":
        unusable = import_items(items, clinicians.source, seed=clinicians.seed, limits=config.data)["set_aside"]
        source = stage.path("exported")
        export_judgements(clinicians.source, source)
    asked = {row["item_id"] for row in stored_rows(items, ["item_id"])}
    said = [row for row in judged(stored_rows(source)) if row["item_id"] in asked]  # a database may hold other runs' items too
    words = Counter(row["item_id"] for row in said if row["status"] != "skipped")
    complete = sum(number >= clinicians.judgements_per_item for number in words.values())
    wanted = max(1, round((len(asked) - unusable) * clinicians.enough))
    if complete < wanted:
        database = clinicians.source if clinicians.kind == "database" else "sqlite:///judgements.db"
        raise Waiting(
            f"{complete} of {len(asked) - unusable} questions are judged by {clinicians.judgements_per_item} clinicians each, {wanted} are needed (clinicians.enough).\n"
            f"a token for each clinician:  python -m serve.tokens clinicians.txt NAME\n"
            f"the page:  serve run serve.annotate:build items={items} database={database} tokens=clinicians.txt judgements_per_item={clinicians.judgements_per_item}")
    _write(stage, "judgements", records.JUDGEMENT, said)


def _write(stage: Stage, part: str, schema: pa.Schema, rows: Iterable[dict[str, Any]]) -> None:
    """Rows as shards of one folder of the stage, few in memory at a time."""
    from medray.data.shards import tables_of, write_shard

    stage.run.fs.makedirs(stage.path(part), exist_ok=True)
    write_shard(tables_of(rows, schema, ROWS), stage.path(part), "part-000000")


def against_truth(config: ClinicianPreferenceConfig, made: dict[str, dict[str, Any]], kept: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """How many answers of the dialogues are right by the true attributes, and how well scores tell right from wrong.

    Over the first TRUTH_IMAGES images, which are in an order that a hash of their ids fixes.

    Returns {"images", "right": {"written" | arm: share of the answers that can be checked}, "auc": {"rating VLM" | "rating model":
    on images that the rating model was not trained on, or None}}; {} where the source has no such attributes.
    """
    from medray.data.rater_pairs import held_out
    from medray.data.shards import stored_rows

    truth = {image: values for image, values in true_attributes(made["data"]["outputs"]["captioned"], TRUTH_IMAGES).items() if ATTRIBUTES.keys() <= values.keys()}
    if not truth:
        return {}

    def checked(uri: str) -> Iterator[tuple[bool, float]]:
        for row in stored_rows(uri, ["image_id", "question", "answer", "score"]):
            if row["score"] is not None and row["image_id"] in truth and held_out(row["image_id"], config.rater):
                right = is_right(row["question"], row["answer"], truth[row["image_id"]])
                if right is not None:
                    yield right, row["score"]

    dialogues = {"written": made["written"], **{arm: one for arm, one in kept.items() if arm != "all"}}
    return {
        "images": len(truth), "right": {name: _share_right(one["outputs"]["conversations"], truth) for name, one in dialogues.items()},
        "auc": {name: _auc(list(checked(made[part]["outputs"]["rows"]))) for name, part in (("rating VLM", "rated"), ("rating model", "scored"))},
    }


def _share_right(conversations: str, truth: dict[str, dict[str, str]]) -> float | None:
    from medray.data.shards import stored_rows

    found: Counter[bool | None] = Counter()
    for row in stored_rows(conversations, ["image_id", "turns"]):
        if row["image_id"] in truth:
            asked = ((user["text"], answer["text"]) for user, answer in pairwise(row["turns"]) if answer["role"] == "assistant")
            found.update(is_right(question, answer, truth[row["image_id"]]) for question, answer in asked)
    known = found[True] + found[False]
    return found[True] / known if known else None


def _auc(scored: list[tuple[bool, float]]) -> float | None:
    from medray.evaluation.rating import auc

    return auc([score for right, score in scored if right], [score for right, score in scored if not right])
