"""Judgements as rows: the last word of each clinician, and what pairs and demonstrations they make."""

from collections import Counter
from datetime import UTC, datetime, timedelta

import pyarrow as pa

from medray.clinicians.judgements import demonstration_rows, item_fingerprint, judged, preference_rows
from medray.records import EXCHANGE, RATING_PAIR
from tests.support.judgements import item

START = datetime(2026, 3, 1, tzinfo=UTC)


def word(item_id, clinician, good=None, status="judged", at=0, **changes):
    good_a, good_b = good or (None, None)
    return {
        "item_id": item_id,
        "clinician": clinician,
        "simulated": False,
        "status": status,
        "good_a": good_a,
        "good_b": good_b,
        "edited_question": None,
        "edited_a": None,
        "edited_b": None,
        "first_shown": "a",
        "judged_at": START + timedelta(seconds=at),
        "seconds": 4.0,
        **changes,
    }


def test_the_last_word_counts():
    rows = [
        word("i", "x", (True, False), at=5),
        word("i", "x", (False, True), at=9),
        word("i", "y", (True, True), at=1),
        word("i", "x", (True, True), at=2),
    ]
    assert [(row["clinician"], row["good_a"], row["good_b"]) for row in judged(rows)] == [
        ("x", False, True),
        ("y", True, True),
    ]
    assert judged([word("i", "x", (True, False)), word("i", "x", status="skipped")])[0]["status"] == "skipped"
    without_time = word("i", "x", status="skipped", judged_at=None)
    assert judged([word("i", "x", (True, False)), without_time])[0]["status"] == "judged"
    assert (
        judged([without_time, without_time | {"status": "not_answerable"}])[0]["status"] == "not_answerable"
    )


def test_one_tick_makes_a_pair_in_the_clinicians_words():
    items = [item(1, context="Seen in an elderly man."), item(2), item(3)]
    said = [
        word("item-1", "x", (False, True), edited_b="A monocyte, large.", edited_question="Which leukocyte?"),
        word("item-1", "y", (True, True)),
        word("item-2", "x", (True, False)),
        word("item-2", "y", status="skipped"),
        word("item-3", "x", (False, False)),
        word("item-3", "y", status="not_answerable"),
        word("item-9", "x", (True, False)),
    ]
    counts = Counter()
    first, second = preference_rows(iter(items), said, counts)
    assert counts == {
        "pairs": 2,
        "both_good": 1,
        "neither_good": 1,
        "skipped": 1,
        "not_answerable": 1,
        "unknown_item": 1,
    }
    assert pa.Table.from_pylist([first, second], schema=RATING_PAIR).to_pylist() == [first, second]
    assert (first["sample_id"], first["origin"], first["judge"]) == ("item-1/x", "clinician", "x")
    assert (first["chosen_question"], first["chosen_answer"]) == ("Which leukocyte?", "A monocyte, large.")
    assert (first["rejected_question"], first["rejected_answer"]) == ("Which leukocyte?", "A lymphocyte.")
    assert first["chosen_context"] == first["rejected_context"] == "A cell.\nSeen in an elderly man."
    assert (second["chosen_answer"], second["rejected_answer"], second["chosen_context"]) == (
        "A lymphocyte.",
        "A monocyte.",
        "A cell.",
    )
    assert (
        second["chosen_image"] == second["rejected_image"] == items[1]["image"]
        and second["chosen_score"] is None
    )


def test_an_edit_that_makes_both_answers_the_same_leaves_no_pair():
    said = [
        word("item-1", "x", (True, False), edited_a="A large  monocyte", edited_b="a large monocyte."),
        word("item-2", "x", (True, False)),
    ]
    counts = Counter()
    (row,) = preference_rows([item(1), item(2)], said, counts)
    assert (row["sample_id"], counts["pairs"], counts["edited_to_the_same"]) == ("item-2/x", 1, 1)


def test_images_without_an_id_are_told_apart():
    said = [
        word("item-1", "x", (True, False)),
        word("item-2", "x", (True, False)),
        word("item-3", "x", (True, False)),
    ]
    items = [
        item(1, image_id=None, image=b"one"),
        item(2, image_id=None, image=b"two"),
        item(3, image_id=None, image=b"one"),
    ]
    first, second, third = (row["chosen_image_id"] for row in preference_rows(items, said))
    assert first and second and first == third != second
    assert [row["image_id"] for row in demonstration_rows(items, said)] == [first, second, third]


def test_items_of_older_runs_say_their_caption_once():
    """Their context began with the caption."""
    new, old = item(1, context="Seen in an elderly man."), item(1, context="A cell.\nSeen in an elderly man.")
    said = [word("item-1", "x", (True, False))]
    assert list(preference_rows([new], said)) == list(preference_rows([old], said))
    assert [row["context"] for row in demonstration_rows([old], said)] == ["A cell.\nSeen in an elderly man."]


def test_a_fingerprint_is_of_image_question_and_answers():
    fingerprint = item_fingerprint(item(1))
    assert (
        fingerprint
        == item_fingerprint(
            {name: item(1)[name] for name in ("image_id", "question", "answer_a", "answer_b")}
        )
        == item_fingerprint(item(1, item_id="x", context="y", turn=7))
    )
    changes = [
        {"image_id": "i"},
        {"image_id": None},
        {"question": "Q?"},
        {"answer_a": "A monocyte.", "answer_b": "A lymphocyte."},
        {"question": 'Which cell?", "A lymphocyte.', "answer_a": ""},
    ]
    assert len({fingerprint, *(item_fingerprint(item(1, **change)) for change in changes)}) == 6
    assert fingerprint == "c6d4b0c9e0829986"  # in files that are kept: never to change


def test_demonstrations_are_what_most_clinicians_accept():
    items = [item(number) for number in range(6)]
    said = [
        # two ticks each: a
        word("item-0", "x", (True, False)),
        word("item-0", "y", (True, True)),
        word("item-0", "z", (False, True)),
        word("item-1", "x", (True, False)),
        word("item-1", "y", (False, False)),  # one of two is no majority
        word("item-2", "x", (False, True)),
        word("item-2", "y", (False, True), at=5, edited_b="Later."),
        word("item-2", "z", (False, True), at=1, edited_b="Earlier."),
        word("item-3", "x", (True, False)),
        word("item-3", "y", status="not_answerable"),  # a word against
        word("item-4", "x", (True, False)),
        word("item-4", "y", status="skipped"),  # no word
        word("item-5", "x", status="skipped"),
    ]
    counts = Counter()
    rows = list(demonstration_rows(items, said, counts))
    assert [(row["sample_id"], row["answer"]) for row in rows] == [
        ("image-0/d0#2", "A lymphocyte."),
        ("image-2/d0#2", "Later."),
        ("image-4/d0#2", "A lymphocyte."),
    ]
    assert counts == {"accepted": 3, "not_accepted": 2, "not_judged": 1, "unknown_item": 0}
    assert pa.Table.from_pylist(rows, schema=EXCHANGE).to_pylist() == rows


def test_a_demonstration_without_a_dialogue_is_named_after_its_item():
    (row,) = demonstration_rows([item(1, dialogue_id=None, turn=None)], [word("item-1", "x", (True, False))])
    assert (row["sample_id"], row["dialogue_id"], row["turn"]) == ("item-1#0", "item-1", 0)
