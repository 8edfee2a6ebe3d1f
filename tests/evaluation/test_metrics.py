"""Every case is computed by hand from the definitions."""

import math
import random
import re

import pytest

from medray.evaluation import metrics


def test_normalisation():
    assert (
        metrics.normalise("The nodule isn't 3.5 mm, there's TWO!  A left-sided one.")
        == "nodule is not 3.5 mm there is 2 left sided 1"
    )
    assert metrics.normalise("an a the") == ""
    assert metrics.normalise("None of the ten; 1,000 (cells)") == "0 of 10 1,000 cells"


def test_chinese_is_split_into_characters():
    assert metrics.normalise("左肺，CT。") == "左 肺 ct"
    assert metrics.open_strict("右肺", "左肺")["recall"] == pytest.approx(1 / 2)
    assert metrics.word_count("左肺 CT") == 3 and metrics.word_count("left lung.") == 2


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Left-sided one", "left sided 1"),  # a hyphen between words is a space ...
        ("left-sided - no", "leftsided no"),  # ... but nothing, everywhere, once one touches a space
        ("1,000 cells/field", "1000 cellsfield"),  # a comma in a number: no mark leaves a space
        ("a 3.5 mm. Yes.", "3.5 mm yes"),
        ("dont; don't", "don't don't"),  # contractions gain an apostrophe and stay
        ("stage: ii*", "stage: ii*"),  # marks that the list lacks
        ("none of two", "0 of 2"),
        ("x." * 40, "x" * 32 + "x." * 8),  # re.UNICODE is 32: so many full stops go
    ],
)
def test_legacy_normalisation_keeps_the_quirks(text, normal):
    assert metrics.normalise_legacy(text) == normal


def test_legacy_recall_counts_words_by_how_often_the_prediction_says_them():
    once = metrics.open_legacy("lung heart", "lung mass")
    assert once == {"recall": 0.5, "precision": 0.5, "f1": 0.5}
    often = metrics.open_legacy("lung lung lung lung heart", "lung mass")
    assert often["recall"] == pytest.approx(0.8) and often["precision"] == pytest.approx(0.8)
    assert metrics.open_legacy("heart", "lung mass") == {"recall": 0.0, "precision": 0.0, "f1": 0.0}
    assert metrics.open_legacy("", "lung")["recall"] == 0.0


def test_legacy_exact_match_is_the_share_of_predicted_words_that_hit():
    # one reference word, three predicted
    assert metrics.exact_legacy("lung lung heart", "lung mass") == pytest.approx(1 / 3)
    assert metrics.exact_legacy("", "lung") == 0.0


def test_strict_overlap_counts_a_word_no_more_often_than_both_say_it():
    often = metrics.open_strict("lung lung lung lung heart", "lung mass")
    assert (
        often["recall"] == pytest.approx(1 / 2)
        and often["precision"] == pytest.approx(1 / 5)
        and often["f1"] == pytest.approx(2 / 7)
    )
    assert metrics.open_strict("lung lung", "lung lung mass")["recall"] == pytest.approx(2 / 3)
    # tp 1, fn 1 ("mass")
    assert metrics.open_legacy("lung", "lung lung mass")["recall"] == pytest.approx(1 / 2)
    assert metrics.set_recall("lung", "lung lung mass") == pytest.approx(1 / 2)


def described(prediction: str, reference: str) -> dict[str, float]:
    """Word by word as the evaluation's description says it, for texts that need no normalisation."""
    said, wanted = prediction.split(), reference.split()
    tp = sum(said.count(word) for word in set(said) & set(wanted))
    fp = sum(said.count(word) for word in set(said) - set(wanted))
    fn = sum(wanted.count(word) for word in set(wanted) - set(said))
    shared = sum(min(said.count(word), wanted.count(word)) for word in set(said) & set(wanted))
    return {
        "legacy_recall": tp / (tp + fn) if tp else 0.0,
        "legacy_precision": tp / (tp + fp) if tp else 0.0,
        "legacy_f1": 2 * tp / (2 * tp + fp + fn) if tp else 0.0,
        "strict_recall": shared / len(wanted) if wanted else 0.0,
        "strict_precision": shared / len(said) if said else 0.0,
        "set": len(set(said) & set(wanted)) / len(set(wanted)) if wanted else 0.0,
        "closed": float(("yes" in prediction or "no" in prediction) and reference in prediction),
    }


