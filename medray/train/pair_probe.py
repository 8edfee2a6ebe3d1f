"""How pairs may pass a model: chosen by a measurement on made-up pairs."""

from __future__ import annotations

import logging
from typing import Any, get_args

import torch

from medray.models.vlm import plain_model
from medray.train.pair_pass import PairPass, packing_problem

logger = logging.getLogger("medray")


_TOLERANCE = {
    torch.float32: 1e-3
}  # nats per token between two ways of passing; of lower precisions rounding is larger


_ROUNDING = 0.2


def choose_pair_pass(model: Any, batch: dict[str, Any]) -> PairPass:
    """The fastest way to pass pairs that gives this model's own log-probabilities, measured on a batch of two
    pairs.

    Args:
        model: under its engine or not, in eval mode.
        batch: a collated batch of pairs (probe_rows), placed, with the same rejected answer behind the same
            prompt and different chosen ones.

    Every worker of a training measures the same batch with the same weights, so all choose the same.
    """
    from medray.train.objectives import answer_logps

    apart, lengths = answer_logps(model, batch, "separate")
    reasons = []
    for way in get_args(PairPass)[:2]:
        problem = packing_problem(model) if way == "packed" else None
        if problem is None:
            try:
                problem = _difference(
                    *answer_logps(model, batch, way), apart, lengths, plain_model(model).dtype
                )
            except (
                TypeError,
                ValueError,
                RuntimeError,
                KeyError,
                IndexError,
                AttributeError,
                NotImplementedError,
            ) as error:
                # what a model raises for masks, positions or features it does not take
                problem = f"{type(error).__name__}: {error}"
        if problem is None:
            break
        reasons.append(f"not {way}: {problem}")
    else:
        way = "separate"
    if reasons:
        logger.warning(
            "%s: chosen and rejected answers pass in rows of their own (%s; %s)",
            plain_model(model).config.model_type,
            way,
            "; ".join(reasons),
        )
    return way


def _difference(
    logps: torch.Tensor, counts: torch.Tensor, apart: torch.Tensor, lengths: torch.Tensor, dtype: torch.dtype
) -> str | None:
    if counts.tolist() != lengths.tolist():
        return "other tokens are scored"
    allowed = _TOLERANCE.get(dtype, _ROUNDING)
    gap = float(((logps - apart).abs() / lengths).max())
    if not gap <= allowed:
        return (
            f"log-probabilities differ from those of separate rows by {gap:.4f} nats per token (allowed "
            f"{allowed})"
        )
    # The same rejected answer behind two chosen ones: whatever differs came over from the chosen answer, or
    # is rounding.
    first, second = logps.chunk(2)[1]
    if not float((first - second).abs()) <= 0.5 * allowed * float(lengths[-1]):
        return (
            f"a rejected answer's log-probability depends on the chosen one ({float(first):.4f} and "
            f"{float(second):.4f} nats)"
        )
    return None


def probe_rows(image: bytes) -> list[dict[str, Any]]:
    """Two preference rows to measure with: one prompt and rejected answer, two chosen answers that differ
    in everything.
    """
    asked = {
        "image": image,
        "prompt": "What is this?",
        "rejected": "A small round cell.",
        "ref_chosen_logp": None,
        "ref_rejected_logp": None,
    }
    return [
        {"sample_id": "probe-0", "chosen": "It is a big nucleus with granules.", **asked},
        {"sample_id": "probe-1", "chosen": "No, nothing can be seen there at all.", **asked},
    ]
