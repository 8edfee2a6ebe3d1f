"""The training objectives as pure functions: `(model, batch, ...) -> (loss sum, weight, metrics)`. No Ray, no
engine.

Shapes: B samples, T tokens, N supervised tokens of the whole batch, V vocabulary. A loss is returned as a sum
with its weight (supervised tokens, or pairs); the step divides by the weight of the whole global batch, so
neither accumulation nor the number of workers changes the result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from medray.models.vlm import plain_model, shared_image_features
from medray.train.pair_packing import IGNORE, pack_pairs
from medray.train.pair_pass import PairPass, pass_by_reading, separate_images

NOT_INPUTS = ("labels", "ref_chosen_logps", "ref_rejected_logps")
BEST_BY = "rating"  # what an epoch's end measures, from 0 to 1, where the best epoch is chosen by it

# Log-probabilities are taken in fp32 over this many tokens at a time: with 150k words in the vocabulary, fp32
# copies of all logits of a batch are larger than the model's own activations.
CHUNK = 1024


def model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """The part of a batch the model's forward takes."""
    return {name: value for name, value in batch.items() if name not in NOT_INPUTS}


@contextlib.contextmanager
def _head_only_at(model: Any, rows_N: torch.Tensor, positions_N: torch.Tensor) -> Iterator[None]:
    """Within the block the output head sees the hidden states at these places only: [B, T, D] -> [N, D]."""
    head = plain_model(model).get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, args: (args[0][rows_N, positions_N],))
    try:
        yield
    finally:
        hook.remove()