def test_against_the_description_on_random_texts():
    rng = random.Random(0)
    words = ("lung", "mass", "no", "yes", "know", "node", "left", "heart", "abnormal", "3")
    for _ in range(500):
        prediction, reference = (" ".join(rng.choices(words, k=rng.randrange(most))) for most in (8, 5))
        legacy, strict = (
            metrics.open_legacy(prediction, reference),
            metrics.open_strict(prediction, reference),
        )
        found = {
            **{f"legacy_{name}": value for name, value in legacy.items()},
            "strict_recall": strict["recall"],
            "strict_precision": strict["precision"],
            "set": metrics.set_recall(prediction, reference),
            "closed": metrics.closed_legacy(prediction, reference),
        }
        assert found == pytest.approx(described(prediction, reference)), (prediction, reference)


def test_exact_match_is_after_normalisation():
    assert metrics.exact_match("The left Lung.", "left lung") == 1.0
    assert metrics.exact_match("left lung mass", "left lung") == 0.0


def test_bleu_and_rouge():
    # 3 of 4 words right, brevity 1: BLEU-1 0.75; bigrams 2 of 3: BLEU-2 sqrt(0.75 * 2/3); trigrams 1 of 2
    scores = metrics.bleu("big round blue cell", "big round blue spot")
    assert scores[0] == pytest.approx(0.75) and scores[1] == pytest.approx(math.sqrt(0.75 * 2 / 3))
    assert scores[2] == pytest.approx((0.75 * 2 / 3 * 1 / 2) ** (1 / 3))
    # no 4-gram of one: smoothed to 1/2
    assert scores[3] == pytest.approx((0.75 * 2 / 3 * 1 / 2 * 1 / 2) ** (1 / 4))
    assert metrics.bleu("red", "red") == [1.0] * 4
    assert metrics.bleu("", "red") == [0.0] * 4
    # half as long: BLEU-1 = exp(1 - 4/2)
    assert metrics.bleu("big round", "big round blue cell")[0] == pytest.approx(math.exp(-1))
    # longest common subsequence "big cell": P 2/2, R 2/3
    assert metrics.rouge_l("big cell", "big round cell") == pytest.approx(0.8)


def test_bleu_and_rouge_are_the_packages_own():
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU

    rng = random.Random(1)
    bleu, rouge = BLEU(effective_order=True, tokenize="none"), RougeScorer(["rougeL"])
    for _ in range(500):
        answer, reference = (
            " ".join(rng.choices(("lung", "mass", "node", "left", "heart"), k=rng.randrange(1, most)))
            for most in (9, 6)
        )
        assert metrics.bleu(answer, reference)[3] == min(
            1.0, bleu.sentence_score(answer, [reference]).score / 100
        )
        assert metrics.rouge_l(answer, reference) == rouge.score(reference, answer)["rougeL"].fmeasure


def test_closed_legacy_reads_substrings():
    assert metrics.closed_legacy("I do not know", "no") == 1.0  # "no" in "not" and "know"
    assert metrics.closed_legacy("It is abnormal", "no") == 1.0
    assert metrics.closed_legacy("left", "left") == 0.0  # no yes or no anywhere
    assert metrics.closed_legacy("left, I know", "left") == 1.0
    assert metrics.closed_legacy("Yes.", "no") == 0.0
    assert metrics.closed_legacy("None.", "no") == 0.0  # "none" has become "0"


def test_published_mean_of_closed_questions_leaves_wrong_yes_and_no_out():
    assert math.isnan(metrics.closed_published("Yes.", "no"))
    assert metrics.closed_published("No.", "no") == 1.0
    assert metrics.closed_published("left", "left") == 0.0  # neither yes nor no: counted, as a miss


