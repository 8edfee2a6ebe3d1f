"""Scores of written predictions; no model, no Ray.

Means, floors and intervals are made of the arrays of `medray.evaluation.prediction_table`, whose rows are in
order of sample_id, so that the same predictions give the same numbers in whatever order they were written.

Letters of shapes: N rows (questions), G rows of one group.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from medray.bootstrap import clustered_intervals, holm, paired_differences
from medray.config import EvaluateConfig
from medray.errors import StageError
from medray.evaluation.prediction_table import GROUPS, METRICS, TEXT_ONLY, TEXT_ONLY_OF, Table, load
from medray.records import ANSWER_TYPES

SCHEMA = 1


def score(predictions: str, config: EvaluateConfig, text_only: str | None = None) -> dict[str, Any]:
    """Scores of one model from its predictions.

    Args:
        predictions: Parquet or .jsonl file, or folder of either (local or fsspec URI), of records.PREDICTION.
        config: bootstrap resamples and seed.
        text_only: predictions of the same model on the same questions with a blank image: what the text alone
            gives away. Without them the predictions' own column text_only_answer is used where it is filled.

    Returns (schema 1)::

        {"schema": 1, "model", "errors", "error_reasons": {reason: number},
         "thinking": {"answers", "unfinished"}, "overall": G,
         "by_type": {"open": G + OPEN, "closed": G + CLOSED, "mcq": G + MCQ},
         "by_attribute", "by_modality", "by_language", "by_benchmark":
            {name: G + {"by_type": {type: accuracy}, "types": {type: as in by_type above}}},
         "bootstrap": {"resamples", "seed", "level"}}

        OPEN    {"legacy": {"recall": S, "precision": S, "f1": S, "exact_match": S},
                 "strict": {"recall": S, "precision": S, "f1": S, "exact_match": S},
                 "set_recall": S, "bleu": [S, S, S, S], "rouge_l": S}
        CLOSED  {"legacy": S, "strict": S, "legacy_published": S or null, "legacy_left_out": share,
                 "unparsable": share} + LIKELIHOOD
        MCQ     {"strict": S, "unparsable": share (the format-failure rate)} + LIKELIHOOD
        LIKELIHOOD  {} or {"likelihood": {"n", "accuracy": S, "normalised": S}}: the option of the highest
        log-likelihood,
                and of the highest per token, where the predictions hold option_logps

    G is {"n", "images", "errors", "answer_words", "answer_tokens", "truncated", "unfinished_thinking",
    "accuracy": S, "majority", "chance"} and, with text_only, {"text_only": {"n", "accuracy": S, "gain": S,
    "recall": S, "recall_gain": S}}, over the questions both have; recall (strict) and its gain are there for
    open questions, gains are the model's own minus text-only. S is {"value", "low", "high"}, a mean over
    questions with its 95 % interval over images. `accuracy` is the strict one: exact match after
    normalisation (open), the parsed answer (closed) or the letter (mcq). Words and tokens are means per
    answer, `truncated` the share that reached the token limit; both null where not recorded. Floors:
    `majority` is the accuracy of always giving the attribute's commonest reference (for mcq its commonest
    letter or option text, whichever is right more often); `chance` that of drawing an option (null where a
    closed question's options are not known). `legacy_published` is `legacy` as LLaVA-Med's script averages
    it: see metrics.closed_published. Of an answer with thinking before it ("<think>...</think>"), what stands
    after the last closing tag is scored; one whose thinking is never closed is empty. Both are counted in
    `thinking`, and `unfinished_thinking` is the share of the latter. `errors` counts questions without an
    answer (unreadable images), by reason in `error_reasons`; they are in no mean. Answer types without
    questions are absent, tables of a column that is null throughout are empty; questions without an attribute
    are under "unknown".

    Raises StageError where there is nothing to score, an id occurs twice or predictions of several models are
    mixed, DataError for a row that lacks what scoring needs.
    """
    table = load(predictions)
    return _scored(table if text_only is None else _with_text_only(table, load(text_only)), config)


def _scored(table: Table, config: EvaluateConfig) -> dict[str, Any]:
    if table.failed_N.all():
        reasons = "; ".join(f"{number} x {reason}" for reason, number in list(table.reasons.items())[:3])
        raise StageError(
            f"{table.uri}: no prediction to score ({len(table.ids)} with "
            f"errors{': ' + reasons if reasons else ''})"
        )
    overall, blocks = _measured(table, np.arange(len(table.ids)), config)
    return {
        "schema": SCHEMA,
        "model": table.model,
        "errors": int(table.failed_N.sum()),
        "error_reasons": dict(list(table.reasons.items())[:20]),
        "thinking": {
            "answers": _count(table, "thinking"),
            "unfinished": _count(table, "unfinished_thinking"),
        },
        "overall": overall,
        "by_type": blocks,
        **{key: _groups(table, label, config, (overall, blocks)) for key, label in GROUPS.items()},
        "bootstrap": {"resamples": config.bootstrap, "seed": config.seed, "level": 0.95},
    }


def _count(table: Table, name: str) -> int:
    return int(np.nansum(table.values[name]))


def not_scored(results: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Of some sets of scores, for a stage's counts: questions without an answer, and answers that never
    ended their thinking, if any.
    """
    results = list(results)
    unfinished = sum(result["thinking"]["unfinished"] for result in results)
    return {
        "without answer": sum(result["errors"] for result in results),
        **({"unfinished thinking": unfinished} if unfinished else {}),
    }


def rescore(
    predictions: str, config: EvaluateConfig, out: str | None = None, text_only: str | None = None
) -> dict[str, Any]:
    """`score` of a saved file or folder, written to `out` as JSON where that is named."""
    result = score(predictions, config, text_only)
    if out is not None:
        from fsspec.core import url_to_fs

        fs, path = url_to_fs(out)
        with fs.open(path, "wt", encoding="utf-8") as handle:
            handle.write(json.dumps(result, indent=1, allow_nan=False) + "\n")
    return result


def compare(first: str, second: str, config: EvaluateConfig) -> dict[str, Any]:
    """The second model minus the first, on the questions both answered.

    Returns {"schema", "first", "second" (the models' names), "n", "images", "unmatched", "accuracy": D,
    "by_type": {type: D of accuracy}, "metrics": {type: {metric: D}}}, metrics named as in METRICS. D is
    {"value", "low", "high", "p_better", "p_bootstrap", "p_permutation"}: see compare.paired_differences.

    Raises StageError where they share no question, or one of another reference under the same id.
    """
    return _compare(load(first), load(second), config)


def compare_models(models: Mapping[str, str], against: str, config: EvaluateConfig) -> dict[str, Any]:
    """Every model of `models` (name -> predictions) compared with the one named `against`.

    Returns {"against", "models": {name: as `compare`}}, where the D of accuracy, in all and by type, also
    hold "p_holm": p_permutation corrected for the number of models (Holm).
    """
    base = load(models[against])
    return _corrected(
        against, {name: _compare(base, load(uri), config) for name, uri in models.items() if name != against}
    )


def score_models(models: Mapping[str, str], config: EvaluateConfig) -> dict[str, Any]:
    """{"models": {name: `score`}, "comparison": `compare_models` against the first, or None}; each
    model's predictions are read once.
    """
    scored, found = {}, {}
    base = None
    for name, uri in models.items():
        table = load(uri)
        scored[name] = _scored(table, config)
        if base is None:
            base = table
        else:
            found[name] = _compare(base, table, config)
    return {"models": scored, "comparison": _corrected(next(iter(models)), found) if found else None}


def _corrected(against: str, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    kinds = {kind for result in found.values() for kind in result["by_type"]}
    families = [{name: result["accuracy"] for name, result in found.items()}]
    families += [
        {name: result["by_type"][kind] for name, result in found.items() if kind in result["by_type"]}
        for kind in sorted(kinds)
    ]
    for family in families:
        for name, p in holm(
            {name: difference["p_permutation"] for name, difference in family.items()}
        ).items():
            family[name]["p_holm"] = p
    return {"against": against, "models": found}


def _with_text_only(table: Table, blank: Table) -> Table:
    """The table with the blank-image run's numbers of the same questions beside its own."""
    own, other = matched(table, blank)
    columns = {name: np.full(len(table.ids), np.nan) for name in TEXT_ONLY}
    for name, metric in TEXT_ONLY_OF.items():
        columns[name][own] = blank.values[metric][other]
        columns[f"{name}_gain"] = table.values[metric] - columns[name]
    return replace(table, values={**table.values, **columns})


def matched(first: Table, second: Table) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the questions both answered. Raises StageError for one id with two references."""
    answered = [np.flatnonzero(~table.failed_N) for table in (first, second)]
    _, own, other = np.intersect1d(
        first.ids[answered[0]], second.ids[answered[1]], assume_unique=True, return_indices=True
    )
    own, other = answered[0][own], answered[1][other]
    for label in ("answer_type", "right_letter"):
        (names, codes), (others, other_codes) = first.labels[label], second.labels[label]
        differing = np.flatnonzero(
            np.array([*names, ""], object)[codes[own]] != np.array([*others, ""], object)[other_codes[other]]
        )
        if len(differing):
            raise StageError(
                f"{first.uri} and {second.uri}: {first.ids[own[differing[0]]]!r} is not the same question in "
                "both (answer type or reference)"
            )
    return own, other


def _compare(first: Table, second: Table, config: EvaluateConfig) -> dict[str, Any]:
    own, other = matched(first, second)
    if not len(own):
        raise StageError(f"{first.uri} and {second.uri} share no answered question")
    images_N = first.labels["image_id"][1][own]

    def differences(chosen: np.ndarray, names: Sequence[str]) -> dict[str, dict[str, float]]:
        sides = [
            np.stack([table.values[name][rows[chosen]] for name in names], axis=1)
            for table, rows in ((first, own), (second, other))
        ]
        return dict(
            zip(
                names,
                paired_differences(*sides, images_N[chosen], config.bootstrap, config.seed),
                strict=True,
            )
        )

    of_kind = {}
    for kind, chosen in _kinds(first, own):
        measured = [
            name
            for name in METRICS[kind]
            if not np.isnan(first.values[name][own[chosen]] - second.values[name][other[chosen]]).all()
        ]
        of_kind[kind] = differences(chosen, measured)
    answered = sum(int((~table.failed_N).sum()) for table in (first, second))
    return {
        "schema": SCHEMA,
        "first": first.model,
        "second": second.model,
        "n": len(own),
        "images": len(np.unique(images_N)),
        "unmatched": answered - 2 * len(own),
        "accuracy": differences(np.arange(len(own)), ["accuracy"])["accuracy"],
        "by_type": {kind: dict(found["accuracy"]) for kind, found in of_kind.items()},
        "metrics": of_kind,
    }


def _kinds(table: Table, rows: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """(answer type, places in `rows`) of the types that occur."""
    for kind in ANSWER_TYPES:
        if kind in table.labels["answer_type"][0] and len(
            places := np.flatnonzero(table.named("answer_type", kind)[rows])
        ):
            yield kind, places


def _groups(
    table: Table, label: str, config: EvaluateConfig, whole: tuple[dict[str, Any], dict[str, Any]]
) -> dict[str, Any]:
    """A table by one label; a group of all rows is not measured anew."""
    names, codes_N = table.labels[label]
    if not names and label != "attribute":
        return {}
    found = {}
    for code, name in [*enumerate(names), (-1, "unknown")]:
        rows = np.flatnonzero(codes_N == code)
        if (~table.failed_N[rows]).any():
            common, blocks = whole if len(rows) == len(table.ids) else _measured(table, rows, config)
            found[name] = {
                **common,
                "by_type": {kind: block["accuracy"]["value"] for kind, block in blocks.items()},
                "types": blocks,
            }
    return found


def _measured(
    table: Table, rows: np.ndarray, config: EvaluateConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what every group has, the block of each answer type that was answered)."""
    kinds = [(kind, rows[places]) for kind, places in _kinds(table, rows)]
    blocks = {
        kind: _block(kind, table, chosen, config) for kind, chosen in kinds if (~table.failed_N[chosen]).any()
    }
    return _common(table, rows, config, ())[0], blocks


def _block(kind: str, table: Table, rows: np.ndarray, config: EvaluateConfig) -> dict[str, Any]:
    common, s = _common(table, rows, config, METRICS[kind])
    if kind == "open":
        parts = ("recall", "precision", "f1")
        legacy, strict = ({name: s[f"{side}_{name}"] for name in parts} for side in ("legacy", "strict"))
        return {
            **common,
            "legacy": {**legacy, "exact_match": s["legacy_exact_match"]},
            "strict": {**strict, "exact_match": s["accuracy"]},
            "set_recall": s["set_recall"],
            "bleu": [s[f"bleu_{order}"] for order in range(1, 5)],
            "rouge_l": s["rouge_l"],
        }
    rest: dict[str, Any] = {"strict": s["accuracy"], "unparsable": _mean(table, rows, "unparsable")}
    if kind == "closed":
        left_out = np.isnan(table.values["legacy_published"][rows[~table.failed_N[rows]]])
        rest |= {
            "legacy": s["legacy"],
            "legacy_published": s["legacy_published"],
            "legacy_left_out": float(left_out.mean()),
        }
    if s["likelihood"] is not None:
        asked = int((~np.isnan(table.values["likelihood"][rows])).sum())
        rest["likelihood"] = {
            "n": asked,
            "accuracy": s["likelihood"],
            "normalised": s["likelihood_normalised"],
        }
    return {**common, **rest}


def _common(
    table: Table, rows: np.ndarray, config: EvaluateConfig, names: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What every group has, and intervals of further metrics on the same resamples (None where no row has
    part).
    """
    failed = int(table.failed_N[rows].sum())
    rows = rows[~table.failed_N[rows]]
    images_G = table.labels["image_id"][1][rows]
    asked = list(dict.fromkeys(["accuracy", *names, *(name for name in TEXT_ONLY if name in table.values)]))
    values_GM = np.stack([table.values[name][rows] for name in asked], axis=1)
    found = clustered_intervals(values_GM, images_G, config.bootstrap, config.seed)
    s = {
        name: None if math.isnan(interval["value"]) else interval
        for name, interval in zip(asked, found, strict=True)
    }
    common = {
        "n": len(rows),
        "images": len(np.unique(images_G)),
        "errors": failed,
        **{
            name: _mean(table, rows, name)
            for name in ("answer_words", "answer_tokens", "truncated", "unfinished_thinking")
        },
        "accuracy": s["accuracy"],
        "majority": _majority(table, rows),
        "chance": _mean(table, rows, "chance", every=True),
    }
    if s.get("text_only") is not None:
        given = {
            "n": int((~np.isnan(table.values["text_only"][rows])).sum()),
            "accuracy": s["text_only"],
            "gain": s["text_only_gain"],
        }
        recall = (
            {"recall": s["text_only_recall"], "recall_gain": s["text_only_recall_gain"]}
            if s["text_only_recall"] is not None
            else {}
        )
        common["text_only"] = {**given, **recall}
    return common, s


def _mean(table: Table, rows: np.ndarray, name: str, every: bool = False) -> float | None:
    """Mean over the rows that have it; None where no row has it, or, with `every`, one has not."""
    values = table.values[name][rows[~table.failed_N[rows]]]
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) and not (every and len(known) < len(values)) else None


def _majority(table: Table, rows: np.ndarray) -> float:
    """Accuracy of the best constant answer of each attribute and answer type: a text, or for mcq a letter."""
    part = table.labels["attribute"][1][rows] * len(ANSWER_TYPES) + table.labels["answer_type"][1][rows]
    _, part = np.unique(part, return_inverse=True)
    best = np.zeros(part.max() + 1)
    for label in ("right_text", "right_letter"):
        names, codes = table.labels[label]
        keys, counts = np.unique(part * (len(names) + 1) + codes[rows], return_counts=True)
        np.maximum.at(best, keys // (len(names) + 1), counts)
    return float(best.sum() / len(rows))
