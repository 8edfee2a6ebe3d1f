"""Every case is computed by hand from the definitions."""

import math

import pytest

from medray.evaluation import metrics


def test_normalisation():
    assert metrics.normalise("The nodule isn't 3.5 mm, there's TWO!  A left-sided one.") == "nodule is not 3.5 mm there is 2 left sided 1"
    assert metrics.normalise("an a the") == ""


def test_legacy_recall_counts_words_by_how_often_the_prediction_says_them():
    once = metrics.open_legacy("lung heart", "lung mass")
    assert once == {"recall": 0.5, "precision": 0.5, "f1": 0.5}
    often = metrics.open_legacy("lung lung lung lung heart", "lung mass")
    assert often["recall"] == pytest.approx(0.8) and often["precision"] == pytest.approx(0.8)
    assert metrics.open_legacy("heart", "lung mass") == {"recall": 0.0, "precision": 0.0, "f1": 0.0}
    assert metrics.open_legacy("", "lung")["recall"] == 0.0


def test_strict_overlap_counts_a_word_no_more_often_than_both_say_it():
    often = metrics.open_strict("lung lung lung lung heart", "lung mass")
    assert often["recall"] == pytest.approx(1 / 2) and often["precision"] == pytest.approx(1 / 5) and often["f1"] == pytest.approx(2 / 7)
    assert metrics.open_strict("lung lung", "lung lung mass")["recall"] == pytest.approx(2 / 3)
    assert metrics.open_legacy("lung", "lung lung mass")["recall"] == pytest.approx(1 / 2)  # tp 1, fn 1 ("mass")
    assert metrics.set_recall("lung", "lung lung mass") == pytest.approx(1 / 2)


def test_exact_match_is_after_normalisation():
    assert metrics.exact_match("The left Lung.", "left lung") == 1.0
    assert metrics.exact_match("left lung mass", "left lung") == 0.0


def test_bleu_and_rouge():
    # 3 of 4 words right, brevity 1: BLEU-1 0.75; bigrams 2 of 3: BLEU-2 sqrt(0.75 * 2/3)
    scores = metrics.bleu("big round blue cell", "big round blue spot")
    assert scores[0] == pytest.approx(0.75) and scores[1] == pytest.approx(math.sqrt(0.75 * 2 / 3))
    assert metrics.bleu("red", "red") == [1.0] * 4
    assert metrics.bleu("", "red") == [0.0] * 4
    # half as long: BLEU-1 = exp(1 - 4/2)
    assert metrics.bleu("big round", "big round blue cell")[0] == pytest.approx(math.exp(-1))
    # longest common subsequence "big cell": P 2/2, R 2/3
    assert metrics.rouge_l("big cell", "big round cell") == pytest.approx(0.8)


def test_closed_legacy_reads_substrings():
    assert metrics.closed_legacy("I do not know", "no") == 1.0  # "no" in "not" and "know"
    assert metrics.closed_legacy("It is abnormal", "no") == 1.0
    assert metrics.closed_legacy("left", "left") == 0.0  # no yes or no anywhere
    assert metrics.closed_legacy("left, I know", "left") == 1.0
    assert metrics.closed_legacy("Yes.", "no") == 0.0


@pytest.mark.parametrize(("answer", "reference", "choices", "result"), [
    ("I do not know", "no", None, (0.0, False)),
    ("It is abnormal", "no", None, (0.0, False)),
    ("No, it is not.", "no", None, (1.0, True)),
    ("Yes.", "no", ["yes", "no"], (0.0, True)),
    ("Yes and no", "no", None, (0.0, False)),
    ("the left side", "left", ["left", "right"], (1.0, True)),
    ("leftmost", "left", ["left", "right"], (0.0, False)),
    ("not normal", "normal", ["normal", "not normal"], (0.0, True)),
    ("", "yes", None, (0.0, False)),
])
def test_closed_strict(answer, reference, choices, result):
    assert metrics.closed_strict(answer, reference, choices) == result


@pytest.mark.parametrize(("answer", "letter"), [
    ("B", "B"), ("(b)", "B"), ("B.", "B"), ("The correct answer is B.", "B"), ("I say A. The correct answer is (C)", "C"),
    ("The correct answer is A. Sorry, the correct answer is D", "D"), ("B because", None), ("B. round", None), ("E", None), ("", None),
    ("The correct answer is round", None), ("A B", None),
])
def test_letter_parse(answer, letter):
    assert metrics.mcq_letter(answer, 4) == letter


def test_mcq_and_majority():
    assert metrics.mcq("c", "C", 4) == (1.0, True)
    assert metrics.mcq("D", "C", 3) == (0.0, False)
    assert metrics.majority_floor(["Big", "big", "small"]) == pytest.approx(2 / 3)