@pytest.mark.parametrize(
    ("answer", "reference", "choices", "result"),
    [
        ("I do not know", "no", None, (0.0, False)),
        ("It is abnormal", "no", None, (0.0, False)),
        ("No, it is not.", "no", None, (1.0, True)),
        ("Yes.", "no", ["yes", "no"], (0.0, True)),
        ("Yes and no", "no", None, (0.0, False)),
        ("the left side", "left", ["left", "right"], (1.0, True)),
        ("leftmost", "left", ["left", "right"], (0.0, False)),
        ("not normal", "normal", ["normal", "not normal"], (0.0, True)),
        ("", "yes", None, (0.0, False)),
        ("不是。", "是", None, (0.0, True)),
        ("不是", "否", None, (1.0, True)),
        ("是的", "是", None, (1.0, True)),
        ("左肺", "左肺", ["左肺", "右肺"], (1.0, True)),
    ],
)
def test_closed_strict(answer, reference, choices, result):
    assert metrics.closed_strict(answer, reference, choices) == result


@pytest.mark.parametrize(
    "answer",
    [
        "Yes—there is a fracture.",
        "Yes – a fracture is seen.",
        "Yes–a fracture.",
        "Yes‑a fracture",
        "Yes… a fracture",
        "«Yes»",
        "„Yes“",
        "❝Yes❞",
        "'Yes'",
        "‘Yes’",
        "Yes • fracture",
        "• Yes",
        "\u200bYes",
        "Y\u00ades",
        "Y\u200des",
        "\ufeffYes",
        "Yes\ufe0f.",
        "ＹＥＳ！",
        "Yes。",
        "¡Yes!",
        "Yes؟",
        "**Yes**",
        "`Yes`",
        "✅ Yes",
        "1️⃣ Yes",
        "Yes\u00a0a fracture",
        "Yes\u2028there",
        "Yes／fracture",
        "→ Yes",
        "𝐘𝐞𝐬",
        "yes_",
        "Yes\x00",
    ],
)
def test_closed_strict_does_not_depend_on_how_an_answer_is_typed(answer):
    assert metrics.closed_strict(answer, "yes") == (1.0, True)
    assert metrics.closed_strict(answer, "ＮＯ．") == (0.0, True)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("left–sided", "left-sided"),
        ("left‑sided", "left sided"),
        ("10 μm", "10 µm"),
        ("５ mm", "5 mm"),
        ("１，０００", "1,000"),
        ("3·5 cm", "3.5 cm"),
        ("٣", "3"),
        ("isn’t", "is not"),
        ("don´t", "do not"),
        ("naïve", "nai\u0308ve"),
        ("ﬁbrosis", "fibrosis"),
        ("type Ⅱ", "Type II"),
        ("10⁵", "10^5"),
        ("1½", "1 1/2"),
        ("37\u202f°C", "37 °C"),
        ("STRASSE", "straße"),
        ("a", "A"),
    ],
)
def test_exact_match_does_not_depend_on_how_a_text_is_typed(first, second):
    assert metrics.exact_match(first, second) == metrics.exact_match(second, first) == 1.0
    assert metrics.open_strict(first, second)["f1"] == (0.0 if first == "a" else 1.0)


@pytest.mark.parametrize(
    ("first", "second"),
    [("10⁵", "105"), ("1½", "11/2"), ("3.5", "35"), ("", "a"), ("", "-"), ("a", "an"), ("lung", "lunge")],
)
def test_texts_that_differ_stay_apart(first, second):
    assert metrics.exact_match(first, second) == 0.0


def test_normalisation_of_ascii_is_as_it_was():
    # The punctuation of the VQA v2 code, written down again: a blank each, but decimal points and
    # apostrophes.
    punctuation = re.compile(r"(?<!\d)[.,]|[.,](?!\d)|[;/\[\]\"{}()=+\\_<>@?!:|*#&%$^~-]")
    letters = [chr(code) for code in range(32, 127) if chr(code) not in "`"] + list("aeiou    ..,,1234''")
    rng = random.Random(3)
    for _ in range(2000):
        text = "".join(rng.choices(letters, k=rng.randrange(20)))
        bare = punctuation.sub(" ", text.lower()).replace("'", "").split()
        expected = [metrics._EXPANDED.get(word, word) for word in bare if word not in ("a", "an", "the")]
        assert metrics.normalise(text) == " ".join(expected), repr(text)


def test_a_chinese_yes_is_known_by_itself_and_not_by_its_punctuation():
    assert metrics.closed_strict("是！", "是。") == (1.0, True) and metrics.closed_strict("不是", "是。") == (
        0.0,
        True,
    )
    assert (
        metrics.chance("closed", "是。") == 1 / 2
        and metrics.is_yes_or_no("否．")
        and not metrics.is_yes_or_no("左")
    )


