"""report.html and results.json of a self-training run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from medray.config import SelfTrainingConfig
from medray.files import files_in
from medray.methods.shared.data_report import account_of_run, not_used
from medray.methods.shared.results import (
    attributes_table,
    counts_table,
    form_table,
    read_metrics,
    recorded,
    text_table,
    write_metrics,
)
from medray.reporting import html_report
from medray.running.run import Run

_CURVES = {
    "loss": {"train": "loss", "held-out": "eval_loss"},
    "rewards": {name: f"rewards/{name}" for name in ("margin", "chosen", "rejected")},
    "reward accuracy": {"accuracy": "rewards/accuracy"},
    "learning rates": {part: f"lr_{part}" for part in ("llm", "projector", "vision")},
}


def write_report(run: Run, config: SelfTrainingConfig, scores: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Gather what the stages recorded and write the run's reading matter.

    Args:
        scores: per model ("base", "sft", "dpo-1", ...) the manifest of its evaluate stage.

    Returns the results, as in results.json: `accuracy` per model (mean over questions of strict
    accuracy, {"value", "low", "high"}), `scores`, `counts`, `judge`, `dropped`, `table` (text).
    """
    by_model = {name: manifest["outputs"]["scores"] for name, manifest in scores.items()}
    stages = {manifest["stage"]: manifest for manifest in run.timeline}
    results = {
        "accuracy": {name: score["overall"]["accuracy"] for name, score in by_model.items()},
        "scores": by_model,
        "differences": {name: manifest["outputs"].get("difference") for name, manifest in scores.items()},
        **recorded(run.timeline),
        "judge": {
            name: manifest["outputs"]["ledger"]
            for name, manifest in stages.items()
            if "ledger" in manifest["outputs"]
        },
    }
    results["table"] = text_table(by_model)
    metrics = write_metrics(run, read_metrics(run))
    run.write_json(results, "results.json")
    run.write_text(render(run, config, results, stages, metrics), "report.html")
    return results


def render(
    run: Run,
    config: SelfTrainingConfig,
    results: dict[str, Any],
    stages: dict[str, Any],
    metrics: dict[str, list[dict]],
) -> str:
    """The HTML page."""
    by_model = results["scores"]
    sections = [
        ("Held-out accuracy, before and after", _accuracy(by_model, results)),
        ("By attribute", attributes_table(by_model)),
        ("Training", html_report.training_curves(metrics, _CURVES)),
        ("Answers: length and form", form_table(by_model)),
        ("Preference pairs", _pairs(results, stages)),
        ("Questions the model asked itself", html_report.gallery(_judged_sample(run, stages))),
        ("Rows: kept, dropped, quarantined, retried", counts_table(results)),
        *not_used(account_of_run(run.timeline)),
        ("Time", html_report.timeline(run.timeline)),
        ("Configuration", html_report.config_section(config.model_dump(mode="json"))),
    ]
    return html_report.page(
        "Self-training report", sections, f"{config.model.path} on {config.data.source}; run {run.uri}"
    )


def _accuracy(by_model: dict[str, Any], results: dict[str, Any]) -> str:
    kinds = sorted({kind for score in by_model.values() for kind in score["by_type"]})
    rows = [
        [
            name,
            html_report.with_interval(score["overall"]["accuracy"]),
            *(
                html_report.with_interval(score["by_type"][kind]["accuracy"])
                if kind in score["by_type"]
                else ""
                for kind in kinds
            ),
            score["overall"]["n"],
            score["overall"]["images"],
        ]
        for name, score in by_model.items()
    ]
    plot = html_report.arms_plot(
        {name: score["overall"]["accuracy"] for name, score in by_model.items()},
        "strict accuracy, 95 % interval over images",
    )
    gains = [
        [name, difference["against"], html_report.with_interval(difference)]
        for name, difference in results["differences"].items()
        if difference
    ]
    gain_table = html_report.table(["model", "against", "paired difference"], gains) if gains else ""
    return (
        html_report.table(["model", "all", *kinds, "questions", "images"], rows)
        + f'<div class="plots">{plot}</div>'
        + gain_table
    )


def _pairs(results: dict[str, Any], stages: dict[str, Any]) -> str:
    rows = [
        [name, key, value]
        for name, manifest in stages.items()
        if name.endswith("-pairs")
        for key, value in manifest["outputs"]["counts"].items()
    ]
    ledger = [
        [name, key, value] for name, entries in results["judge"].items() for key, value in entries.items()
    ]
    return html_report.table(["stage", "what", "number"], rows) + (
        html_report.table(["judge", "what", "number"], ledger) if ledger else ""
    )


def _judged_sample(run: Run, stages: dict[str, Any], rows: int = 40) -> Iterator[dict[str, Any]]:
    """The first rows of the last round's judged file; only one file is opened."""
    import pyarrow.parquet as pq

    judged = [manifest for name, manifest in stages.items() if name.endswith("-judge")]
    if not judged:
        return
    _, _, folder = judged[-1]["outputs"]["rows"].partition(run.uri)
    for path in files_in(run.fs, f"{run._root}{folder}", ".parquet")[:1]:
        with run.fs.open(path, "rb") as handle:
            batch = next(pq.ParquetFile(handle).iter_batches(batch_size=rows), None)
            yield from (batch.to_pylist() if batch is not None else [])
