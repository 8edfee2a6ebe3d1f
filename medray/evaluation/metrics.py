"""Metrics of visual question answering (pure). Two variants of each stand side by side:

- legacy: bug-compatible with LLaVA-Med's public evaluation (llava/eval/run_eval.py and eval_metrics/), so
  that numbers compare with papers; it has a normalisation of its own, `normalise_legacy`;
- strict: what the name of the metric says.

All functions take texts and return numbers per question; means and intervals are made in
`medray.evaluation.scores`.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from medray.evaluation.plain_text import plain

_ARTICLES = {"a", "an", "the"}
_NUMBERS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
# The contractions of the VQA v2 evaluation code that medical text may hold, without their apostrophe.
_CONTRACTIONS = {
    "arent": "are not",
    "cant": "can not",
    "couldnt": "could not",
    "didnt": "did not",
    "doesnt": "does not",
    "dont": "do not",
    "hadnt": "had not",
    "hasnt": "has not",
    "havent": "have not",
    "isnt": "is not",
    "shouldnt": "should not",
    "thats": "that is",
    "theres": "there is",
    "theyre": "they are",
    "wasnt": "was not",
    "werent": "were not",
    "whats": "what is",
    "wont": "will not",
    "wouldnt": "would not",
    "youre": "you are",
    "its": "its",
}
_EXPANDED = _NUMBERS | _CONTRACTIONS
_HAN = re.compile(r"[㐀-䶿一-鿿豈-﫿\U00020000-\U000323af]")


@lru_cache(maxsize=1024)  # every metric of a question asks for the same two texts
def normalise(text: str) -> str:
    """VQA-v2 style: lower case, no punctuation, number words to digits, contractions expanded, no a/an/the.

    Punctuation and letters of every script and width are folded first (plain_text.plain). Chinese has no
    spaces: every character becomes a word of its own.
    """
    return " ".join(
        _EXPANDED.get(word, word) for word in _apart(plain(text)).split() if word not in _ARTICLES
    )


def word_count(text: str) -> int:
    """Words between spaces, as they stand; of Chinese, characters."""
    return len(_apart(text).split())


def _apart(text: str) -> str:
    return text if text.isascii() else _HAN.sub(r" \g<0> ", text)


# The full forms of the VQA v2 code's table. Its keys are these with one apostrophe left out (those it writes
# in capitals, such as I'm, are left out: they never match a lower-cased text).
_LEGACY_FORMS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't "
    "he'd he'd've he's how'd "
    "how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't "
    "not've o'clock oughtn't "
    "'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's "
    "someone'd someone'd've "
    "someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's "
    "they'd they'd've "
    "they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's "
    "where'd where's where've "
    "who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all "
    "y'all'll y'all'd've you'd "
    "you'd've you'll you're you've"
)


def _without_one_apostrophe(form: str) -> list[str]:
    return [form[:place] + form[place + 1 :] for place, letter in enumerate(form) if letter == "'"]


_LEGACY_CONTRACTIONS = {
    key: form for form in _LEGACY_FORMS.split() for key in _without_one_apostrophe(form)
} | {"somebody'd": "somebodyd"}
_LEGACY_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
# the public code passes re.UNICODE, which is 32, where re.sub expects the number of replacements
_PERIODS_STRIPPED = 32


@lru_cache(maxsize=1024)
def normalise_legacy(text: str) -> str:
    """LLaVA-Med's normalize_word on the lower-cased text, quirks included.

    A punctuation mark becomes a space, but nothing at all where it touches a space anywhere in the text
    ("left-sided - a" gives "leftsided") or where a number holds a comma; the first 32 full stops go, unless a
    digit follows; other marks (: * # % ') stay; contractions gain an apostrophe ("dont" gives "don't") and
    are not expanded.
    """
    text = text.lower()
    glued = _COMMA_IN_NUMBER.search(text) is not None
    bare = text
    for mark in _LEGACY_PUNCTUATION:
        if mark in text:
            bare = bare.replace(mark, "" if glued or f"{mark} " in text or f" {mark}" in text else " ")
    words = (_NUMBERS.get(word, word) for word in _PERIOD.sub("", bare, count=_PERIODS_STRIPPED).split())
    return " ".join(_LEGACY_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


@lru_cache(maxsize=1024)
def _words(text: str) -> Counter[str]:
    return Counter(normalise(text).split())


@lru_cache(maxsize=1024)
def _legacy_words(text: str) -> Counter[str]:
    # The public code normalises in its loop over questions and once more inside each metric.
    return Counter(normalise_legacy(normalise_legacy(text)).split())


def _shared(first: Counter, second: Counter) -> int:
    """Size of the multisets' overlap."""
    return sum(min(count, second[item]) for item, count in first.items() if item in second)


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def open_legacy(answer: str, reference: str) -> dict[str, float]:
    """recall, precision and f1 as LLaVA-Med computes them.

    tp counts shared words by how often the *prediction* says them, so repeating a right word inflates recall:
    reference "lung mass", prediction "lung lung lung lung heart" gives tp 4, fn 1, recall 0.80.
    """
    predicted, wanted = _legacy_words(answer), _legacy_words(reference)
    tp = sum(count for word, count in predicted.items() if word in wanted)
    fp = sum(count for word, count in predicted.items() if word not in wanted)
    fn = sum(count for word, count in wanted.items() if word not in predicted)
    if tp == 0:
        return {"recall": 0.0, "precision": 0.0, "f1": 0.0}
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    return {"recall": recall, "precision": precision, "f1": _f1(precision, recall)}


def exact_legacy(answer: str, reference: str) -> float:
    """What LLaVA-Med's tables call "exact match": distinct reference words that the prediction says, over
    its length in words.
    """
    predicted, wanted = _legacy_words(answer), _legacy_words(reference)
    return sum(word in predicted for word in wanted) / predicted.total() if predicted else 0.0


def open_strict(answer: str, reference: str) -> dict[str, float]:
    """recall, precision and f1 of the multiset overlap (each word counts as often as both sides have it)."""
    predicted, wanted = _words(answer), _words(reference)
    shared = _shared(predicted, wanted)
    if shared == 0:
        return {"recall": 0.0, "precision": 0.0, "f1": 0.0}
    precision, recall = shared / predicted.total(), shared / wanted.total()
    return {"recall": recall, "precision": precision, "f1": _f1(precision, recall)}


def set_recall(answer: str, reference: str) -> float:
    """MedEvalKit's recall: share of the reference's distinct words that occur in the prediction.

    MedEvalKit only lower-cases and splits; here both sides are normalised, so that "lung." is "lung" as in
    the other columns.
    """
    wanted, predicted = _words(reference), _words(answer)
    return sum(word in predicted for word in wanted) / len(wanted) if wanted else 0.0


def exact_match(answer: str, reference: str) -> float:
    """1.0 if both are equal after normalisation. Texts of which it leaves nothing ("a", "-") are compared
    as they stand.
    """
    said, wanted = normalise(answer), normalise(reference)
    return float(said == wanted if said or wanted else answer.strip().lower() == reference.strip().lower())


def bleu(answer: str, reference: str) -> list[float]:
    """Sentence BLEU-1..4 in 0..1 over normalised words (sacrebleu, exponential smoothing as its default).

    A reference shorter than n words has no n-grams; BLEU-n then uses the orders it has (effective order).
    """
    candidate, wanted = normalise(answer).split(), normalise(reference).split()
    shared = [_shared(_words(answer), _words(reference)), 0, 0, 0]
    for order in (2, 3, 4):
        if shared[order - 2]:  # else no longer n-gram is shared
            shared[order - 1] = _shared(_ngrams(candidate, order), _ngrams(wanted, order))
    return list(_bleu(tuple(shared), len(candidate), len(wanted)))


def _ngrams(words: list[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[start:] for start in range(order)), strict=False))


