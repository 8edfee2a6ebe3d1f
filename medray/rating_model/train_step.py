"""The rating model's part of the one training loop (medray.train.worker): its loss, its step, its batches.

BioMed-VITAL (arXiv 2406.13173; the released filter/train_clip_filter.py): pairs of a rating VLM weigh 1,
those of clinicians w, and the loss is the mean over a batch's pairs of weight * loss. What differs from the
released code: losses see raw logits (`paper_exact` puts the sigmoid back), the model is in train mode in
every epoch, the best epoch's checkpoint is kept, and pairs are split by image.

Shapes: B pairs, 2B exchanges (chosen, then rejected).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from medray.config import DataConfig, ModelConfig, RaterConfig
from medray.errors import ConfigError
from medray.images.decoding import filler_picture
from medray.rating_model.inputs import RaterInputs
from medray.rating_model.model import RatingModel, load_inputs
from medray.rating_model.pairs import PairEncoder, right_order
from medray.train.engine import make_engine
from medray.train.objectives import BEST_BY
from medray.train.step import TrainStep

RATER_METRICS = ("accuracy", "answer_cut", "context_cut", "margin")
_LABELS = ("weights", "clinician", "answer_cut", "context_cut")  # of a batch, what the model does not read


def rating_loss(chosen: torch.Tensor, rejected: torch.Tensor, config: RaterConfig) -> torch.Tensor:
    """Loss per pair [B] of the logits of its better and its worse exchange, each [B].

    hinge: max(0, margin - (f_i - f_j)); bradley_terry: -log sigmoid(f_i - f_j). With config.paper_exact f is
        the sigmoid of the
    logit, as in the released code: a hinge of margin 1 on values in (0, 1) is never met, and where both are
    near an end of that range there is no gradient left.
    """
    if config.paper_exact:
        chosen, rejected = chosen.sigmoid(), rejected.sigmoid()
    if config.loss == "hinge":
        return F.relu(config.margin - (chosen - rejected))
    return -F.logsigmoid(chosen - rejected)


def pair_logits(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the better and of the worse exchange of each pair, [B] and [B]."""
    return model(**{name: value for name, value in batch.items() if name not in _LABELS}).chunk(2)


