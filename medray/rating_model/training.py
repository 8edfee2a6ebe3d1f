"""Whole trainings of the rating model: pairs in, the best epoch's model out."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from medray.config import DataConfig, ModelConfig, RaterConfig
from medray.errors import DataError
from medray.models.vlm import resolve_model
from medray.rating_model.pairs import ORIGINS, PairEncoder, pair_counts, pairs_of, trains_on
from medray.rating_model.train_step import leading_measure, new_rater
from medray.train.worker import Objective, TrainResult, run_training

_SELECTED_BY = {"eval_alignment": "clinician alignment", "eval_accuracy": "pair accuracy", None: "last epoch"}


def _parts() -> tuple[type, type]:
    from medray.rating_model.train_step import RaterBatches, RaterStep

    return RaterStep, RaterBatches


RATER = Objective("rater", RaterConfig, _parts, chooses_best=True)


@dataclass(frozen=True)
class RaterResult(TrainResult):
    """What the training of a rating model left behind: see TrainResult; `best` is what export_rater takes.

    selected_by: what chose the best epoch: "clinician alignment", "pair accuracy" (no clinician's pair was
        held out, or train_on is model) or "last epoch" (no such pair was).
    best_epoch: from 0.
    """

    selected_by: str = ""
    best_epoch: int = 0


def train_rater(
    stage_dir: str,
    pairs: str | list[str],
    config: RaterConfig,
    data_config: DataConfig,
    max_quarantined: float = 1.0,
) -> RaterResult:
    """Train on records.RATING_PAIR shards; the same call after a crash resumes from the last checkpoint.

    Args:
        stage_dir: where checkpoints go: a path or URL that every node reaches.
        pairs: a folder, or several; sample_ids are unique over all of them.
        max_quarantined: see run_training.

    Returns a RaterResult; its counts are also of pairs by side and origin
    (medray.rating_model.pairs.pair_counts), and of those trained on whose answer or context was cut.

    Raises DataError where there is nothing to train on, and what run_training raises.
    """
    uris = [pairs] if isinstance(pairs, str) else list(pairs)
    counts = pair_counts(uris, config)
    wanted = [origin for origin in ORIGINS if trains_on(origin, config)]
    missing = [origin for origin in wanted if not counts[f"train, {origin}"]]
    if missing:
        raise DataError(
            f"rater.train_on is {config.train_on}, and {', '.join(uris)} hold no pair of origin "
            f"{' or '.join(missing)} to train on "
            f"(by side and origin: {counts}); without them set rater.train_on to what there is"
        )
    rows = sum(counts[f"train, {origin}"] for origin in wanted)
    held_out = sum(counts[f"held_out, {origin}"] for origin in ORIGINS)
    encoder = resolve_model(config.encoder)
    # Sorted once, for all epochs.
    train = _encoded(
        pairs_of(uris, "train", config, data_config, trained=True).materialize(), encoder, config, data_config
    )
    measured = (
        _encoded(
            pairs_of(uris, "held_out", config, data_config).limit(config.eval_rows),
            encoder,
            config,
            data_config,
        )
        if held_out
        else None
    )
    model_config = ModelConfig(path=config.encoder, precision=config.precision)
    result = run_training(
        stage_dir,
        train,
        measured,
        rows,
        encoder,
        model_config,
        config,
        RATER,
        max_quarantined=max_quarantined,
    )
    best = result.best_metrics or {}
    return RaterResult(
        result.checkpoint,
        result.metrics,
        {**result.counts, **counts, **_cuts(result.metrics)},
        result.quarantine,
        result.best,
        result.best_metrics,
        selected_by=_SELECTED_BY[leading_measure(best, config)],
        best_epoch=int(best.get("epoch", config.epochs - 1)),
    )


def _encoded(pairs: Any, encoder: str, config: RaterConfig, data_config: DataConfig) -> Any:
    import ray.data

    arguments = {
        "encoder": encoder,
        "max_length": config.max_length,
        "square": config.pad_to_square,
        "data_config": data_config.model_dump(),
    }
    return pairs.map_batches(
        PairEncoder,
        fn_constructor_kwargs=arguments,
        batch_size=64,
        batch_format="pyarrow",
        num_cpus=data_config.read_cpus,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=data_config.encoders),
    )


def _cuts(metrics: str) -> dict[str, int]:
    """Pairs of the first epoch whose answer, or context, was cut on either side."""
    lines = [line for line in map(json.loads, metrics.splitlines()) if line["epoch"] == 0 and "loss" in line]
    return {
        f"{part} cut": round(sum(line[f"{part}_cut"] * line["samples"] for line in lines))
        for part in ("answer", "context")
    }


def export_rater(checkpoint: Any, folder: str | os.PathLike, config: RaterConfig) -> None:
    """Write a checkpoint's weights as a folder of RatingModel.save_pretrained, fp32."""
    from safetensors import safe_open

    model = new_rater(resolve_model(config.encoder), config)
    with (
        checkpoint.as_directory() as source,
        safe_open(Path(source, "state.safetensors"), framework="pt") as state,
        torch.no_grad(),
    ):
        for name, parameter in model.named_parameters():
            parameter.copy_(state.get_tensor(f"weight/{name}"))
    model.save_pretrained(folder)
