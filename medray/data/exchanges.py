"""Exchanges (a question and its answer) as dialogues; what generation wrote, in the forms others read (pure,
and streamed).

Ids: dialogue "{image}/d{k}" holds the k-th answers to the questions about an image, exchange
"{dialogue}#{turn}" is one of them.
"""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import pyarrow as pa

from medray.data.attribute_questions import turns_of
from medray.records import CLINICIAN_ITEM, CONVERSATION, EXCHANGE
from medray.storage.shards import empty_folder, stored_rows, tables, write_shard

Row = dict[str, Any]


def exchange_id(dialogue_id: str, turn: int) -> str:
    return f"{dialogue_id}#{turn}"


def normal(text: str) -> str:
    """What texts that say the same have in common: their letters and digits, in lower case."""
    return " ".join(re.findall(r"\w+", text.lower()))


def same_answer(one: str, other: str) -> bool:
    """Whether two answers differ in nothing but case, blanks and a full stop at the end: between them
    there is nothing to choose.
    """
    return _plain(one) == _plain(other)


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def kind_of_error(error: str | None) -> str:
    """An error without what differs from row to row, to count by: numbers, and what stands in quotation
    marks.
    """
    text = re.sub(r"\d+(\.\d+)?", "#", re.sub(r"'[^']*'|\"[^\"]*\"", "'...'", error or "unknown"))
    return text if len(text) <= 80 else f"{text[:77]}..."


def known_of(row: Mapping[str, Any]) -> str | None:
    """What is known of an image beside it: its caption and its context, or None.

    A context that begins with the caption's lines is all of it, as in the clinician items of older runs.
    """
    caption, context = ((row.get(name) or "").strip() for name in ("caption", "context"))
    return (context if f"{context}\n".startswith(f"{caption}\n") else f"{caption}\n{context}".strip()) or None


def conversation_row(exchanges: Sequence[Mapping[str, Any]]) -> Row:
    """The row of records.CONVERSATION that exchanges of one dialogue make, whatever their order; the
    image of whichever has it.
    """
    ordered = sorted(exchanges, key=lambda row: row["turn"])
    image = next((row["image"] for row in ordered if row["image"] is not None), None)
    turns = turns_of({"question": row["question"], "reference": row["answer"]} for row in ordered)
    return {
        "sample_id": ordered[0]["dialogue_id"],
        "image_id": ordered[0]["image_id"],
        "image": image,
        "turns": turns,
    }


def rounds_of(turns: Sequence[Mapping[str, str]]) -> Iterator[tuple[str, str]]:
    """(question, answer) of each round of a conversation's turns."""
    return (
        (user["text"], answer["text"]) for user, answer in pairwise(turns) if answer["role"] == "assistant"
    )


def demonstrations_of(exchanges: str | None) -> list[Row]:
    """Demonstrations for writers, out of shards of exchanges that clinicians accepted; none without a folder.

    Held in memory, without images: the bank is some dozens to hundreds of dialogues, as clinicians made it.

    Returns {"dialogue_id", "image_id", "modality", "context", "rounds": [{"question", "answer"}]} by
    dialogue, in order of id.
    """
    found: dict[str, Row] = {}
    rows = (
        []
        if exchanges is None
        else stored_rows(exchanges, [name for name in EXCHANGE.names if name != "image"])
    )
    for row in rows:
        one = found.setdefault(
            row["dialogue_id"],
            {name: row[name] for name in ("dialogue_id", "image_id", "modality", "context")} | {"rounds": []},
        )
        one["rounds"].append((row["turn"], row["question"], row["answer"]))
    for one in found.values():
        one["rounds"] = [
            {"question": question, "answer": answer} for _, question, answer in sorted(one["rounds"])
        ]
    return [found[name] for name in sorted(found)]


