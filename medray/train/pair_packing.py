"""Two answers behind one prompt: chosen and rejected share the image and the question, so these pass the
model once.

[prompt | chosen | rejected] is one sequence in which both answers attend to the prompt and to themselves but
not to each other, and both are numbered from the prompt's end. The log-probabilities are those of two
separate sequences; with an image of 576 tokens and answers of 100, the model works through 0.57 of the
tokens.

Shapes: B pairs, T tokens of the longest separate sequence, L of the longest packed one, N supervised tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

IGNORE = -100
PROMPT, CHOSEN, REJECTED, PADDING = 0, 1, 2, 3
PER_TOKEN = ("input_ids", "mm_token_type_ids")


@dataclass(frozen=True)
class PackedPairs:
    """Model inputs of B packed rows, and where the labels are predicted.

    inputs: input_ids [B, L], attention_mask [B, 1, L, L] (0 or the dtype's minimum, added to scores),
        position_ids, images.
    predicted_at: rows and positions [N] of the hidden states that predict `labels`.
    labels: [N].
    sequences: [N], the separate sequence each label is of: 0..B-1 chosen, B..2B-1 rejected.
    """

    inputs: dict[str, Any]
    predicted_at: tuple[torch.Tensor, torch.Tensor]
    labels: torch.Tensor
    sequences: torch.Tensor


def pack_pairs(model: Any, batch: dict[str, Any]) -> PackedPairs:
    """Pack a batch of 2B right-padded sequences (B chosen, then B rejected, each pair with one common
    prompt).

    Args:
        model: the transformers model, for its dtype and its rule of positions.
        batch: as collate_dpo makes it, labels on the answers only.
    """
    labels, pairs = batch["labels"], len(batch["labels"]) // 2
    starts = (labels[:pairs] != IGNORE).int().argmax(1)
    chosen, rejected = batch["attention_mask"].sum(1).sub(starts.repeat(2)).chunk(2)
    device = labels.device
    place = torch.arange(int((starts + chosen + rejected).max()), device=device)[None]  # [1, L]
    second = (starts + chosen)[:, None]
    segments = (
        (place >= starts[:, None]).int()
        + (place >= second).int()
        + (place >= second + rejected[:, None]).int()
    )
    # Where each packed token comes from: the same place of the chosen sequence, or earlier in the rejected
    # one.
    source = (place - torch.where(segments == REJECTED, chosen[:, None], 0)).clamp(max=labels.shape[1] - 1)
    row = torch.arange(pairs, device=device)[:, None] + pairs * (segments == REJECTED)
    inputs = {
        name: value
        for name, value in batch.items()
        if name not in (*PER_TOKEN, "labels", "attention_mask", "ref_chosen_logps", "ref_rejected_logps")
    }
    for name in PER_TOKEN:
        if name in batch:
            inputs[name] = batch[name][row, source]
    if "image_grid_thw" in inputs:
        inputs["image_grid_thw"] = inputs["image_grid_thw"][: len(inputs["image_grid_thw"]) // 2]
    in_answer = (segments == CHOSEN) | (segments == REJECTED)
    pair, at = in_answer.nonzero(as_tuple=True)
    # An answer's first token is predicted by the prompt's last.
    is_first_rejected = at == second[pair, 0]
    predicted_from = torch.where(is_first_rejected, starts[pair] - 1, at - 1)
    inputs |= {
        "attention_mask": _mask(segments, model.dtype),
        "position_ids": _positions(model, inputs, segments, chosen),
    }
    return PackedPairs(
        inputs,
        (pair, predicted_from),
        labels[row, source][pair, at],
        row.expand(-1, place.shape[1])[pair, at],
    )


def _mask(segments_BL: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    query, key = segments_BL[:, :, None], segments_BL[:, None, :]
    allowed = ((key == PROMPT) | (key == query)).tril()
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(
        ~allowed, torch.finfo(dtype).min
    )[:, None]


def _positions(
    model: Any, inputs: dict[str, Any], segments_BL: torch.Tensor, chosen_B: torch.Tensor
) -> torch.Tensor:
    """Positions as if each answer followed the prompt directly: [B, L], or [3, B, L] for Qwen-VL's rotary
    positions.
    """
    back = torch.where(segments_BL == REJECTED, chosen_B[:, None], 0)
    if "image_grid_thw" not in inputs:
        return torch.arange(segments_BL.shape[1], device=segments_BL.device)[None] - back
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=(segments_BL != PADDING).long(),
    )
    return positions - back
