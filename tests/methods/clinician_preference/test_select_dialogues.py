"""What is kept of scored dialogues: every turn counts, modalities do not vanish, repetitions go."""

import random
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medray.config.clinician_preference_sections import SelectConfig
from medray.errors import DataError
from medray.methods.clinician_preference.select_dialogues import select
from medray.records import CONVERSATION, SCORED, check_turns


def dialogue(name, scores, modality="ct", answers=None):
    image = name.partition("/")[0]
    return [
        {
            "sample_id": f"{name}#{turn}",
            "dialogue_id": name,
            "turn": turn,
            "image_id": image,
            "image": f"png {image}".encode(),
            "modality": modality,
            "context": None,
            "question": f"question {turn}?",
            "answer": answers[turn] if answers else f"answer {turn} of {name}",
            "score": score,
        }
        for turn, score in enumerate(scores)
    ]


def write(folder, rows, files=1):
    folder.mkdir()
    for number in range(files):
        pq.write_table(
            pa.Table.from_pylist(rows[number::files], schema=SCORED),
            folder / f"{number}.parquet",
            row_group_size=7,
        )
    return str(folder)


@pytest.fixture
def chosen(tmp_path):
    def run(rows, **settings):
        source = write(tmp_path / f"in-{random.random()}", rows, 2)
        summary = select(source, str(tmp_path / "out"), SelectConfig(**settings))
        table = pq.read_table(tmp_path / "out")
        assert table.schema.remove_metadata() == CONVERSATION
        return summary, {row["sample_id"]: row for row in table.to_pylist()}

    return run


FIVE = [
    *dialogue("i1/d0", [9.0, 9.0, 0.0]),  # mean 6, min 0: only its last turn tells
    *dialogue("i2/d0", [7.0, 6.5]),  # 6.75, 6.5
    *dialogue("i3/d0", [8.0]),
    *dialogue("i4/d0", [5.0] * 100),
    *dialogue("i5/d0", [1.0, 9.5]),  # 5.25, 1
]


@pytest.mark.parametrize(
    ("aggregate", "top", "expected"),
    [
        ("mean", 2, {"i3/d0": [0], "i2/d0": [0, 1]}),
        ("mean", 3, {"i3/d0": [0], "i2/d0": [0, 1], "i1/d0": [0, 1, 2]}),
        ("min", 3, {"i3/d0": [0], "i2/d0": [0, 1], "i4/d0": [*range(100)]}),
        ("turns", 4, {"i5/d0": [1], "i1/d0": [0, 1], "i3/d0": [0]}),
    ],
)
def test_every_turn_counts_not_the_first_alone(chosen, aggregate, top, expected):
    _, kept = chosen(FIVE, aggregate=aggregate, top=top, fraction=None)
    asked = {
        name: [int(turn["text"].split()[1].strip("?")) for turn in row["turns"][::2]]
        for name, row in kept.items()
    }
    assert asked == expected
    for name, row in kept.items():
        assert check_turns(row["turns"]) is None
        assert row["image"] == f"png {name[:2]}".encode() and row["image_id"] == name[:2]
        assert [turn["text"] for turn in row["turns"][1::2]] == [
            f"answer {turn} of {name}" for turn in expected[name]
        ]


MIXED = [row for number in range(90) for row in dialogue(f"ct{number}/d0", [5 + number / 100])] + [
    row
    for modality, count in (("mri", 8), ("gross", 2))
    for number in range(count)
    for row in dialogue(f"{modality}{number}/d0", [1 + number / 100], modality)
]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("global", {"ct": 10, "mri": 0, "gross": 0}),
        ("proportional", {"ct": 8, "mri": 1, "gross": 1}),
        ("equal", {"ct": 4, "mri": 4, "gross": 2}),
    ],
)
def test_rare_modalities_vanish_only_where_asked_for_and_the_mix_says_so(chosen, rule, expected):
    summary, kept = chosen(MIXED, per_modality=rule, fraction=0.1)
    found = Counter(name.rstrip("0123456789/d") for name in kept)
    assert found == {modality: count for modality, count in expected.items() if count}
    assert {modality: mix["kept"] for modality, mix in summary["mix"].items()} == expected
    assert {modality: mix["before"] for modality, mix in summary["mix"].items()} == {
        "ct": 90,
        "mri": 8,
        "gross": 2,
    }
    assert (
        summary["mix"]["ct"]["share before"] == 0.9
        and summary["mix"]["ct"]["share kept"] == expected["ct"] / 10
    )
    assert summary["mix"]["gross"]["mean score before"] == pytest.approx(1.005)
    # Within a modality the best are kept.
    assert {name for name in kept if name.startswith("ct")} == {
        f"ct{number}/d0" for number in range(90 - expected["ct"], 90)
    }


def test_an_unknown_modality_is_a_modality(chosen):
    summary, kept = chosen(
        [*dialogue("i1/d0", [1.0], None), *dialogue("i2/d0", [2.0]), *dialogue("i3/d0", [3.0])],
        per_modality="equal",
        top=2,
        fraction=None,
    )
    assert summary["mix"]["unknown"]["kept"] == 1 and set(kept) == {"i1/d0", "i3/d0"}


def test_of_dialogues_that_say_the_same_the_best_is_kept(chosen):
    rows = [
        *dialogue("i1/d0", [5.0, 5.0], answers=["A cell.", "One"]),
        *dialogue("i1/d1", [7.0, 7.0], answers=["a CELL", "one."]),
        *dialogue("i1/d2", [6.0, 6.0], answers=["A cell.", "Two"]),
        *dialogue("i2/d0", [1.0, 1.0], answers=["A cell.", "One"]),
    ]
    summary, kept = chosen(rows, fraction=1.0)
    assert set(kept) == {"i1/d1", "i1/d2", "i2/d0"}, "another image may well say the same"
    assert summary["counts"]["left out: says what another says"] == 1
    _, kept = chosen(rows, fraction=1.0, deduplicate=False)
    assert len(kept) == 4
    _, kept = chosen(rows, fraction=1.0, aggregate="turns")
    assert {name: len(row["turns"]) // 2 for name, row in kept.items()} == {
        "i1/d1": 2,
        "i1/d2": 1,
        "i2/d0": 2,
    }


