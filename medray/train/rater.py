"""Training the rating model on pairs, through the one training loop (medray.train.worker).

BioMed-VITAL (arXiv 2406.13173; the released filter/train_clip_filter.py): pairs of a rating VLM weigh 1, those of clinicians w,
and the loss is the mean over a batch's pairs of weight * loss. What differs from the released code: losses see raw logits
(`paper_exact` puts the sigmoid back), the model is in train mode in every epoch, the best epoch's checkpoint is kept, and
pairs are split by image.

Shapes: B pairs, 2B exchanges (chosen, then rejected).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from medray.config import DataConfig, ModelConfig, RaterConfig
from medray.data.rater_inputs import PairEncoder, RaterInputs
from medray.data.rater_pairs import ORIGINS, pair_counts, pairs_of, right_order, trains_on
from medray.errors import ConfigError, DataError
from medray.models.rater import Rater, load_inputs
from medray.models.vlm import resolve_model
from medray.train.engine import make_engine
from medray.train.step import TrainStep
from medray.train.worker import BEST_BY, TrainResult, run_training

RATER_METRICS = ("accuracy", "answer_cut", "context_cut", "margin")
_LABELS = ("weights", "clinician", "answer_cut", "context_cut")  # of a batch, what the model does not read


def rating_loss(chosen: torch.Tensor, rejected: torch.Tensor, config: RaterConfig) -> torch.Tensor:
    """Loss per pair [B] of the logits of its better and its worse exchange, each [B].

    hinge: max(0, margin - (f_i - f_j)); bradley_terry: -log sigmoid(f_i - f_j). With config.paper_exact f is the sigmoid of the
    logit, as in the released code: a hinge of margin 1 on values in (0, 1) is never met, and where both are near an end of that
    range there is no gradient left.
    """
    if config.paper_exact:
        chosen, rejected = chosen.sigmoid(), rejected.sigmoid()
    if config.loss == "hinge":
        return F.relu(config.margin - (chosen - rejected))
    return -F.logsigmoid(chosen - rejected)


def pair_logits(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the better and of the worse exchange of each pair, [B] and [B]."""
    return model(**{name: value for name, value in batch.items() if name not in _LABELS}).chunk(2)


