"""results.json, metrics.jsonl, TensorBoard files and report.html of an instruction-free tuning."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from medray.config import InstructionFreeConfig
from medray.methods.shared.data_report import account_of_run, not_used
from medray.methods.shared.results import counts_table, metrics_of, recorded, timeline_of, write_metrics
from medray.reporting import html_report
from medray.running.run import Run

_HEADLINE = (
    "strict",
    "balanced",
    "likelihood",
    "format failures",
    "leakage",
    "plain",
    "general",
    "retained",
    "F1",
    "ROUGE-L",
)
_READING = (
    'Strict: the text after the last "The correct answer is" must be one option letter. Balanced: strict, '
    "with all true answers of an attribute weighed alike, so that a preferred letter gains nothing. "
    'Likelihood: the likeliest of "The correct answer is A.", B, ... '
    "Format failures: answers that are no letter (wrong in strict). Leakage: answers that are attribute "
    "lists. Plain: strict accuracy on the source's own questions, or on short ones about its attributes. "
    "General: strict accuracy on general questions. "
    "Retained: of the general questions that the base model answers rightly, the share the tuned model does. "
    "F1: attributes of a description "
    "against the true ones. ROUGE-L depends on the order of the attributes, which shuffling makes random. "
    "Brackets hold 95 % bootstrap intervals over images. "
    "Losses with and without shuffling are not comparable: a random order cannot be predicted."
)

_CURVES = {
    "loss": {"train": "loss", "held-out, in order": "eval_loss"},
    "proxy, |Pbar - start| and |P - Pbar|": {name: f"proxy_{name}" for name in ("moved", "gap")},
    "learning rates": {part: f"lr_{part}" for part in ("llm", "projector", "vision", "proxy")},
}


def write_report(
    run: Run,
    shared: Run,
    config: InstructionFreeConfig,
    data: dict[str, Any],
    before: dict[str, Any],
    after: dict[str, Any],
) -> dict[str, Any]:
    """Gather what the stages recorded and write the run's reading matter.

    Args:
        data, before, after: manifests of the data stage and of the evaluations of the base and the tuned
            model.

    Returns the results, as in results.json: `measures` and `scores` per model ("base", "tuned"), `floors` of
    the multiple-choice questions, `differences`, `retention`, `counts`, `attempts`, `seconds`, `table`
    (text).
    """
    timeline = timeline_of(run, shared)
    outputs = {"base": before["outputs"], "tuned": after["outputs"]}
    results = {
        "measures": {name: measures(found) for name, found in outputs.items()},
        "floors": floors(before["outputs"]),
        "scores": {name: found["scores"] for name, found in outputs.items()},
        "form": data["outputs"]["form"],
        "differences": after["outputs"]["differences"],
        "retention": after["outputs"]["retention"],
        **recorded(timeline),
    }
    results["table"] = text_table(results)
    metrics = write_metrics(run, metrics_of(run, shared))
    run.write_json(results, "results.json")
    run.write_text(render(run, config, results, data, outputs, metrics, timeline), "report.html")
    return results


def measures(outputs: dict[str, Any]) -> dict[str, Any]:
    """The headline numbers of one model's evaluation: S ({"value", "low", "high"}), a share, or None where it
    was not measured.

    strict, balanced (strict, all true answers weighed alike), likelihood (over stated options), likelihood
    per token, format failures: of multiple choice in the authors' words; leakage: of these and plain
    questions; plain, general: strict accuracy; precision, recall, F1 (of attributes), ROUGE-L: of
    descriptions.
    """
    scores = outputs["scores"]
    strict = {one: found["overall"]["accuracy"] for one, found in scores.items()}
    choices = scores["choices"]["by_type"]["mcq"] if "choices" in scores else {}
    overlap = outputs.get("overlap") or {}
    return {
        "strict": strict.get("choices"),
        "balanced": outputs.get("balanced"),
        "likelihood": choices.get("likelihood", {}).get("accuracy"),
        "likelihood per token": choices.get("likelihood", {}).get("normalised"),
        "format failures": choices.get("unparsable"),
        "leakage": outputs.get("leakage"),
        "plain": strict.get("plain"),
        "general": strict.get("general"),
        "retained": (outputs.get("retention") or {}).get("retained"),
        "precision": overlap.get("precision"),
        "recall": overlap.get("recall"),
        "F1": overlap.get("f1"),
        "ROUGE-L": scores["described"]["by_type"]["open"]["rouge_l"],
    }


def floors(outputs: dict[str, Any]) -> dict[str, float | None]:
    """What the held-out questions give without a look at the image: a drawn option, each attribute's
    commonest answer.
    """
    overall = outputs["scores"]["choices"]["overall"] if "choices" in outputs["scores"] else {}
    return {"chance": overall.get("chance"), "majority": overall.get("majority")}


def text_table(results: dict[str, Any]) -> str:
    """The headline numbers of both models, and the floors."""
    lines = [f"{'model':<8}" + "".join(f"{name:>22}" for name in _HEADLINE)]
    for model, found in results["measures"].items():
        lines.append(f"{model:<8}" + "".join(f"{_shown(found[name]):>22}" for name in _HEADLINE))
    return "\n".join(
        [
            *lines,
            "floors  " + ", ".join(f"{name} {_shown(value)}" for name, value in results["floors"].items()),
        ]
    )


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return html_report.with_interval(value) if isinstance(value, dict) else f"{value:.3f}"


def render(
    run: Run,
    config: InstructionFreeConfig,
    results: dict[str, Any],
    data: dict[str, Any],
    outputs: dict[str, Any],
    metrics: dict[str, list[dict]],
    timeline: list[dict[str, Any]],
) -> str:
    """The HTML page."""
    sections = [
        ("Before and after", f'<p class="soft">{_READING}</p>' + _headline(results)),
        ("Multiple choice by attribute", _attributes(results["scores"], "choices")),
        ("Plain questions by attribute", _attributes(results["scores"], "plain")),
        ("What the model has kept", _kept(results)),
        ("Descriptions", _table(results["measures"], ("precision", "recall", "F1", "ROUGE-L"))),
        ("Training", html_report.training_curves(metrics, _CURVES)),
        ("Answers to multiple choice", _gallery(data, outputs, "choices")),
        ("Answers to plain questions", _gallery(data, outputs, "plain")),
        ("Descriptions of held-out images", _gallery(data, outputs, "described")),
        ("General questions", _gallery(data, outputs, "general")),
        ("Rows: kept, quarantined, retried", counts_table(results)),
        *not_used(account_of_run(timeline)),
        ("Time", html_report.timeline(timeline)),
        ("Configuration", html_report.config_section(config.model_dump(mode="json"))),
    ]
    return html_report.page(
        "Instruction-free tuning report",
        sections,
        f"{config.model.path} on {config.data.source}; run {run.uri}",
    )


def _headline(results: dict[str, Any]) -> str:
    floor_rows = [
        [f"floor: {name}", value, *[None] * (len(_HEADLINE) - 1)]
        for name, value in results["floors"].items()
        if value is not None
    ]
    rows = [[model, *(found[name] for name in _HEADLINE)] for model, found in results["measures"].items()]
    plots = "".join(
        html_report.arms_plot(
            {model: found[name] for model, found in results["measures"].items() if found[name]},
            f"{name}, 95 % interval over images",
        )
        for name in ("strict", "likelihood", "plain", "general", "F1")
    )
    gains = [[one, difference] for one, difference in results["differences"].items()]
    gain_table = html_report.table(["questions", "tuned minus base, strict, paired"], gains) if gains else ""
    return (
        html_report.table(["model", *_HEADLINE], [*rows, *floor_rows])
        + f'<div class="plots">{plots}</div>'
        + gain_table
    )


def _table(by_model: dict[str, dict[str, Any]], names: tuple[str, ...]) -> str:
    return html_report.table(
        ["model", *names], [[model, *(found[name] for name in names)] for model, found in by_model.items()]
    )


def _attributes(scores: dict[str, dict[str, Any]], one: str) -> str:
    by_model = {model: found[one]["by_attribute"] for model, found in scores.items() if one in found}
    names = sorted({name for found in by_model.values() for name in found})
    rows = []
    for name in names:
        groups = [found.get(name) for found in by_model.values()]
        known = next(group for group in groups if group)
        rows.append(
            [
                name,
                known["n"],
                known["chance"],
                known["majority"],
                *(group and group["accuracy"] for group in groups),
            ]
        )
    return (
        html_report.table(
            ["attribute", "questions", "chance", "majority", *(f"{model}, strict" for model in by_model)],
            rows,
        )
        if rows
        else ""
    )


def _kept(results: dict[str, Any]) -> str:
    kept = results["retention"]
    if not kept:
        return ""
    shares = [kept[name] for name in ("before", "after", "retained", "gained")]
    head = [
        "questions",
        "right before",
        "accuracy before",
        "accuracy after",
        "still right",
        "newly right (of those wrong before)",
    ]
    kinds = sorted({kind for found in results["scores"].values() for kind in found["general"]["by_type"]})
    rows = [
        [
            model,
            *(
                found["general"]["by_type"][kind]["accuracy"] if kind in found["general"]["by_type"] else None
                for kind in kinds
            ),
        ]
        for model, found in results["scores"].items()
    ]
    return html_report.table(head, [[kept["questions"], kept["could"], *shares]]) + html_report.table(
        ["model", *kinds], rows
    )


def _gallery(data: dict[str, Any], outputs: dict[str, Any], one: str) -> str:
    from medray.methods.shared.results_page import wins_and_losses

    return (
        wins_and_losses(_examples(data, outputs, one), list(outputs), most=6)
        if one in outputs["base"]["sets"]
        else ""
    )


def _examples(
    data: dict[str, Any], outputs: dict[str, Any], one: str, rows: int = 400, most: int = 24
) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    """Questions that the models answered differently, with their image and both answers."""
    from medray.evaluation.prediction_files import by_id, read_predictions
    from medray.methods.prepare_data.pipeline import images_of

    first = list(itertools.islice(read_predictions(outputs["base"]["sets"][one]), rows))
    answers = {model: by_id(found["sets"][one], ["answer"]) for model, found in outputs.items()}
    shown = [
        (
            row,
            {
                model: found[row["sample_id"]]["answer"]
                for model, found in answers.items()
                if row["sample_id"] in found
            },
        )
        for row in first
    ]
    shown = [(row, both) for row, both in shown if len(set(both.values())) > 1][:most]
    images = dict(images_of(data["outputs"][one], {row["sample_id"] for row, _ in shown}))
    return (
        ({**row, "image": images[row["sample_id"]]}, both)
        for row, both in shown
        if row["sample_id"] in images
    )
