"""Fold the ways of writing one text into one (pure): width, dashes, quotation marks, invisible characters,
typographic marks.

The strict metrics work on folded text, so that no score depends on how a model types. The legacy metrics do
not: they reproduce a published script.
"""

from __future__ import annotations

import re
import unicodedata

# Characters that show nothing. Unicode files some under letters and marks, so their category does not tell.
_INVISIBLE = {
    0x034F,
    0x115F,
    0x1160,
    0x17B4,
    0x17B5,
    *range(0x180B, 0x1810),
    0x2065,
    0x3164,
    *range(0xFE00, 0xFE10),
    0xFFA0,
    *range(0xE0000, 0xE1000),
}
_APOSTROPHES = re.compile(r"['’ʼ＇]|(?<=[^\W\d_])[`´‘‛′](?=[^\W\d_])")
_RAISED = re.compile(r"(?<=\d)(?=[⁰¹²³⁴-⁹⁺⁻½¼¾⅐-⅞])")  # 10⁵ is not 105, and 1½ not 11/2
_DECIMAL_POINT = re.compile(r"(?<=\d)[·⋅٫](?=\d)")
_POINT = re.compile(r"(?<!\d)[.,]|[.,](?!\d)")  # a decimal point or comma inside a number is part of it


class _Folded(dict):
    """For str.translate: letters, marks and digits stay (digits of any script as 0 to 9), all else becomes a
    blank or nothing.
    """

    def __missing__(self, code: int) -> int | str | None:
        self[code] = folded = self._fold(code)
        return folded

    @staticmethod
    def _fold(code: int) -> int | str | None:
        character = chr(code)
        category = unicodedata.category(character)
        if code in _INVISIBLE or category == "Cf" or (category == "Cc" and not character.isspace()):
            return None
        if category == "Nd":
            return str(unicodedata.decimal(character))
        return code if category[0] in "LMN" or character in ".,'" else " "


_FOLDED = _Folded()


def plain(text: str) -> str:
    """The text in lower case with words and numbers alone, between single blanks; apostrophes close up
    ("isn't" gives "isnt").

    Compatibility forms (full-width letters and digits, ligatures, circled letters, no-break blanks) become
    the plain characters they stand for (Unicode NFKC), and punctuation and symbols of every script become
    blanks. A decimal point or comma stays.
    """
    text = _APOSTROPHES.sub("'", text)
    if not text.isascii():
        # Apostrophes first: NFKC makes a blank and an accent of the acute one.
        text = _DECIMAL_POINT.sub(".", unicodedata.normalize("NFKC", _RAISED.sub(" ", text)))
        text = unicodedata.normalize("NFC", text.casefold())
    else:
        text = text.lower()
    return " ".join(_POINT.sub(" ", text.translate(_FOLDED)).replace("'", "").split())
