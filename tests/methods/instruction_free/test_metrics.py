"""Leaks, retention and descriptions on predictions worked out by hand."""

import pytest

from medray.config import EvaluateConfig
from medray.data.attribute_descriptions import WBCATT, choice_questions
from medray.methods.instruction_free.metrics import (
    attribute_overlap,
    balanced_accuracy,
    description_overlap,
    leakage,
    retention,
    stated_options,
)
from tests.data.test_attribute_descriptions import CELL
from tests.evaluation.test_score import row, write

CONFIG = EvaluateConfig(bootstrap=200)


def test_only_questions_that_ask_for_the_statement_have_stated_options():
    asked = next(row for row in choice_questions(CELL, WBCATT, "x") if row["attribute"] == "granule_colour")
    assert stated_options(asked) == [
        "The correct answer is A.",
        "The correct answer is B.",
        "The correct answer is C.",
    ]
    assert (
        stated_options(
            {"question": "What is it?\nA. x\nB. y\nAnswer with the letter.", "choices": ["x", "y"]}
        )
        == []
    )
    assert stated_options({"question": "Say: The correct answer is yes.", "choices": None}) == []


def test_leakage(tmp_path):
    rows = [
        row(0, "i0", "mcq", "A", "big cell size, round cell shape, Neutrophil", choices=["x", "y"]),
        row(1, "i0", "mcq", "A", "The correct answer is A.", choices=["x", "y"]),
        row(2, "i1", "mcq", "A", "Granularity, pink granule colour", choices=["x", "y"]),
        row(3, "i1", "mcq", "A", "big cell size", choices=["x", "y"]),
        row(4, "i1", "mcq", "A", None, error="no image"),
    ]
    found = leakage([write(tmp_path / "p", rows)], WBCATT, CONFIG)
    assert found == {"value": 0.5, "low": 0.5, "high": 0.5}  # half of the answers on each image
    both = leakage(
        [
            str(tmp_path / "p"),
            write(tmp_path / "q", [row(9, "i2", "open", "a", "cell"), row(10, "i2", "open", "a", "b")]),
        ],
        WBCATT,
        CONFIG,
    )
    assert both["value"] == pytest.approx(2 / 6)


def test_a_preferred_letter_gains_nothing_in_balanced_accuracy(tmp_path):
    """Shape is A for three images of four, size B for all; a letter that is true of none adds nothing to
    the mean.
    """

    def rows(shape, size):
        true = ["A", "A", "A", "B"]
        answers = [
            row(number, f"i{number}", "mcq", letter, answer, "shape", ["x", "y", "z"])
            for number, (letter, answer) in enumerate(zip(true, shape, strict=True))
        ]
        return [
            *answers,
            *(
                row(
                    10 + number,
                    f"i{number}",
                    "mcq",
                    "B",
                    answer,
                    "size",
                    ["x", "y"],
                    error=None if answer else "no image",
                )
                for number, answer in enumerate(size)
            ),
        ]

    def value(name, shape, size):
        return balanced_accuracy(write(tmp_path / name, rows(shape, size)), CONFIG)["value"]

    assert value("same", "AAAA", "BBBB") == value("other", "BBBB", "BBBB") == pytest.approx((1 / 2 + 1) / 2)
    assert value("knows", "AAAB", "BBBB") == 1
    assert value("half", "ACAB", "BAB" + "A") == pytest.approx(((2 / 3 + 1) / 2 + 2 / 4) / 2)
    assert value("unanswered", "AAAB", ["B", "A", None, "B"]) == pytest.approx((1 + 2 / 3) / 2)


def test_retention_counts_what_was_right_before(tmp_path):
    def rows(*answers):
        references = ("big", "yes", "B", "red", "no")
        kinds = ("open", "closed", "mcq", "open", "closed")
        return [
            row(n, f"i{n % 2}", kinds[n], references[n], answer, choices=["x", "y"] if n == 2 else None)
            for n, answer in enumerate(answers)
        ]

    before = write(
        tmp_path / "before", [*rows("Big", "yes", "B", "blue", "yes"), row(9, "i0", "open", "a", "a")]
    )
    after = write(tmp_path / "after", rows("big", "cell, round", "The correct answer is B.", "red", None))
    found = retention(before, after, CONFIG)
    # Questions 0 to 3 were answered twice. Right before: 0, 1, 2, of which 0 and 2 still are; 3 has become
    # right.
    assert (found["questions"], found["could"]) == (4, 3)
    assert [found[name]["value"] for name in ("before", "after", "retained", "gained")] == pytest.approx(
        [3 / 4, 3 / 4, 2 / 3, 1]
    )
    nothing = retention(
        before, write(tmp_path / "none", [row(0, "i0", "open", "big", None, error="x")]), CONFIG
    )
    assert nothing == {
        "questions": 0,
        "could": 0,
        "before": None,
        "after": None,
        "retained": None,
        "gained": None,
    }


@pytest.mark.parametrize(
    ("answer", "reference", "precision", "recall"),
    [
        ("round cell shape, Big cell size.", "big cell size, round cell shape", 1, 1),  # in any order
        # said once
        (
            "big cell size, big cell size, irregular cell shape",
            "big cell size, round cell shape, granularity",
            1 / 2,
            1 / 3,
        ),
        ("The cell is big and round.", "big cell size, round cell shape", 0, 0),
        ("", "big cell size", 0, 0),
        ("mass, malignant", "mass, malignant, oval mass shape, spiculated mass margins", 1, 1 / 2),
    ],
)
def test_attribute_overlap(answer, reference, precision, recall):
    f1 = 2 * precision * recall / (precision + recall) if precision else 0
    assert attribute_overlap(answer, reference) == pytest.approx(
        {"precision": precision, "recall": recall, "f1": f1}
    )


def test_description_overlap_is_a_mean_over_images(tmp_path):
    rows = [
        row(0, "i0", "open", "a b, c", "c, a b"),
        row(1, "i1", "open", "a b, c", "c, d"),
        row(2, "i2", "open", "a b, c", None, error="no image"),
    ]
    found = description_overlap(write(tmp_path / "p", rows), CONFIG)
    assert [found[name]["value"] for name in ("precision", "recall", "f1")] == [0.75, 0.75, 0.75]
    assert found["f1"]["low"] == 0.5
    assert found["f1"]["high"] == 1.0
