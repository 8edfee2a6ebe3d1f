"""Images as people have them: each either becomes RGB or is refused with its reason, before it costs
memory.
"""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from medray.config import DataConfig
from medray.images.decoding import (
    PAD_COLOUR,
    ImageError,
    decode,
    image_format,
    is_plain,
    other_frames,
    pad_to_square,
    page_png,
    pages_of,
)

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
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 bytes"),
        (None, "0 bytes"),
        (b"hello", "cannot be decoded"),
        (saved(noise((400, 300)), "JPEG")[:2000], "cannot be decoded"),
        (bomb(), "data.max_image_pixels"),
        (saved(Image.new("RGB", (1, 1))), "data.min_image_side"),
        (saved(Image.new("RGB", (600, 4))), "data.max_aspect"),
        (saved(noise(), "DDS")[:80] + bytes(4) + saved(noise(), "DDS")[84:], "cannot be decoded"),
    ],
    ids=["empty", "none", "text", "truncated", "bomb", "1x1", "strip", "dds"],
)
def test_refused_with_a_reason(data, reason):
    with pytest.raises(ImageError, match=reason):
        decode(data, LIMITS)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000"])
def test_formats_that_images_come_in(kind):
    assert decode(saved(noise(), kind), LIMITS).size == (40, 30)


def test_a_format_that_runs_a_program_is_none_of_them():
    with pytest.raises(ImageError, match="cannot identify image file"):
        decode(saved(noise(), "EPS"), LIMITS)  # Pillow gives it to Ghostscript


def tiff(values, photometric=1, sample_format=1, order="<"):
    """An uncompressed grey TIFF of one strip, written by hand: Pillow writes no white-is-zero of 16 bits."""
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    tags = [
        (256, values.shape[1]),
        (257, values.shape[0]),
        (258, values.dtype.itemsize * 8),
        (259, 1),
        (262, photometric),
        (273, 8),
        (277, 1),
        (278, values.shape[0]),
        (279, len(data)),
        (339, sample_format),
    ]
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    return head + data + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


RAMP = np.tile(np.linspace(0, 1, 64), (48, 1))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize(
    ("kind", "sample_format"),
    [("u1", 1), ("i1", 2), ("u2", 1), ("i2", 2), ("u4", 1), ("i4", 2), ("f4", 3), ("f8", 3)],
)
def test_every_kind_of_grey_is_shown_right_or_refused(kind, sample_format, photometric, order):
    """0 is black, or white where the file says so, whatever the kind of number; no other picture without
    a word.
    """
    scale = {"u": 2 ** (8 * int(kind[1])) - 1, "i": 2 ** (8 * int(kind[1])) - 2, "f": 1}[kind[0]]
    data = tiff(((RAMP - (kind[0] == "i") * 0.5) * scale).astype(kind), photometric, sample_format, order)
    try:
        row = np.asarray(decode(data, LIMITS))[5, :, 0].astype(float)
    except ImageError as error:
        assert "cannot identify image file; medray reads" in str(error)
        assert kind not in ("u1", "f4") and (kind, photometric, order) != ("u2", 0, "<")
        return
    wanted = 255 * RAMP[5] if photometric else 255 * (1 - RAMP[5])
    assert np.abs(row - wanted).max() <= 1


def test_values_that_are_no_numbers_are_black():
    values = RAMP.astype("f4")
    values[0, :3] = np.nan, np.inf, -np.inf
    image = np.asarray(decode(tiff(values, sample_format=3), LIMITS))[..., 0]
    assert image[0, :3].tolist() == [0, 255, 0]
    assert np.abs(image[5] - 255 * RAMP[5]).max() <= 1
    with pytest.raises(ImageError, match="no value of the image is finite"):
        decode(tiff(np.full((48, 64), np.nan, "f4"), sample_format=3), LIMITS)


