"""Simulated clinicians: right but for the stated errors, the same on every run."""

import pytest

from medray.clinicians.simulated import errs, is_right, simulated_judgements
from medray.config import CliniciansConfig
from medray.data.attribute_questions import ATTRIBUTES, asked_attribute
from medray.errors import DataError
from medray.records import JUDGEMENT

RECORD = {name: attribute.values[0] for name, attribute in ATTRIBUTES.items()} | {
    "cell_size": "small",
    "granularity": "yes",
}


def item(number=0, question="What is the cell size?", a="small", b="big"):
    return {
        "item_id": f"item-{number}",
        "image_id": "one",
        "question": question,
        "answer_a": a,
        "answer_b": b,
    }


@pytest.mark.parametrize(
    ("question", "answer", "right"),
    [
        ("What is the cell size?", "small", True),
        ("What is the cell size?", " Small. ", True),
        ("What is the cell size?", "big", False),
        # longer than the word: not the answer the bundled models are taught
        ("What is the cell size?", "a small cell", False),
        ("Is the cell granular?", "yes", True),
        ("Is the cell agranular?", "yes", False),
        ("What is the cell size?\nA. big\nB. small\nAnswer with the letter.", "B", True),
        ("What is the cell size?\nA. big\nB. small\nAnswer with the letter.", "a", False),
        ("What is the mood of the cell?", "small", None),
        ("Describe the image.", "A cell.", None),
    ],
)
def test_right_answers(question, answer, right):
    assert is_right(question, answer, RECORD) is right
    assert (asked_attribute(question) is None) == (right is None)
    assert (
        asked_attribute("What is the cell size?\nA. big\nB. small\nAnswer with the letter.")
        == "cell_size"
        != asked_attribute("Is the cell granular?")
    )


def test_without_errors_the_ticks_are_the_truth():
    config = CliniciansConfig(error_rate=0, names=2, judgements_per_item=2)
    rows = list(simulated_judgements(item(), RECORD, config))
    assert {row["clinician"] for row in rows} == {"simulated-1", "simulated-2"}
    for row in rows:
        assert (row["status"], row["good_a"], row["good_b"], row["simulated"]) == (
            "judged",
            True,
            False,
            True,
        )
        assert set(row) <= set(JUDGEMENT.names)


def test_what_they_cannot_judge_they_do_not():
    (row,) = simulated_judgements(item(question="What is the mood?"), RECORD, CliniciansConfig())
    assert (row["status"], row["good_a"], row["good_b"]) == ("not_answerable", None, None)
    (row,) = simulated_judgements(item(question="Describe the image."), RECORD, CliniciansConfig())
    assert row["status"] == "skipped"


def test_the_error_rate_is_the_stated_one_and_errors_are_independent():
    config = CliniciansConfig(error_rate=0.2, names=3, judgements_per_item=3)
    rows = [row for number in range(2000) for row in simulated_judgements(item(number), RECORD, config)]
    wrong_a, wrong_b = [not row["good_a"] for row in rows], [row["good_b"] for row in rows]
    assert len(rows) == 6000
    assert sum(wrong_a) / 6000 == pytest.approx(0.2, abs=0.02)
    assert sum(wrong_b) / 6000 == pytest.approx(0.2, abs=0.02)
    assert sum(a and b for a, b in zip(wrong_a, wrong_b, strict=True)) / 6000 == pytest.approx(0.04, abs=0.01)
    first = [wrong for row, wrong in zip(rows, wrong_a, strict=True) if row["clinician"] == "simulated-1"]
    second = [wrong for row, wrong in zip(rows, wrong_a, strict=True) if row["clinician"] == "simulated-2"]
    assert len(first) == len(second) == 2000


def test_items_are_spread_over_the_clinicians_and_nothing_depends_on_order():
    config = CliniciansConfig(names=3, judgements_per_item=1)
    forth = [row for number in range(300) for row in simulated_judgements(item(number), RECORD, config)]
    back = [
        row for number in reversed(range(300)) for row in simulated_judgements(item(number), RECORD, config)
    ]
    assert forth == back[::-1]
    shares = [sum(row["clinician"] == f"simulated-{n}" for row in forth) for n in (1, 2, 3)]
    assert sum(shares) == 300
    assert min(shares) > 70
    other = [
        row
        for number in range(300)
        for row in simulated_judgements(item(number), RECORD, config.model_copy(update={"seed": 1}))
    ]
    assert other != forth
    assert any(
        errs(config, f"item-{n}", "simulated-1", "a")
        != errs(config.model_copy(update={"seed": 1}), f"item-{n}", "simulated-1", "a")
        for n in range(100)
    )


def test_images_without_the_attributes_are_named():
    with pytest.raises(
        DataError, match="'label' is not given: simulated clinicians need WBCAtt's attributes"
    ):
        list(simulated_judgements(item(), {"mass_shape": "oval"}, CliniciansConfig()))


def test_real_clinicians_need_a_place():
    for kind in ("database", "export"):
        with pytest.raises(ValueError, match=f"kind {kind} needs source"):
            CliniciansConfig(kind=kind)
    with pytest.raises(ValueError, match="there are 2"):
        CliniciansConfig(names=2, judgements_per_item=3)
