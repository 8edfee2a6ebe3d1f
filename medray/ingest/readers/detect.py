"""Which format a file is in, told by its own names (columns, keys), most particular first (pure)."""

from __future__ import annotations

import re
from collections.abc import Iterable

from medray import records
from medray.ingest.readers.captions import IMAGE_COLUMNS, TEXT_COLUMNS, column
from medray.ingest.readers.suffixes import suffix_of

SUFFIXES: dict[str, tuple[str, ...]] = {
    "shards": (".parquet",),
    "hf-parquet": (".parquet",),
    "wbcatt": (".jsonl", ".json", ".csv"),
    "skincon": (".csv",),
    "cbis-ddsm": (".csv",),
    "pmc-vqa": (".csv",),
    "omnimedvqa": (".json", ".jsonl"),
    "slake": (".json", ".jsonl"),
    "vqa-rad": (".jsonl", ".json"),
    "preference": (".jsonl", ".json", ".parquet"),
    "llava": (".jsonl", ".json"),
    "llava-med-captions": (".json", ".jsonl"),
    "llava-med-qa": (".jsonl", ".json"),
    "questions": (".csv", ".jsonl", ".json"),
    "captions": (".csv", ".jsonl", ".json"),
    "webdataset": (".tar",),
}
"""The files of each format (readers.suffixes.suffix_of); "images" and "dicom" are folders."""

_OWN = {"split", "group_id"}.union(
    *(
        schema.names
        for schema in (
            records.SAMPLE,
            records.CONVERSATION,
            records.QUESTION,
            records.IMAGE_TEXT,
            records.PREFERENCE,
            records.PREFERENCE_WITH_REFERENCE,
            records.DESCRIPTION,
        )
    )
)
"""What medray's own shards hold; a table of other columns is somebody else's, whatever it calls its ids."""

TABLES = tuple(sorted({suffix for suffixes in SUFFIXES.values() for suffix in suffixes}))

# In this order: SLAKE has VQA-RAD's names too, and LLaVA-Med's conversations and questions may carry their
# figures' captions.
_NAMES: dict[str, tuple[set[str], ...]] = {
    "wbcatt": ({"nucleus_shape"},),
    "skincon": ({"Do not consider this image"},),
    "cbis-ddsm": ({"abnormality type", "pathology"},),
    "pmc-vqa": ({"Figure_path", "Choice A"},),
    "omnimedvqa": ({"gt_answer", "option_A"},),
    "slake": ({"img_name", "q_lang"},),
    "vqa-rad": ({"qid", "question", "image_name"}, {"qid", "question", "answer_type"}),
    "preference": ({"chosen", "rejected"},),
    "llava": ({"conversations"}, {"conversatons"}, {"messages"}, {"prompt", "completion"}),
    "llava-med-qa": ({"question_id", "gpt4_answer"},),
    "llava-med-captions": ({"pair_id", "fig_caption"},),
}

LOOKED_FOR = (
    "Parquet with the columns of medray's own shards, with chosen and rejected (preference) or with an image "
    "column (hf-parquet); "
    + "; ".join(
        f"{kind} ({' or '.join(', '.join(sorted(names)) for names in alternatives)})"
        for kind, alternatives in _NAMES.items()
    )
    + "; questions (question, answer and a column of the image files)"
    + f"; captions (a column of {', '.join(IMAGE_COLUMNS)} and one of {', '.join(TEXT_COLUMNS)})"
    + "; webdataset (*.tar); "
    "dicom (*.dcm or DICM at byte 128); images (*.jpg, *.png, ...)"
)


def table_format(names: Iterable[str], path: str) -> str | None:
    """The format of a CSV or JSON file with these names; None for none."""
    names = list(names)
    suffix = suffix_of(path)
    for kind, alternatives in _NAMES.items():
        if suffix in SUFFIXES[kind] and any(wanted <= set(names) for wanted in alternatives):
            return kind
    image = column(names, (*IMAGE_COLUMNS, "images")) is not None
    if (
        image
        and suffix in SUFFIXES["questions"]
        and column(names, ("question",))
        and column(names, ("answer", "answers"))
    ):
        return "questions"
    # LLaVA-Bench's questions: `text` is what is asked, and the answers are somewhere else.
    both = (
        column(names, IMAGE_COLUMNS) is not None
        and column(names, TEXT_COLUMNS) is not None
        and not _asks(names)
    )
    return "captions" if both and suffix in SUFFIXES["captions"] else None


def _asks(names: Iterable[str]) -> bool:
    lower = {str(name).strip().lower() for name in names}
    return "question_id" in lower and "text" in lower and "caption" not in lower


def alike(kind: str, names: Iterable[str]) -> bool:
    """Whether an object with these keys may be a record of the format, complete or not."""
    names = set(names)
    if kind == "questions":
        return column(names, (*IMAGE_COLUMNS, "images", "question")) is not None
    if kind == "captions":
        return column(names, (*IMAGE_COLUMNS, *TEXT_COLUMNS)) is not None
    return any(wanted & names for wanted in _NAMES[kind]) if kind in _NAMES else True


def parquet_format(names: Iterable[str]) -> str | None:
    """The format of a Parquet file with these columns; None for none."""
    names = list(names)
    if {"sample_id", "image"} <= set(names) and set(names) <= _OWN:
        return "shards"
    lower = {name.strip().lower() for name in names}
    if {"chosen", "rejected"} <= lower:
        return "preference"
    return "hf-parquet" if lower & {"image", "images"} else None


def missing_columns(names: Iterable[str]) -> str:
    """What a table of these columns lacks to be read as captions, for an error."""
    names = list(names)
    if not names:
        return "no columns or keys were found in it"
    if _asks(names):
        return (
            "its texts are questions (question_id, text) without answers; write the answers beside them, "
            "with columns question and answer"
        )
    said = f"it has {', '.join(str(name)[:60] for name in names[:30])}{', ...' if len(names) > 30 else ''}"
    image, text = column(names, IMAGE_COLUMNS), column(names, (*TEXT_COLUMNS, "question"))
    if image is None and text is not None:
        return f"{said}; name the column of the image files file_name"
    return (
        f"{said}; name the column of the texts caption, or columns question and answer"
        if image is not None
        else said
    )


def chosen_files(kind: str, files: list[str]) -> list[str]:
    """Of a set's files those that are read together: of VQA-RAD the official file and not its MEVF
    re-splits, of PMC-VQA version 1 and not version 2 (*_2.csv) nor the part of its test set that was
    checked (test_clean.csv). What is left out here is read where it is named itself.
    """
    apart = {"vqa-rad": r"(mevf[^/]*|(train|test)set\.json)$", "pmc-vqa": r"(_2|_clean)\.csv$"}.get(kind)
    return [path for path in files if apart is None or not re.search(apart, path)] or files