@pytest.mark.parametrize("compression", [None, "tiff_deflate", "tiff_lzw"])
def test_compressed_white_is_zero(compression):
    image = Image.fromarray((RAMP * 65535).round().astype("u2"))
    data = saved(image, "TIFF", compression=compression, tiffinfo={262: 0})
    # Pillow inverts neither when it writes nor when it reads
    stored = np.asarray(Image.open(io.BytesIO(data)))
    assert stored[0, 0] == 0
    assert np.asarray(decode(data, LIMITS))[0, [0, 63], 0].tolist() == [255, 0]


RED = Image.new("RGB", (8, 6), (200, 30, 20))


@pytest.mark.parametrize(
    "data",
    [
        saved(RED.convert("CMYK"), "TIFF"),
        saved(RED.convert("CMYK"), "JPEG", quality=98),
        saved(RED.convert("YCbCr"), "TIFF"),
        saved(
            ImageCms.profileToProfile(
                RED, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
            ),
            "TIFF",
        ),
        saved(RED, "JPEG2000", no_jp2=True),
        saved(RED, "AVIF"),
        saved(RED, "JPEG", progressive=True, quality=98),
        saved(RED, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 6), (0, 0, 250))]),
        b"P3 2 2 255\n" + b"200 30 20 " * 4,
    ],
    ids=[
        "cmyk-tiff",
        "cmyk-jpeg",
        "ycbcr-tiff",
        "lab-tiff",
        "j2k",
        "avif",
        "progressive",
        "mpo",
        "plain-ppm",
    ],
)
def test_colour_spaces_become_rgb(data):
    assert np.abs(np.asarray(decode(data, LIMITS), int)[1, 1] - (200, 30, 20)).max() <= 4


@pytest.mark.parametrize(
    "data",
    [
        saved(Image.new("RGBA", (8, 6), (200, 30, 20, 0))),
        saved(Image.new("LA", (8, 6), (90, 0))),
        saved(RED, transparency=(200, 30, 20)),
        saved(RED.quantize(4), transparency=0),
        saved(RED.quantize(4), "GIF", transparency=0),
        saved(RED.convert("L"), transparency=RED.convert("L").getpixel((0, 0))),
        saved(Image.new("RGBA", (8, 6), (200, 30, 20, 0)), "WEBP", lossless=True, exact=True),
    ],
    ids=["rgba", "la", "rgb-colour", "palette", "gif", "grey-value", "webp"],
)
def test_all_that_is_transparent_is_white(data):
    assert np.asarray(decode(data, LIMITS)).min() == 255


@pytest.mark.parametrize(
    ("kind", "left_out"),
    [
        ("GIF", ["first-frame-of-animated-GIF"]),
        ("PNG", ["first-frame-of-animated-PNG"]),
        ("WEBP", ["first-frame-of-animated-WEBP"]),
        ("AVIF", ["first-frame-of-animated-AVIF"]),
        ("TIFF", ["first-page-of-TIFF"]),
        ("MPO", []),
    ],
)
def test_frames_that_are_left_out_are_named(kind, left_out):
    assert (
        other_frames(saved(RED, kind, save_all=True, append_images=[Image.new("RGB", (8, 6), (0, 0, 250))]))
        == left_out
    )
    assert other_frames(saved(RED, "JPEG" if kind == "MPO" else kind)) == []
    assert other_frames(saved(RED, "TIFF")[:20]) == other_frames(b"GIF89a") == []


def test_pages_are_found_without_their_small_copies():
    pages = [noise(seed=seed) for seed in range(3)]
    pages[1].encoderinfo = {"tiffinfo": {254: 1}}  # NewSubfileType: a reduced copy
    data = saved(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert pages_of(io.BytesIO(data)) == [0, 2]
    for page in (0, 2):
        image = Image.open(io.BytesIO(page_png(data, page, LIMITS)))
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), np.asarray(pages[page]))
    grey = saved(
        pages[0].convert("L"), "TIFF", save_all=True, append_images=[pages[1].convert("L")], big_tiff=True
    )
    assert pages_of(io.BytesIO(grey)) == [0, 1]
    assert Image.open(io.BytesIO(page_png(grey, 1, LIMITS))).mode == "L"


