"""Pairs of two score levels."""

from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medray.config.clinician_preference_sections import PairsConfig
from medray.methods.clinician_preference.rated_pairs import model_pairs
from medray.records import RATED, RATING_PAIR


def rated(scores, per_image=4):
    return [
        {
            "sample_id": f"i{number // per_image}/d0#{number % per_image}",
            "dialogue_id": f"i{number // per_image}/d0",
            "turn": number % per_image,
            "image_id": f"i{number // per_image}",
            "image": f"png{number // per_image}".encode(),
            "modality": "ct",
            "context": "known",
            "question": f"q{number}",
            "answer": f"a{number}",
            "score": score,
            "raw": None,
            "error": None if score is not None else "no score",
        }
        for number, score in enumerate(scores)
    ]


def write(folder, rows, files=1):
    folder.mkdir()
    for number in range(files):
        pq.write_table(pa.Table.from_pylist(rows[number::files], schema=RATED), folder / f"{number}.parquet")
    return str(folder)


SCORES = [(7 * number) % 11 for number in range(400)]


def test_pairs_hold_two_levels_the_better_one_chosen_and_both_sides_whole(tmp_path):
    rows = {row["answer"]: row for row in rated(SCORES)}
    counts = model_pairs(
        write(tmp_path / "in", list(rows.values()), 3),
        str(tmp_path / "out"),
        PairsConfig(max_pairs=300),
        "api:strong",
    )
    table = pq.read_table(tmp_path / "out")
    pairs = table.to_pylist()
    assert table.schema.remove_metadata() == RATING_PAIR
    assert counts["pairs"] == len(pairs) == 300 and counts["rated"] == 400 and counts["without score"] == 0
    assert (
        len({row["sample_id"] for row in pairs})
        == len({frozenset((row["chosen_answer"], row["rejected_answer"])) for row in pairs})
        == 300
    )
    assert {(row["origin"], row["judge"]) for row in pairs} == {("model", "api:strong")}
    for pair in pairs:
        assert pair["chosen_score"] > pair["rejected_score"]
        for half in ("chosen", "rejected"):
            source = rows[pair[f"{half}_answer"]]
            assert all(
                pair[f"{half}_{name}"] == source[name]
                for name in ("image_id", "image", "context", "question", "score")
            )
    uses = Counter(answer for row in pairs for answer in (row["chosen_answer"], row["rejected_answer"]))
    assert max(uses.values()) <= 2, "300 pairs of 400 exchanges need each twice at most"


def test_the_draw_does_not_depend_on_how_shards_are_cut_but_on_the_seed(tmp_path):
    rows = rated(SCORES)
    drawn = []
    for name, source, seed in (
        ("a", write(tmp_path / "1", rows), 0),
        ("b", write(tmp_path / "2", rows[::-1], 5), 0),
        ("c", str(tmp_path / "1"), 1),
    ):
        model_pairs(source, str(tmp_path / name), PairsConfig(max_pairs=100, seed=seed), "m")
        drawn.append(pq.read_table(tmp_path / name).to_pylist())
    assert drawn[0] == drawn[1]
    assert {row["sample_id"] for row in drawn[0]} != {row["sample_id"] for row in drawn[2]}


def test_a_missing_score_is_missing_and_never_the_one_before(tmp_path):
    scores = [9, None, 2, None, None, 5]
    counts = model_pairs(
        write(tmp_path / "in", rated(scores)), str(tmp_path / "out"), PairsConfig(uses=50), "m"
    )
    pairs = pq.read_table(tmp_path / "out").to_pylist()
    assert counts["without score"] == 3 and counts["pairs"] == 3
    assert {(row["chosen_score"], row["rejected_score"]) for row in pairs} == {(9, 2), (9, 5), (5, 2)}


@pytest.mark.parametrize(
    ("scores", "width", "pairs"),
    [
        ([8, 8, 8, 8], 1.0, 0),  # one level
        ([8.0, 8.5], 1.0, 0),  # one level of width 1
        ([8.0, 8.5], 0.5, 1),
        ([7.9, 8.0], 1.0, 1),
        ([10.0, 9.0], 1.0, 1),
        ([None, None], 1.0, 0),
        ([], 1.0, 0),
    ],
)
def test_levels(tmp_path, scores, width, pairs):
    counts = model_pairs(
        write(tmp_path / "in", rated(scores)), str(tmp_path / "out"), PairsConfig(level_width=width), "m"
    )
    assert counts["pairs"] == pairs


def test_pairs_of_one_image_and_pairs_within_a_side(tmp_path):
    source = write(tmp_path / "in", rated(SCORES), 2)
    counts = model_pairs(source, str(tmp_path / "same"), PairsConfig(same_image=True), "m")
    same = pq.read_table(tmp_path / "same").to_pylist()
    assert counts["pairs across images"] == 0 and len(same) > 200
    assert all(row["chosen_image_id"] == row["rejected_image_id"] for row in same)

    held_out = {f"i{number}" for number in range(0, 100, 5)}
    counts = model_pairs(
        source, str(tmp_path / "sides"), PairsConfig(max_pairs=200), "m", side=held_out.__contains__
    )
    pairs = pq.read_table(tmp_path / "sides").to_pylist()
    assert counts["pairs across images"] > 150
    inside = [row["chosen_image_id"] in held_out for row in pairs]
    assert inside == [row["rejected_image_id"] in held_out for row in pairs]
    assert sum(inside) == 40 and len(pairs) == 200, "a fifth of the exchanges has a fifth of the pairs"
