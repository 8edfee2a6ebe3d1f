"""Images that a record holds itself: bytes, base64 text, data: URIs, {bytes, path} (pure, no Ray).

Readers know image files by name. What a record holds inline is taken out before a reader sees the record, and
a name that stands for it is put in its place.
"""

from __future__ import annotations

import ast
import base64
import binascii
import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote_to_bytes

from medray.errors import BadRecord
from medray.images.decoding import image_format
from medray.ingest.files.reading import is_dicom
from medray.pseudonyms import shortened
from medray.stable_draws import image_digest

PREFIX = "inline-"  # of the names that stand for inline images
# The longest path of any file system that people use (bytes); what is longer and no base64 is neither.
LONGEST_PATH = 4096
_BYTES = ("bytes", "base64", "b64", "data", "url", "image_url")
_NAMES = ("path", "file_name", "filename", "file")
# Fields in which a text is a file's name or an image, whatever it looks like.
_FIELDS = frozenset(
    (
        "image",
        "images",
        "img",
        "picture",
        "photo",
        "image_file",
        "image_path",
        "file_name",
        "filename",
        "file",
        "path",
        "image_name",
        "img_name",
        "figure_path",
        "imageid",
        "image_base64",
        "image_bytes",
        "jpg",
        "jpeg",
        "png",
    )
)
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]+={0,2}")
_BLANKS = str.maketrans("", "", " \t\r\n\v\f")


def inline_image(value: Any) -> bytes | None:
    """The encoded image that a value of an image field holds itself; None if it names a file or holds
    nothing.

    Base64 may have line breaks, blanks, the URL-safe alphabet and no padding, with or without
    data:TYPE;...;base64, before it. Of {bytes, path} the bytes count, as bytes, base64 or a list of numbers;
    tables hold such an object as text, in JSON or as Python writes it.

    Raises BadRecord for a text that begins as an inline image and is none, or is neither that nor a path.
    """
    if isinstance(value, Mapping):
        return next(
            (found for field in _BYTES if (found := inline_image(value.get(field))) is not None), None
        )
    if isinstance(value, list):
        return _of_numbers(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value) or None
    if not isinstance(value, str):
        return None
    text = value.strip()
    if text[:1] in ("{", "[") and (written := _written_object(text)) is not None:
        return inline_image(written)
    if text[:5].lower() == "data:":
        return _of_data_uri(text)
    if text[:2] in ("b'", 'b"') and text[-1:] == text[1]:  # Python's own writing of bytes
        text = text[2:-1]
    if _looks_encoded(text):
        return _of_base64(text)
    if len(text.encode("utf-8", "replace")) > LONGEST_PATH or (
        len(text) > 512 and _BASE64.fullmatch(text.translate(_BLANKS))
    ):
        raise BadRecord(f"{len(text)} characters are neither the path of an image nor an image as base64")
    return None


def named_file(value: Any) -> Any:
    """The file's name in {bytes: null, path}, also as text of a table; any other value as it is."""
    if isinstance(value, str) and value.strip()[:1] == "{":
        written = _written_object(value.strip())
        value = value if written is None else written
    if not isinstance(value, Mapping):
        return value
    return next((value[field] for field in _NAMES if isinstance(value.get(field), str)), value)


def take_out(record: Any) -> tuple[Any, dict[str, bytes]]:
    """(the record with a name for each inline image, the images by these names). A record without any comes
    back as it is.

    Raises BadRecord as inline_image does.
    """
    if not isinstance(record, dict):
        return record, {}
    images: dict[str, bytes] = {}
    changed = {}
    for field, value in record.items():
        if _may_be_image(field, value):
            alone = value[0] if _is_list(value) and len(value) == 1 else value
            replaced = (
                [_replaced(one, images) for one in alone] if _is_list(alone) else _replaced(alone, images)
            )
            if replaced is not alone:
                changed[field] = replaced
    return (record | changed if changed else record), images


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and not all(isinstance(one, int) for one in value)


def _written_object(text: str) -> Mapping[str, Any] | None:
    """The object with an image's bytes or path that a text is, or that is alone in a list; None if it is
    none.
    """
    if not any(f"{quote}{name}{quote}" in text[:200] for name in (*_BYTES, *_NAMES) for quote in "'\""):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        return value if isinstance(value, Mapping) else None
    return None


def _may_be_image(field: Any, value: Any) -> bool:
    if str(field).strip().lower() in _FIELDS:
        return True
    # Other fields too, where nobody could take it for text.
    return isinstance(value, str) and (
        value[:11].lower() == "data:image/" or (len(value) > 256 and _looks_encoded(value.strip()))
    )


def _replaced(value: Any, images: dict[str, bytes]) -> Any:
    data = inline_image(value)
    if data is None:
        return named_file(value)
    name = f"{PREFIX}{image_digest(data)}"
    images[name] = data
    return name


def _looks_encoded(text: str) -> bool:
    """Whether a text is base64 of something that begins as an image does."""
    head = text[:256].translate(_BLANKS)[:240]
    if len(head) < 32 or not _BASE64.fullmatch(head):
        return False
    try:
        start = _decoded(head[: len(head) // 4 * 4])
    except binascii.Error:
        return False
    return (
        image_format(start) not in ("unknown", "BMP", "PPM")
        or (start[:2] in (b"BM", b"P4", b"P5", b"P6") and len(text) > 512)
        or is_dicom(start)
    )


def _of_data_uri(text: str) -> bytes:
    head, comma, body = text.partition(",")
    if not comma:
        raise BadRecord(f"the data: URI {shortened(text, 60)!r} has no comma before its data")
    if any(part.strip().lower() == "base64" for part in head.split(";")):
        return _of_base64(unquote_to_bytes(body).decode("ascii", "replace") if "%" in body else body)
    data = unquote_to_bytes(body.strip())
    if not data:
        raise BadRecord("the data: URI holds no data")
    return data


def _of_base64(text: str) -> bytes:
    try:
        data = _decoded(text.translate(_BLANKS))
    except (binascii.Error, UnicodeEncodeError):
        raise BadRecord(f"the image's base64 ({len(text)} characters) cannot be decoded") from None
    if not data:
        raise BadRecord("the inline image is empty")
    return data


def _decoded(text: str) -> bytes:
    """Base64 in either alphabet, with or without its padding. Raises binascii.Error for anything else."""
    text = text.rstrip("=").replace("-", "+").replace("_", "/")
    return base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), validate=True)


def _of_numbers(value: list[Any]) -> bytes | None:
    """Bytes written as a list of numbers, as pandas writes them to JSON."""
    if len(value) < 8 or not all(type(one) is int and 0 <= one < 256 for one in value[:64]):
        return None
    try:
        return bytes(value)
    except (ValueError, TypeError):
        raise BadRecord("the image is a list of numbers that are not bytes") from None
