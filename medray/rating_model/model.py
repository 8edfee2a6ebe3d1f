"""The rating model of BioMed-VITAL (arXiv 2406.13173): f(image, text) = MLP([text embedding ; image
embedding]), one raw logit.

The encoder is any CLIP-family model that transformers' AutoModel loads (CLIP, SigLIP, VisionTextDualEncoder,
...), tuned whole. Embeddings are L2-normalised, as those of the authors' open_clip encoder are. The released
model ends in a sigmoid, which under a hinge of margin 1 saturates; here the model gives logits, and only a
loss may put a sigmoid on them (medray.rating_model.train_step). A rater's folder::

    config.json, model.safetensors, processor and tokenizer   the tuned encoder: a model folder of its own
    head.safetensors                                          the MLP
    rater.json                                                hidden, max_length, pad_to_square

Shapes: B exchanges, U images, T tokens, D widths of embeddings.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from medray.config import DataConfig, RaterConfig
from medray.errors import ConfigError
from medray.models.cache import localize
from medray.models.export import whole_folder
from medray.models.vlm import load_processor, load_whole, resolve_model
from medray.rating_model.inputs import RaterInputs

FACTS = "rater.json"
_UNUSED = {"logit_scale", "logit_bias"}  # of the contrastive loss alone


class RatingModel(nn.Module):
    """Encoder and MLP.

    Args:
        encoder: a model with get_text_features and get_image_features.
        processor: its tokenizer and image processor, saved with it.
        hidden: widths of the MLP's hidden layers.
        max_length, pad_to_square: how its inputs are made (medray.rating_model.inputs), kept with it.

    Attributes:
        pads: SigLIP reads texts padded to a fixed length, without a mask.
    """

    def __init__(
        self, encoder: Any, processor: Any, hidden: Sequence[int], max_length: int, pad_to_square: bool
    ):
        super().__init__()
        self.encoder, self.processor = encoder, processor
        self.hidden, self.max_length, self.pad_to_square = tuple(hidden), max_length, pad_to_square
        self.pads = _pads(encoder.config)
        for name in _UNUSED & dict(encoder.named_parameters(recurse=False)).keys():
            # Kept and saved, but no parameter: DeepSpeed cannot share out one without dimensions.
            value = getattr(encoder, name).detach()
            delattr(encoder, name)
            encoder.register_buffer(name, value)
        widths = [_width(encoder), *self.hidden]
        layers = [layer for pair in itertools.pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
        self.mlp = nn.Sequential(*layers, nn.Linear(widths[-1], 1))

    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        image_of: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits, float32 [B].

        Args:
            pixel_values: normalised [U, 3, H, W]; each image is encoded once.
            input_ids, attention_mask: [B, T].
            image_of: each text's image [B]; None: there are as many images as texts, in the same order.
        """
        image_UD = self.embed_images(pixel_values)
        return self.rate(
            self.embed_texts(input_ids, attention_mask), image_UD if image_of is None else image_UD[image_of]
        )

    def embed_texts(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """L2-normalised [B, D]."""
        mask = None if self.pads else attention_mask
        return functional.normalize(
            self.encoder.get_text_features(input_ids=input_ids, attention_mask=mask).pooler_output, dim=-1
        )

    def embed_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """L2-normalised [U, D]."""
        return functional.normalize(
            self.encoder.get_image_features(pixel_values=pixel_values).pooler_output, dim=-1
        )

    def rate(self, text_BD: torch.Tensor, image_BD: torch.Tensor) -> torch.Tensor:
        """Logits, float32 [B], of embedded exchanges."""
        return self.mlp(torch.cat([text_BD, image_BD], dim=1)).squeeze(1).float()

    def inputs(self, limits: DataConfig) -> RaterInputs:
        """What makes this model's inputs of exchanges."""
        return _inputs(self.processor, self.encoder.config, self.max_length, self.pad_to_square, limits)

    def optimizer_groups(self, config: RaterConfig) -> list[dict[str, Any]]:
        """AdamW parameter groups "encoder" and "head", each with its peak learning rate in `lr` and
        `peak_lr`.
        """
        rates = {"encoder": config.lr, "head": config.lr if config.lr_head is None else config.lr_head}
        parts = {"encoder": self.encoder, "head": self.mlp}
        return [
            {
                "params": list(parts[name].parameters()),
                "lr": rate,
                "peak_lr": rate,
                "weight_decay": config.weight_decay,
                "name": name,
            }
            for name, rate in rates.items()
        ]

    @classmethod
    def from_encoder(
        cls,
        path: str,
        hidden: Sequence[int] = (512, 512, 512),
        max_length: int = 256,
        pad_to_square: bool = False,
        seed: int = 0,
    ) -> RatingModel:
        """A new rater: the encoder's weights (folder, hub id, remote address or testbed:encoder) and an MLP
        drawn from the seed.

        Raises ConfigError where there is no such encoder.
        """
        folder = localize(resolve_model(path))
        encoder = _load_encoder(folder)
        torch.manual_seed(seed)
        return cls(encoder, load_processor(folder, field="rater.encoder"), hidden, max_length, pad_to_square)

    @classmethod
    def from_pretrained(cls, path: str) -> RatingModel:
        """What `save_pretrained` wrote (folder or remote address), fp32, in eval mode.

        Raises ConfigError where there is no rater.
        """
        from safetensors.torch import load_file

        folder = Path(localize(resolve_model(path)))
        if not (folder / FACTS).is_file():
            raise ConfigError(
                f"{path} holds no rating model (it has no {FACTS}); medray.rating_model.training makes one "
                "of an encoder"
            )
        model = cls(
            _load_encoder(str(folder)),
            load_processor(str(folder), field="rater.encoder"),
            **json.loads((folder / FACTS).read_text()),
        )
        model.mlp.load_state_dict(load_file(folder / "head.safetensors"))
        return model.eval()

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write the folder of the module's docstring, whole or not at all."""
        from safetensors.torch import save_file

        with whole_folder(folder) as scratch:
            self.encoder.save_pretrained(scratch)
            self.processor.save_pretrained(scratch)
            save_file(
                {name: value.contiguous() for name, value in self.mlp.state_dict().items()},
                scratch / "head.safetensors",
            )
            facts = {
                "hidden": list(self.hidden),
                "max_length": self.max_length,
                "pad_to_square": self.pad_to_square,
            }
            (scratch / FACTS).write_text(json.dumps(facts, indent=1) + "\n")


def load_inputs(path: str, max_length: int, pad_to_square: bool, limits: DataConfig) -> RaterInputs:
    """What makes the inputs of a rater on this encoder, without its weights."""
    from transformers import AutoConfig

    folder = localize(resolve_model(path))
    return _inputs(
        load_processor(folder, field="rater.encoder"),
        AutoConfig.from_pretrained(folder),
        max_length,
        pad_to_square,
        limits,
    )


def _inputs(
    processor: Any, config: Any, max_length: int, pad_to_square: bool, limits: DataConfig
) -> RaterInputs:
    positions = config.text_config.max_position_embeddings
    if _pads(config):
        return RaterInputs(
            processor.tokenizer, processor.image_processor, positions, pad_to_square, limits, pad_to=positions
        )
    return RaterInputs(
        processor.tokenizer, processor.image_processor, min(max_length, positions), pad_to_square, limits
    )


def _pads(config: Any) -> bool:
    return config.model_type.startswith("siglip")


def _load_encoder(folder: str) -> Any:
    from transformers import AutoModel

    encoder = load_whole(AutoModel, folder, "rater.encoder", dtype=torch.float32)
    if not callable(getattr(encoder, "get_text_features", None)):
        raise ConfigError(
            f"rater.encoder: {folder} is a {type(encoder).__name__}, no encoder of images and texts; take a "
            "CLIP or SigLIP"
        )
    return encoder


@torch.no_grad()
def _width(encoder: Any) -> int:
    """Widths of a text's and an image's embedding together."""
    vision = encoder.config.vision_config
    text = encoder.get_text_features(input_ids=torch.zeros((1, 1), dtype=torch.long)).pooler_output
    image = encoder.get_image_features(
        pixel_values=torch.zeros((1, 3, vision.image_size, vision.image_size))
    ).pooler_output
    return text.shape[-1] + image.shape[-1]