def unpack(generated: str, out_dir: str) -> dict[str, Any]:
    """Write what shards of records.GENERATED hold into three folders of `out_dir`, each emptied first:

    conversations  records.CONVERSATION, one row for each image and answer k
    exchanges      records.EXCHANGE, one row for each of their rounds
    items          records.CLINICIAN_ITEM, one row for each question with two answers that differ

    Returns what quality shows: numbers of each, dropped texts by reason, mean words and rounds.
    """
    writers: dict[str, tuple[pa.Schema, Callable[[Row], Iterable[Row]]]] = {
        "conversations": (CONVERSATION, lambda row: map(conversation_row, _dialogues(row))),
        "exchanges": (
            EXCHANGE,
            lambda row: (exchange for dialogue in _dialogues(row) for exchange in dialogue),
        ),
        "items": (CLINICIAN_ITEM, _items),
    }
    counts: Counter[str] = Counter({"images": 0, "without dialogue": 0, "exchanges": 0})
    for row in stored_rows(generated, ["error", "rounds", "dropped"]):
        counts.update(_quality(row))
    for name, (schema, make) in writers.items():
        folder = posixpath.join(out_dir, name)
        empty_folder(folder)
        counts[name] = 0

        def made(
            name: str = name, schema: pa.Schema = schema, make: Callable[[Row], Iterable[Row]] = make
        ) -> Iterator[pa.Table]:
            for table in tables(generated, rows=32):
                rows = [one for row in table.to_pylist() for one in make(row)]
                counts[name] += len(rows)
                if rows:
                    yield pa.Table.from_pylist(rows, schema=schema)

        write_shard(made(), folder, "part")
    words = {
        f"mean words, {side}": round(counts.pop(f"{side} words") / max(counts[f"{side}s"], 1), 2)
        for side in ("question", "answer")
    }
    del counts["answers"]
    return {
        **counts,
        **words,
        "mean rounds": round(counts["questions"] / max(counts["images"] - counts["without dialogue"], 1), 2),
    }


def _dialogues(row: Row) -> Iterator[list[Row]]:
    """For each answer k the exchanges of a GENERATED row; rounds without that answer are left out."""
    rounds = row["rounds"] or []
    for k in range(max((len(one["answers"]) for one in rounds), default=0)):
        name = f"{row['sample_id']}/d{k}"
        base = {
            "dialogue_id": name,
            "image_id": row["sample_id"],
            "image": row["image"],
            "modality": row["modality"],
            "context": known_of(row),
        }
        exchanges = [
            {
                "sample_id": exchange_id(name, turn),
                "turn": turn,
                **base,
                "question": one["question"],
                "answer": one["answers"][k],
            }
            for turn, one in enumerate(rounds)
            if len(one["answers"]) > k and one["answers"][k]
        ]
        if exchanges:
            yield exchanges


def _items(row: Row) -> Iterator[Row]:
    """What clinicians choose between; of equal answers there is nothing to choose."""
    name = f"{row['sample_id']}/d0"
    for turn, one in enumerate(row["rounds"] or []):
        answers = one["answers"]
        if len(answers) == 2 and all(answers) and not same_answer(*answers):
            yield {
                "item_id": exchange_id(name, turn),
                "image_id": row["sample_id"],
                "image": row["image"],
                "modality": row["modality"],
                "caption": row["caption"],
                "context": row["context"],
                "dialogue_id": name,
                "turn": turn,
                "question": one["question"],
                "answer_a": answers[0],
                "answer_b": answers[1],
            }


def _quality(row: Row) -> dict[str, int]:
    rounds = row["rounds"] or []
    answers = [answer for one in rounds for answer in one["answers"] if answer]
    counts = Counter(f"dropped: {kind_of_error(one['reason'])}" for one in row["dropped"] or [])
    if row["error"] is not None:
        counts[f"error: {kind_of_error(row['error'])}"] += 1
    return {
        **counts,
        "images": 1,
        "without dialogue": int(not answers),
        "questions": len(rounds),
        "answers": len(answers),
        "question words": sum(len(one["question"].split()) for one in rounds),
        "answer words": sum(len(answer.split()) for answer in answers),
    }
