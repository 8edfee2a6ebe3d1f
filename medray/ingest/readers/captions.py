"""Images with a text: LLaVA-Med's figure captions, tables of image files and captions."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from medray.errors import BadRecord
from medray.ingest.files.inline_images import PREFIX
from medray.ingest.readers.common import Place, Row, given, inside, need, need_text, qa, row, text_of
from medray.ingest.readers.markers import asked, check_no_marker
from medray.ingest.readers.messages import listed
from medray.stable_draws import digest

IMAGE_COLUMNS = ("file_name", "image_file", "image_path", "image", "filename", "file", "path")
TEXT_COLUMNS = ("caption", "text", "report")

_DOMAINS = {
    "chest_xray": "x-ray",
    "mri": "mri",
    "ct_scan": "ct",
    "histology": "histology",
    "gross": "gross pathology",
}


def llava_med_captions(record: dict[str, Any], place: Place) -> Iterator[Row]:
    """LLaVA-Med's figure captions (llava_med_instruct_fig_captions.json: a list by domain; or a plain list):
    pair_id, pmid, fig_caption, in_text_mention (texts, or objects whose `tokens` is the sentence), domain
    (flags).

    The image is <pair_id>.jpg, as LLaVA-Med's download_images.py names it. Figures of one article share a
    group.
    """
    pair = need_text(record, "pair_id")
    image = str(given(record, "image") or f"{pair}.jpg")
    pmid = given(record, "pmid") or pair.partition("_")[0]
    yield row(
        pair,
        pair,
        inside(place.images, image),
        {"caption": caption_of(record, "fig_caption"), "context": "\n".join(_mentions(record)) or None},
        group_id=digest(pmid),
        modality=_modality(record),
    )


def llava_med_qa(record: dict[str, Any], place: Place) -> Iterator[Row]:
    """LLaVA-Med's chat benchmark (data/eval/llava_med_eval_qa50_qa.jsonl: 193 questions on 50 figures):
    question_id, text with the image's marker, gpt4_answer (the reference), type (conversation,
    detailed_description), domain, pair_id, and the figure's fig_label, fig_caption and in_text_mention,
    which become the context of the question: the judge sees it, the model does not.
    """
    pair = need_text(record, "pair_id")
    payload = qa(
        asked(need_text(record, "text"), "text"),
        need_text(record, "gpt4_answer"),
        "open",
        given(record, "type"),
        context=_context(record),
    )
    yield row(
        f"{place.stem}:{need(record, 'question_id')}",
        pair,
        inside(place.images, str(given(record, "image") or f"{pair}.jpg")),
        payload,
        split="test",
        group_id=digest(pair.partition("_")[0]),
        modality=_modality(record),
    )


def _modality(record: dict[str, Any]) -> str | None:
    """The figure's kind where `domain` flags just one."""
    domain = record.get("domain") or {}
    domains = [name for name, is_it in domain.items() if is_it is True] if isinstance(domain, dict) else []
    return _DOMAINS.get(domains[0]) if len(domains) == 1 else None


def _context(record: dict[str, Any]) -> str | None:
    """Caption and mentions of a figure in the words in which LLaVA-Med's judge reads them
    (llava/eval/eval_multimodal_chat_gpt_score.py, conv_to_str); a mention is its sentence there and no
    list of entities. None where the record has no caption.
    """
    if given(record, "fig_caption") is None:
        return None
    label = str(given(record, "fig_label") or "").strip()
    caption = f"Figure Caption:\n{label + ': ' if label else ''}{need_text(record, 'fig_caption')}"
    mentions = "".join(f"\n\t- {mention}" for mention in _mentions(record))
    return f"{caption}\n\nFigure Context:{mentions}" if mentions else caption


def _mentions(record: dict[str, Any]) -> list[str]:
    """The sentences of the article that mention the figure."""
    said = given(record, "in_text_mention") or []
    return [
        sentence
        for mention in (said if isinstance(said, list) else [said])
        if (sentence := _sentence(mention))
    ]


def _sentence(mention: Any) -> str:
    tokens = mention.get("tokens", mention.get("text")) if isinstance(mention, dict) else mention
    if isinstance(tokens, list):
        tokens = " ".join(map(str, tokens))
    if not isinstance(tokens, str):
        raise BadRecord("field 'in_text_mention' holds a mention without text or 'tokens'")
    return tokens.strip()


# Words for a missing caption beside those of any text.
_NO_CAPTION = {"none", "n/a", "na", "-", "."}


def caption_of(record: Mapping[str, Any], field: str) -> str:
    """The caption in a field. Raises BadRecord for one that says nothing, or that holds an image marker."""
    value = listed(record.get(field))
    if isinstance(value, list):
        if len(value) != 1:
            raise BadRecord(f"field {field!r} holds {len(value)} texts; a row has one: write a row for each")
        record = {field: value[0]}
    text = need_text(record, field)
    if text.lower() in _NO_CAPTION:
        raise BadRecord(f"field {field!r} is empty ({text!r})")
    check_no_marker(text, field)
    return text


def column(names: Iterable[str], wanted: tuple[str, ...]) -> str | None:
    """The first of the wanted column names that is there, in any case."""
    there = {str(name).strip().lower(): name for name in reversed(list(names))}
    return next((there[name] for name in wanted if name in there), None)


def image_column(record: Mapping[str, Any]) -> str | None:
    """The field that names the image's file; of several the one that holds the image itself (VLMEvalKit:
    image beside image_path).
    """
    fields = [name for name in record if str(name).strip().lower() in IMAGE_COLUMNS]
    inline = (name for name in fields if str(record[name]).startswith(PREFIX)) if len(fields) > 1 else ()
    return next(iter(inline), None) or column(record, IMAGE_COLUMNS)


def file_in(record: Mapping[str, Any], field: str) -> str:
    """The file's name in a field, also as a list of one. Raises BadRecord for none or several."""
    value = listed(record.get(field))
    if isinstance(value, list) and value:
        if len(value) > 1:
            raise BadRecord(f"field {field!r} holds {len(value)} images; a row must have one")
        return text_of(value[0], field)
    return need_text(record, field)


def captions(record: dict[str, Any], place: Place) -> Iterator[Row]:
    """A table of images and texts: Hugging Face's imagefolder metadata.csv or .jsonl (file_name relative
    to that file) or any table with one of IMAGE_COLUMNS and one of TEXT_COLUMNS.
    """
    fields = [image_column(record), column(record, TEXT_COLUMNS)]
    for field, wanted in zip(fields, (IMAGE_COLUMNS, TEXT_COLUMNS)):
        if field is None:
            raise BadRecord(f"none of the fields {', '.join(wanted)} is there")
    image, text = file_in(record, fields[0]), caption_of(record, fields[1])
    # train/metadata.csv and test/metadata.csv may name different images alike.
    identity = posixpath.join(place.prefix or place.split_folder, image)
    yield row(
        f"{identity}:{digest(text)[:8]}",
        identity,
        inside(place.images, image),
        {"caption": text, "context": None},
    )