def rater_objective(model: Any, batch: dict[str, Any], config: RaterConfig) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Returns (sum over pairs of weight * loss, number of pairs, sums over pairs of RATER_METRICS)."""
    chosen, rejected = pair_logits(model, batch)
    loss = (batch["weights"] * rating_loss(chosen, rejected, config)).sum()
    metrics = {
        "accuracy": right_order(chosen, rejected), "margin": chosen - rejected, "answer_cut": batch["answer_cut"].float(),
        "context_cut": batch["context_cut"].float(),
    }
    return loss, torch.tensor(len(chosen), device=loss.device), {name: value.detach().sum() for name, value in metrics.items()}


class RaterStep(TrainStep):
    """TrainStep with the rating model. `config` is a RaterConfig."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        return RATER_METRICS

    def _load(self, model_dir: str, model_config: ModelConfig) -> tuple[Any, Any, None]:
        model = new_rater(model_dir, self.config).to(self.device, self.dtype)
        return model, model.processor.image_processor, None

    def _engine(self, model: Rater, precision: str, kind: str) -> Any:
        if self.config.gradient_checkpointing:
            model.encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return make_engine(model, self.config, precision, kind, model.optimizer_groups(self.config))

    def objective(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        return rater_objective(self.engine, batch, self.config)

    def samples_of(self, batch: dict[str, Any]) -> int:
        return len(batch["weights"])

    def weight_of(self, batch: dict[str, Any]) -> int:
        return len(batch["weights"])

    def measure(self, batches: list[dict[str, Any]], filler: dict[str, Any]) -> dict[str, float]:
        """Held-out loss (every pair counting 1), alignment with the clinicians' pairs, accuracy on the model's, and the number
        that chooses the best epoch: alignment, or accuracy where no clinician's pair is held out; between equal ones, the
        accuracy on all pairs decides."""
        def sums(batch: dict[str, Any]) -> torch.Tensor:
            chosen, rejected = pair_logits(self.engine, batch)
            right, clinician = right_order(chosen, rejected), batch["clinician"].float()
            return torch.stack([rating_loss(chosen, rejected, self.config).sum(), (right * clinician).sum(), clinician.sum(), right.sum(), torch.ones_like(right).sum()])

        totals = self.totals(batches, filler, sums)
        if not totals:
            return {}
        loss, aligned, of_clinicians, right, pairs = totals
        found = {"eval_loss": loss / pairs, "eval_pairs": pairs, "eval_clinician_pairs": of_clinicians}
        if of_clinicians:
            found["eval_alignment"] = aligned / of_clinicians
        if pairs > of_clinicians:
            found["eval_accuracy"] = (right - aligned) / (pairs - of_clinicians)
        leading = found.get("eval_alignment", found.get("eval_accuracy"))
        return found | {BEST_BY: (leading + 1e-3 * right / pairs) / (1 + 1e-3)}


class RaterBatches:
    """Collates encoded pairs (the interface of medray.train.worker.Batches).

    Raises ConfigError where the encoder's limits let no pair pass.
    """

    def __init__(self, model_dir: str, model_config: ModelConfig, config: RaterConfig, objective: str):
        self.config = config
        self.inputs: RaterInputs = load_inputs(model_dir, config.max_length, config.pad_to_square, DataConfig())
        self.filler = self.collate([_filler(model_dir, config)])

    def in_order(self, rows: Iterable[dict[str, Any]], epoch: int | None) -> Iterator[dict[str, Any]]:
        return iter(rows)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        cuts = {f"{part}_cut": torch.tensor([any(name.endswith(part) for name in row["cut"]) for row in rows]) for part in ("answer", "context")}
        return {**self.inputs.collate_pairs(rows), **cuts}

    def micro_batches(self, rows: list[dict[str, Any]], epoch: int | None) -> list[dict[str, torch.Tensor]]:
        """Pairs in micro-batches of like length (less padding)."""
        rows = sorted(rows, key=lambda row: max(len(row["chosen_ids"]), len(row["rejected_ids"])))
        return [self.collate(rows[start : start + self.config.micro_batch]) for start in range(0, len(rows), self.config.micro_batch)]


def _filler(model_dir: str, config: RaterConfig) -> dict[str, Any]:
    """A worker without pairs of its own still takes part in every pass, with this pair at weight zero."""
    import pyarrow as pa

    from medray.train.worker import filler_picture

    side = {"image_id": "filler", "image": filler_picture(), "context": None, "question": "What is this?", "answer": "Nothing."}
    pair = {"sample_id": "filler", "origin": "model", "weight": 0.0, **{f"{name}_{key}": value for name in ("chosen", "rejected") for key, value in side.items()}}
    (row,) = PairEncoder(model_dir, config.max_length, config.pad_to_square, {})(pa.Table.from_pylist([pair])).to_pylist()
    if row["error"] is not None:
        raise ConfigError(f"rater: not even an answer of one word can be encoded: {row['error']}")
    return row


def new_rater(encoder: str, config: RaterConfig) -> Rater:
    """The model that training begins from."""
    return Rater.from_encoder(encoder, config.hidden, config.max_length, config.pad_to_square, config.seed)


@dataclass(frozen=True)
class RaterResult(TrainResult):
    """What the training of a rating model left behind: see TrainResult; `best` is what export_rater takes.

    selected_by: what chose the best epoch: "clinician alignment", "pair accuracy" (no clinician's pair was held out) or "last epoch"
        (no pair was).
    best_epoch: from 0.
    """

    selected_by: str = ""
    best_epoch: int = 0


def train_rater(stage_dir: str, pairs: str | list[str], config: RaterConfig, data_config: DataConfig) -> RaterResult:
    """Train on records.RATING_PAIR shards; the same call after a crash goes on from the last checkpoint.

    Args:
        stage_dir: where checkpoints go: a path or URL that every node reaches.
        pairs: a folder, or several; sample_ids are unique over all of them.

    Returns a RaterResult; its counts are also of pairs by side and origin (medray.data.rater_pairs.pair_counts), and of those
    trained on whose answer or context was cut.

    Raises DataError where there is nothing to train on, and what run_training raises.
    """
    uris = [pairs] if isinstance(pairs, str) else list(pairs)
    counts = pair_counts(uris, config)
    rows = sum(counts[f"train, {origin}"] for origin in ORIGINS if trains_on(origin, config))
    if not rows:
        raise DataError(f"rater: none of the pairs in {', '.join(uris)} can be trained on (train_on is {config.train_on}; by side and origin: {counts})")
    held_out = sum(counts[f"held_out, {origin}"] for origin in ORIGINS)
    encoder = resolve_model(config.encoder)
    # Sorted once, for all epochs.
    train = _encoded(pairs_of(uris, "train", config, data_config, trained=True).materialize(), encoder, config, data_config)
    measured = _encoded(pairs_of(uris, "held_out", config, data_config).limit(config.eval_rows), encoder, config, data_config) if held_out else None
    model_config = ModelConfig(path=config.encoder, precision=config.precision)
    result = run_training(stage_dir, train, measured, rows, encoder, model_config, config, "rater")
    best = result.best_metrics or {}
    selected_by = "clinician alignment" if "eval_alignment" in best else "pair accuracy" if "eval_accuracy" in best else "last epoch"
    return RaterResult(
        result.checkpoint, result.metrics, {**result.counts, **counts, **_cuts(result.metrics)}, result.quarantine, result.best, result.best_metrics,
        selected_by=selected_by, best_epoch=int(best.get("epoch", config.epochs - 1)))


def _encoded(pairs: Any, encoder: str, config: RaterConfig, data_config: DataConfig) -> Any:
    import ray.data

    arguments = {"encoder": encoder, "max_length": config.max_length, "square": config.pad_to_square, "data_config": data_config.model_dump()}
    return pairs.map_batches(
        PairEncoder, fn_constructor_kwargs=arguments, batch_size=64, batch_format="pyarrow", num_cpus=data_config.read_cpus,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=data_config.encoders))


def _cuts(metrics: str) -> dict[str, int]:
    """Pairs of the first epoch whose answer, or context, was cut on either side."""
    lines = [line for line in map(json.loads, Path(metrics).read_text().splitlines()) if line["epoch"] == 0 and "loss" in line]
    return {f"{part} cut": round(sum(line[f"{part}_cut"] * line["samples"] for line in lines)) for part in ("answer", "context")}


def export_rater(checkpoint: Any, folder: str | os.PathLike, config: RaterConfig) -> None:
    """Write a checkpoint's weights as a folder of Rater.save_pretrained, fp32."""
    from safetensors import safe_open

    model = new_rater(resolve_model(config.encoder), config)
    with checkpoint.as_directory() as source, safe_open(Path(source, "state.safetensors"), framework="pt") as state, torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state.get_tensor(f"weight/{name}"))
    model.save_pretrained(folder)
