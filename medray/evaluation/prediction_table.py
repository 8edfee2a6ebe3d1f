"""Predictions as arrays of numbers: what scoring works on.

A row's texts become a few numbers and are dropped. Letters of shapes: N rows (questions), n those of one
part, K distinct answers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medray.data.exchanges import kind_of_error
from medray.errors import DataError, StageError
from medray.evaluation import metrics
from medray.evaluation.prediction_files import prediction_tables
from medray.evaluation.targets import LETTERS
from medray.inference.thinking import UNFINISHED, said
from medray.records import ANSWER_TYPES, PREDICTION

GROUPS = {
    "by_attribute": "attribute",
    "by_modality": "modality",
    "by_language": "language",
    "by_benchmark": "benchmark",
}

_OPEN = (
    "accuracy",
    "legacy_recall",
    "legacy_precision",
    "legacy_f1",
    "legacy_exact_match",
    "strict_recall",
    "strict_precision",
    "strict_f1",
    "set_recall",
    "bleu_1",
    "bleu_2",
    "bleu_3",
    "bleu_4",
    "rouge_l",
)
_LIKELIHOOD = ("likelihood", "likelihood_normalised")
METRICS: dict[str, tuple[str, ...]] = {
    "open": _OPEN,
    "closed": ("accuracy", "legacy", "legacy_published", *_LIKELIHOOD),
    "mcq": ("accuracy", *_LIKELIHOOD),
}
# what of the answer to a blank image is kept
TEXT_ONLY_OF = {"text_only": "accuracy", "text_only_recall": "strict_recall"}
TEXT_ONLY = ("text_only", "text_only_gain", "text_only_recall", "text_only_recall_gain")
_MEASURED = (
    *dict.fromkeys(name for names in METRICS.values() for name in names if name not in _LIKELIHOOD),
    "unparsable",
    "chance",
    "answer_words",
)
_VALUES = (*_MEASURED, *_LIKELIHOOD, "answer_tokens", "truncated", "thinking", "unfinished_thinking")
_LABELS = ("image_id", "answer_type", *GROUPS.values(), "right_text", "right_letter")
_COLUMNS = [name for name in PREDICTION.names if name != "question"]
_READ = (
    "sample_id",
    "image_id",
    "answer",
    "reference",
    "answer_type",
    "choices",
    "option_logps",
    "option_tokens",
    "text_only_answer",
    "thinking",
    "error",
)


@dataclass(frozen=True)
class Table:
    """Numbers of a set of predictions, in order of sample_id."""

    uri: str
    model: str | None
    ids: np.ndarray  # [N] of str
    failed_N: np.ndarray  # without an answer
    # names in sorted order, and per row the name's number, -1 for null
    labels: dict[str, tuple[list[str], np.ndarray]]
    values: dict[str, np.ndarray]  # metric -> [N] float64; NaN: the row has no part in it
    reasons: dict[str, int]  # why rows have no answer -> their number

    def named(self, label: str, name: str) -> np.ndarray:
        """[N] bool: rows with this label."""
        names, codes_N = self.labels[label]
        return codes_N == names.index(name)


def load(uri: str) -> Table:
    """The numbers of a set of predictions.

    Raises StageError where an id occurs twice or predictions of several models are mixed, DataError for a row
    that lacks what scoring needs.
    """
    parts = [_Part(uri, table) for table in prediction_tables(uri, _COLUMNS)] or [
        _Part(uri, PREDICTION.empty_table())
    ]
    models = {name for part in parts for name in part.models}
    if len(models) > 1:
        raise StageError(
            f"{uri}: holds predictions of {', '.join(sorted(models))}; score one folder per model"
        )
    ids = pa.chunked_array([part.ids for part in parts])
    order = pc.sort_indices(ids).to_numpy()
    names = ids.take(order).to_numpy()
    twice = np.flatnonzero(names[1:] == names[:-1])
    if len(twice):
        raise StageError(f"{uri}: sample_id {names[twice[0]]!r} occurs twice")
    columns = {
        name: np.concatenate([part.values[name] for part in parts])[order] for name in (*_VALUES, *TEXT_ONLY)
    }
    if np.isnan(columns["text_only"]).all():
        columns = {name: column for name, column in columns.items() if name not in TEXT_ONLY}
    labels = {name: _coded([part.labels[name] for part in parts], order) for name in _LABELS}
    reasons: Counter[str] = Counter()
    for part in parts:
        reasons.update(part.reasons)
    failed_N = np.concatenate([part.failed for part in parts])[order]
    return Table(uri, next(iter(models), None), names, failed_N, labels, columns, dict(reasons.most_common()))


class _Part:
    """Numbers and labels of some rows, n of them: a few thousand are read, measured and dropped at a time.

    Attributes:
        values: metric -> [n] float64.
        labels: label -> column of n texts, each distinct one stored once.
    """

    def __init__(self, uri: str, table: pa.Table):
        table = table.combine_chunks()
        column = {name: table[name].to_pylist() for name in _READ}
        column["choices"] = [tuple(choices or ()) for choices in column["choices"]]
        _check_ids(uri, column)
        self.ids = _one(table["sample_id"])
        self.models = table["model"].unique().drop_null().to_pylist()
        self.failed = pc.or_(table["error"].is_valid(), table["answer"].is_null()).to_numpy().astype(bool)
        self.reasons = Counter(
            kind_of_error(column["error"][row] or "no answer") for row in np.flatnonzero(self.failed)
        )
        answered = np.flatnonzero(~self.failed).tolist()
        _check_answered(uri, column, answered)
        thinking = _without_thinking(column, answered)
        self.values = self._measured(column, answered) | self._likelihoods(column, answered)
        known = ~self.failed
        self.values["thinking"] = np.where(known, [kind is not None for kind in thinking], math.nan)
        self.values["unfinished_thinking"] = np.where(
            known, [kind == UNFINISHED for kind in thinking], math.nan
        )
        self.values["answer_tokens"] = np.where(
            known, table["tokens"].cast(pa.float64()).fill_null(math.nan).to_numpy(), math.nan
        )
        self.values["truncated"] = np.where(
            known,
            pc.equal(table["finish_reason"], "length").cast(pa.float64()).fill_null(math.nan).to_numpy(),
            math.nan,
        )
        self.labels = {
            name: _one(table[name]).dictionary_encode() for name in _LABELS if name in table.column_names
        }
        right: list[dict[str, str]] = [{}] * len(self.failed)
        for row in answered:
            right[row] = _right(column["reference"][row], column["answer_type"][row], column["choices"][row])
        for name in ("right_text", "right_letter"):
            self.labels[name] = pa.array(
                [texts.get(name) for texts in right], pa.string()
            ).dictionary_encode()

    def _measured(self, column: dict[str, list], answered: list[int]) -> dict[str, np.ndarray]:
        """What is made of the answer's text and of that to a blank image; each distinct one is measured
        once.
        """
        places: dict[tuple, int] = {}
        own_N, blank_N = np.full((2, len(self.failed)), -1)
        for row in answered:
            asked = (column["reference"][row], column["answer_type"][row], column["choices"][row])
            own_N[row] = places.setdefault((column["answer"][row], *asked), len(places))
            if (blank := column["text_only_answer"][row]) is not None:
                blank_N[row] = places.setdefault((blank, *asked), len(places))
        numbers = [answer_numbers(*key) for key in places]
        # the last: no answer
        of_key = {
            name: np.array([*(found.get(name, math.nan) for found in numbers), math.nan])
            for name in _MEASURED
        }
        values = {name: numbers_K[own_N] for name, numbers_K in of_key.items()}
        for name, metric in TEXT_ONLY_OF.items():
            values[name] = of_key[metric][blank_N]
            values[f"{name}_gain"] = values[metric] - values[name]
        return values

    def _likelihoods(self, column: dict[str, list], answered: list[int]) -> dict[str, np.ndarray]:
        likely_N, per_token_N = np.full((2, len(self.failed)), math.nan)
        for row in answered:
            logps, lengths = column["option_logps"][row], column["option_tokens"][row]
            if not logps:
                continue
            try:
                right = _right_option(
                    column["reference"][row], column["answer_type"][row], column["choices"][row]
                )
                likely_N[row] = metrics.likeliest(logps, right)
                if lengths:
                    per_token_N[row] = metrics.likeliest(logps, right, lengths)
            except ValueError as error:
                raise DataError(f"{column['sample_id'][row]}: option_logps: {error}") from None
        return {"likelihood": likely_N, "likelihood_normalised": per_token_N}


def _one(column: pa.ChunkedArray) -> pa.Array:
    combined = column.combine_chunks()
    return combined.chunk(0) if isinstance(combined, pa.ChunkedArray) else combined


def _coded(parts: list[pa.DictionaryArray], order: np.ndarray) -> tuple[list[str], np.ndarray]:
    """(names in sorted order, [N] number of each row's name in it, -1 for null)."""
    column = pa.chunked_array(parts).unify_dictionaries()
    names = column.chunk(0).dictionary.to_pylist()
    rank = np.empty(len(names) + 1, np.int64)
    rank[sorted(range(len(names)), key=names.__getitem__)] = np.arange(len(names))
    rank[-1] = -1
    codes_N = np.concatenate([part.indices.fill_null(-1).to_numpy() for part in column.chunks])
    return sorted(names), rank[codes_N[order]]


def _check_ids(uri: str, column: dict[str, list]) -> None:
    for identity, image in zip(column["sample_id"], column["image_id"], strict=True):
        if not identity or not image:
            raise DataError(f"{uri}: a row has no sample_id or no image_id (sample_id {identity!r})")


def _without_thinking(column: dict[str, list], answered: list[int]) -> list[str | None]:
    """Leave of each answer what stands after its thinking; returns per row whether there was any, and
    whether it was finished.
    """
    found: list[str | None] = [None] * len(column["answer"])
    for row in answered:
        answer, thinking = said(column["answer"][row])
        found[row] = thinking or column["thinking"][row]
        column["answer"][row] = answer
        if (blank := column["text_only_answer"][row]) is not None:
            column["text_only_answer"][row] = said(blank).answer
    return found


def _check_answered(uri: str, column: dict[str, list], answered: list[int]) -> None:
    for row in answered:
        if column["answer_type"][row] not in ANSWER_TYPES:
            raise StageError(
                f"{uri}: {column['sample_id'][row]}: answer_type {column['answer_type'][row]!r} is not open, "
                "closed or mcq"
            )
        if column["reference"][row] is None:
            raise DataError(f"{uri}: {column['sample_id'][row]}: reference is missing")
        if column["answer_type"][row] == "mcq":
            reference, choices = column["reference"][row], column["choices"][row]
            letter = metrics.option_letter(reference, choices)
            if letter is None:
                raise DataError(
                    f"{uri}: {column['sample_id'][row]}: reference {reference[:80]!r} is not the letter or "
                    f"the text of one of the {len(choices)} choices"
                )
            column["reference"][row] = letter


# Short answers repeat: benchmarks of 100k questions hold a few thousand distinct ones.
@lru_cache(maxsize=16_384)
def answer_numbers(
    answer: str, reference: str, answer_type: str, choices: tuple[str, ...] = ()
) -> dict[str, float]:
    """Metrics of one answer by the names of METRICS, with "unparsable", "chance" and "answer_words"."""
    common = {
        "chance": metrics.chance(answer_type, reference, choices),
        "answer_words": metrics.word_count(answer),
    }
    if answer_type == "closed":
        hit, parsed = metrics.closed_strict(answer, reference, choices)
        legacy = {
            "legacy": metrics.closed_legacy(answer, reference),
            "legacy_published": metrics.closed_published(answer, reference),
        }
        return {**common, **legacy, "accuracy": hit, "unparsable": float(not parsed)}
    if answer_type == "mcq":
        right = metrics.mcq_letter(reference, len(LETTERS)) or "D"
        hit, parsed = metrics.mcq(answer, reference, len(choices) or max(4, LETTERS.index(right) + 1))
        return {**common, "accuracy": hit, "unparsable": float(not parsed)}
    values = {
        "accuracy": metrics.exact_match(answer, reference),
        "set_recall": metrics.set_recall(answer, reference),
        "rouge_l": metrics.rouge_l(answer, reference),
    }
    values |= {f"legacy_{name}": value for name, value in metrics.open_legacy(answer, reference).items()}
    values |= {f"strict_{name}": value for name, value in metrics.open_strict(answer, reference).items()}
    values |= {f"bleu_{order}": value for order, value in enumerate(metrics.bleu(answer, reference), 1)}
    return {**common, **values, "legacy_exact_match": metrics.exact_legacy(answer, reference)}


def _right_option(reference: str, answer_type: str, choices: Sequence[str]) -> int:
    """Index of the right option; -1 where it is not among the choices."""
    if answer_type == "mcq":
        return LETTERS.find(metrics.mcq_letter(reference, len(LETTERS)) or "?")
    wanted = metrics.normalise(reference)
    return next((number for number, choice in enumerate(choices) if metrics.normalise(choice) == wanted), -1)


@lru_cache(maxsize=16_384)
def _right(reference: str, answer_type: str, choices: tuple[str, ...]) -> dict[str, str]:
    """The reference as a constant answer would have to give it: for mcq by its text or by its letter."""
    letter = (
        metrics.normalise(reference)
        if answer_type != "mcq"
        else metrics.option_letter(reference, choices) or reference
    )
    index = _right_option(reference, answer_type, choices)
    text = metrics.normalise(choices[index]) if answer_type == "mcq" and 0 <= index < len(choices) else letter
    return {"right_text": text, "right_letter": letter}