@lru_cache(maxsize=16_384)  # few answers are long
def _bleu(shared: tuple[int, ...], candidate: int, wanted: int) -> tuple[float, ...]:
    """BLEU-1..4 from the numbers of n-grams shared and the lengths in words."""
    from sacrebleu.metrics import BLEU

    totals = [max(0, candidate - order) for order in range(4)]
    scores = (
        BLEU.compute_bleu(
            list(shared[:order]),
            totals[:order],
            candidate,
            wanted,
            smooth_method="exp",
            effective_order=True,
            max_ngram_order=order,
        ).score
        for order in range(1, 5)
    )
    return tuple(min(1.0, score / 100) for score in scores)


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L F1 in 0..1 over normalised words (rouge_score, no stemming)."""
    wanted, said = normalise(reference), normalise(answer)
    return (
        0.0
        if set(wanted.split()).isdisjoint(said.split())
        else _rouge().score(wanted, said)["rougeL"].fmeasure
    )


@lru_cache(maxsize=1)
def _rouge():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False, tokenizer=_Spaces())


class _Spaces:
    """rouge_score's own tokenizer would drop what normalise kept."""

    @staticmethod
    def tokenize(text: str) -> list[str]:
        return text.split()


def _says_yes_or_no(text: str) -> bool:
    return "yes" in text or "no" in text


