"""Metrics of visual question answering (pure). Two variants of each stand side by side:

- legacy: bug-compatible with LLaVA-Med's public evaluation, so that numbers compare with papers;
- strict: what the name of the metric says.

All functions take texts and return numbers per question; means and intervals are made in `predict.score`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

_ARTICLES = {"a", "an", "the"}
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
    "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}
# The contractions of the VQA v2 evaluation code that medical text may hold, without their apostrophe.
_CONTRACTIONS = {
    "arent": "are not", "cant": "can not", "couldnt": "could not", "didnt": "did not", "doesnt": "does not", "dont": "do not",
    "hadnt": "had not", "hasnt": "has not", "havent": "have not", "isnt": "is not", "shouldnt": "should not", "thats": "that is",
    "theres": "there is", "theyre": "they are", "wasnt": "was not", "werent": "were not", "whats": "what is", "wont": "will not",
    "wouldnt": "would not", "youre": "you are", "its": "its",
}
# A decimal point or comma inside a number is part of it.
_PUNCTUATION = re.compile(r"(?<!\d)[.,]|[.,](?!\d)|[;/\[\]\"{}()=+\\_<>@`?!:|*#&%$^~-]")


def normalise(text: str) -> str:
    """VQA-v2 style: lower case, no punctuation, number words to digits, contractions expanded, no a/an/the."""
    text = _PUNCTUATION.sub(" ", text.lower().replace("’", "'"))
    words = []
    for word in text.split():
        bare = word.replace("'", "")
        words.extend(_CONTRACTIONS.get(bare, _NUMBERS.get(bare, bare)).split())
    return " ".join(word for word in words if word not in _ARTICLES)


def _words(text: str) -> Counter[str]:
    return Counter(normalise(text).split())


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def open_legacy(answer: str, reference: str) -> dict[str, float]:
    """recall, precision and f1 as LLaVA-Med computes them.

    tp counts shared words by how often the *prediction* says them, so repeating a right word inflates recall:
    reference "lung mass", prediction "lung lung lung lung heart" gives tp 4, fn 1, recall 0.80.
    """
    predicted, wanted = _words(answer), _words(reference)
    tp = sum(count for word, count in predicted.items() if word in wanted)
    fp = sum(count for word, count in predicted.items() if word not in wanted)
    fn = sum(count for word, count in wanted.items() if word not in predicted)
    if tp == 0:
        return {"recall": 0.0, "precision": 0.0, "f1": 0.0}
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    return {"recall": recall, "precision": precision, "f1": _f1(precision, recall)}


def open_strict(answer: str, reference: str) -> dict[str, float]:
    """recall, precision and f1 of the multiset overlap (each word counts as often as both sides have it)."""
    predicted, wanted = _words(answer), _words(reference)
    shared = (predicted & wanted).total()
    if shared == 0:
        return {"recall": 0.0, "precision": 0.0, "f1": 0.0}
    precision, recall = shared / predicted.total(), shared / wanted.total()
    return {"recall": recall, "precision": precision, "f1": _f1(precision, recall)}


def set_recall(answer: str, reference: str) -> float:
    """MedEvalKit's recall: share of the reference's distinct words that occur in the prediction."""
    wanted = set(_words(reference))
    return len(wanted & set(_words(answer))) / len(wanted) if wanted else 0.0


def exact_match(answer: str, reference: str) -> float:
    """1.0 where both are equal after normalisation."""
    return float(normalise(answer) == normalise(reference))


def bleu(answer: str, reference: str) -> list[float]:
    """Sentence BLEU-1..4 in 0..1 over normalised words (sacrebleu, exponential smoothing as its default).

    A reference shorter than n words has no n-grams; BLEU-n then uses the orders it has (effective order).
    """
    candidate, wanted = normalise(answer), normalise(reference)
    if not candidate or not wanted:
        return [0.0] * 4
    return [min(1.0, _bleu(order).sentence_score(candidate, [wanted]).score / 100) for order in range(1, 5)]


@lru_cache(maxsize=4)
def _bleu(order: int):
    from sacrebleu.metrics import BLEU

    return BLEU(max_ngram_order=order, effective_order=True, tokenize="none")


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L F1 in 0..1 over normalised words (rouge_score, no stemming)."""
    return _rouge().score(normalise(reference), normalise(answer))["rougeL"].fmeasure


@lru_cache(maxsize=1)
def _rouge():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False, tokenizer=_Spaces())


class _Spaces:
    """rouge_score's own tokenizer would drop what normalise kept."""

    @staticmethod
    def tokenize(text: str) -> list[str]:
        return text.split()


def closed_legacy(answer: str, reference: str) -> float:
    """LLaVA-Med's rule: a hit iff "yes" or "no" occurs in the answer and the reference does, both as *substrings*.

    So "know" and "abnormal" say "no", and a choice such as "left" can only hit beside a yes or no.
    """
    text = answer.lower()
    return float(("yes" in text or "no" in text) and reference.lower() in text)


def closed_strict(answer: str, reference: str, choices: Sequence[str] | None = None) -> tuple[float, bool]:
    """(hit, parsed): the answer names exactly one of the choices, as whole words, and it is the reference.

    Args:
        choices: the possible answers; default yes and no, or only the reference where that is neither.

    An answer that names none or several is unparsable: wrong, and to be counted separately. Where one choice is part
    of another ("normal" in "not normal"), the longer one counts.
    """
    wanted = normalise(reference)
    if choices:
        options = {normalise(choice) for choice in choices} | {wanted}
    else:
        options = {"yes", "no"} if wanted in ("yes", "no") else {wanted}
    text = f" {normalise(answer)} "
    named = set()
    for option in sorted(options, key=len, reverse=True):
        if option and f" {option} " in text:
            named.add(option)
            text = text.replace(f" {option} ", " | ")
    if len(named) != 1:
        return 0.0, False
    return float(named == {wanted}), True


_LEAD = "the correct answer is"


def mcq_letter(answer: str, choices: int = 4) -> str | None:
    """The option letter an answer gives, or None where its format is wrong.

    The text after the last "The correct answer is", else the whole answer, must be one option letter, with nothing
    around it but punctuation: "B", "(B)", "B." and "The correct answer is B." pass; "B because ..." does not.
    """
    text = answer.strip()
    place = text.lower().rfind(_LEAD)
    if place >= 0:
        text = text[place + len(_LEAD):]
    match = re.fullmatch(r"[\s:(\[*\"']*([A-Za-z])[\s)\].:*\"']*", text)
    if match is None:
        return None
    letter = match[1].upper()
    return letter if ord(letter) - ord("A") < choices else None


def mcq(answer: str, reference: str, choices: int) -> tuple[float, bool]:
    """(hit, parsed) of the strict letter parse; `reference` is the right letter."""
    letter = mcq_letter(answer, choices)
    return float(letter is not None and letter == reference.strip().upper()), letter is not None


def majority_floor(references: Sequence[str]) -> float:
    """Accuracy of always giving the most frequent reference; NaN for none."""
    if not references:
        return math.nan
    return Counter(normalise(reference) for reference in references).most_common(1)[0][1] / len(references)
