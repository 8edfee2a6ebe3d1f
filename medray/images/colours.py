"""Decoded images of every mode to 8-bit RGB: deep grey, floating point, white-is-zero, alpha, CIE L*a*b*
(pure, no Ray).

Standard: TIFF 6.0 for PhotometricInterpretation and SampleFormat.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageCms

_PHOTOMETRIC, _BITS, _SAMPLE_FORMAT = 262, 258, 339  # TIFF tags
_WHITE_IS_ZERO, _UNSIGNED, _SIGNED = 0, 1, 2
_DEEP = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")


def to_rgb(image: Image.Image) -> Image.Image:
    """The decoded image as RGB.

    Grey of more than 8 bits, signed and floating-point grey is spread from its smallest to its largest value
    (a picture of one value is black); values that are not finite are black, infinity is white. Alpha and
    transparent colours are laid over white.

    Raises ValueError where Pillow cannot convert the mode, or no value is finite.
    """
    tags = getattr(image, "tag_v2", None) or {}
    sign = _first(tags.get(_SAMPLE_FORMAT, _UNSIGNED))
    if image.mode in _DEEP or (image.mode == "L" and sign == _SIGNED):
        values = _values(image, sign, _first(tags.get(_BITS, 8)))
        # Pillow inverts white-is-zero of 8 bits and fewer, and no deeper one.
        inverted = image.mode in _DEEP and tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
        return Image.fromarray(_spread(-values if inverted else values)).convert("RGB")
    if image.mode in ("La", "RGBa"):  # alpha that is multiplied in already
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(canvas, image).convert("RGB")
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _first(value: object) -> object:
    return value[0] if isinstance(value, tuple) else value


def _values(image: Image.Image, sign: object, bits: object) -> np.ndarray:
    """The stored values (float64), where Pillow reads signed ones as unsigned or the other way round."""
    values = np.asarray(image)
    if image.mode == "L":
        values = values.view(np.int8)
    elif image.mode == "I" and bits == 32 and sign == _UNSIGNED and getattr(image, "tag_v2", None):
        values = np.ascontiguousarray(values).view(np.uint32)
    return values.astype(np.float64)


def _spread(values: np.ndarray) -> np.ndarray:
    known = np.isfinite(values)
    finite = values if known.all() else values[known]
    if not finite.size:
        raise ValueError("no value of the image is finite")
    low, high = float(finite.min()), float(finite.max())
    if high == low:
        return np.zeros(values.shape, np.uint8)
    scaled = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) * (255.0 / (high - low))
    return scaled.round().astype(np.uint8)