@pytest.mark.parametrize(
    ("relative_to", "one_right_in", "expected"),
    [
        (None, 2, {"easy, yes": 80}),
        ("question", 2, {"easy, yes": 40, "hard, yes": 40}),
        (
            "exchange",
            4,
            {f"{question}, {answer}": 20 for question in ("easy", "hard") for answer in ("yes", "no")},
        ),
    ],
)
def test_scores_relative_to_their_like_keep_what_is_hard_and_what_is_rare(
    chosen, relative_to, one_right_in, expected
):
    """Of answers to two questions: the easy one's are rated 4 higher, "yes" 2 higher, the right ones 1
    higher. A quarter is kept.
    """
    rows = []
    for number in range(320):
        question, answer, right = (
            ("easy", "hard")[number % 2],
            ("yes", "no")[number // 2 % 2],
            number // 4 % one_right_in == 0,
        )
        score = 4.0 * (question == "easy") + 2.0 * (answer == "yes") + right + number * 1e-4
        rows.append(
            {
                **dialogue(f"i{number}/d0", [score])[0],
                "question": f"Is it  {question.upper()}?",
                "answer": answer,
            }
        )
    summary, kept = chosen(rows, relative_to=relative_to, fraction=0.25)
    said = Counter(
        f"{question['text'].split()[-1].strip('?').lower()}, {answer['text']}"
        for question, answer in (row["turns"] for row in kept.values())
    )
    assert said == expected
    assert summary["variety"] == pytest.approx({"before": 4, "kept": len(expected)}), (
        "all as often as each other"
    )
    assert summary["mix"]["ct"]["mean score kept"] == pytest.approx(
        sum(row["score"] for row in rows if row["dialogue_id"] in kept) / 80
    ), "what is told is the score itself"


def test_what_has_no_like_is_ranked_by_its_score(chosen):
    summary, kept = chosen(
        [
            row
            for number in range(30)
            for row in dialogue(f"i{number}/d0", [float(number)], answers=[f"answer {number}"])
        ],
        relative_to="exchange",
        fraction=0.2,
    )
    assert set(kept) == {f"i{number}/d0" for number in range(24, 30)}
    assert summary["variety"] == pytest.approx({"before": 30, "kept": 6})


def test_a_turn_without_a_score_leaves_its_dialogue_out_and_is_counted(chosen):
    rows = [
        *dialogue("i1/d0", [9.0, None]),
        *dialogue("i2/d0", [1.0, 2.0]),
        *dialogue("i3/d0", [float("nan")]),
        *dialogue("i2/d0", [1.0, 2.0])[:1],
    ]
    summary, kept = chosen(rows, fraction=1.0)
    assert set(kept) == {"i2/d0"} and len(kept["i2/d0"]["turns"]) == 4
    counts = summary["counts"]
    assert (
        counts["left out: no score"] == 2
        and counts["left out: sample_id seen before"] == 1
        and counts["exchanges"] == 6
    )
    assert (counts["ranked"], counts["dialogues kept"], counts["exchanges kept"]) == (1, 1, 2)
    _, kept = chosen(rows, fraction=1.0, aggregate="turns")
    assert {name: len(row["turns"]) for name, row in kept.items()} == {"i1/d0": 2, "i2/d0": 4}
    with pytest.raises(DataError, match="no dialogue to choose from"):
        chosen(dialogue("i1/d0", [None]), fraction=1.0)


def many():
    rng = random.Random(0)
    return [
        row
        for number in range(200)
        for k in range(2)
        for row in dialogue(
            f"i{number:03d}/d{k}",
            [float(rng.randint(0, 10)) for _ in range(rng.randint(1, 5))],
            rng.choice(["ct", "ct", "mri"]),
        )
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"order": "random", "aggregate": "turns"},
        {"per_modality": "global", "aggregate": "min"},
        {"relative_to": "question"},
    ],
    ids=str,
)
def test_what_is_kept_does_not_depend_on_how_shards_are_cut(tmp_path, settings):
    rows = many()
    mixed = random.Random(1).sample(rows, len(rows))
    config = SelectConfig(fraction=0.3, **settings)
    results = [
        select(write(tmp_path / name, order, files), str(tmp_path / f"out-{name}"), config)
        for name, order, files in (("a", rows, 1), ("b", mixed, 6))
    ]
    assert results[0] == results[1]
    assert pq.read_table(tmp_path / "out-a").to_pylist() == pq.read_table(tmp_path / "out-b").to_pylist()


def test_the_random_arm_knows_no_score_and_another_seed_keeps_others(tmp_path):
    source = write(tmp_path / "in", many())
    kept = {}
    for order, seed in (("score", 0), ("random", 0), ("random", 1)):
        summary = select(source, str(tmp_path / "out"), SelectConfig(order=order, seed=seed, fraction=0.1))
        kept[order, seed] = {
            row["sample_id"] for row in pq.read_table(tmp_path / "out", columns=["sample_id"]).to_pylist()
        }
        means = [(mix["mean score before"], mix["mean score kept"]) for mix in summary["mix"].values()]
        assert all((after - before > 2) is (order == "score") for before, after in means)
    assert (
        len(kept["random", 0] & kept["random", 1])
        < 20
        < len(kept["random", 0])
        == len(kept["score", 0])
        == 40
    )