def closed_legacy(answer: str, reference: str) -> float:
    """LLaVA-Med's rule: a hit iff "yes" or "no" occurs in the answer and the reference does, both as
    *substrings*.

    So "know" and "abnormal" say "no", and a choice such as "left" can only hit beside a yes or no.
    """
    text = normalise_legacy(answer)
    return float(_says_yes_or_no(text) and normalise_legacy(reference) in text)


def closed_published(answer: str, reference: str) -> float:
    """`closed_legacy` as LLaVA-Med's script averages it: NaN where an answer with a yes or no does not hold
    the reference.

    The script appends nothing for such a question, so it is missing from the numerator and from the
    *denominator*: the wrong answers of yes/no questions do not count at all.
    """
    hit = closed_legacy(answer, reference)
    return math.nan if hit == 0.0 and _says_yes_or_no(normalise_legacy(answer)) else hit


# Chinese yes and no by their ways of writing. 不是 holds 是: the longer one is looked for first.
_CHINESE = {"是": "是", "是的": "是", "否": "否", "不是": "否", "不": "否"}


def is_yes_or_no(reference: str) -> bool:
    """Whether a reference is a yes or a no, English or Chinese, however it is written ("Ｙｅｓ.", "是。")."""
    return normalise(reference) in ("yes", "no") or _squeezed(reference) in _CHINESE


def _squeezed(text: str) -> str:
    return normalise(text).replace(" ", "")


def closed_strict(answer: str, reference: str, choices: Sequence[str] | None = None) -> tuple[float, bool]:
    """(hit, parsed): the answer names exactly one of the choices, as whole words, and it is the reference.

    Args:
        choices: the possible answers; default yes and no (in the reference's language), or only the reference
            where that is neither.

    An answer that names none or several is unparsable: wrong, and to be counted separately. Where one choice
    is part of another ("normal" in "not normal"), the longer one counts.
    """
    options = _options(reference, choices)
    text = f" {normalise(answer)} "
    named = set()
    for option in sorted(options, key=len, reverse=True):
        if option and f" {option} " in text:
            named.add(options[option])
            text = text.replace(f" {option} ", " | ")
    if len(named) != 1:
        return 0.0, False
    return float(named == {options[normalise(reference)]}), True


def _options(reference: str, choices: Sequence[str] | None) -> dict[str, str]:
    """What may be named -> what it means."""
    wanted = normalise(reference)
    if choices:
        return {normalise(choice): normalise(choice) for choice in (*choices, reference)}
    if _squeezed(reference) in _CHINESE:
        return {normalise(word): meaning for word, meaning in _CHINESE.items()}
    return {"yes": "yes", "no": "no"} if wanted in ("yes", "no") else {wanted: wanted}


_LEAD = "the correct answer is"
# What may stand before the letter: "Final answer: B", "\\boxed{\\text{B}}". One of _NAMING must be among the
# words.
_NAMING = {
    "answer",
    "option",
    "choice",
    "boxed",
    "text",
    "textbf",
    "mathrm",
    "mathbf",
    "答案",
    "答案是",
    "答案为",
    "正确答案",
    "正确答案是",
    "正确答案为",
}
_FILLING = {"the", "my", "final", "correct", "right", "best", "letter", "is"}
_SIGNS = re.compile(r"[+=<>≠¬]")  # they say something of the letter beside them
_ANSWER_TAG = re.compile(r"</?answer>", re.IGNORECASE)


