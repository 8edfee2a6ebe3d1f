"""Answers to benchmark questions, and their scores.

`Predict` runs in engine actors: rows of records.QUESTION in, rows of records.PREDICTION out, greedy. `score` reads the
written predictions and returns one dictionary per model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow.dataset

from medray.config import DataConfig, EngineConfig, EvaluateConfig, ModelConfig, SamplingConfig
from medray.errors import StageError
from medray.evaluation import metrics
from medray.evaluation.compare import clustered_interval, paired_difference
from medray.inference.worker import EngineWorker
from medray.records import PREDICTION

_COLUMNS = [name for name in PREDICTION.names if name != "question"]


class Predict(EngineWorker):
    """One greedy answer per question.

    Args:
        model, model_config, data_config, engine_config: see EngineWorker.
        name: written to the column `model`.
        max_tokens: longest answer.
        suffix: put after the question; part of a benchmark's definition, e.g. "Answer with yes or no."
    """

    schema = PREDICTION
    stage = "predict"

    def __init__(
        self, model: str, model_config: ModelConfig | dict, data_config: DataConfig | dict, engine_config: EngineConfig | dict,
        name: str, max_tokens: int = 128, suffix: str = "",
    ):
        super().__init__(model, model_config, data_config, engine_config)
        self.name = name
        self.suffix = suffix
        self.sampling = SamplingConfig(temperature=0, top_k=0, top_p=1.0, max_tokens=max_tokens)

    async def row(self, row: dict[str, Any]) -> dict[str, Any]:
        image, key = await self.image(row)
        text = f"{row['question']}\n{self.suffix}" if self.suffix else row["question"]
        prompt = self.engine.chat.prompt_ids([{"role": "user", "text": text}])
        output = (await self.engine.generate(prompt, image, self.sampling, image_id=key))[0]
        return {
            **row, "answer": output.text.strip(), "model": self.name, "finish_reason": output.finish_reason,
            "tokens": len(output.token_ids), "error": None,
        }

    def failed(self, row: dict[str, Any], reason: str) -> dict[str, Any]:
        return {**super().failed(row, reason), "model": self.name}


def score(predictions: str, config: EvaluateConfig) -> dict[str, Any]:
    """Scores of one model from its predictions.

    Args:
        predictions: folder (local or fsspec URI) of Parquet files of records.PREDICTION.
        config: bootstrap resamples and seed.

    Returns::

        {"model", "errors", "overall": G + {"answer_tokens", "truncated"},
         "by_type": {
            "open": G + {"legacy": {"recall": S, "precision": S, "f1": S}, "strict": {"recall": S, "precision": S, "f1": S},
                         "set_recall": S, "bleu": [S, S, S, S], "rouge_l": S},
            "closed": G + {"legacy": S, "unparsable": share},
            "mcq": G + {"unparsable": share, "chance": value}},
         "by_attribute": {name: G + {"by_type": {type: accuracy}}},
         "bootstrap": {"resamples", "seed", "level"}}

    G is {"n", "images", "answer_words": mean words per answer, "accuracy": S, "majority": value}.
    S is {"value", "low", "high"}, a mean over questions with its 95 % interval over images. `accuracy` is exact match
    after normalisation (open), the parsed answer (closed) or the letter (mcq). `majority` is the accuracy of always
    giving the commonest reference of the attribute. Answer types without questions are absent. `errors` counts
    questions without an answer (unreadable images); they are in no mean.

    Raises StageError where there is nothing to score.
    """
    rows, errors = [], 0
    for row in _read(predictions):
        if row["error"] is not None:
            errors += 1
        else:
            rows.append(_scored(row))
    if not rows:
        raise StageError(f"{predictions}: no prediction to score ({errors} with errors)")

    def mean(group: Sequence[dict[str, Any]], name: str) -> dict[str, float]:
        return clustered_interval([row[name] for row in group], [row["image_id"] for row in group], config.bootstrap, config.seed)

    types = {kind: group for kind in ("open", "closed", "mcq") if (group := [row for row in rows if row["answer_type"] == kind])}
    attributes: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        attributes.setdefault(row["attribute"] or "unknown", []).append(row)
    overall = {
        "answer_tokens": float(np.mean([row["tokens"] for row in rows])), "truncated": float(np.mean([row["truncated"] for row in rows])),
    }
    return {
        "model": rows[0]["model"], "errors": errors, "overall": {**_common(rows, mean), **overall},
        "by_type": {kind: {**_common(group, mean), **_of_type(kind, group, mean)} for kind, group in types.items()},
        "by_attribute": {name: {**_common(group, mean), "by_type": _accuracies(group)} for name, group in sorted(attributes.items())},
        "bootstrap": {"resamples": config.bootstrap, "seed": config.seed, "level": 0.95},
    }


def compare(first: str, second: str, config: EvaluateConfig) -> dict[str, Any]:
    """Accuracy of the second model minus the first's on the questions both answered.

    Returns {"n", "images", "unmatched", "accuracy": {"value", "low", "high", "p_better"}, "by_type": {type: the same}}.

    Raises StageError where they share no question.
    """
    sides = [{row["sample_id"]: _scored(row) for row in _read(uri) if row["error"] is None} for uri in (first, second)]
    shared = sorted(sides[0].keys() & sides[1].keys())
    if not shared:
        raise StageError(f"{first} and {second} share no answered question")

    def difference(ids: Sequence[str]) -> dict[str, float]:
        values = [[side[key]["accuracy"] for key in ids] for side in sides]
        return paired_difference(*values, [sides[0][key]["image_id"] for key in ids], config.bootstrap, config.seed)

    kinds = {kind: ids for kind in ("open", "closed", "mcq") if (ids := [key for key in shared if sides[0][key]["answer_type"] == kind])}
    return {
        "n": len(shared), "images": len({sides[0][key]["image_id"] for key in shared}),
        "unmatched": len(sides[0].keys() ^ sides[1].keys()), "accuracy": difference(shared),
        "by_type": {kind: difference(ids) for kind, ids in kinds.items()},
    }


def _read(uri: str) -> Iterator[dict[str, Any]]:
    from fsspec.core import url_to_fs

    fs, path = url_to_fs(uri)
    for batch in pyarrow.dataset.dataset(path, format="parquet", filesystem=fs).to_batches(columns=_COLUMNS):
        yield from batch.to_pylist()


def _scored(row: dict[str, Any]) -> dict[str, Any]:
    """What the means need of one prediction: a few numbers, no texts but the reference."""
    kept = {name: row[name] for name in ("sample_id", "image_id", "reference", "answer_type", "attribute", "model", "tokens")}
    numbers = _numbers(row["answer"], row["reference"], row["answer_type"], tuple(row["choices"] or ()))
    return {**kept, "truncated": float(row["finish_reason"] == "length"), "answer_words": len(row["answer"].split()), **numbers}


# Short answers repeat: benchmarks of 100k questions hold a few thousand distinct ones.
@lru_cache(maxsize=65536)
def _numbers(answer: str, reference: str, answer_type: str, choices: tuple[str, ...]) -> dict[str, float]:
    if answer_type == "closed":
        hit, parsed = metrics.closed_strict(answer, reference, choices)
        return {"accuracy": hit, "unparsable": float(not parsed), "legacy": metrics.closed_legacy(answer, reference)}
    if answer_type == "mcq":
        hit, parsed = metrics.mcq(answer, reference, len(choices) or 4)
        return {"accuracy": hit, "unparsable": float(not parsed), "chance": 1 / (len(choices) or 4)}
    if answer_type != "open":
        raise StageError(f"answer_type {answer_type!r} is not open, closed or mcq")
    values = {"accuracy": metrics.exact_match(answer, reference), "set_recall": metrics.set_recall(answer, reference), "rouge_l": metrics.rouge_l(answer, reference)}
    values |= {f"legacy_{name}": value for name, value in metrics.open_legacy(answer, reference).items()}
    values |= {f"strict_{name}": value for name, value in metrics.open_strict(answer, reference).items()}
    return values | {f"bleu_{order}": value for order, value in enumerate(metrics.bleu(answer, reference), 1)}


def _common(group: Sequence[dict[str, Any]], mean: Any) -> dict[str, Any]:
    return {
        "n": len(group), "images": len({row["image_id"] for row in group}),
        "answer_words": float(np.mean([row["answer_words"] for row in group])),
        "accuracy": mean(group, "accuracy"), "majority": _majority(group),
    }


def _of_type(kind: str, group: Sequence[dict[str, Any]], mean: Any) -> dict[str, Any]:
    if kind == "open":
        return {
            **{
                variant: {name: mean(group, f"{variant}_{name}") for name in ("recall", "precision", "f1")}
                for variant in ("legacy", "strict")
            },
            "set_recall": mean(group, "set_recall"), "rouge_l": mean(group, "rouge_l"),
            "bleu": [mean(group, f"bleu_{order}") for order in range(1, 5)],
        }
    unparsable = float(np.mean([row["unparsable"] for row in group]))
    if kind == "closed":
        return {"legacy": mean(group, "legacy"), "unparsable": unparsable}
    return {"unparsable": unparsable, "chance": float(np.mean([row["chance"] for row in group]))}


def _accuracies(group: Sequence[dict[str, Any]]) -> dict[str, float]:
    by_type: dict[str, list[float]] = {}
    for row in group:
        by_type.setdefault(row["answer_type"], []).append(row["accuracy"])
    return {kind: float(np.mean(values)) for kind, values in by_type.items()}


def _majority(group: Sequence[dict[str, Any]]) -> float:
    """Accuracy of the commonest reference of each attribute and answer type."""
    parts: dict[tuple[Any, str], list[str]] = {}
    for row in group:
        parts.setdefault((row["attribute"], row["answer_type"]), []).append(row["reference"])
    return sum(metrics.majority_floor(references) * len(references) for references in parts.values()) / len(group)
