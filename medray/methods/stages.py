"""The stages of self-training, each a function of the stage's folder, the config and what came before.

They only place work: rows move through Ray Data, training runs in Ray Train, the rules live in medray.inference,
medray.train and medray.evaluation. Nothing here holds rows.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from medray.config import SelfTrainingConfig, TrainConfig
from medray.run import Run, Stage


@dataclass(frozen=True)
class Model:
    """A model of the run: where it lies and the hash of its weights."""

    path: str
    hash: str


def data_inputs(config: SelfTrainingConfig) -> dict[str, Any]:
    """What the data stage depends on: execution settings such as CPUs are left out."""
    return {"data": config.data.model_dump(exclude={"read_cpus"}), "kinds": config.evaluate.kinds, "eval_seed": config.evaluate.seed,
            "max_eval": config.evaluate.max_images, "seed": config.sft.seed, "eval_rows": config.sft.eval_rows}


def judge_inputs(config: SelfTrainingConfig) -> dict[str, Any]:
    return config.judge.model_dump(exclude={"concurrency", "retries", "timeout"})


def arm_of(model: str) -> str:
    """The arm a model's name belongs to: dpo-2 is of arm dpo."""
    return model.partition("-")[0]


def resolve_base(config: SelfTrainingConfig) -> Model:
    from medray.models.vlm import model_hash, resolve_model

    path = resolve_model(config.model.path)
    return Model(path, model_hash(path))


def exported(manifest: dict[str, Any]) -> Model:
    return Model(manifest["outputs"]["model"], manifest["outputs"]["model_hash"])


def prepare_data(stage: Stage, config: SelfTrainingConfig) -> dict[str, Any]:
    """Source -> conversations, unlabelled images, held-out questions, quarantine (Parquet shards)."""
    from medray.data.prepare import prepare

    counts = prepare(config.data, stage.dir, seed=config.sft.seed, eval_kinds=config.evaluate.kinds, eval_seed=config.evaluate.seed,
                     max_eval_images=config.evaluate.max_images, eval_conversations=config.sft.eval_rows)
    return {"counts": counts, **{part: stage.path(part) for part in ("conversations", "eval_conversations", "images", "questions", "quarantine")}}


def tune(stage: Stage, config: SelfTrainingConfig, model: Model, rows_uri: str, objective: str, train: TrainConfig) -> dict[str, Any]:
    """Train adapters on the rows, merge them, export the model; keeps the metrics of every step."""
    import shutil
    import tempfile

    from medray.data.collate import Encoder
    from medray.data.shards import count_rows, read_rows
    from medray.inference.engine import localize
    from medray.models.vlm import model_hash
    from medray.train.worker import export_merged, run_training

    local = localize(model.path)
    rows = count_rows(rows_uri)
    kwargs = {"model_path": local, "model_config": config.model.model_dump(), "data_config": config.data.model_dump(), "kind": objective}

    def encoded(uri: str):
        return read_rows(uri, num_cpus=config.data.read_cpus).map_batches(
            Encoder, fn_constructor_kwargs=kwargs, batch_size=32, num_cpus=config.data.read_cpus,
        )

    evaluation = stage.run.path("stages", "00-data", "eval_conversations")
    has_eval = objective == "sft" and train.eval_rows > 0 and count_rows(evaluation) > 0
    result = run_training(
        stage.path("train"), encoded(rows_uri), encoded(evaluation) if has_eval else None, rows=rows,
        model_dir=local, model_config=config.model, train_config=train, objective=objective,
    )
    stage.publish("model", lambda folder: export_merged(result.checkpoint, local, folder, config.model, train))
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copy(result.metrics, f"{scratch}/metrics.jsonl")
        with open(f"{scratch}/metrics.jsonl") as handle:
            stage.run.write_text(handle.read(), stage.folder, "metrics.jsonl")
    path = stage.path("model")
    return {"model": path, "model_hash": model_hash(localize(path)), "counts": result.counts, "metrics": stage.path("metrics.jsonl")}
