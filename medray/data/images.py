"""Encoded image bytes to pixels: limits first, then one decode to RGB (pure, no Ray)."""

from __future__ import annotations

import base64
import io
import math
import re
import struct
import warnings

import numpy as np
from PIL import Image, ImageOps

from medray.config import DataConfig
from medray.errors import DataError

# CLIP's mean colour, which LLaVA pads with: after normalisation it is zero.
PAD_COLOUR = (122, 116, 104)
LARGEST_SQUARE = 178_956_970  # pixels; Pillow opens none larger
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")  # Pillow knows forty more, one of which (EPS) runs a program of the machine's

_IN_MEMORY = re.compile(r"<_io\.BytesIO object at 0x[0-9a-f]+>")


class ImageError(DataError):
    """One image that cannot be used; its row is quarantined with this reason."""


def decode(data: bytes | None, limits: DataConfig) -> Image.Image:
    """RGB image out of encoded bytes, upright (EXIF), first frame.

    Size limits are checked on the header, before any pixel is decoded, so a small file that claims huge dimensions
    costs nothing. 16-bit greyscale is scaled by its own range, alpha is laid over white.

    Raises ImageError with the reason; so for a file that is none of FORMATS.
    """
    if not data:
        raise ImageError("the image file is empty (0 bytes)")
    if len(data) > limits.max_image_bytes:
        raise ImageError(f"image file of {len(data)} bytes is over data.max_image_bytes {limits.max_image_bytes}")
    try:
        with warnings.catch_warnings():
            # Pillow only warns between one and two times its own limit; ours decides.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            check_size(image.size, limits)
            image.load()
        ImageOps.exif_transpose(image, in_place=True)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"image is over data.max_image_pixels {limits.max_image_pixels}: {error}") from None
    # Pillow's decoders raise these for damaged files; SyntaxError is what its PNG reader uses for a broken chunk, and its EXIF reader for a broken header.
    except (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, RuntimeError, AttributeError, ArithmeticError, struct.error) as error:
        raise ImageError(f"image cannot be decoded: {_IN_MEMORY.sub('', str(error)).strip()}") from None
    return image if image.mode == "RGB" else _to_rgb(image)


def check_size(size: tuple[int, int], limits: DataConfig) -> None:
    width, height = size
    if width * height > limits.max_image_pixels:
        raise ImageError(f"image of {width} x {height} pixels is over data.max_image_pixels {limits.max_image_pixels}")
    if min(size) < limits.min_image_side:
        raise ImageError(f"image of {width} x {height} pixels is under data.min_image_side {limits.min_image_side}")
    if max(size) > limits.max_aspect * min(size):
        raise ImageError(f"image of {width} x {height} pixels is longer than data.max_aspect {limits.max_aspect:g} allows")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        values = np.asarray(image, dtype=np.float64)
        low, high = float(values.min()), float(values.max())
        scaled = np.zeros_like(values) if high == low else (values - low) * (255.0 / (high - low))
        return Image.fromarray(scaled.round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or (image.mode == "P" and "transparency" in image.info):
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")


def pad_to_square(image: Image.Image, fill: tuple[int, int, int] = PAD_COLOUR, max_pixels: int = LARGEST_SQUARE) -> Image.Image:
    """The image in the middle of a square of its longer side (LLaVA's image_aspect_ratio=pad).

    Args:
        max_pixels: of the square. An image whose square would have more is made smaller first: padding turns a thin image of few pixels into very many.
    """
    if image.width == image.height:
        return image
    side = max(image.size)
    if side > (most := math.isqrt(max_pixels)):
        image, side = image.resize((max(1, image.width * most // side), max(1, image.height * most // side))), most
    square = Image.new("RGB", (side, side), fill)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def png_url(image: Image.Image, compress_level: int = 6) -> str:
    """A data: URL of the image as PNG.

    Args:
        compress_level: zlib's, from 0 (large, at once) to 9.
    """
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=compress_level)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def filler_picture() -> bytes:
    """A grey PNG, for a row that stands for no image."""
    data = io.BytesIO()
    Image.new("RGB", (64, 64), (127, 127, 127)).save(data, "PNG")
    return data.getvalue()


def image_format(data: bytes) -> str:
    """JPEG, PNG, ... by the first bytes; "unknown" otherwise."""
    for magic, name in ((b"\xff\xd8\xff", "JPEG"), (b"\x89PNG", "PNG"), (b"GIF8", "GIF"), (b"BM", "BMP"), (b"II*\x00", "TIFF"), (b"MM\x00*", "TIFF")):
        if data.startswith(magic):
            return name
    return "WEBP" if data[8:12] == b"WEBP" else "unknown"
