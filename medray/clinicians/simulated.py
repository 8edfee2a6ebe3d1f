"""Clinicians simulated from the true attributes of images, with a stated error rate (pure; no image, no Ray).

They stand in for people where a method is tried out on data whose attributes are known; every judgement of
theirs says `simulated`. Each tick is drawn from (seed, item, clinician, answer) alone: the same on every run,
and independent between answers and clinicians.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from medray.clinicians.judgements import item_fingerprint
from medray.config import CliniciansConfig
from medray.data.attribute_questions import DESCRIBE_PHRASINGS, right_answer
from medray.errors import DataError
from medray.stable_draws import drawn, unit

NEVER = datetime(1970, 1, 1, tzinfo=UTC)  # when simulated clinicians judge: the same on every run


def simulated_names(config: CliniciansConfig) -> list[str]:
    return [f"simulated-{number}" for number in range(1, config.names + 1)]


def simulated_judgements(
    item: Mapping[str, Any], attributes: Mapping[str, str], config: CliniciansConfig
) -> Iterator[dict[str, Any]]:
    """Rows of records.JUDGEMENT: what config.judgements_per_item of the simulated clinicians say of an item.

    Args:
        item: row of records.CLINICIAN_ITEM.
        attributes: the true ones of its image.
    """
    identity = item["item_id"]
    for name in drawn(simulated_names(config), config.seed, "assigned", identity)[
        : config.judgements_per_item
    ]:
        truths = {side: is_right(item["question"], item[f"answer_{side}"], attributes) for side in "ab"}
        known = truths["a"] is not None
        skipped = "skipped" if item["question"].strip() in DESCRIBE_PHRASINGS else "not_answerable"
        yield {
            "item_id": identity,
            "clinician": name,
            "simulated": True,
            "status": "judged" if known else skipped,
            **{
                f"good_{side}": truth != errs(config, identity, name, side) if known else None
                for side, truth in truths.items()
            },
            "item": item_fingerprint(item),
            "judged_at": NEVER,
            "first_shown": "ab"[unit(config.seed, "first", identity, name) < 0.5],
        }


def errs(config: CliniciansConfig, item: str, clinician: str, side: str) -> bool:
    """Whether a simulated clinician's tick of an answer is the wrong one."""
    return unit(config.seed, "error", item, clinician, side) < config.error_rate


def is_right(question: str, answer: str, attributes: Mapping[str, str]) -> bool | None:
    """Whether an answer is, capitals and full stop aside, the word that the attributes give; None for a
    question in a form that medray.data.attribute_questions does not make.

    Raises DataError where the attributes are not those of medray.data.attribute_questions.ATTRIBUTES.
    """
    try:
        truth = right_answer(question, attributes)
    except KeyError as missing:
        raise DataError(
            f"attribute {missing} is not given: simulated clinicians need WBCAtt's attributes (data.format "
            "wbcatt, or testbed:cells)"
        ) from None
    return None if truth is None else answer.strip().rstrip(".").lower() == truth.lower()
