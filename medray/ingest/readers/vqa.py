"""Questions and answers about images: VQA-RAD, SLAKE, PMC-VQA, OmniMedVQA."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from typing import Any

from medray.errors import BadRecord
from medray.ingest.readers.common import Place, Row, given, inside, mcq, need, need_text, qa, row
from medray.ingest.readers.markers import asked
from medray.stable_draws import digest


def vqa_rad(record: dict[str, Any], place: Place) -> Iterator[Row]:
    """Official OSF fields or the MEVF split. Quirks: integer answers, answer_type with a trailing space,
    the split in phrase_type (test_*), no split in MEVF files (it is the file's name).
    """
    name = need_text(record, "image_name") if given(record, "image") is None else None
    image = posixpath.join("images", name) if name is not None else need_text(record, "image")
    if "mevf" in place.name or place.name in ("trainset.json", "testset.json"):
        split = "test" if "test" in place.name else "train"
    else:
        # The record's own word, test_*, comes before that of its file's name; "freeform" and "para" say no
        # split.
        split = "test" if str(given(record, "phrase_type")).startswith("test") else place.split or "train"
    question = asked(need_text(record, "question"), "question")
    payload = qa(
        question, need_text(record, "answer"), _open_or_closed(record), given(record, "question_type")
    )
    # Ids are the same whatever folder the images were unpacked to.
    yield row(
        f"{place.stem}:{need(record, 'qid')}",
        image,
        inside(place.images, name or image),
        payload,
        split=split,
    )


def _open_or_closed(record: dict[str, Any]) -> str:
    kind = str(given(record, "answer_type") or "").strip().upper()
    if kind not in ("OPEN", "CLOSED"):
        raise BadRecord(f"answer_type is {record.get('answer_type')!r}; it must be OPEN or CLOSED")
    return kind.lower()


def slake(record: dict[str, Any], place: Place) -> Iterator[Row]:
    """SLAKE 1.0 (Liu et al., ISBI 2021): train.json, validate.json (validation.json on the hub) and
    test.json; images are imgs/<img_name>, questions English or Chinese (q_lang). qid counts through the
    three files.
    """
    language = record.get("q_lang")
    if language not in ("en", "zh"):
        raise BadRecord(f"q_lang is {language!r}; it must be en or zh")
    image = need_text(record, "img_name")
    payload = qa(
        asked(need_text(record, "question"), "question"),
        need_text(record, "answer"),
        _open_or_closed(record),
        given(record, "content_type"),
        language,
    )
    yield row(
        f"{place.stem}:{need(record, 'qid')}",
        image,
        inside(place.images, image),
        payload,
        modality=record.get("modality"),
    )


_OPTION_LETTER = re.compile(r"^\s*([A-D])\s*[:.)]\s*")


def pmc_vqa(record: dict[str, Any], place: Place) -> Iterator[Row]:
    """PMC-VQA (Zhang et al., 2023), both layouts: version 1 with the answer's text in Answer and its letter
    in Answer_label, version 2 (train_2.csv) with Caption, split and the letter in Answer. Options begin with
    " A:".

    Figures of one article share a group.
    """
    figure = need_text(record, "Figure_path")
    choices = [
        _OPTION_LETTER.sub("", str(given(record, f"Choice {letter}") or "")).strip() for letter in "ABCD"
    ]
    answer = need_text(record, "Answer")
    label = str(given(record, "Answer_label") or answer).strip().upper().rstrip(".:")
    if label in ("A", "B", "C", "D"):
        right = "ABCD".index(label)
    else:
        wanted = _OPTION_LETTER.sub("", answer).strip()
        if wanted not in choices:
            raise BadRecord(f"Answer {answer!r} is neither a letter from A to D nor one of the choices")
        right = choices.index(wanted)
    if not all(choices):
        raise BadRecord(f"'Choice {'ABCD'[choices.index('')]}' is empty")
    question = need_text(record, "Question")
    article = re.match(r"PMC\d+", posixpath.basename(figure))
    yield row(
        f"{place.stem}:{figure}:{digest(question, *choices)[:8]}",
        figure,
        inside(place.images, figure),
        mcq(question, choices, right),
        group_id=digest(article[0]) if article else None,
    )


def omnimedvqa(record: dict[str, Any], place: Place) -> Iterator[Row]:
    """OmniMedVQA (Hu et al., CVPR 2024): QA_information/*/*.json; image_path is relative to the set's root.
    gt_answer is an option's text; some records have two or three options; Chest CT Scan.json writes
    `modality` for modality_type.

    The set has no splits: it is made for evaluation.
    """
    image = need_text(record, "image_path")
    choices = [
        need_text(record, name)
        for name in ("option_A", "option_B", "option_C", "option_D")
        if given(record, name) is not None
    ]
    answer = need_text(record, "gt_answer")
    # Exactly so if that is there, else apart from case and the final stop.
    same = [answer == choice for choice in choices]
    if not any(same):
        same = [answer.rstrip(".").casefold() == choice.rstrip(".").casefold() for choice in choices]
    if not any(same):
        raise BadRecord(f"gt_answer {answer!r} is none of the options")
    payload = mcq(need_text(record, "question"), choices, same.index(True), record.get("question_type"))
    yield row(
        need_text(record, "question_id"),
        image,
        inside(place.images, image),
        payload,
        modality=given(record, "modality_type") or given(record, "modality"),
    )
