"""Response shuffling of instruction-free tuning (arXiv 2603.19482): the parts of a description in a new order
each epoch, so that the model learns what is there and not where it is said. Pure functions of texts.

Two ways to part a text: at a separator (attribute lists) or between sentences (reports). The paper's authors
released the first; sentences are our reading of the second.
"""

from __future__ import annotations

import re
from typing import Literal, get_args

from medray.errors import ConfigError
from medray.stable_draws import digest

Parts = Literal["separator", "sentences"]

_MARK = re.compile(r"[.!?]+$")
_OUTSIDE_BRACKETS = r"(?![^()]*\))"

# Where a sentence can end: marks, perhaps closing quotes or brackets, and white space. An empty line always
# ends one.
_END = re.compile(r"""[.!?]+["'”’)\]]*\s+|\s*\n\s*\n\s*""")
_HAS_MARK = re.compile(r"""[.!?]["'”’)\]]*$""")
_OPENERS = "\"'“‘([*-•"
# Words that are followed by more of their sentence, lower case and without their full stop.
_ABBREVIATIONS = frozenset(
    (
        "dr",
        "mr",
        "mrs",
        "ms",
        "prof",
        "st",
        "vs",
        "v",
        "e.g",
        "eg",
        "i.e",
        "ie",
        "cf",
        "ca",
        "approx",
        "incl",
        "resp",
        "viz",
        "al",
        "fig",
        "figs",
        "ref",
        "refs",
        "dept",
        "est",
        "max",
        "min",
        "avg",
        "dx",
        "hx",
        "tx",
        "rx",
        "pt",
        "lat",
        "ant",
        "post",
        "sup",
        "inf",
        "med",
        "temp",
        "diam",
        "vol",
        "wt",
        "ht",
    )
)
# These are words of their own too ("Effusion? No."): abbreviations only before a number.
_BEFORE_NUMBERS = frozenset(("no", "nos", "nr", "ser", "im", "p", "pp", "ed", "grade", "type"))


def shuffled(
    text: str, sample_id: str, epoch: int, seed: int, parts: Parts = "separator", separator: str = ","
) -> str:
    """The text with its parts in an order that (seed, epoch, sample_id) fix, each order equally likely; a
    restarted epoch draws the same on any machine. A text of one part is returned as it is.

    The parts are those of `separated` or `sentences`: nothing inside them changes, and none is lost or
    doubled, the same part said twice included. Capitals stay as they are.

    Args:
        parts: "separator", or "sentences".
        separator: used by "separator" only.

    "separator": parts are joined by the separator and a blank (a separator with white space in it: as it is).
    The final full stop, exclamation or question mark of the whole text stays at its end and does not travel
    with the last part. Words between the parts belong to them: "a, b and c." has the parts "a" and "b and c",
    and its other order is "b and c, a."; "a, b, and c." has three, and may become "and c, a, b.".

    "sentences": sentences are joined by one blank, so line breaks between them are lost; each keeps its own
    mark, and one without any (the last, perhaps) gets a full stop. A heading ("FINDINGS:") goes with the
    sentence after it.

    Raises ConfigError for another value of `parts` or an empty separator.
    """
    if parts not in get_args(Parts):
        raise ConfigError(f"shuffling: unknown parts {parts!r}; allowed values: {', '.join(get_args(Parts))}")
    found, mark = (sentences(text), "") if parts == "sentences" else separated(text, separator)
    if len(found) < 2:
        return text
    between = " " if parts == "sentences" else separator if re.search(r"\s", separator) else f"{separator} "
    return between.join(found[index] for index in order(len(found), sample_id, epoch, seed)) + mark


def order(count: int, sample_id: str, epoch: int, seed: int) -> list[int]:
    """A permutation of range(count) fixed by the other arguments."""
    return sorted(range(count), key=lambda index: digest("shuffle", seed, epoch, sample_id, index))


def separated(text: str, separator: str = ",") -> tuple[list[str], str]:
    """(parts without blanks at their ends, final mark). Empty parts are left out.

    A separator inside round brackets ("a nodule (2 cm, calcified)") does not separate, nor a comma between
    digits ("1,200").
    """
    if not separator:
        raise ConfigError("shuffling: the separator is empty; give one, such as ',', or use parts: sentences")
    body = text.strip()
    mark = _MARK.search(body)
    body = body[: mark.start()] if mark else body
    literal = r"(?:(?<!\d),|,(?!\d))" if separator == "," else re.escape(separator)
    pieces = re.split(literal + _OUTSIDE_BRACKETS, body)
    return [piece.strip() for piece in pieces if piece.strip()], mark[0] if mark else ""


def sentences(text: str) -> list[str]:
    """The sentences of a text, without white space at their ends; of several, those without a mark get a full
    stop.

    A sentence ends at . ! or ? before white space, or at an empty line (but not at one after a colon). It
    does not end inside a number ("2.5 cm"), after an abbreviation ("Dr.", "e.g.", "No. 3"), an initial ("J.
    Smith") or a list's number ("2. Lungs: clear."), nor before a small letter, unless the whole text has no
    capitals. In doubt two sentences stay one: nothing is torn.
    """
    text = text.strip()
    no_capitals = text == text.lower()
    found, begin = [], 0
    for end in _END.finditer(text):
        if _ends(text[begin : end.start()], end[0], text[end.end() :], no_capitals):
            found.append(text[begin : end.end()].strip())
            begin = end.end()
    found = [sentence for sentence in [*found, text[begin:]] if sentence]
    if len(found) < 2:
        return found
    return [sentence if _HAS_MARK.search(sentence) else f"{sentence}." for sentence in found]


def _ends(before: str, mark: str, after: str, no_capitals: bool) -> bool:
    """Whether the sentence `before` really ends at `mark`, a run of marks and white space, with `after`
    behind it.
    """
    if re.search(r"\n\s*\n", mark):
        return not before.endswith(":")
    following = after.lstrip(_OPENERS)[:1]
    if following.islower() and not no_capitals:
        return False
    if not mark.startswith(".") or mark.startswith(".."):
        return True
    last = re.search(r"[\w.]*$", before)[0].lower()
    if last in _ABBREVIATIONS or (last in _BEFORE_NUMBERS and following.isdigit()):
        return False
    is_list_number = re.search(r"(^|[:\n])\s*\d+$", before)
    is_initial = len(last) == 1 and last.isalpha() and before.strip()[-1:].isupper()
    return not is_list_number and not is_initial
