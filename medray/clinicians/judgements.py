"""Clinicians' judgements as rows: the last word of each, preference pairs and demonstrations made of them
(pure, no database).

Source: BioMed-VITAL (arXiv 2406.13173), sections 3.1 and 3.2: clinicians see image, caption, in-text mention,
question and two answers and tick each answer good or not; one tick makes a preference pair, and what they
accept becomes the demonstration bank.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import xxhash

from medray.data.exchanges import known_of, same_answer

Row = dict[str, Any]

STATUSES = ("judged", "skipped", "not_answerable")
FINGERPRINTED = ("image_id", "question", "answer_a", "answer_b")


def judged(rows: Iterable[Row]) -> list[Row]:
    """One records.JUDGEMENT row per item and clinician, the last word of each, in order of item and
    clinician.

    The last is the one with the latest `judged_at`; of equal times the later row; one without a time comes
    before those that have one. Holds the judgements, which have no images.
    """
    last: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (row["item_id"], row["clinician"])
        if key not in last or _when(row) >= _when(last[key]):
            last[key] = row
    return [last[key] for key in sorted(last)]


def preference_rows(
    items: Iterable[Row], judgements: Iterable[Row], counts: Counter | None = None
) -> Iterator[Row]:
    """records.RATING_PAIR rows: the answer a clinician called good over the one they did not, in their own
    words where they edited.

    Two good answers, or none, say nothing about which is better: no pair; nor do two that an edit has made
    the same.

    Args:
        items: records.CLINICIAN_ITEM rows; streamed. An item that comes twice is taken once.
        judgements: records.JUDGEMENT rows, also histories.
        counts: gets pairs, both_good, neither_good, edited_to_the_same, skipped, not_answerable, and
            unknown_item for judgements whose item is not there.
    """
    counts = Counter() if counts is None else counts
    for item, words in _with_judgements(items, judgements, counts):
        for word in words:
            outcome = choice(word)
            if outcome not in ("a", "b"):
                counts[{"both": "both_good", "neither": "neither_good"}.get(outcome, outcome)] += 1
            elif same_answer(*(_texts(item, word, side)[1] for side in "ab")):
                counts["edited_to_the_same"] += 1
            else:
                counts["pairs"] += 1
                yield _pair(item, word, chosen=outcome)


def demonstration_rows(
    items: Iterable[Row], judgements: Iterable[Row], counts: Counter | None = None
) -> Iterator[Row]:
    """records.EXCHANGE rows of the demonstration bank: at most one accepted answer for each item.

    An answer is accepted where more than half of the clinicians who judged the item call it good; "not
    answerable" counts as a word against both. Of two accepted answers the one with more ticks is taken, of
    equal ones a. The words are those of the last clinician who called it good and edited it or the question;
    else the stored ones.

    Args:
        items, judgements: as in preference_rows.
        counts: gets accepted, not_accepted, not_judged (all skipped it) and unknown_item.
    """
    counts = Counter() if counts is None else counts
    for item, words in _with_judgements(items, judgements, counts):
        said = [word for word in words if word["status"] != "skipped"]
        good = {
            side: [word for word in said if word["status"] == "judged" and word[f"good_{side}"]]
            for side in "ab"
        }
        side = max("ab", key=lambda side: len(good[side]))  # max keeps the first of equals
        if not said:
            counts["not_judged"] += 1
        elif 2 * len(good[side]) <= len(said):
            counts["not_accepted"] += 1
        else:
            counts["accepted"] += 1
            yield _demonstration(item, side, good[side])


def choice(word: Row) -> str:
    """What a judgement says of the pair: a | b | both | neither | skipped | not_answerable."""
    if word["status"] != "judged":
        return word["status"]
    return {(True, False): "a", (False, True): "b", (True, True): "both", (False, False): "neither"}[
        bool(word["good_a"]), bool(word["good_b"])
    ]


def item_fingerprint(item: Mapping[str, Any]) -> str:
    """What a judgement of the item is about, as 16 hex digits: the image (by its id), the question and both
    answers as they were shown.

    An item's id names an image and a turn: another run may write another question under it.
    """
    return xxhash.xxh64_hexdigest(json.dumps([item[name] for name in FINGERPRINTED]).encode())


def _with_judgements(
    items: Iterable[Row], judgements: Iterable[Row], counts: Counter
) -> Iterator[tuple[Row, list[Row]]]:
    """Each judged item with what was said of it; what is left over is counted."""
    words: dict[str, list[Row]] = defaultdict(list)
    for word in judged(judgements):
        words[word["item_id"]].append(word)
    for item in items:
        if item["item_id"] in words:
            yield item, words.pop(item["item_id"])
    counts["unknown_item"] += sum(map(len, words.values()))


def _when(word: Row) -> tuple[bool, Any]:
    return word["judged_at"] is not None, word["judged_at"]


def _image_id(item: Row) -> str:
    """An item's image needs no id of its own; what is made of it does: images are told apart, and held
    out, by it.
    """
    return item["image_id"] or hashlib.sha256(item["image"]).hexdigest()[:32]


def _pair(item: Row, word: Row, chosen: str) -> Row:
    rejected = "b" if chosen == "a" else "a"
    row = {
        "sample_id": f"{item['item_id']}/{word['clinician']}",
        "origin": "clinician",
        "judge": word["clinician"],
    }
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        question, answer = _texts(item, word, side)
        row |= {
            f"{name}_image_id": _image_id(item),
            f"{name}_image": item["image"],
            f"{name}_context": known_of(item),
        }
        row |= {f"{name}_question": question, f"{name}_answer": answer, f"{name}_score": None}
    return row


def _demonstration(item: Row, side: str, accepting: list[Row]) -> Row:
    edited = [
        word
        for word in accepting
        if word["edited_question"] is not None or word[f"edited_{side}"] is not None
    ]
    word = max(edited or accepting, key=_when)
    question, answer = _texts(item, word, side)
    dialogue, turn = (
        (item["item_id"], 0) if item["dialogue_id"] is None else (item["dialogue_id"], item["turn"] or 0)
    )
    return {
        "sample_id": f"{dialogue}#{turn}",
        "dialogue_id": dialogue,
        "turn": turn,
        "image_id": _image_id(item),
        "image": item["image"],
        "modality": item["modality"],
        "context": known_of(item),
        "question": question,
        "answer": answer,
    }


def _texts(item: Row, word: Row, side: str) -> tuple[str, str]:
    """(question, answer) as the clinician left them."""
    question, answer = word["edited_question"], word[f"edited_{side}"]
    return (
        item["question"] if question is None else question,
        item[f"answer_{side}"] if answer is None else answer,
    )
