"""Dialogues as people write them: LLaVA's {from, value}, chat messages of text or blocks, prompt and
completion."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from medray.errors import BadRecord
from medray.ingest.readers.common import is_empty
from medray.ingest.readers.markers import check_media, check_no_marker, markers_in, without_marker
from medray.records import check_turns

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "vuser": "questioner",
    "system": "system",
}
"""Names of the speakers, LLaVA's and those of chat messages."""

DIALOGUES = ("conversations", "conversatons", "messages")
"""Fields that hold a dialogue; the second is LLaVA-Med's spelling."""
_TRUTH_VALUES = ("0", "1", "true", "false")  # of KTO rows; beside a dialogue, 0 and 1 are more likely a class


@dataclass(frozen=True)
class Said:
    """One message: a role of medray.records, its text, and the images among its blocks."""

    role: str
    text: str
    images: int


def dialogue_turns(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """Turns {"role", "text"} of a record with one of DIALOGUES, or with `prompt` and `completion` (TRL). The
    image's marker is
    taken out of the first turn that is not the system's, wherever it stands in it.

    Raises BadRecord if a turn is malformed, or there are several markers, or one in another turn.
    """
    # KTO's rows look like dialogues, and half of them hold an answer to avoid.
    # Not by `get`, which would count a label that says something else as read.
    for field, value in record.items():
        if field in ("label", "kto_tag") and (
            isinstance(value, bool)
            or ("completion" in record and str(value).strip().lower() in _TRUTH_VALUES)
        ):
            raise BadRecord(
                f"field {field!r} is {value!r}: a row of unpaired preferences (KTO) is not a dialogue; give "
                "preference "
                f"pairs, or remove the column if it is something else"
            )
    field = next((name for name in DIALOGUES if not is_empty(record.get(name))), None)
    if field is not None:
        said = messages(record[field], field)
    elif not is_empty(record.get("prompt")) and not is_empty(record.get("completion")):
        field = "prompt"
        said = [
            *messages(record["prompt"], "prompt", "user"),
            *messages(record["completion"], "completion", "assistant"),
        ]
    else:
        raise BadRecord("field 'conversations' is missing or empty")
    return turns_of(said, field)


def turns_of(said: list[Said], field: str) -> list[dict[str, str]]:
    """Messages as turns, checked, with one image marker at most; see dialogue_turns."""
    markers = [markers_in(one.text) + one.images for one in said]
    if sum(markers) > 1:
        raise BadRecord(f"{field}: {sum(markers)} image markers; a row has one image")
    first = next((number for number, one in enumerate(said) if one.role != "system"), 0)
    turns = []
    for number, one in enumerate(said):
        if number == first:
            check_media(one.text, f"{field}[{number}]")
        elif one.images:
            raise BadRecord(f"{field}[{number}] holds the image; it must be in the first question")
        else:
            check_no_marker(one.text, f"{field}[{number}]")
        turns.append({"role": one.role, "text": without_marker(one.text)})
    problem = check_turns(turns)
    if problem:
        raise BadRecord(f"{field}: {problem}")
    return turns


def messages(value: Any, field: str, role: str | None = None) -> list[Said]:
    """The messages in a field: a list of objects with from and value, or role and content (text or blocks);
    JSON of that; or
    an object of lists, as Hugging Face stores a Sequence.

    Args:
        role: whose message a plain text is; None: a text is no list of messages.
    """
    value = listed(value)
    if isinstance(value, str) and role is not None:
        return [Said(role, value.strip(), 0)]
    if isinstance(value, dict) and value and all(isinstance(part, list) for part in value.values()):
        if len({len(part) for part in value.values()}) > 1:
            raise BadRecord(f"field {field!r} is an object of lists of different lengths")
        value = [dict(zip(value, parts)) for parts in zip(*value.values())]
    elif isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise BadRecord(
            f"field {field!r} is a {type(value).__name__}, not a list of messages"
            if value
            else f"field {field!r} holds no message"
        )
    return [_message(one, f"{field}[{number}]") for number, one in enumerate(value)]


def _message(message: Any, place: str) -> Said:
    if not isinstance(message, dict):
        raise BadRecord(f"{place} is a {type(message).__name__}, not an object with a role and a text")
    speaker = message["from"] if message.get("from") is not None else message.get("role")
    role = ROLES.get(speaker.strip().lower()) if isinstance(speaker, str) else None
    if role is None:
        raise BadRecord(
            f"{place} has the role {str(speaker)[:40]!r}; it must be one of {', '.join(ROLES)} ('from' or "
            "'role')"
        )
    content = message["value"] if message.get("value") is not None else message.get("content")
    images = 0
    if isinstance(content, list):
        content, images = _blocks(content, place)
    if not isinstance(content, str):
        raise BadRecord(f"{place} has no text in 'value' or 'content'")
    return Said(role, content.strip(), images)


def _blocks(blocks: list[Any], place: str) -> tuple[str, int]:
    """(text, number of images) of a message's content blocks."""
    texts, images = [], 0
    for block in blocks:
        kind = block.get("type") if isinstance(block, dict) else "text"
        text = block.get("text") if isinstance(block, dict) else block
        if kind in ("image", "image_url", "input_image"):
            images += 1
        elif kind in ("text", "input_text", "output_text") and (text is None or isinstance(text, str)):
            texts.append(text or "")
        else:
            raise BadRecord(f"{place} holds a block of type {str(kind)[:40]!r}; only text and image are read")
    return "\n".join(text for text in texts if text.strip()), images


def listed(value: Any) -> Any:
    """A list or object that stands as text (JSON, or Python's own writing, as tables hold it), parsed;
    else the value."""
    text = value.strip() if isinstance(value, str) else ""
    if not text or text[0] + text[-1] not in ("[]", "{}") or len(text) > 2**20:
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return value
