"""Filling the templates of medray.inference.prompts (pure)."""

from __future__ import annotations

import re
import unicodedata
from importlib import resources


def fill(template: str, **parts: str) -> str:
    """The template with its {names} replaced; braces inside what is filled in stay as they are."""
    text = resources.files("medray.inference.prompts").joinpath(template).read_text(encoding="utf-8")
    # Not str.format: captions and answers may contain braces.
    return re.sub(
        "|".join(rf"\{{{name}\}}" for name in parts), lambda match: parts[match[0][1:-1]], text
    ).strip()


_DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-"))


def first_line(reply: str) -> str:
    """The first line of a reply that holds numbers: full-width digits and marks as plain ones, every dash
    and minus as "-".
    """
    return unicodedata.normalize("NFKC", reply.strip().split("\n", 1)[0]).translate(_DASHES).strip()


def known(caption: str | None, context: str | None) -> str:
    """The paragraph that tells what is written about the image, or nothing."""
    said = "\n".join(text.strip() for text in (caption, context) if text and text.strip())
    return f"What is written about the image:\n{said}\n\n" if said else ""