def test_page_directories_in_a_circle_end():
    data = bytearray(tiff((RAMP * 255).astype("u1")))
    data[-4:] = data[4:8]  # the next directory is the same again
    assert pages_of(io.BytesIO(bytes(data))) == [0]


@pytest.mark.parametrize(
    ("data", "plain"),
    [
        (saved(noise(), "JPEG"), True),
        (saved(noise()), True),
        (saved(noise().convert("L")), True),
        (saved(noise().convert("CMYK"), "JPEG"), False),
        (saved(Image.fromarray((RAMP * 65535).astype("u2"))), False),
        (saved(RED, transparency=(200, 30, 20)), False),
        (saved(RED.quantize(4), "GIF"), False),
    ],
)
def test_plain_images_are_those_that_all_programs_show_alike(data, plain):
    assert is_plain(data) is plain
    turned = Image.Exif()
    turned[0x0112] = 6
    assert not is_plain(saved(noise(), "JPEG", exif=turned))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF"])
def test_formats_are_told_by_their_first_bytes(kind):
    assert image_format(saved(noise(), kind)) == kind
    assert image_format(b"P5 is what he said") == "PPM"  # decoding refuses it
    assert image_format(b"Pneumonia") == image_format(b"") == "unknown"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF"])
def test_damaged_files_are_decoded_or_refused(kind):
    """Whatever a decoder raises, it is the image's own reason: no flipped byte ends a job."""
    data = saved(noise(), kind)
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(data)
        for at in random.integers(0, len(data), 4):
            damaged[at] = random.integers(0, 256)
        try:
            assert decode(bytes(damaged), LIMITS).mode == "RGB"
        except ImageError as error:
            refused += 1
            assert 0 < len(str(error)) < 300
        other_frames(bytes(damaged))
    assert refused or kind in ("BMP", "PPM", "TIFF", "GIF")


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
    assert np.asarray(decode(saved(Image.new("RGBA", (8, 8), (10, 20, 30, 0))), LIMITS))[0, 0].tolist() == [
        255,
        255,
        255,
    ]
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
    assert (
        square.shape == (300, 300, 3)
        and np.array_equal(square[147:153], np.asarray(image.resize((300, 6))))
        and (square[:147] == PAD_COLOUR).all()
    )
    assert pad_to_square(image.rotate(90, expand=True), max_pixels=300 * 300 + 500).size == (300, 300)
    assert pad_to_square(image, max_pixels=900 * 900).size == (900, 900) and pad_to_square(
        noise((3, 900)), max_pixels=100
    ).size == (10, 10)


def test_damaged_exif_leaves_the_image_as_it_is():
    assert decode(saved(noise(), "WEBP", exif=b"Exif\0\0MM\0\0"), LIMITS).size == (40, 30)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = saved(noise(), "JPEG", exif=exif)
    at = data.index(b"Exif") + 6
    for broken in (
        data[: at + 2] + b"\xff" * 12 + data[at + 14 :],
        data[: at + 10] + b"\xff" * 6 + data[at + 16 :],
    ):
        assert decode(broken, LIMITS).size in ((40, 30), (30, 40))
        assert is_plain(broken) in (True, False)


def test_a_thumbnail_in_front_is_not_the_image(tmp_path):
    image, thumbnail = noise(), noise((8, 6))
    path = tmp_path / "a.tif"
    thumbnail.save(path, save_all=True, append_images=[image], tiffinfo={254: 1})
    data = path.read_bytes()
    # Pillow writes the tag into both; the second directory is the image.
    first, second = (at for at in range(len(data) - 4) if data[at : at + 4] == b"\xfe\x00\x04\x00")
    data = data[: second + 8] + b"\0\0\0\0" + data[second + 12 :]
    assert first < second and decode(data, LIMITS).size == (40, 30)


def test_deep_grey_with_alpha_is_refused():
    header = struct.pack(">IIBBBBB", 4, 4, 16, 4, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + b"\x0f\xff\xff\xff" * 4 for _ in range(4)))
    parts = ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts
    )
    with pytest.raises(ImageError, match="16-bit grey with alpha"):
        decode(data, LIMITS)