def mcq_letter(answer: str, choices: int = 4) -> str | None:
    """The option letter an answer gives, or None where its format is wrong.

    The text after the last "The correct answer is", else the whole answer, must be one option letter, with
    nothing around it but punctuation (of any script and width), markup or the word answer: "B", "(B)",
    "Ｂ．",
    "**b**", "Answer: B", "\\boxed{B}" and "The correct answer is B." pass; "B because ..." and "B. round" do
    not.
    """
    folded = unicodedata.normalize("NFKC", _ANSWER_TAG.sub(" ", answer))
    if _SIGNS.search(folded):
        return None
    text = plain(folded)
    place = text.rfind(_LEAD)
    if place >= 0:
        text = text[place + len(_LEAD) :].strip()
    *before, letter = text.split() or [""]
    if len(letter) != 1 or not "a" <= letter <= "z":
        return None
    if before and (_NAMING.isdisjoint(before) or not _NAMING.union(_FILLING).issuperset(before)):
        return None
    return letter.upper() if ord(letter) - ord("a") < choices else None


def option_letter(reference: str, choices: Sequence[str]) -> str | None:
    """The letter of the option that a reference names: by its letter, its text, or both ("B. lung"); None
    where it names none or several.
    """
    letter = mcq_letter(reference, len(choices) or 26)
    if letter is not None:
        return letter
    named = _named(plain(reference), [plain(choice) for choice in choices])
    if not named and (both := _LETTER_AND_TEXT.match(unicodedata.normalize("NFKC", reference))) is not None:
        named = (
            [both[1].upper()]
            if both[1].upper() in _named(normalise(both[2]), [normalise(choice) for choice in choices])
            else []
        )
    elif not named:
        named = _named(normalise(reference), [normalise(choice) for choice in choices])
    return named[0] if len(named) == 1 else None


_LETTER_AND_TEXT = re.compile(r"\W*([A-Za-z])\s*[.):,、]\s*(.+)", re.DOTALL)


def _named(text: str, options: Sequence[str]) -> list[str]:
    """The letters of the options with this text."""
    return [chr(ord("A") + place) for place, option in enumerate(options) if text and option == text]


def mcq(answer: str, reference: str, choices: int) -> tuple[float, bool]:
    """(hit, parsed) of the strict letter parse; `reference` is the right letter."""
    letter = mcq_letter(answer, choices)
    return float(letter is not None and letter == mcq_letter(reference, 26)), letter is not None


def likeliest(logps: Sequence[float], right: int, lengths: Sequence[int] | None = None) -> float:
    """Hit of the option with the highest log-likelihood; k options that tie at the top count 1/k.

    Args:
        logps: nats per option, summed over its tokens.
        right: index of the right option.
        lengths: tokens per option; given, nats per token are compared.

    Raises ValueError where there is no such option or lengths do not fit.
    """
    if not 0 <= right < len(logps):
        raise ValueError(f"the right option has number {right}, of {len(logps)} log-likelihoods")
    if any(math.isnan(value) for value in logps):
        raise ValueError("a log-likelihood is NaN")
    values = list(logps)
    if lengths is not None:
        if len(lengths) != len(logps) or min(lengths) < 1:
            raise ValueError(f"option lengths {list(lengths)} do not fit {len(logps)} log-likelihoods")
        values = [value / length for value, length in zip(logps, lengths, strict=True)]
    best = max(values)
    return (values[right] == best) / values.count(best)


def chance(answer_type: str, reference: str, choices: Sequence[str] | None = None) -> float:
    """Expected accuracy of drawing an option: 0 for open questions, NaN for closed ones whose options are
    not known.
    """
    if answer_type == "open":
        return 0.0
    if choices:
        return 1 / len(choices)
    if answer_type == "mcq":
        return 1 / 4
    return 1 / 2 if is_yes_or_no(reference) else math.nan


def majority_floor(references: Sequence[str]) -> float:
    """Accuracy of always giving the most frequent reference; NaN for none."""
    if not references:
        return math.nan
    return Counter(normalise(reference) for reference in references).most_common(1)[0][1] / len(references)
