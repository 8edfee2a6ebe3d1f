"""Dialogues and preferences: LLaVA conversations and chat messages, preference rows of TRL and
LLaMA-Factory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from medray.errors import BadRecord
from medray.ingest.readers.common import Place, Row, identity_of, inside, is_empty, need, row
from medray.ingest.readers.markers import asked, check_no_marker
from medray.ingest.readers.messages import DIALOGUES, Said, dialogue_turns, messages
from medray.stable_draws import digest


def llava(record: dict[str, Any], place: Place) -> Iterator[Row]:
    """LLaVA conversations, with LLaVA-Med's `conversatons` too, chat `messages`, or `prompt` and
    `completion`; `image` (or `images`) names one file. A record without an id gets one of its image and
    texts.
    """
    turns = dialogue_turns(record)
    image = image_name(record)
    identity = identity_of(record.get("id")) or f"{image}:{digest(*(turn['text'] for turn in turns))[:8]}"
    yield row(identity, image, inside(place.images, image), {"turns": turns})


def preference(record: dict[str, Any], place: Place) -> Iterator[Row]:
    """A preference row of JSON (see preference_pair); `images` (or `image`) names one file."""
    pair = preference_pair(record)
    image = image_name(record)
    yield row(preference_id(record, image, pair), image, inside(place.images, image), {"preference": pair})


def preference_id(record: Mapping[str, Any], image: str, pair: dict[str, str]) -> str:
    """The record's own id, or one fixed by the image and the texts."""
    own = identity_of(record.get("sample_id")) or identity_of(record.get("id"))
    return own or f"{image}:{digest(*pair.values())[:8]}"


def image_name(record: Mapping[str, Any]) -> str:
    """The file's name in `images` or `image`. Raises BadRecord for none, several, or anything but a name."""
    image = one_image(record)
    if is_empty(image):
        raise BadRecord("field 'image' is missing or empty")
    if not isinstance(image, str):
        raise BadRecord(f"field 'image' is a {type(image).__name__}; it must name one file")
    return image.strip()


def one_image(record: Mapping[str, Any]) -> Any:
    """The image of `images` (a list of one) or `image`. Raises BadRecord for several."""
    field = "images" if record.get("images") is not None else "image"
    value = record.get(field)
    if not isinstance(value, list):
        return value
    if len(value) != 1:
        raise BadRecord(f"field {field!r} holds {len(value)} images; a row must have one")
    return value[0]


def preference_pair(record: Mapping[str, Any]) -> dict[str, str]:
    """{"prompt", "chosen", "rejected"} of a preference row. The answers are texts or messages; the question
    is in `prompt`, `question`, `instruction` and `input`, one of DIALOGUES (LLaMA-Factory), or the first
    message of both answers (TRL's "implicit prompt"). System messages are left out.

    Raises BadRecord if there is more than one question, or chosen and rejected are the same.
    """
    questions, answers = [], []
    for field in ("chosen", "rejected"):
        need(record, field)
        said = [one for one in messages(record[field], field, "assistant") if one.role != "system"]
        questions.append([one for one in said if one.role != "assistant"])
        replies = [one for one in said if one.role == "assistant"]
        if len(replies) != 1 or is_empty(replies[0].text) or said[-1].role != "assistant":
            raise BadRecord(f"field {field!r} must end in its only answer")
        check_no_marker(replies[0].text, field)
        answers.append(replies[0].text)
    field, prompt = _prompt(record)
    if prompt is None:
        if not questions[0] or questions[0] != questions[1]:
            raise BadRecord(
                "field 'prompt' is missing, and chosen and rejected do not begin with the same question"
            )
        prompt = questions[0]
    elif any(questions) and any(
        [one.text for one in opening] not in ([], [one.text for one in prompt]) for opening in questions
    ):
        raise BadRecord(f"chosen and rejected begin with another question than {field!r}")
    if len(prompt) != 1 or prompt[0].role == "assistant":
        raise BadRecord(f"field {field!r} has {len(prompt)} messages; a pair is about one question")
    if prompt[0].images > 1:
        raise BadRecord(f"field {field!r} holds {prompt[0].images} images; a row has one")
    question = asked(prompt[0].text, field)
    if answers[0] == answers[1]:
        raise BadRecord("chosen and rejected are the same")
    return {"prompt": question, "chosen": answers[0], "rejected": answers[1]}


def _prompt(record: Mapping[str, Any]) -> tuple[str, list[Said] | None]:
    """(field, messages) of the question, without the system's; ("prompt", None) if no field holds it."""
    if record.get("prompt") is not None:
        need(record, "prompt")
    for field in ("prompt", *DIALOGUES, "question", "instruction"):
        if is_empty(record.get(field)):
            continue
        said = [one for one in messages(record[field], field, "user") if one.role != "system"]
        if field == "instruction" and not is_empty(record.get("input")):
            said = [*said[:-1], Said("user", f"{said[-1].text}\n{record['input']}", 0)]
        return field, said
    return "prompt", None
