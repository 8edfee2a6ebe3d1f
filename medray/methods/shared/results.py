"""results.json, metrics.jsonl, TensorBoard files and report.html of a self-training run."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterator
from typing import Any

from medray.reporting import html_report
from medray.running.run import Run


def text_table(by_model: dict[str, dict[str, Any]]) -> str:
    """Accuracy of every model, whole and by kind of question, with 95 % intervals over images."""
    kinds = sorted({kind for score in by_model.values() for kind in score["by_type"]})
    lines = [f"{'model':<10}{'all':>24}" + "".join(f"{kind:>24}" for kind in kinds) + f"{'words':>8}"]
    for name, score in by_model.items():
        cells = [
            score["overall"]["accuracy"],
            *(score["by_type"].get(kind, {}).get("accuracy") for kind in kinds),
        ]
        words = score["overall"]["answer_words"]
        lines.append(
            f"{name:<10}"
            + "".join(f"{html_report.with_interval(c) if c else '':>24}" for c in cells)
            + f"{words:>8.2f}"
        )
    return "\n".join(lines)


def recorded(timeline: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the stages recorded of their work: `counts`, `attempts` and `seconds`, each by stage."""
    return {
        "counts": {stage["stage"]: stage["outputs"].get("counts", {}) for stage in timeline},
        "attempts": {stage["stage"]: stage["attempts"] for stage in timeline},
        "seconds": {stage["stage"]: stage["seconds"] for stage in timeline},
    }


def timeline_of(run: Run, shared: Run) -> list[dict[str, Any]]:
    """The manifests of both, the shared stages first; `shared` may be the run itself."""
    return run.timeline if shared is run else [*shared.timeline, *run.timeline]


def metrics_of(run: Run, shared: Run) -> dict[str, list[dict[str, Any]]]:
    """The training metrics of both, by stage; `shared` may be the run itself."""
    return read_metrics(run) if shared is run else {**read_metrics(shared), **read_metrics(run)}


def read_metrics(run: Run) -> dict[str, list[dict[str, Any]]]:
    """The training metrics of the run's stages so far, by stage."""
    return {
        manifest["stage"]: list(_lines(run, manifest["stage"]))
        for manifest in run.timeline
        if "metrics" in manifest["outputs"]
    }


def write_metrics(run: Run, metrics: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Training metrics by stage into metrics.jsonl and TensorBoard files; returns them."""
    text = "".join(
        json.dumps({"stage": name, **row}) + "\n" for name, rows in metrics.items() for row in rows
    )
    run.write_text(text, "metrics.jsonl")

    from torch.utils.tensorboard import SummaryWriter

    run.remove("tensorboard")
    with tempfile.TemporaryDirectory() as scratch:
        for name, rows in metrics.items():
            with SummaryWriter(f"{scratch}/{name}") as writer:
                for row in rows:
                    for key, value in row.items():
                        if isinstance(value, (int, float)) and key not in ("step", "epoch"):
                            writer.add_scalar(key, value, row["step"])
        run.fs.put(scratch + "/", run.path("tensorboard") + "/", recursive=True)
    return metrics


def _lines(run: Run, stage: str) -> Iterator[dict[str, Any]]:
    for line in run.read_text("stages", stage, "metrics.jsonl").splitlines():
        yield json.loads(line)


def attributes_table(by_model: dict[str, Any]) -> str:
    """Accuracy by attribute: a column per model."""
    names = sorted({name for score in by_model.values() for name in score["by_attribute"]})
    rows = []
    for name in names:
        floors = [
            score["by_attribute"][name]["majority"]
            for score in by_model.values()
            if name in score["by_attribute"]
        ]
        rows.append(
            [
                name,
                floors[0],
                *(
                    html_report.with_interval(score["by_attribute"][name]["accuracy"])
                    if name in score["by_attribute"]
                    else ""
                    for score in by_model.values()
                ),
            ]
        )
    return html_report.table(["attribute", "majority floor", *by_model], rows)


def form_table(by_model: dict[str, Any]) -> str:
    """Length and form of the answers of every model."""
    rows = [
        [name, kind, score["answer_words"], score.get("unparsable", 0.0), score["n"]]
        for name, whole in by_model.items()
        for kind, score in whole["by_type"].items()
    ]
    return html_report.table(["model", "kind", "mean answer words", "share unparsable", "questions"], rows)


def counts_table(results: dict[str, Any]) -> str:
    """The numbers of `recorded` and of `ledgers`, where the results have them; a count by name takes a
    line for each name.
    """
    rows: list[list[Any]] = []
    for stage, found in itertools.chain(results["counts"].items(), results.get("ledgers", {}).items()):
        for key, value in found.items():
            named = (
                {f"{key}: {name}": number for name, number in value.items()}
                if isinstance(value, dict)
                else {key: value}
            )
            rows += [[stage, *one] for one in named.items()]
    rows += [[stage, "attempts", number] for stage, number in results["attempts"].items() if number > 1]
    return html_report.table(["stage", "what", "number"], rows)
