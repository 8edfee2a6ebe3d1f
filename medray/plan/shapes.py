"""A vision-language model as numbers: parameters, bytes, floating-point operations. One multiply-add is two
operations.

Parameters are counted matrix by matrix, so that they equal the real model's (tests count both). Operations
are those of the matrix products, 2 per weight and token (Kaplan et al., arXiv 2001.08361, table 1), and of
attention, 4 x width per token and attended token in each layer; norms, activations and softmax are left out,
as is usual.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medray.errors import ConfigError


@dataclass(frozen=True)
class Language:
    """The language model: a Llama or Qwen2 (`bias`: on query, key and value)."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int
    tied: bool = False
    bias: bool = False

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's matrices: query and output, key and value, and the gated MLP's three."""
        return (
            2 * self.width**2 + 2 * self.width * self.kv_heads * self.head_size + 3 * self.width * self.inner
        )

    @property
    def parameters(self) -> int:
        biases = (self.heads + 2 * self.kv_heads) * self.head_size if self.bias else 0
        return (
            self.layers * (self.layer_weights + biases + 2 * self.width)
            + self.width
            + self.vocabulary * self.width * (1 if self.tied else 2)
        )

    def forward(self, tokens: float, attended: float | None = None) -> float:
        """Operations of `tokens` tokens through the layers, without the output head.

        Args:
            attended: tokens each attends to, on average; by default half of them (causal).
        """
        attended = tokens / 2 if attended is None else attended
        return tokens * self.layers * (2 * self.layer_weights + 4 * self.width * attended)

    def head(self, tokens: float) -> float:
        """Operations of the output head for `tokens` positions."""
        return 2 * tokens * self.width * self.vocabulary

    def lora(self, rank: int) -> int:
        """Parameters of adapters on all seven matrices of every layer."""
        pairs = (
            [(self.width, self.width)] * 2
            + [(self.width, self.kv_heads * self.head_size)] * 2
            + [(self.width, self.inner)] * 3
        )
        return self.layers * rank * sum(map(sum, pairs))

    def cache_bytes(self, element_bytes: int = 2) -> int:
        """Keys and values of one token (bytes)."""
        return 2 * self.layers * self.kv_heads * self.head_size * element_bytes


@dataclass(frozen=True)
class Vision:
    """The vision tower and the projector.

    patches: the tower's tokens of one image. reach: tokens each attends to, on average over layers (windows).
        gated: Qwen's MLP of
    three matrices and RMS norms, else CLIP's of two and layer norms. merged: patches that become one token of
    the language model.
    """

    width: int
    layers: int
    inner: int
    patch: int
    patches: int
    merged: int = 1
    reach: int | None = None
    gated: bool = False

    @property
    def layer_weights(self) -> int:
        return 4 * self.width**2 + (3 if self.gated else 2) * self.width * self.inner

    @property
    def image_tokens(self) -> int:
        """Tokens of an image in the language model."""
        return self.patches // self.merged

    def parameters(self, out: int) -> tuple[int, int]:
        """Of the tower and of the projector to a language model of width `out`."""
        width = self.width
        if self.gated:  # Qwen2.5-VL: a patch is two frames deep; four patches meet in the merger
            tower = (
                self.layers * (self.layer_weights + 4 * width + 2 * self.inner + width + 2 * width)
                + 2 * 3 * self.patch**2 * width
            )
            joined = self.merged * width
            return tower, width + joined**2 + joined + joined * out + out
        norms = 4 * width
        tower = self.layers * (self.layer_weights + 4 * width + self.inner + width + norms)
        # CLIP: patch and class embedding, positions, norms before and after.
        tower += 3 * self.patch**2 * width + width + (self.patches + 1) * width + norms
        return tower, width * out + out + out**2 + out

    def forward(self, out: int) -> float:
        """Operations of one image through tower and projector."""
        tokens = self.patches if self.gated else self.patches + 1
        layers = tokens * self.layers * (2 * self.layer_weights + 4 * self.width * (self.reach or tokens))
        channels = (2 if self.gated else 1) * 3 * self.patch**2
        joined = self.merged * self.width
        projector = (
            2
            * self.image_tokens
            * (joined * (joined if self.gated else out) + (joined if self.gated else out) * out)
        )
        return layers + 2 * tokens * channels * self.width + projector

    def lora(self, rank: int) -> int:
        """Parameters of adapters on attention and MLP of every layer."""
        mlp = (3 if self.gated else 2) * (self.width + self.inner)
        return self.layers * rank * (4 * 2 * self.width + mlp)


@dataclass(frozen=True)
class Shape:
    """A vision-language model."""

    language: Language
    vision: Vision

    @property
    def parameters(self) -> int:
        return self.language.parameters + sum(self.vision.parameters(self.language.width))

    @property
    def image_forward(self) -> float:
        """Operations of one image through tower and projector."""
        return self.vision.forward(self.language.width)


_CLIP_L = Vision(width=1024, layers=24, inner=4096, patch=14, patches=576)
# Windows of 112 pixels (64 patches) in 28 of 32 layers; an image of about 0.5 megapixels gives 2304 patches.
_QWEN_VISION = {
    "width": 1280,
    "layers": 32,
    "patch": 14,
    "patches": 2304,
    "merged": 4,
    "reach": (28 * 64 + 4 * 2304) // 32,
    "gated": True,
}
KNOWN = {
    "llava-hf/llava-1.5-7b-hf": Shape(Language(4096, 32, 32, 32, 11008, 32064), _CLIP_L),
    "llava-hf/llava-1.5-13b-hf": Shape(Language(5120, 40, 40, 40, 13824, 32064), _CLIP_L),
    "Qwen/Qwen2.5-VL-3B-Instruct": Shape(
        Language(2048, 36, 16, 2, 11008, 151936, tied=True, bias=True), Vision(**_QWEN_VISION, inner=3420)
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": Shape(
        Language(3584, 28, 28, 4, 18944, 152064, bias=True), Vision(**_QWEN_VISION, inner=3420)
    ),
    "Qwen/Qwen2.5-VL-72B-Instruct": Shape(
        Language(8192, 80, 64, 8, 29568, 152064, bias=True), Vision(**_QWEN_VISION, inner=3456)
    ),
}


def shape_of(model: str) -> Shape:
    """The shape of a known hub id, or of a local folder (or testbed: name) in Hugging Face format.

    Raises ConfigError for anything else: nothing is downloaded.
    """
    if model in KNOWN:
        return KNOWN[model]
    if model.startswith("testbed:"):
        from medray.models.vlm import resolve_model

        model = resolve_model(model)
    if not Path(model, "config.json").is_file():
        raise ConfigError(
            f"model.path: the shape of {model} is not known; give a local folder with config.json, or one of "
            f"{', '.join(KNOWN)}"
        )
    from transformers import AutoConfig

    return shape_from(AutoConfig.from_pretrained(model))


def shape_from(config: Any) -> Shape:
    """The shape of a transformers configuration of LLaVA or Qwen2.5-VL.

    Raises ConfigError for another architecture.
    """
    text, vision = config.text_config, config.vision_config
    if config.model_type not in ("llava", "qwen2_5_vl"):
        raise ConfigError(f"model.path: {config.model_type} models are not counted; LLaVA and Qwen2.5-VL are")
    language = Language(
        text.hidden_size,
        text.num_hidden_layers,
        text.num_attention_heads,
        text.num_key_value_heads,
        text.intermediate_size,
        text.vocab_size,
        tied=bool(config.tie_word_embeddings),
        bias=config.model_type == "qwen2_5_vl",
    )
    if config.model_type == "llava":
        side = vision.image_size // vision.patch_size
        return Shape(
            language,
            Vision(
                vision.hidden_size,
                vision.num_hidden_layers,
                vision.intermediate_size,
                vision.patch_size,
                side**2,
            ),
        )
    merged, full = vision.spatial_merge_size**2, len(vision.fullatt_block_indexes)
    patches, window = _QWEN_VISION["patches"], (vision.window_size // vision.patch_size) ** 2
    reach = ((vision.depth - full) * window + full * patches) // vision.depth
    return Shape(
        language,
        Vision(
            vision.hidden_size,
            vision.depth,
            vision.intermediate_size,
            vision.patch_size,
            patches,
            merged,
            reach,
            gated=True,
        ),
    )
