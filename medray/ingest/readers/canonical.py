"""Records in medray's own words, as its shards and its WebDataset tars hold them, to payloads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from string import ascii_uppercase
from typing import Any

from medray.data.attribute_questions import check_record
from medray.errors import BadRecord
from medray.ingest.readers.common import is_empty, mcq, qa, text_of, yes_or_no
from medray.ingest.readers.conversations import preference_pair
from medray.ingest.readers.markers import asked, check_no_marker
from medray.ingest.readers.messages import DIALOGUES, dialogue_turns
from medray.ingest.readers.options import right_option
from medray.records import ANSWER_TYPES, check_turns


def payloads(record: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(suffix of the sample_id, payload) of everything a record says of its image: turns (or LLaVA's
    `conversations`), one question, a preference, attributes, a caption; ("", {}) for an image alone.

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
    elif any(record.get(field) for field in DIALOGUES):
        yield {"turns": dialogue_turns(record)}
    if record.get("question") is not None:
        yield _question(record)
    if record.get("chosen") is not None:
        yield {"preference": preference_pair(record)}
    text = record.get("caption") or record.get("text")
    if not is_empty(text):
        check_no_marker(str(text), "caption")
        yield {
            "caption": _text(text, "caption"),
            "context": _text(record["context"], "context") if not is_empty(record.get("context")) else None,
        }
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
    if is_empty(answer):
        raise BadRecord("empty reference answer")
    reference, choices = text_of(answer, "reference"), record.get("choices")
    if choices is not None and not (
        isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
    ):
        raise BadRecord("field 'choices' is no list of texts")
    language = record.get("language")
    if language is not None and not isinstance(language, str):
        raise BadRecord("field 'language' is no text")
    # Beside a caption the context is the caption's.
    context = (
        None
        if record.get("caption") or record.get("text") or is_empty(record.get("context"))
        else _text(record["context"], "context")
    )
    kind = record.get("answer_type") or ("mcq" if choices else "closed" if yes_or_no(reference) else "open")
    if kind not in ANSWER_TYPES:
        raise BadRecord(f"answer_type is {kind!r}; it must be one of {', '.join(ANSWER_TYPES)}")
    question = asked(_text(record["question"], "question"), "question")
    if choices and not all(choice in question for choice in choices):
        # Tables of other people's making hold the options beside the question; a model sees only the
        # question.
        return mcq(
            question,
            choices,
            right_option(record, reference, list(zip(ascii_uppercase, choices)), "reference"),
            record.get("attribute"),
            language,
        )
    return qa(question, reference, kind, record.get("attribute"), language, choices, context)


def _attributes(value: Any) -> dict[str, Any]:
    """Attributes as an object or, as Arrow gives a map, as pairs."""
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs
    ):
        raise BadRecord("field 'attributes' is no object")
    attributes = {str(name): str(text) for name, text in pairs if text is not None}
    try:
        check_record(attributes)
    except ValueError:
        return {"attributes": attributes}
    return {"record": attributes}


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str) or is_empty(value):
        raise BadRecord(f"field {field!r} is empty or no text")
    return value.strip()


def members_of(sample: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(sample_id, payload) of everything in a SAMPLE row: what the source's reader had given (the inverse of
    medray.ingest.canonical_rows.ToSamples)."""
    found: list[tuple[str, dict[str, Any]]] = []
    for row in sample["attributes"] or ():
        found.append(
            (
                row["sample_id"],
                {"record" if sample["source"] == "wbcatt" else "attributes": dict(row["values"])},
            )
        )
    for row in sample["captions"] or ():
        found.append((row["sample_id"], {"caption": row["caption"], "context": row["context"]}))
    for row in sample["dialogues"] or ():
        found.append((row["sample_id"], {"turns": row["turns"]}))
    for row in sample["questions"] or ():
        found.append(
            (row["sample_id"], {"qa": {key: value for key, value in row.items() if key != "sample_id"}})
        )
    for row in sample["preferences"] or ():
        found.append(
            (row["sample_id"], {"preference": {key: row[key] for key in ("prompt", "chosen", "rejected")}})
        )
    return found or [(sample["image_id"], {})]
