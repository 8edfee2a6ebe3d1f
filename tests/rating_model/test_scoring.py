"""Bulk scoring: every exchange, each id once, whatever is bad or killed."""

import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from medray.config import DataConfig, ScoreConfig
from medray.data.pixels import normalise_pixels
from medray.errors import ConfigError
from medray.rating_model.model import RatingModel
from medray.rating_model.scoring import SCORED_ROW, Score, score_exchanges
from medray.records import EXCHANGE, SCORED
from medray.storage.shards import stored_rows
from tests.support.processes import kill_one
from tests.support.rating_pairs import cell, exchange, exchanges

CONFIG = ScoreConfig(batch=4, rows_per_task=8)
DATA = DataConfig(read_cpus=0.5)


@pytest.fixture(scope="module")
def rater(tiny_clip, tmp_path_factory):
    path = tmp_path_factory.mktemp("rater") / "rater"
    RatingModel.from_encoder(tiny_clip, hidden=(8,), max_length=64).save_pretrained(path)
    return str(path)


def plain_scores(rater, rows):
    """One exchange at a time, straight through the model."""
    model = RatingModel.from_pretrained(rater)
    inputs = model.inputs(DATA)
    scores = []
    for row in rows:
        batch = inputs.batch(
            [inputs.text(row["question"], row["answer"], row["context"]).ids],
            [inputs.pixels(row["image"])],
            [0],
        )
        batch["pixel_values"] = normalise_pixels(batch["pixel_values"], inputs.image_processor)
        with torch.no_grad():
            scores.append(float(model(**batch)))
    return scores


def test_every_turn_gets_its_own_score_in_its_own_place(rater):
    """Not the dialogue's first alone; and a bad row is missing a score rather than taking over its
    neighbour's.
    """
    rows = [
        exchange(number, turn, answer)
        for number in range(3)
        for turn, answer in enumerate(("red", "blue, and a good deal longer than that", "I do not know"))
    ]
    rows[4] |= {"answer": " "}
    rows += [
        exchange(9, 0, "red", image=b"no image"),
        exchange(9, 1, "blue", image=b"no image"),
        exchange(8, 0, "red " * 90),
    ]
    found = Score(rater, CONFIG, DATA)(pa.Table.from_pylist(rows, schema=EXCHANGE))
    assert found.schema == SCORED_ROW and SCORED_ROW.names[: len(SCORED.names)] == SCORED.names
    found = found.to_pylist()
    assert [row["sample_id"] for row in found] == [row["sample_id"] for row in rows]
    bad = [4, 9, 10]
    assert [place for place, row in enumerate(found) if row["score"] is None] == bad
    assert found[4]["error"] == "empty answer" and all(
        "cannot be decoded" in found[place]["error"] for place in bad[1:]
    )
    good = [place for place in range(len(rows)) if place not in bad]
    assert [found[place]["score"] for place in good] == pytest.approx(
        plain_scores(rater, [rows[place] for place in good]), abs=1e-5
    )
    assert len({round(found[place]["score"], 6) for place in good}) == len(good)
    assert (found[11]["cut"], found[0]["cut"]) == (["answer", "context"], [])


def test_an_image_is_decoded_once_a_batch(rater, monkeypatch):
    scorer = Score(rater, CONFIG, DATA)
    seen = []
    decode = scorer.inputs.pixels
    monkeypatch.setattr(scorer.inputs, "pixels", lambda image: seen.append(image) or decode(image))
    scorer(
        pa.Table.from_pylist(
            [exchange(number % 2, turn, "red") for turn in range(3) for number in range(2)], schema=EXCHANGE
        )
    )
    assert sorted(seen) == sorted(cell(number)[0] for number in range(2))


def test_without_a_rating_model_it_says_so(tiny_clip):
    with pytest.raises(ConfigError, match="holds no rating model"):
        Score(tiny_clip, CONFIG, DATA)


@pytest.mark.ray
@pytest.mark.faults
def test_a_killed_actor_costs_no_row_and_doubles_none(ray_cluster, rater, tmp_path):
    """kill -9 of the scoring actor, then the same call again: each exchange of both folders has one
    score, and nothing runs anew.
    """
    rows = [
        exchange(number, turn, answer) for number in range(40) for turn, answer in enumerate(("red", "blue"))
    ]
    sources = [
        exchanges(rows[:60], tmp_path / "a"),
        exchanges([*rows[60:], exchange(99, 0, "")], tmp_path / "b"),
    ]
    target, committed = str(tmp_path / "rows"), str(tmp_path / "committed")

    killed: list[int] = []
    threading.Thread(target=lambda: killed.append(kill_one("MapBatches(Score)")), daemon=True).start()
    counts = score_exchanges(sources, target, committed, rater, CONFIG, DATA)
    assert killed and counts == {"exchanges": 81, "without score": 1}
    found = {row["sample_id"]: row for row in stored_rows(target)}
    assert len(found) == 81 and set(found) == {row["sample_id"] for row in rows} | {"cell-0099/d0#0"}
    sample = rows[::9]
    assert [found[row["sample_id"]]["score"] for row in sample] == pytest.approx(
        plain_scores(rater, sample), abs=1e-5
    )
    before = sorted((path.name, path.stat().st_mtime_ns) for path in Path(target).glob("*.parquet"))
    assert score_exchanges(sources, target, committed, rater, CONFIG, DATA) == counts
    assert sorted((path.name, path.stat().st_mtime_ns) for path in Path(target).glob("*.parquet")) == before
    assert pq.read_schema(next(Path(target).glob("*.parquet"))).names == SCORED_ROW.names
