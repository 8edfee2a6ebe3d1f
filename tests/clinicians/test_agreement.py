"""Kappa against cases worked out by hand and printed in textbooks."""

from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest

from medray.clinicians.agreement import cohen_kappa, fleiss_kappa, summary


def labels(table):
    """Two raters' labels from a square table of counts (rows: the first rater)."""
    pairs = [
        (row, column)
        for row, counts in enumerate(table)
        for column, count in enumerate(counts)
        for _ in range(count)
    ]
    return [first for first, _ in pairs], [second for _, second in pairs]


def test_cohen_by_hand():
    # p_o = (20 + 15) / 50 = 0.7; p_e = 0.5 * 0.6 + 0.5 * 0.4 = 0.5; kappa = 0.2 / 0.5
    assert cohen_kappa(*labels([[20, 5], [10, 15]])) == pytest.approx(0.4)
    # The same p_o = 0.6 by different margins: p_e = 0.6 * 0.7 + 0.4 * 0.3 = 0.54, and 0.6 * 0.3 + 0.4 * 0.7 =
    # 0.46.
    assert cohen_kappa(*labels([[45, 15], [25, 15]])) == pytest.approx((0.60 - 0.54) / (1 - 0.54))
    assert cohen_kappa(*labels([[25, 35], [5, 35]])) == pytest.approx((0.60 - 0.46) / (1 - 0.46))


def test_cohen_at_its_ends():
    assert cohen_kappa("abab", "abab") == 1
    assert cohen_kappa("ab", "ba") == -1
    assert cohen_kappa("aabb", "abab") == 0
    assert cohen_kappa("aaaa", "bbbb") == 0  # each always says the same, and never what the other says
    assert cohen_kappa("aaaa", "aaaa") is None
    assert cohen_kappa([], []) is None
    with pytest.raises(ValueError, match="2 labels of the first"):
        cohen_kappa("ab", "a")


def test_fleiss_by_hand():
    """Fleiss' worked example of ten subjects, fourteen raters and five labels, as reprinted in textbooks:
    0.210.
    """
    table = [
        (0, 0, 0, 0, 14),
        (0, 2, 6, 4, 2),
        (0, 0, 3, 5, 6),
        (0, 3, 9, 2, 0),
        (2, 2, 8, 1, 1),
        (7, 7, 0, 0, 0),
        (3, 2, 6, 3, 0),
        (2, 5, 3, 2, 2),
        (6, 5, 2, 1, 0),
        (0, 2, 2, 3, 7),
    ]
    assert fleiss_kappa(Counter(dict(enumerate(counts))) for counts in table) == pytest.approx(
        0.20993, abs=1e-5
    )


def test_fleiss_with_unequal_numbers_of_raters():
    """Three raters agree on one subject, two of three on another, one subject has two who differ, one a
    single rating that says nothing.

    Mean agreement (1 + 1/3 + 0) / 3 = 4/9; good 3 + 2 + 1 of 8 ratings: chance (6/8)^2 + (2/8)^2 = 5/8.
    """
    subjects = [Counter(good=3), Counter(good=2, bad=1), Counter(good=1, bad=1), Counter(bad=1)]
    assert fleiss_kappa(subjects) == pytest.approx((4 / 9 - 5 / 8) / (1 - 5 / 8))


def test_fleiss_where_it_is_not_defined():
    assert (
        fleiss_kappa([])
        is fleiss_kappa([Counter(good=1)])
        is fleiss_kappa([Counter(good=2), Counter(good=3)])
        is None
    )
    assert fleiss_kappa([Counter(good=2), Counter(bad=2)]) == 1


def word(item, clinician, good=None, status="judged", at=0, **changes):
    good_a, good_b = good or (None, None)
    return {
        "item_id": item,
        "clinician": clinician,
        "simulated": False,
        "status": status,
        "good_a": good_a,
        "good_b": good_b,
        "edited_question": None,
        "edited_a": None,
        "edited_b": None,
        "first_shown": "a",
        "judged_at": datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=at),
        "seconds": None,
        **changes,
    }


def test_a_summary():
    rows = [
        word("1", "x", (True, False), seconds=2.0),
        word("1", "y", (True, False), first_shown="b", seconds=8.0),
        word("2", "x", (True, True), at=0),
        word("2", "x", (False, True), at=5, edited_b="Better.", seconds=4.0),
        word("2", "y", (True, False), seconds=1.0),
        word("3", "x", status="not_answerable", seconds=9.0),
        word("3", "y", status="not_answerable"),
        word("3", "z", (True, True), simulated=True),
        word("4", "x", status="skipped"),
        word("4", "y", (False, False)),
    ]
    found = summary(rows)
    assert (found["items"], found["items_with_two"]) == (4, 3)  # of item 4 one says nothing
    assert found["clinicians"]["x"] == {
        "judged": 2,
        "skipped": 1,
        "not_answerable": 1,
        "edited": 1,
        "seconds": 4.0,
        "first_preferred": 0.5,
        "simulated": False,
    }
    assert found["clinicians"]["y"] == {
        "judged": 3,
        "skipped": 0,
        "not_answerable": 1,
        "edited": 0,
        "seconds": 4.5,
        "first_preferred": 0.5,
        "simulated": False,
    }
    assert (
        found["clinicians"]["z"]["first_preferred"] is found["clinicians"]["z"]["seconds"] is None
        and found["clinicians"]["z"]["simulated"]
    )
    (pair,) = [row for row in found["cohen_kappa"] if (row["first"], row["second"]) == ("x", "y")]
    # Ticks: 1a, 1b alike, 2a, 2b not: p_o = 1/2, both say good to half: p_e = 1/2. Choices: a-a, b-a, not
    # answerable twice: p_o = 2/3, p_e = (1*2 + 1*0 + 1*1) / 9.
    assert (
        pair["ticks"] == 0
        and pair["choices"] == pytest.approx((2 / 3 - 1 / 3) / (1 - 1 / 3))
        and pair["items"] == 3
    )
    # Items 1 and 2, two answers each.
    assert found["fleiss_kappa"]["ticks"] == {"kappa": pytest.approx(0), "subjects": 4}
    # Item 1: 1; 2: 0; 3: two of three, 1/3. Labels a 3, b 1, not answerable 2, both 1 of 7.
    chance = (9 + 1 + 4 + 1) / 49
    assert found["fleiss_kappa"]["choices"] == {
        "kappa": pytest.approx((4 / 9 - chance) / (1 - chance)),
        "subjects": 3,
    }
