"""CLIP-family encoders of images and texts, frozen: transformers' models (CLIP, SigLIP, ...) and
open_clip's.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL.Image import Image

from medray.errors import ConfigError
from medray.models.vlm import load_processor, load_whole

OPEN_CLIP = "open_clip:"


class Encoder:
    """A two-tower model of transformers.

    Args:
        path: local folder, remote address or hub id.
        precision: bf16 or fp32.

    Raises ConfigError for a model without text and image features.
    """

    def __init__(self, path: str, precision: str, device: str):
        from transformers import AutoModel

        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.model = load_whole(AutoModel, path, "demonstrations.encoder", dtype=dtype).to(device).eval()
        kind = self.model.config.model_type
        if not callable(getattr(self.model, "get_image_features", None)) or not callable(
            getattr(self.model, "get_text_features", None)
        ):
            raise ConfigError(
                f"demonstrations.encoder: {path} is a {kind} model without text and image features; give a "
                "CLIP or SigLIP class model"
            )
        self.processor: Any = load_processor(path, field="demonstrations.encoder")
        # SigLIP was trained on texts padded to the full length, and reads others differently.
        self.padding = "max_length" if kind.startswith("siglip") else "longest"
        self.max_length = self.model.config.text_config.max_position_embeddings

    @torch.inference_mode()
    def images(self, images: list[Image]) -> torch.Tensor:
        """Features (N, D) in 32 bits."""
        pixels = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        return self._pooled(self.model.get_image_features(pixels.to(self.model.device, self.model.dtype)))

    @torch.inference_mode()
    def texts(self, texts: list[str]) -> torch.Tensor:
        """Features (N, D) in 32 bits; longer texts are cut at the end."""
        tokens = self.processor.tokenizer(
            texts, padding=self.padding, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        return self._pooled(
            self.model.get_text_features(
                **{name: values.to(self.model.device) for name, values in tokens.items()}
            )
        )

    @staticmethod
    def _pooled(features: Any) -> torch.Tensor:
        return features.pooler_output.float().cpu()


class OpenClipEncoder:
    """A model of open_clip: "NAME@TAG" (an architecture and the weights for it), "hf-hub:org/name" or
    "local-dir:FOLDER"; see Encoder.

    Raises ConfigError where open_clip is not installed, or knows no such model.
    """

    def __init__(self, name: str, precision: str, device: str):
        try:
            import open_clip
        except ImportError as error:
            raise ConfigError(
                f"demonstrations.encoder: {OPEN_CLIP}{name} needs the package open_clip_torch on every node: "
                "pip install 'medray[open-clip]'"
            ) from error
        name, _, tag = (name, "", "") if ":" in name else name.partition("@")
        try:
            model, self.preprocess = open_clip.create_model_from_pretrained(
                name, pretrained=tag or None, precision=precision, device=device
            )
        except (RuntimeError, OSError, ValueError) as error:
            # what open_clip and the hub raise for a name, a tag or weights that are not there
            raise ConfigError(
                f"demonstrations.encoder: {OPEN_CLIP}{name} cannot be loaded: {error}. Give NAME@TAG as in "
                "open_clip.list_pretrained(), hf-hub:org/name or local-dir:FOLDER"
            ) from error
        self.model, self.device = model.eval(), device
        self.dtype = open_clip.get_input_dtype(precision)
        self.tokenizer = open_clip.get_tokenizer(name)

    @torch.inference_mode()
    def images(self, images: list[Image]) -> torch.Tensor:
        pixels = torch.stack([self.preprocess(image) for image in images])
        return self.model.encode_image(pixels.to(self.device, self.dtype)).float().cpu()

    @torch.inference_mode()
    def texts(self, texts: list[str]) -> torch.Tensor:
        return self.model.encode_text(self.tokenizer(texts).to(self.device)).float().cpu()


def load_encoder(path: str, precision: str = "fp32") -> Encoder | OpenClipEncoder:
    """The encoder at a path or, after "open_clip:", of that name, on a GPU where the process has one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if path.startswith(OPEN_CLIP):
        return OpenClipEncoder(path.removeprefix(OPEN_CLIP), precision, device)
    return Encoder(path, precision, device)