def supervised_logits(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [N, V] at the positions that predict a label, those labels [N], and the sample each belongs to
    [N].

    The vocabulary projection of an image's hundreds of tokens, which nothing is asked of, is never computed.
    """
    targets = batch["labels"][:, 1:]
    rows, positions = (targets != IGNORE).nonzero(as_tuple=True)
    with _head_only_at(model, rows, positions):
        logits = model(**model_inputs(batch), use_cache=False).logits
    return logits, targets[rows, positions], rows


def token_logps(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-probability of each label, nats, float32 [N], of logits [N, V] that are aligned with labels [N].

    IGNORE labels give 0.
    """

    def part(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return -F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="none")

    if len(labels) <= CHUNK:
        return part(logits, labels)
    chunks = zip(logits.split(CHUNK), labels.split(CHUNK), strict=True)
    return torch.cat(
        [checkpoint(part, x, y, use_reentrant=False) if x.requires_grad else part(x, y) for x, y in chunks]
    )


def sequence_logps(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each row's labels, nats summed over its labelled tokens [B], and their number [B].

    Args:
        logits: [B, T, V] as a causal model returns them: logits[:, t] predicts labels[:, t + 1].
        labels: [B, T], IGNORE where not supervised.
    """
    targets = labels[:, 1:]
    positions = targets != IGNORE
    return sum_rows(
        token_logps(logits[:, :-1][positions], targets[positions]), positions.nonzero()[:, 0], len(labels)
    )


def sum_rows(logps_N: torch.Tensor, rows_N: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over each sequence's tokens [count], and how many there are [count]."""
    sums = torch.zeros(count, dtype=logps_N.dtype, device=logps_N.device).index_add(0, rows_N, logps_N)
    return sums, torch.bincount(rows_N, minlength=count)


def sft_loss(
    logits: torch.Tensor, labels: torch.Tensor, normaliser: torch.Tensor | float | None = None
) -> torch.Tensor:
    """Next-token cross-entropy, summed over labelled tokens and divided by `normaliser` (default: their
    number).

    Args:
        logits: [B, T, V] as a causal model returns them.
        labels: [B, T], IGNORE where not supervised.
        normaliser: supervised tokens of the whole global batch, where it spans several forward passes.
    """
    logps, lengths = sequence_logps(logits, labels)
    return -logps.sum() / (lengths.sum().clamp(min=1) if normaliser is None else normaliser)


def sft_objective(
    model: Any, batch: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Cross-entropy summed over answers and flipped questions (SQ-LLaVA, arXiv 2403.11299: one token mean, no
    extra weight).

    Returns (loss sum, number of supervised tokens, no further metrics).
    """
    logits, labels, _ = supervised_logits(model, batch)
    return -token_logps(logits, labels).sum(), torch.tensor(len(labels), device=labels.device), {}


def dpo_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    ref_chosen_logps: torch.Tensor,
    ref_rejected_logps: torch.Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """DPO (Rafailov et al., arXiv 2305.18290, eq. 7): -log sigmoid(beta * ((pi_w - pi_l) - (ref_w - ref_l))),
    per pair [B].

    All arguments are nats summed over the answer's tokens, [B]. Rewards are beta * (policy - reference).
    label_smoothing is conservative DPO's epsilon (0 in the paper). Metrics are per pair too.
    """
    chosen = beta * (policy_chosen_logps - ref_chosen_logps)
    rejected = beta * (policy_rejected_logps - ref_rejected_logps)
    margin = chosen - rejected
    loss = -F.logsigmoid(margin) * (1 - label_smoothing) - F.logsigmoid(-margin) * label_smoothing
    return loss, {
        "rewards/chosen": chosen.detach(),
        "rewards/rejected": rejected.detach(),
        "rewards/margin": margin.detach(),
        "rewards/accuracy": (margin > 0).float().detach(),
    }


def answer_logps(
    model: Any, batch: dict[str, Any], pair_pass: PairPass | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed log-probabilities and token counts of a collated batch of pairs: [2B] (chosen, then rejected),
    nats.

    Where the model allows it, each of the B images is encoded once, and each prompt passed once
    (`medray.train.pair_packing`); else chosen and rejected pass in rows of their own. The reference stage and
    the policy both come through here.

    Args:
        pair_pass: as choose_pair_pass measured; None: as the model's config and modules say.
    """
    pair_pass = pass_by_reading(model) if pair_pass is None else pair_pass
    if pair_pass == "packed":
        packed = pack_pairs(plain_model(model), batch)
        with _head_only_at(model, *packed.predicted_at):
            logits = model(**packed.inputs, use_cache=False).logits
        labels, rows = packed.labels, packed.sequences
    elif pair_pass == "shared":
        with shared_image_features(model, copies=2):
            logits, labels, rows = supervised_logits(model, batch)
    else:
        logits, labels, rows = supervised_logits(model, separate_images(batch, copies=2))
    return sum_rows(token_logps(logits, labels), rows, len(batch["labels"]))


def dpo_objective(
    model: Any,
    batch: dict[str, Any],
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    length_normalised: bool = False,
    sft_weight: float = 0.0,
    pair_pass: PairPass | None = None,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """DPO over a batch of 2B sequences (B chosen, then B rejected) on B images.

    The reference's log-probabilities come with the batch: training holds one model.

    Args:
        beta, label_smoothing: see dpo_loss.
        length_normalised: divide every log-probability by its answer's tokens (not in the paper).
        sft_weight: weight of an added cross-entropy per token of the chosen answer (not in the paper).
        pair_pass: see answer_logps.

    Returns (loss sum over pairs, number of pairs, sums over pairs for metrics).
    """
    logps, lengths = answer_logps(model, batch, pair_pass)
    (chosen, rejected), (chosen_length, rejected_length) = logps.chunk(2), lengths.chunk(2)
    ref_chosen, ref_rejected = batch["ref_chosen_logps"], batch["ref_rejected_logps"]
    if length_normalised:
        loss, metrics = dpo_loss(
            chosen / chosen_length,
            rejected / rejected_length,
            ref_chosen / chosen_length,
            ref_rejected / rejected_length,
            beta,
            label_smoothing,
        )
    else:
        loss, metrics = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, label_smoothing)
    total = loss.sum()
    if sft_weight:
        total = total - sft_weight * (chosen / chosen_length).sum()
    metrics |= {
        "logps/chosen": chosen.detach(),
        "logps/rejected": rejected.detach(),
        "tokens/chosen": chosen_length.float(),
        "tokens/rejected": rejected_length.float(),
    }
    return (
        total,
        torch.tensor(len(loss), device=loss.device),
        {name: value.sum() for name, value in metrics.items()},
    )


DPO_METRICS = (
    "logps/chosen",
    "logps/rejected",
    "rewards/accuracy",
    "rewards/chosen",
    "rewards/margin",
    "rewards/rejected",
    "tokens/chosen",
    "tokens/rejected",
)
