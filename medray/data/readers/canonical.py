"""Records in medray's own words, as its shards and its WebDataset tars hold them, to payloads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from medray.data.dialogues import check_record
from medray.data.readers.common import BadRecord, qa, yes_or_no
from medray.data.readers.conversations import llava_turns, preference_pair
from medray.records import ANSWER_TYPES, check_turns


def payloads(record: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(suffix of the sample_id, payload) of everything a record says of its image: turns (or LLaVA's `conversations`),
    one question, a preference, attributes, a caption; ("", {}) for an image alone.

    Raises BadRecord where a part is malformed.
    """
    found = list(_parts(record))
    # One part keeps the record's own id; the attributes beside another part get one of their own.
    if not found:
        yield "", {}
    for number, payload in enumerate(found):
        yield "" if number == 0 else f"/{next(iter(payload))}", payload


def _parts(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if record.get("turns"):
        yield {"turns": _turns(record["turns"])}
    elif record.get("conversations") or record.get("conversatons"):
        yield {"turns": llava_turns(dict(record))}
    if record.get("question") is not None:
        yield _question(record)
    if record.get("chosen") is not None:
        yield {"preference": preference_pair(dict(record))}
    text = record.get("caption") or record.get("text")
    if text:
        yield {"caption": _text(text, "caption"), "context": _text(record["context"], "context") if record.get("context") else None}
    if record.get("attributes"):
        yield _attributes(record["attributes"])


def _turns(turns: Any) -> list[dict[str, str]]:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRecord("field 'turns' is no list of objects")
    problem = check_turns(turns)
    if problem:
        raise BadRecord(problem)
    return [{"role": turn["role"], "text": turn["text"]} for turn in turns]


def _question(record: Mapping[str, Any]) -> dict[str, Any]:
    answer = record.get("reference") if record.get("reference") is not None else record.get("answer")
    if not str(answer if answer is not None else "").strip():
        raise BadRecord("empty reference answer")
    reference, choices = str(answer).strip(), record.get("choices")
    if choices is not None and not (isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)):
        raise BadRecord("field 'choices' is no list of texts")
    language = record.get("language")
    if language is not None and not isinstance(language, str):
        raise BadRecord("field 'language' is no text")
    # Beside a caption the context is the caption's.
    context = None if record.get("caption") or record.get("text") or not record.get("context") else _text(record["context"], "context")
    kind = record.get("answer_type") or ("mcq" if choices else "closed" if yes_or_no(reference) else "open")
    if kind not in ANSWER_TYPES:
        raise BadRecord(f"answer_type is {kind!r}; it must be one of {', '.join(ANSWER_TYPES)}")
    return qa(_text(record["question"], "question"), reference, kind, record.get("attribute"), language, choices, context)


def _attributes(value: Any) -> dict[str, Any]:
    """Attributes as an object or, as Arrow gives a map, as pairs."""
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise BadRecord("field 'attributes' is no object")
    attributes = {str(name): str(text) for name, text in pairs if text is not None}
    try:
        check_record(attributes)
    except ValueError:
        return {"attributes": attributes}
    return {"record": attributes}


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadRecord(f"field {field!r} is empty or no text")
    return value.strip()


def members_of(sample: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(sample_id, payload) of everything in a SAMPLE row: what the source's reader had given (the inverse of
    medray.data.samples.ToSamples)."""
    found: list[tuple[str, dict[str, Any]]] = []
    for row in sample["attributes"] or ():
        found.append((row["sample_id"], {"record" if sample["source"] == "wbcatt" else "attributes": dict(row["values"])}))
    for row in sample["captions"] or ():
        found.append((row["sample_id"], {"caption": row["caption"], "context": row["context"]}))
    for row in sample["dialogues"] or ():
        found.append((row["sample_id"], {"turns": row["turns"]}))
    for row in sample["questions"] or ():
        found.append((row["sample_id"], {"qa": {key: value for key, value in row.items() if key != "sample_id"}}))
    for row in sample["preferences"] or ():
        found.append((row["sample_id"], {"preference": {key: row[key] for key in ("prompt", "chosen", "rejected")}}))
    return found or [(sample["image_id"], {})]
