"""Images as people have them: each either becomes RGB or is refused with its reason, before it costs memory."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from medray.config import DataConfig
from medray.data.images import PAD_COLOUR, ImageError, decode, pad_to_square

LIMITS = DataConfig()


def saved(image, kind="PNG", **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def noise(size=(40, 30), seed=0):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def bomb(width=60_000, height=60_000):
    """A PNG of a few bytes whose header claims 3.6 gigapixels."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("data", "reason"), [
    (b"", "0 bytes"),
    (None, "0 bytes"),
    (b"hello", "cannot be decoded"),
    (saved(noise((400, 300)), "JPEG")[:2000], "cannot be decoded"),
    (bomb(), "data.max_image_pixels"),
    (saved(Image.new("RGB", (1, 1))), "data.min_image_side"),
    (saved(Image.new("RGB", (600, 4))), "data.max_aspect"),
    (saved(noise(), "WEBP", exif=b"Exif\0\0MM\0\0"), "cannot be decoded"),
    (saved(noise(), "DDS")[:80] + bytes(4) + saved(noise(), "DDS")[84:], "cannot be decoded"),
], ids=["empty", "none", "text", "truncated", "bomb", "1x1", "strip", "exif", "dds"])
def test_refused_with_a_reason(data, reason):
    with pytest.raises(ImageError, match=reason):
        decode(data, LIMITS)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000"])
def test_formats_that_images_come_in(kind):
    assert decode(saved(noise(), kind), LIMITS).size == (40, 30)


def test_a_format_that_runs_a_program_is_none_of_them():
    with pytest.raises(ImageError, match="cannot identify image file"):
        decode(saved(noise(), "EPS"), LIMITS)  # Pillow gives it to Ghostscript


def test_too_many_bytes():
    with pytest.raises(ImageError, match="max_image_bytes 100"):
        decode(saved(noise()), DataConfig(max_image_bytes=100))


def test_cmyk_becomes_rgb():
    image = decode(saved(noise().convert("CMYK"), "JPEG", quality=95), LIMITS)
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image, float) - np.asarray(noise(), float)).mean() < 60


def test_sixteen_bits_are_scaled_by_their_own_range():
    values = np.linspace(1000, 3000, 40 * 30).reshape(30, 40).astype(np.uint16)
    image = np.asarray(decode(saved(Image.fromarray(values)), LIMITS))
    assert image.shape == (30, 40, 3)
    assert (image.min(), image.max()) == (0, 255)
    assert (np.diff(image[0, :, 0].astype(int)) >= 0).all()


def test_alpha_is_laid_over_white():
    assert np.asarray(decode(saved(Image.new("RGBA", (8, 8), (10, 20, 30, 0))), LIMITS))[0, 0].tolist() == [255, 255, 255]
    palette = Image.new("P", (8, 8))
    assert decode(saved(palette), LIMITS).mode == "RGB"


def test_exif_turns_the_image_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert decode(saved(noise((40, 30)), "JPEG", exif=exif), LIMITS).size == (30, 40)


def test_padding_is_centred_and_clips_mean_colour():
    square = pad_to_square(noise((40, 20)))
    assert square.size == (40, 40)
    assert square.getpixel((0, 0)) == PAD_COLOUR
    assert np.array_equal(np.asarray(square)[10:30], np.asarray(noise((40, 20))))
    assert pad_to_square(noise((20, 20))).size == (20, 20)


def test_a_thin_image_is_made_smaller_before_its_square_is_too_large():
    image = noise((900, 18))
    square = np.asarray(pad_to_square(image, max_pixels=300 * 300))
    assert square.shape == (300, 300, 3) and np.array_equal(square[147:153], np.asarray(image.resize((300, 6)))) and (square[:147] == PAD_COLOUR).all()
    assert pad_to_square(image.rotate(90, expand=True), max_pixels=300 * 300 + 500).size == (300, 300)
    assert pad_to_square(image, max_pixels=900 * 900).size == (900, 900) and pad_to_square(noise((3, 900)), max_pixels=100).size == (10, 10)
