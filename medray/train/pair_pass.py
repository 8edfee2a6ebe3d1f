"""How a batch of preference pairs passes a model: packed, or each answer in a row of its own.

Packing (medray.train.pair_packing) hides one answer from the other with a mask. It is right only where every
layer is full causal attention that takes that mask and those positions: a recurrent layer carries one answer
into the other, a sliding window counts the wrong neighbours, prefix attention over the image is lost. So
packing is read from the model's config and modules, layer by layer, and measured once where a training or a
reference stage starts; what is unknown passes separately.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any, Literal

from torch import nn

from medray.models.vlm import plain_model

logger = logging.getLogger("medray")

# packed: one row per pair. shared: two rows, the image's features once. separate: two rows, as transformers
# itself would run them.
PairPass = Literal["packed", "shared", "separate"]

MASKED_ATTENTION = ("sdpa", "eager")  # implementations that take a mask of any form
# Of a text config: each names something else than full causal attention where it is set.
_NOT_FULL = (
    "sliding_window",
    "attention_chunk_size",
    "use_bidirectional_attention",
    "use_bidirectional_attn",
    "attention_window",
    "local_attention",
)
# The modules of a layer that is one self-attention and one feed-forward part. Whatever else a layer holds is
# unknown here.
_LAYER = {
    "self_attn",
    "mlp",
    "feed_forward",
    "block_sparse_moe",
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "post_self_attn_layernorm",
    "post_mlp_layernorm",
}


def packing_problem(model: Any) -> str | None:
    """Why pairs of this transformers model (or PEFT's wrapper of it) cannot be packed, by its config and
    modules; None where they can.
    """
    plain = plain_model(model)
    kind = plain.config._attn_implementation
    if kind not in MASKED_ATTENTION:
        return f"{kind} attention takes no mask between answers"
    text = plain.config.get_text_config(decoder=True)
    layer_types = set(getattr(text, "layer_types", None) or ["full_attention"])
    if layer_types != {"full_attention"}:
        return f"layers of {', '.join(sorted(layer_types - {'full_attention'}))}"
    for name in _NOT_FULL:
        if getattr(text, name, None) and not (
            name == "sliding_window" and getattr(text, "use_sliding_window", None) is False
        ):
            return f"{name} {getattr(text, name)}"
    if "token_type_ids" in inspect.signature(plain.forward).parameters:
        return "attention that depends on token_type_ids"
    decoder = plain.get_decoder()
    if not {"attention_mask", "position_ids"} <= inspect.signature(decoder.forward).parameters.keys():
        return f"{type(decoder).__name__} takes no mask or no positions"
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        return f"{type(decoder).__name__} has no list of layers that can be read"
    return next((problem for layer in layers if (problem := _layer_problem(layer))), None)


def _layer_problem(layer: nn.Module) -> str | None:
    children = {name: child for name, child in layer.named_children() if not isinstance(child, nn.Dropout)}
    unknown = [name for name in children if name not in _LAYER]
    if unknown or "self_attn" not in children:
        return f"{type(layer).__name__} with {', '.join(unknown) or 'no self_attn'}"
    attention = children["self_attn"]
    if getattr(attention, "is_causal", None) is not True:
        return f"{type(attention).__name__} is not causal"
    if getattr(attention, "sliding_window", None):
        return f"{type(attention).__name__} with a sliding window of {attention.sliding_window}"
    stateful = [
        type(module).__name__
        for module in layer.modules()
        if isinstance(module, (nn.modules.conv._ConvNd, nn.RNNBase))
    ]
    return f"{type(layer).__name__} with {stateful[0]}" if stateful else None


def pass_by_reading(model: Any) -> PairPass:
    """How pairs pass a model of which nothing was measured."""
    if packing_problem(model) is None:
        return "packed"
    return "separate"


def separate_images(batch: dict[str, Any], copies: int) -> dict[str, Any]:
    """A batch of pairs with each image given once per row; grids are there for every row already."""
    pixels = batch["pixel_values"]
    return {**batch, "pixel_values": pixels.repeat(copies, *([1] * (pixels.dim() - 1)))}
