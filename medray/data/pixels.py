"""Pixels as a model takes them: rescaled and normalised as its image processor does."""

from __future__ import annotations

from typing import Any


def normalise_pixels(pixel_values: Any, image_processor: Any, dtype: Any = None) -> Any:
    """uint8 pixels to what the processor would have returned: (x * rescale_factor - mean) / std per channel.

    Args:
        pixel_values: uint8 [B, 3, H, W] (LLaVA) or [patches, 3 * time * side * side] (Qwen-VL, channel
            first).
        dtype: torch dtype of the result, default float32.
    """
    import torch

    mean = torch.tensor(image_processor.image_mean, device=pixel_values.device)
    std = torch.tensor(image_processor.image_std, device=pixel_values.device)
    values = pixel_values.float() * image_processor.rescale_factor
    if values.dim() == 2:
        channels = values.view(values.shape[0], 3, -1)
        values = ((channels - mean[:, None]) / std[:, None]).reshape(values.shape)
    else:
        values = (values - mean[:, None, None]) / std[:, None, None]
    return values if dtype is None else values.to(dtype)
