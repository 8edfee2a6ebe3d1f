"""Encoded image bytes to pixels: limits first, then one decode to RGB (pure, no Ray)."""

from __future__ import annotations

import base64
import io
import math
import re
import struct
import warnings
from typing import BinaryIO

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from medray.config import DataConfig
from medray.errors import DataError
from medray.images.colours import to_rgb
from medray.pseudonyms import shortened

TIFF_SUFFIXES = (".tif", ".tiff", ".btf", ".tf8")
# CLIP's mean colour, which LLaVA pads with: after normalisation it is zero.
PAD_COLOUR = (122, 116, 104)
MAX_PAGES = 65_536  # of a TIFF file: each becomes a row
_NEW_SUBFILE_TYPE = 254
# bit depth and colour type in a PNG's header; Pillow reads the upper 8 bits
_DEEP_GREY_WITH_ALPHA = b"\x10\x04"
LARGEST_SQUARE = 178_956_970  # pixels; Pillow opens none larger
# Pillow knows forty more, one of which (EPS) runs a program of the machine's
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

# Pillow only warns between one and two times its own limit; ours decides. For the whole process: images are
# decoded in threads.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
_IN_MEMORY = re.compile(r"<_io\.BytesIO object at 0x[0-9a-f]+>")


class ImageError(DataError):
    """One image that cannot be used; its row is quarantined with this reason."""


def decode(data: bytes | None, limits: DataConfig, page: int = 0) -> Image.Image:
    """RGB image out of encoded bytes, upright (EXIF): its first frame, or a page of a TIFF file (from 0).

    Size limits are checked on the header, before any pixel is decoded, so a small file that claims huge
    dimensions costs nothing. Grey of more than 8 bits and floating point are scaled by the image's own range
    (white is zero where TIFF says so), alpha is laid over white, CMYK, YCCK and CIE L*a*b* become sRGB.

    Raises ImageError with the reason; so for a file that is none of FORMATS.
    """
    if not data:
        raise ImageError("the image file is empty (0 bytes)")
    if len(data) > limits.max_image_bytes:
        raise ImageError(
            f"image file of {len(data)} bytes is over data.max_image_bytes {limits.max_image_bytes}"
        )
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.format == "TIFF" and not page:
            page = next(iter(_pages_or_none(data)), 0)  # the first directory may be a thumbnail
        if page:
            image.seek(page)
        check_size(image.size, limits)
        if data[24:26] == _DEEP_GREY_WITH_ALPHA and image.format == "PNG":
            raise ImageError(
                "a PNG of 16-bit grey with alpha is not read: half of its bits would be lost; save it "
                "without alpha"
            )
        image.load()
        return to_rgb(_upright(image))
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"image is over data.max_image_pixels {limits.max_image_pixels}: {error}") from None
    except UnidentifiedImageError:
        raise ImageError(
            f"image cannot be decoded: cannot identify image file; medray reads {', '.join(FORMATS)}"
        ) from None
    except Exception as error:
        # Pillow's decoders raise anything for a damaged file; the caller quarantines the row
        raise ImageError(
            f"image cannot be decoded: {shortened(_IN_MEMORY.sub('', str(error)).strip())}"
        ) from None


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF data say; as it is where these are damaged."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # Pillow's readers of EXIF raise anything for damaged data
        return image
    return image


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # as above
        return 1


def check_size(size: tuple[int, int], limits: DataConfig) -> None:
    width, height = size
    if width * height > limits.max_image_pixels:
        raise ImageError(
            f"image of {width} x {height} pixels is over data.max_image_pixels {limits.max_image_pixels}"
        )
    if min(size) < limits.min_image_side:
        raise ImageError(
            f"image of {width} x {height} pixels is under data.min_image_side {limits.min_image_side}"
        )
    if max(size) > limits.max_aspect * min(size):
        raise ImageError(
            f"image of {width} x {height} pixels is longer than data.max_aspect {limits.max_aspect:g} allows"
        )


