"""What jobs tell Prometheus while they run, through the exporter that Ray has on every node
(docs/how-to/monitoring.md).

Rates and sums are Prometheus' own work, so nearly everything here is a counter. Labels have few values:
stages and kinds of objective, never ids. Outside Ray (a notebook, a unit test) the numbers go nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class RowMetrics:
    """Of an actor that works on rows: `medray_rows` by stage and outcome (done, or set aside with an
    error), `medray_generated_tokens`.
    """

    def __init__(self, stage: str):
        from ray.util.metrics import Counter

        self.stage = stage
        self._rows = Counter(
            "medray_rows",
            "Rows that generating, judging and predicting actors are done with, by stage and outcome.",
            ("stage", "outcome"),
        )
        self._tokens = Counter(
            "medray_generated_tokens", "Tokens that vLLM engines of jobs generated, by stage.", ("stage",)
        )

    def rows(self, done: int, set_aside: int) -> None:
        for outcome, number in (("done", done), ("set aside", set_aside)):
            if number:
                self._rows.inc(number, {"stage": self.stage, "outcome": outcome})

    def tokens(self, number: int) -> None:
        if number:
            self._tokens.inc(number, {"stage": self.stage})


class TrainMetrics:
    """Training metrics reported by rank 0: samples, seconds and those of them that were spent waiting
    for rows, the loss and the number of workers.
    """

    def __init__(self, objective: str):
        from ray.util.metrics import Counter, Gauge

        self._labels = {"objective": objective}
        self._samples = Counter(
            "medray_train_samples",
            "Samples that were trained on, those after an interruption done again included.",
            ("objective",),
        )
        self._seconds = Counter("medray_train_seconds", "Seconds of training steps.", ("objective",))
        self._data_seconds = Counter(
            "medray_train_data_seconds",
            "Seconds of training steps that were spent on waiting for rows and checkpoints.",
            ("objective",),
        )
        self._loss = Gauge("medray_train_loss", "Loss of the last training step.", ("objective",))
        self._workers = Gauge("medray_train_workers", "Training workers.", ("objective",))

    def step(self, metrics: Mapping[str, Any], workers: int) -> None:
        """One optimiser step's line of metrics.jsonl."""
        for counter, name in (
            (self._samples, "samples"),
            (self._seconds, "seconds"),
            (self._data_seconds, "data_seconds"),
        ):
            if metrics[name] > 0:
                counter.inc(metrics[name], self._labels)
        self._loss.set(metrics["loss"], self._labels)
        self._workers.set(workers, self._labels)