def rater_objective(
    model: Any, batch: dict[str, Any], config: RaterConfig
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Returns (sum over pairs of weight * loss, number of pairs, sums over pairs of RATER_METRICS)."""
    chosen, rejected = pair_logits(model, batch)
    loss = (batch["weights"] * rating_loss(chosen, rejected, config)).sum()
    metrics = {
        "accuracy": right_order(chosen, rejected),
        "margin": chosen - rejected,
        "answer_cut": batch["answer_cut"].float(),
        "context_cut": batch["context_cut"].float(),
    }
    return (
        loss,
        torch.tensor(len(chosen), device=loss.device),
        {name: value.detach().sum() for name, value in metrics.items()},
    )


def leading_measure(measured: Mapping[str, Any], config: RaterConfig) -> str | None:
    """Which of an epoch's measures chooses the best epoch: "eval_alignment", "eval_accuracy", or None
    where neither was taken.
    """
    names = ("eval_accuracy",) if config.train_on == "model" else ("eval_alignment", "eval_accuracy")
    return next((name for name in names if name in measured), None)


class RaterStep(TrainStep):
    """TrainStep with the rating model. `config` is a RaterConfig."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        return RATER_METRICS

    def _load(self, model_dir: str, model_config: ModelConfig) -> tuple[Any, Any, None]:
        model = new_rater(model_dir, self.config).to(self.device, self.dtype)
        return model, model.processor.image_processor, None

    def _engine(self, model: RatingModel, precision: str, kind: str) -> Any:
        if self.config.gradient_checkpointing:
            model.encoder.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        return make_engine(model, self.config, precision, kind, model.optimizer_groups(self.config))

    def objective(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        return rater_objective(self.engine, batch, self.config)

    def samples_of(self, batch: dict[str, Any]) -> int:
        return len(batch["weights"])

    def weight_of(self, batch: dict[str, Any]) -> int:
        return len(batch["weights"])

    def measure(self, batches: list[dict[str, Any]], filler: dict[str, Any]) -> dict[str, float]:
        """Held-out loss (every pair counting 1), alignment with the clinicians' pairs, accuracy on the
        model's, and the number that chooses the best epoch: alignment, or accuracy where no clinician's
        pair is held out; between equal ones, the accuracy on all pairs decides. Without clinicians in
        training (train_on is model) they have no say in that either.
        """

        def sums(batch: dict[str, Any]) -> torch.Tensor:
            chosen, rejected = pair_logits(self.engine, batch)
            right, clinician = right_order(chosen, rejected), batch["clinician"].float()
            return torch.stack(
                [
                    rating_loss(chosen, rejected, self.config).sum(),
                    (right * clinician).sum(),
                    clinician.sum(),
                    right.sum(),
                    torch.ones_like(right).sum(),
                ]
            )

        totals = self.totals(batches, filler, sums)
        if not totals:
            return {}
        loss, aligned, of_clinicians, right, pairs = totals
        found = {"eval_loss": loss / pairs, "eval_pairs": pairs, "eval_clinician_pairs": of_clinicians}
        if of_clinicians:
            found["eval_alignment"] = aligned / of_clinicians
        if pairs > of_clinicians:
            found["eval_accuracy"] = (right - aligned) / (pairs - of_clinicians)
        leading = leading_measure(found, self.config)
        if leading is None:
            return found
        among_equals = found[leading] if self.config.train_on == "model" else right / pairs
        return found | {BEST_BY: (found[leading] + 1e-3 * among_equals) / (1 + 1e-3)}


class RaterBatches:
    """Collates encoded pairs (the interface of medray.train.worker.Batches).

    Raises ConfigError where the encoder's limits let no pair pass.
    """

    def __init__(self, model_dir: str, model_config: ModelConfig, config: RaterConfig, objective: str):
        self.config = config
        self.inputs: RaterInputs = load_inputs(
            model_dir, config.max_length, config.pad_to_square, DataConfig()
        )
        self.filler = self.collate([_filler(model_dir, config)])

    def in_order(self, rows: Iterable[dict[str, Any]], epoch: int | None) -> Iterator[dict[str, Any]]:
        return iter(rows)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        cuts = {
            f"{part}_cut": torch.tensor([any(name.endswith(part) for name in row["cut"]) for row in rows])
            for part in ("answer", "context")
        }
        return {**self.inputs.collate_pairs(rows), **cuts}

    def micro_batches(self, rows: list[dict[str, Any]], epoch: int | None) -> list[dict[str, torch.Tensor]]:
        """Pairs in micro-batches of like length (less padding)."""
        rows = sorted(rows, key=lambda row: max(len(row["chosen_ids"]), len(row["rejected_ids"])))
        return [
            self.collate(rows[start : start + self.config.micro_batch])
            for start in range(0, len(rows), self.config.micro_batch)
        ]


def _filler(model_dir: str, config: RaterConfig) -> dict[str, Any]:
    """A worker without pairs of its own still takes part in every pass, with this pair at weight zero."""
    import pyarrow as pa

    side = {
        "image_id": "filler",
        "image": filler_picture(),
        "context": None,
        "question": "What is this?",
        "answer": "Nothing.",
    }
    pair = {
        "sample_id": "filler",
        "origin": "model",
        "weight": 0.0,
        **{f"{name}_{key}": value for name in ("chosen", "rejected") for key, value in side.items()},
    }
    (row,) = PairEncoder(model_dir, config.max_length, config.pad_to_square, {})(
        pa.Table.from_pylist([pair])
    ).to_pylist()
    if row["error"] is not None:
        raise ConfigError(f"rater: not even an answer of one word can be encoded: {row['error']}")
    return row


def new_rater(encoder: str, config: RaterConfig) -> RatingModel:
    """The model that training begins from."""
    return RatingModel.from_encoder(
        encoder, config.hidden, config.max_length, config.pad_to_square, config.seed
    )
