"""Train, validation and test, in the words people use for them: in file names, folders and records (pure).

The words are those of Hugging Face's data sets (datasets.data_files: eval and evaluation name the test split,
dev the validation split) and a few more. A word that is not among them is an error, never a training row.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

_WORDS = {
    "train": ("train", "training", "trn", "trainval"),
    "val": ("val", "valid", "validation", "validate", "dev", "devel", "development"),
    "test": (
        "test",
        "testing",
        "tests",
        "tst",
        "testmini",
        "eval",
        "evaluation",
        "evaluate",
        "holdout",
        "heldout",
    ),
}
_SPLITS = {word + more: split for split, words in _WORDS.items() for word in words for more in ("", "set")}
# What a folder's name may say beside its split: train_images, Test Data.
_BESIDE = re.compile(r"(sets?|data|dataset|split|images?|imgs?|files?|records)$")
# Words that a folder or a section may have beside its split and say nothing else: VQA_test, partial-train.
# With others a "test" may be anything: test-project, blood_test.
_NEUTRAL = frozenset(
    (
        "set",
        "sets",
        "data",
        "dataset",
        "split",
        "splits",
        "image",
        "images",
        "img",
        "imgs",
        "picture",
        "pictures",
        "file",
        "files",
        "record",
        "records",
        "item",
        "items",
        "sample",
        "samples",
        "vqa",
        "qa",
        "question",
        "questions",
        "answer",
        "answers",
        "caption",
        "captions",
        "annotation",
        "annotations",
        "label",
        "labels",
        "metadata",
        "json",
        "jsonl",
        "csv",
        "jpg",
        "jpeg",
        "png",
        "dicom",
        "dcm",
        "shard",
        "shards",
        "part",
        "parts",
        "partial",
        "full",
        "all",
        "final",
        "official",
        "public",
        "clean",
        "raw",
        "processed",
        "resized",
        "subset",
        "small",
        "new",
        "v",
        "the",
        "for",
        "of",
    )
)
# Fields that may hold a split under another name; they are heeded if their value is a known word.
_OTHER_FIELDS = ("subset", "partition", "set", "datasplit", "datasetsplit", "splitname", "splittype", "phase")


class UnknownSplit(ValueError):
    """A record's word for its split is none of the known ones."""


def as_split(word: str) -> str | None:
    """train, val or test for a word in any case and spelling ("Test set", "validation", "train_1"); None
    for others."""
    return _SPLITS.get(re.sub(r"[^a-z]+", "", word.lower()))


def split_of_name(name: str) -> str | None:
    """The split that a file's name holds as a word of its own (train-00000-of-00007.parquet, dataTest.json);
    None for
    no or several splits."""
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    found = {_SPLITS[word] for part in parts if (word := part.lower()) in _SPLITS}
    found |= {_SPLITS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in _SPLITS}
    return found.pop() if len(found) == 1 else None


def split_of_folder(name: str) -> str | None:
    """The split that a folder's or a section's name is, apart from words that say nothing else: test,
    testImages, VQA_test, partial-train. None for others, and for several.
    """
    word = re.sub(r"[^a-z]+", "", name.lower())
    whole = _SPLITS.get(word) or _SPLITS.get(_BESIDE.sub("", word))
    if whole or not word:
        return whole
    words = [part.lower() for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]
    return split_of_name(name) if all(word in _NEUTRAL or word in _SPLITS for word in words) else None


def split_of_folders(relative: str) -> str | None:
    """The split of the nearest folder of a relative path whose name says one."""
    return _split_of_parts(posixpath.dirname(relative))


@lru_cache(4096)
def _split_of_parts(folder: str) -> str | None:
    return next((split for name in reversed(folder.split("/")) if (split := split_of_folder(name))), None)


@lru_cache(4096)
def split_of(path: str, root: str | None = None) -> str | None:
    """train, val or test where the file's name says one of them, or else its folder, or else a folder between
    that and
    `root`, the nearest first (test/metadata.csv, test/labels/metadata.csv)."""
    name = posixpath.basename(path)
    found = split_of_name(name)
    # A name with words for several splits holds several.
    return found or (None if _several(name) else split_of_folder(split_folder(path, root)))


def _several(name: str) -> bool:
    return len({_SPLITS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in _SPLITS}) > 1


def split_folder(path: str, root: str | None = None) -> str:
    """The name of the folder that says the file's split, else ""."""
    folder = posixpath.dirname(path)
    between = [folder]
    while (
        root
        and folder.startswith(root.rstrip("/") + "/")
        and (folder := posixpath.dirname(folder)) != root.rstrip("/")
    ):
        between.append(folder)
    names = (posixpath.basename(one) for one in between)
    return next((name for name in names if split_of_folder(name)), "")


def known_split(value: Any, more: Collection[str] = ()) -> str | None:
    """A record's own word for its split as train, val or test; None where it says nothing (null, NaN, blank).

    Args:
        more: other names that are splits, such as data.train_split.

    Raises UnknownSplit for any other word.
    """
    if value is None or value != value:
        return None
    word = str(value).strip()
    if isinstance(value, str) and word.lower() in ("", "nan", "null", "none", "<na>"):
        return None
    if word in more:
        return word
    found = as_split(word) if isinstance(value, str) else None
    if found is None:
        raise UnknownSplit(
            f"field 'split' is {value!r}; write train, val or test, or name it with data.train_split or "
            "data.eval_split"
        )
    return found


@lru_cache(1024)
def _plain_names(names: tuple[Any, ...]) -> dict[str, Any]:
    return {re.sub(r"[^a-z]+", "", str(name).lower()): name for name in names}


def record_split(record: Mapping[str, Any], more: Collection[str] = ()) -> str | None:
    """The split that a record names in a field `split`, in whatever case, or in a field such as `subset` if
    that holds a known word. Raises UnknownSplit."""
    names = _plain_names(tuple(record))
    if "split" in names and isinstance(names["split"], str):
        return known_split(record[names["split"]], more)
    for field in _OTHER_FIELDS:
        # The names are read without a look at the record's value, which would count as used.
        value = dict.get(record, names[field]) if field in names and isinstance(record, dict) else None
        if isinstance(value, str) and (as_split(value) or value.strip() in more):
            return known_split(record[names[field]], more)
    return _flagged(record, names) or _nested(record, names, more)


def _flagged(record: Mapping[str, Any], names: Mapping[str, Any]) -> str | None:
    """The split of a field such as is_test that is true."""
    for plain, name in names.items():
        split = _SPLITS.get(plain[2:]) if plain.startswith(("is", "in")) else None
        if split is not None and str(record[name]).strip().lower() in ("true", "1", "1.0", "yes"):
            return split
    return None


def _nested(record: Mapping[str, Any], names: Mapping[str, Any], more: Collection[str]) -> str | None:
    """The split within a record's `metadata`."""
    for field in ("metadata", "meta", "info"):
        value = dict.get(record, names[field]) if field in names and isinstance(record, dict) else None
        if isinstance(value, dict) and any(str(name).strip().lower() == "split" for name in value):
            return record_split(value, more)
    return None


def split_in(members: Mapping[str, Any]) -> str | None:
    """The word for a split among the members beside a file's records: {"split": "test", "data": [...]}.
    Any text of a member `split` is one, known or not, and a known word of a member such as `subset`.
    """
    for name, value in members.items():
        plain = re.sub(r"[^a-z]+", "", str(name).lower())
        if isinstance(value, str) and (plain == "split" or (plain in _OTHER_FIELDS and as_split(value))):
            return value
    return None
