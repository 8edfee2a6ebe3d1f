"""Questions and answers in tables of any making: question and answer, with options or without, beside an
image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from medray.errors import BadRecord
from medray.ingest.readers.captions import file_in, image_column
from medray.ingest.readers.common import (
    Place,
    Row,
    given,
    inside,
    is_empty,
    mcq,
    need_text,
    qa,
    row,
    text_of,
    yes_or_no,
)
from medray.ingest.readers.conversations import image_name
from medray.ingest.readers.markers import asked, check_no_marker
from medray.ingest.readers.messages import listed
from medray.ingest.readers.options import options_in, options_of, right_option
from medray.stable_draws import digest

# Fields that may name the right option.
_ANSWERS = (
    "correct_answer",
    "answer_label",
    "answer_letter",
    "answer_idx",
    "answer_index",
    "gt_answer",
    "correct_option",
    "label",
)


class Named(Mapping):
    """A record whose fields are found by their names in lower case, apart from blanks at the ends."""

    def __init__(self, record: Mapping[str, Any]):
        self._record = record
        self._names = {name.strip().lower(): name for name in reversed(list(record))}

    def __getitem__(self, name: str) -> Any:
        return self._record[self._names[name]]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def questions(record: dict[str, Any], place: Place) -> Iterator[Row]:
    """A row of a table of images, questions and answers; see question_of. The id is of the image and the
    texts."""
    named = Named(record)
    field = image_column(record)
    image = image_name(named) if field is None or "images" in named else file_in(record, field)
    name, payload = question_of(named)
    yield row(f"{image}:{name}", image, inside(place.images, image), payload)


def question_of(record: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(a hash of what it says, payload) of a record with `question`, `answer` and perhaps options. The
    question is multiple
    choice if there are options, closed if the answer is yes or no, else open."""
    question = asked(need_text(record, "question"), "question")
    options = options_of(record)
    if not options:
        question, options = options_in(question)
    names = ("answer", "answers", "reference", *(_ANSWERS if options else ()))
    field = next((name for name in names if given(record, name) is not None), "answer")
    answer = record.get(field)
    answer = listed(answer)
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if options:
        right = right_option(record, answer, options, field)
        texts = [text for _, text in options]
        return digest(question, *texts)[:8], mcq(question, texts, right)
    if is_empty(answer):
        raise BadRecord(f"field {field!r} is {'empty' if field in record else 'missing'}")
    answer = text_of(answer, field)
    check_no_marker(answer, field)
    return digest(question, answer)[:8], qa(question, answer, "closed" if yes_or_no(answer) else "open")