@pytest.mark.parametrize(
    "answer",
    [
        "Ａ",
        "ａ",
        "a)",
        "(a).",
        '"A)"',
        "A。",
        "【A】",
        "（Ａ）",
        "《A》",
        "A，",
        "A：",
        "Ⓐ",
        "⒜",
        "A\u200b",
        "\u00a0A",
        "**A**",
        "Answer: A",
        "**Answer:** (A)",
        "Final answer — A",
        "Option A",
        "\\boxed{A}",
        "$\\boxed{\\text{A}}$",
        "<answer>A</answer>",
        "答案：A",
        "The correct answer is：Ａ。",
        "The correct\u00a0answer is **A**",
        "B? No. The correct answer is “A”…",
    ],
)
def test_a_letter_is_read_however_it_is_typed(answer):
    assert metrics.mcq_letter(answer, 4) == "A" and metrics.mcq(answer, "(ａ)", 4) == (1.0, True)


@pytest.mark.parametrize(
    "answer",
    [
        "A+",
        "≠ A",
        "not A",
        "A or B",
        "A/B",
        "A because",
        "A. lung",
        "Ä",
        "А",
        "1",
        "AA",
        "Ｅ",
        "The best lung is A",
        "<A>",
    ],
)
def test_what_is_more_or_less_than_a_letter_is_none(answer):
    assert metrics.mcq_letter(answer, 4) is None


@pytest.mark.parametrize(
    ("reference", "letter"),
    [
        ("B", "B"),
        ("（ｂ）", "B"),
        ("Lung.", "B"),
        ("B. lung", "B"),
        ("B) Lung", "B"),
        ("A. lung", None),
        ("heart", None),
        ("D", None),
        ("", None),
        ("same", None),
    ],
)
def test_a_reference_names_one_option(reference, letter):
    assert (
        metrics.option_letter(reference, ["liver", "lung", ""] if reference != "same" else ["same", "same"])
        == letter
    )


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(b)", "B"),
        ("B.", "B"),
        ("The correct answer is B.", "B"),
        ("I say A. The correct answer is (C)", "C"),
        ("The correct answer is A. Sorry, the correct answer is D", "D"),
        ("B because", None),
        ("B. round", None),
        ("E", None),
        ("", None),
        ("The correct answer is round", None),
        ("A B", None),
    ],
)
def test_letter_parse(answer, letter):
    assert metrics.mcq_letter(answer, 4) == letter


def test_mcq_and_majority():
    assert metrics.mcq("c", "C", 4) == (1.0, True)
    assert metrics.mcq("D", "C", 3) == (0.0, False)
    assert metrics.majority_floor(["Big", "big", "small"]) == pytest.approx(2 / 3)


def test_likeliest_option_with_and_without_length():
    logps, lengths = [-4.0, -3.0, -6.0], [2, 1, 4]  # per token -2, -3, -1.5
    assert [metrics.likeliest(logps, right) for right in range(3)] == [0.0, 1.0, 0.0]
    assert [metrics.likeliest(logps, right, lengths) for right in range(3)] == [0.0, 0.0, 1.0]
    assert metrics.likeliest([-1.0, -1.0, -2.0], 0) == 0.5
    assert metrics.likeliest([-math.inf, -2.0], 1) == 1.0
    for wrong in (
        (logps, 3, None),
        (logps, -1, None),
        (logps, 0, [1, 2]),
        (logps, 0, [1, 0, 1]),
        ([math.nan, 0.0], 0, None),
    ):
        with pytest.raises(ValueError, match=r"log-likelihood|lengths"):
            metrics.likeliest(*wrong)


def test_chance():
    assert metrics.chance("mcq", "B", ["x", "y", "z"]) == pytest.approx(1 / 3)
    assert (
        metrics.chance("mcq", "B") == 1 / 4
        and metrics.chance("closed", "Yes.") == 1 / 2
        and metrics.chance("open", "lung") == 0.0
    )
    assert (
        math.isnan(metrics.chance("closed", "left"))
        and metrics.chance("closed", "left", ["left", "right"]) == 1 / 2
    )
