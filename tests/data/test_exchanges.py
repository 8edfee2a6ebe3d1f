"""Dialogues as exchanges and back, and what generation wrote."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medray.data.exchanges import (
    conversation_row,
    demonstrations_of,
    kind_of_error,
    known_of,
    same_answer,
    unpack,
)
from medray.records import CLINICIAN_ITEM, CONVERSATION, EXCHANGE, GENERATED


def exchanges_of(*texts):
    return [
        {
            "sample_id": f"i1/d0#{turn}",
            "dialogue_id": "i1/d0",
            "turn": turn,
            "image_id": "i1",
            "image": b"png" if turn == 0 else None,
            "question": question,
            "answer": answer,
        }
        for turn, (question, answer) in enumerate(zip(texts[::2], texts[1::2], strict=True))
    ]


@pytest.mark.parametrize("turns", [1, 2, 100])
def test_a_dialogue_keeps_its_order(turns):
    texts = [f"text {number}" for number in range(2 * turns)]
    # As text, "i1/d0#10" comes before "i1/d0#2": turns are numbers.
    row = conversation_row(sorted(exchanges_of(*texts), key=lambda one: one["sample_id"]))
    assert [turn["text"] for turn in row["turns"]] == texts
    assert [turn["role"] for turn in row["turns"]] == ["user", "assistant"] * turns
    assert (row["sample_id"], row["image_id"], row["image"]) == ("i1/d0", "i1", b"png")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Yes", "yes.", True),
        ("a  cell", "A cell", True),
        ("<5 mm", ">5 mm", False),
        ("1.5", "15", False),
        ("No", "Yes", False),
    ],
)
def test_answers_between_which_there_is_nothing_to_choose(one, other, same):
    assert same_answer(one, other) is same_answer(other, one) is same


def generated(name, rounds, error=None, dropped=(), **more):
    row = {
        "sample_id": name,
        "image": name.encode(),
        "modality": "smear",
        "caption": "A smear.",
        "context": "Patient with fever.",
        "error": error,
        "dropped": list(dropped),
    }
    return {
        **row,
        "rounds": rounds
        if rounds is None
        else [{"question": question, "answers": list(answers)} for question, *answers in rounds],
        **more,
    }


@pytest.fixture
def written(tmp_path):
    """Two answers; one answer, the first round without; none at all; two answers of which some are the
    same or missing.
    """
    rows = [
        generated("a", [("What?", "A cell.", "A lymphocyte."), ("How many?", "One.", "Two cells.")]),
        generated(
            "b",
            [("What?", None), ("Where?", "Left.")],
            dropped=[{"text": "x", "reason": "duplicate question"}],
            caption=None,
            modality=None,
        ),
        generated(
            "c",
            None,
            error="no dialogue: turn 3: user where assistant was expected",
            dropped=[{"text": "x", "reason": "turn 3: user where assistant was expected"}] * 2,
        ),
        generated("d", [("What?", "Same.", "Same. "), ("Where?", "Left.", None), ("Size?", "2 cm", "3 cm")]),
    ]
    folder = tmp_path / "generated"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=GENERATED), folder / "a.parquet")
    return str(folder)


def test_unpacked(written, tmp_path):
    counts = unpack(written, str(tmp_path / "out"))
    assert counts == unpack(written, str(tmp_path / "out")), "the same again, into the same folders"
    exchanges = pq.read_table(tmp_path / "out/exchanges")
    assert exchanges.schema.remove_metadata() == EXCHANGE
    assert exchanges["sample_id"].to_pylist() == [
        "a/d0#0",
        "a/d0#1",
        "a/d1#0",
        "a/d1#1",
        "b/d0#1",
        "d/d0#0",
        "d/d0#1",
        "d/d0#2",
        "d/d1#0",
        "d/d1#2",
    ]
    assert exchanges["answer"].to_pylist()[:5] == ["A cell.", "One.", "A lymphocyte.", "Two cells.", "Left."]
    assert (
        exchanges["context"].to_pylist()[0] == "A smear.\nPatient with fever."
        and exchanges["context"].to_pylist()[4] == "Patient with fever."
    )
    assert exchanges["image"].to_pylist()[4] == b"b"
    conversations = pq.read_table(tmp_path / "out/conversations")
    assert conversations.schema.remove_metadata() == CONVERSATION
    assert {row["sample_id"]: len(row["turns"]) for row in conversations.to_pylist()} == {
        "a/d0": 4,
        "a/d1": 4,
        "b/d0": 2,
        "d/d0": 6,
        "d/d1": 4,
    }
    items = pq.read_table(tmp_path / "out/items")
    assert items.schema.remove_metadata() == CLINICIAN_ITEM
    assert [(row["item_id"], row["answer_a"], row["answer_b"]) for row in items.to_pylist()] == [
        ("a/d0#0", "A cell.", "A lymphocyte."),
        ("a/d0#1", "One.", "Two cells."),
        ("d/d0#2", "2 cm", "3 cm"),
    ]
    # A clinician reads the caption once; a clinician's pair and a model's pair about one exchange show the
    # rating model the same text.
    assert items.select(["caption", "context"]).to_pylist()[0] == {
        "caption": "A smear.",
        "context": "Patient with fever.",
    }
    of_exchange = dict(zip(exchanges["sample_id"].to_pylist(), exchanges["context"].to_pylist(), strict=True))
    assert {row["item_id"]: known_of(row) for row in items.to_pylist()} == {
        name: of_exchange[name] for name in items["item_id"].to_pylist()
    }
    assert counts == {
        "images": 4,
        "without dialogue": 1,
        "questions": 7,
        "dropped: duplicate question": 1,
        "dropped: turn #: user where assistant was expected": 2,
        "error: no dialogue: turn #: user where assistant was expected": 1,
        "conversations": 5,
        "exchanges": 10,
        "items": 3,
        "mean words, question": 1.14,
        "mean words, answer": 1.5,
        "mean rounds": 2.33,
    }


@pytest.mark.parametrize(
    ("caption", "context", "known"),
    [
        ("A smear.", "Fever.", "A smear.\nFever."),
        (" A smear. ", None, "A smear."),
        (None, "Fever.", "Fever."),
        (" ", "", None),
        ("A smear.", "A smear. Fever.", "A smear.\nA smear. Fever."),
        # as items were stored that repeated the caption
        ("A smear.", "A smear.\nFever.", "A smear.\nFever."),
        ("A smear.", "A smear.", "A smear."),
    ],
)
def test_what_is_known_of_an_image(caption, context, known):
    assert known_of({"caption": caption, "context": context}) == known
    assert known_of({"caption": caption, "context": known}) == known


def test_demonstrations_are_dialogues_in_order_without_images(written, tmp_path):
    unpack(written, str(tmp_path / "out"))
    found = demonstrations_of(str(tmp_path / "out/exchanges"))
    assert [one["dialogue_id"] for one in found] == ["a/d0", "a/d1", "b/d0", "d/d0", "d/d1"]
    assert found[0] == {
        "dialogue_id": "a/d0",
        "image_id": "a",
        "modality": "smear",
        "context": "A smear.\nPatient with fever.",
        "rounds": [{"question": "What?", "answer": "A cell."}, {"question": "How many?", "answer": "One."}],
    }
    assert demonstrations_of(None) == []


def test_errors_are_counted_by_kind():
    assert kind_of_error("score 11 is not from 0 to 10") == kind_of_error("score 12.5 is not from 0 to 10")
    assert kind_of_error("turn 2: unknown role 'x'") == kind_of_error("turn 7: unknown role 'patient'")
    assert kind_of_error(None) == "unknown" and len(kind_of_error("y" * 500)) == 80
