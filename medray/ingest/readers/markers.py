"""Markers that stand for the image within a text: <image>, <img>, <image 1>, the tokens of model families
(pure)."""

from __future__ import annotations

import re

from medray.errors import BadRecord

# A marker left in a text would become a second image token in a model's prompt.
_MARKER = re.compile(
    # Qwen-VL's <img>path</img>; <image>, <img></img>, <image 1>
    r"<img>[^<>]{1,512}</img>|<\s*(?:image|img)(?:[ _-]?\d+)?\s*/?\s*>(?:\s*<\s*/\s*(?:image|img)\s*>)?"
    # Qwen-VL, Phi-3-vision
    r"|<\|vision_start\|>(?:<\|image_pad\|>)*<\|vision_end\|>|<\|image(?:_pad|_\d+)?\|>"
    r"|<(?:IMG_CONTEXT|ImageHere|image_placeholder|image_soft_token|start_of_image|im_patch|image_token)>|\[(?:IMG|IMAGE)\]",
    re.IGNORECASE,
)
_OTHER_MEDIA = re.compile(r"<\s*(?:video|audio)\s*/?\s*>", re.IGNORECASE)
# ms-swift's: what stands there is in another field of the record.
_PLACEHOLDER = re.compile(r"<\s*(?:bbox|ref-object|cot-process)\s*>", re.IGNORECASE)


def markers_in(text: str) -> int:
    """Number of image markers in a text."""
    if "<" not in text and "[" not in text:
        return 0
    return len(_MARKER.findall(text))


def without_marker(text: str) -> str:
    """The text without its image markers, wherever they stand; the words around one stay apart."""
    if "<" not in text and "[" not in text:
        return text.strip()
    parts = _MARKER.split(text)
    said = parts[0]
    for part in parts[1:]:
        before, after = said.rstrip(), part.lstrip()
        blank = said[len(before) :] + part[: len(part) - len(after)]
        apart = "" if not before or not after or after[0] in ",.;:?!)" else "\n" if "\n" in blank else " "
        said = f"{before}{apart}{after}"
    return said.strip()


def asked(text: str, field: str) -> str:
    """A question about one image, without the image's marker.

    Raises BadRecord for several markers, a marker of another medium, and a question of nothing else.
    """
    check_media(text, field)
    found = markers_in(text)
    if found > 1:
        raise BadRecord(f"field {field!r} has {found} image markers; a row has one image")
    question = without_marker(text)
    if not question:
        raise BadRecord(f"field {field!r} is empty apart from the image's marker")
    return question


def check_media(text: str, field: str) -> None:
    """Raise BadRecord for a marker of a video or sound, and for a placeholder of what another field holds."""
    if "<" not in text:
        return
    if placeholder := _PLACEHOLDER.search(text):
        raise BadRecord(
            f"field {field!r} contains {placeholder[0]}, which stands for a value of another field "
            "(objects); write the value into the text"
        )
    other = _OTHER_MEDIA.search(text)
    if other:
        raise BadRecord(f"field {field!r} contains {other[0]}; only images are read")


def check_no_marker(text: str, field: str) -> None:
    """Raise BadRecord for a text that holds an image marker, such as an answer or a caption."""
    check_media(text, field)
    if markers_in(text):
        raise BadRecord(
            f"field {field!r} contains {_MARKER.search(text)[0]} inside its text; only the first question may"
        )