def pad_to_square(
    image: Image.Image, fill: tuple[int, int, int] = PAD_COLOUR, max_pixels: int = LARGEST_SQUARE
) -> Image.Image:
    """The image in the middle of a square of its longer side (LLaVA's image_aspect_ratio=pad).

    Args:
        max_pixels: of the square. An image whose square would have more is made smaller first: padding turns
            a thin image of few pixels into very many.
    """
    if image.width == image.height:
        return image
    side = max(image.size)
    if side > (most := math.isqrt(max_pixels)):
        image, side = (
            image.resize((max(1, image.width * most // side), max(1, image.height * most // side))),
            most,
        )
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


# The first bytes of each format; of those in boxes after the box's length.
_MAGIC = (
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG", "PNG"),
    (0, b"GIF8", "GIF"),
    (0, b"BM", "BMP"),
    (0, b"II*\x00", "TIFF"),
    (0, b"MM\x00*", "TIFF"),
    (0, b"II+\x00", "TIFF"),
    (0, b"MM\x00+", "TIFF"),
    (8, b"WEBP", "WEBP"),
    (4, b"jP  \r\n", "JPEG2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG2000"),
    (4, b"ftypavif", "AVIF"),
    (4, b"ftypavis", "AVIF"),
)


def image_format(data: bytes) -> str:
    """JPEG, PNG, ... by the first bytes; "unknown" otherwise."""
    for at, magic, name in _MAGIC:
        if data.startswith(magic, at):
            return name
    # Two letters and a blank: P5 of a PGM file.
    return (
        "PPM"
        if data[:1] == b"P" and data[1:2] in (*map(bytes, zip(b"123456fF")),) and data[2:3].isspace()
        else "unknown"
    )


def is_plain(data: bytes) -> bool:
    """Whether every program shows the encoded image as `decode` does: 8-bit grey or RGB, upright, no
    alpha, one frame.
    """
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    upright = _orientation(image) == 1
    return (
        image.mode in ("L", "RGB")
        and upright
        and "transparency" not in image.info
        and not getattr(image, "is_animated", False)
    )


def other_frames(data: bytes) -> list[str]:
    """What `decode` leaves out of a file, as a category to be counted: "first-frame-of-animated-GIF",
    "first-page-of-TIFF". [] for a file of one picture, and for one that cannot be read.
    """
    kind = image_format(data)
    if kind == "TIFF":
        return ["first-page-of-TIFF"] if len(_pages_or_none(data)) > 1 else []
    # A JPEG's second picture (MPO) is another view or a gain map of the first.
    if kind in ("GIF", "WEBP", "AVIF") or (kind == "PNG" and b"acTL" in data[: 2**16]):
        try:
            animated = getattr(Image.open(io.BytesIO(data), formats=(kind,)), "is_animated", False)
        except Exception:  # a damaged file; decoding it says so
            return []
        return [f"first-frame-of-animated-{kind}"] if animated else []
    return []


def _pages_or_none(data: bytes) -> list[int]:
    try:
        return pages_of(io.BytesIO(data))
    except (ImageError, struct.error):
        return []


def pages_of(handle: BinaryIO) -> list[int]:
    """The pages of a TIFF file, from 0, in their order, without reduced copies (pyramids, thumbnails) and
    masks.

    Reads the directories alone (TIFF 6.0 section 2; BigTIFF has wider numbers). Raises ImageError or
    struct.error for a file that is no TIFF or is cut off, and for more than MAX_PAGES.
    """
    order = {b"II": "<", b"MM": ">"}.get(handle.read(2))
    version = struct.unpack(f"{order}H", handle.read(2))[0] if order else 0
    if version not in (42, 43):
        raise ImageError("no TIFF file")
    # Directories: number of entries, bytes of an entry, next directory.
    number, entry, following = ("H", 12, "I") if version == 42 else ("Q", 20, "Q")
    if version == 43:
        handle.read(4)

    def read(kind: str) -> int:
        return struct.unpack(f"{order}{kind}", handle.read(struct.calcsize(kind)))[0]

    pages, seen, at = [], set(), read(following)
    while at and at not in seen:
        if len(seen) == MAX_PAGES:
            raise ImageError(f"the TIFF file has more than {MAX_PAGES} pages")
        seen.add(at)
        handle.seek(at)
        entries = handle.read(read(number) % 2**16 * entry)
        kinds = [
            struct.unpack_from(
                f"{order}I" if field == 4 else f"{order}H",
                entries,
                start + entry - (4 if version == 42 else 8),
            )[0]
            for start in range(0, len(entries) - entry + 1, entry)
            for tag, field in [struct.unpack_from(f"{order}HH", entries, start)]
            if tag == _NEW_SUBFILE_TYPE
        ]
        if not any(kind & 0b101 for kind in kinds):
            pages.append(len(seen) - 1)
        at = read(following)
    return pages


def page_png(data: bytes, page: int, limits: DataConfig) -> bytes:
    """One page of a TIFF file (from 0) as a PNG of the pixels that `decode` gives, grey where they are.

    Raises ImageError with the reason.
    """
    image = decode(data, limits, page)
    red, green, blue = image.split()
    out = io.BytesIO()
    (red if red.tobytes() == green.tobytes() == blue.tobytes() else image).save(out, "PNG")
    return out.getvalue()
