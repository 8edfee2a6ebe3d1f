import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medray.config import JudgeConfig
from medray.methods.self_train.preference_pairs import preference_rows, write_pairs
from medray.records import JUDGED, PREFERENCE
from medray.storage.shards import stored_rows


def judged(verdicts, texts=("good", "bad"), error=None):
    question = {
        "question_id": "i/r1/q0",
        "question": "Q?",
        "seed": 1,
        "answers": [{"text": text} for text in texts],
    }
    base = {
        "question_id": "i/r1/q0",
        "first": 0,
        "second": 1,
        "first_score": 8.0,
        "second_score": 5.0,
        "order_agreement": True,
        "raw": [],
        "error": None,
    }
    return {
        "sample_id": "i",
        "image": b"x",
        "questions": [question],
        "verdicts": [{**base, **v} for v in verdicts],
        "judge": "j",
        "error": error,
    }


def test_the_higher_score_is_chosen():
    pairs, drops = preference_rows(judged([{"first_score": 4.0}]), JudgeConfig())
    assert drops == {}
    assert pairs == [
        {
            "sample_id": "i/r1/q0",
            "image_id": "i",
            "image": b"x",
            "prompt": "Q?",
            "chosen": "bad",
            "rejected": "good",
            "chosen_score": 5.0,
            "rejected_score": 4.0,
            "judge": "j",
            "order_agreement": True,
        }
    ]
    assert set(pairs[0]) == set(PREFERENCE.names)


@pytest.mark.parametrize(
    ("verdict", "texts", "reason"),
    [
        ({"first_score": 5.0}, ("a", "b"), "tie"),
        ({"first_score": 6.0}, ("a", "b"), "tie"),  # no more than min_margin
        ({"order_agreement": False}, ("a", "b"), "order disagreement"),
        (
            {"first_score": None, "error": "order 1: the first line holds 0 numbers instead of two"},
            ("a", "b"),
            "judge error",
        ),
        ({"first_score": None}, ("a", "b"), "judge error"),
        ({"error": "identical answers"}, ("a", "a "), "identical answers"),
        ({}, ("a", " "), "empty answer"),
    ],
)
def test_what_is_dropped_is_counted(verdict, texts, reason):
    assert preference_rows(judged([verdict], texts), JudgeConfig(min_margin=1.0)) == ([], {reason: 1})


@pytest.mark.parametrize(("limit", "kept"), [(None, 1), (8.0, 1), (8.5, 0)])
def test_of_two_poor_answers_neither_is_learned(limit, kept):
    pairs, drops = preference_rows(judged([{}]), JudgeConfig(min_chosen_score=limit))
    assert (len(pairs), drops) == (kept, {} if kept else {"both answers poor": 1})


def test_no_order_is_no_disagreement():
    assert len(preference_rows(judged([{"order_agreement": None}]), JudgeConfig())[0]) == 1


def test_best_against_worst_of_three_answers():
    verdicts = [
        {"first": 0, "second": 1, "first_score": 7.0, "second_score": 5.0},
        {"first": 0, "second": 2, "first_score": 7.0, "second_score": 2.0},
        {"first": 1, "second": 2, "first_score": 5.0, "second_score": 5.0},
    ]
    (pair,), drops = preference_rows(judged(verdicts, ("a", "b", "c")), JudgeConfig())
    assert (pair["chosen"], pair["rejected"]) == ("a", "c")
    assert drops == {"tie": 1}


def test_a_row_set_aside_gives_nothing():
    assert preference_rows(judged([], error="no image"), JudgeConfig()) == ([], {"row error": 1})


def test_shards_of_judged_rows_become_shards_of_pairs(tmp_path):
    """A shard that leaves no pair has no file."""
    shards = {
        0: [judged([{}]) | {"sample_id": "a"}, judged([{"first_score": 5.0}])],
        1: [judged([], error="no image")],
        2: [judged([{}], ("one two three", "four five"))],
    }
    for number, rows in shards.items():
        rows = [dict.fromkeys(JUDGED.names) | row for row in rows]
        pq.write_table(pa.Table.from_pylist(rows, schema=JUDGED), tmp_path / f"{number}.parquet")
    (tmp_path / "out").mkdir()
    told = pa.table(
        {"number": list(shards), "path": [str(tmp_path / f"{number}.parquet") for number in shards]}
    )
    counts = {
        row["name"]: row["number"]
        for row in write_pairs(told, str(tmp_path / "out"), JudgeConfig().model_dump()).to_pylist()
    }
    assert counts == {
        "pairs": 2,
        "words, chosen": 4,
        "words, rejected": 3,
        "dropped: tie": 1,
        "dropped: row error": 1,
    }
    assert [row["image_id"] for row in stored_rows(str(tmp_path / "out"))] == ["a", "i"]
    assert len(list((tmp_path / "out").iterdir())) == 2
