"""Index rows to one row per image and split."""

import json
from collections import Counter

import pyarrow as pa
import pytest

from medray.config import DataConfig
from medray.ingest.group_by_image import _prepared, group_rows, groups_of, split_of
from medray.ingest.source_index import INDEX
from medray.stable_draws import unit

SETTINGS = DataConfig(testbed_val_fraction=0.3)


def index_row(sample, image=None, split=None, error=None, payload=None, **more):
    row = {
        "sample_id": sample,
        "image_id": image or sample,
        "image_file": f"/x/{image or sample}.png",
        "split": split,
        "payload": json.dumps(payload or {}),
    }
    return {**row, "where": f"f.json record {sample}", "error": error, **more}


def grouped(rows):
    return group_rows(_prepared(pa.Table.from_pylist(rows, schema=INDEX)), SETTINGS.model_dump()).to_pylist()


def test_an_image_is_one_row_however_many_records_it_has():
    (row,) = grouped(
        [
            index_row("q2", "a", "train", payload={"qa": 2}),
            index_row("q1", "a", "train", payload={"qa": 1}, modality="ct"),
        ]
    )
    assert (row["sample_id"], row["image_id"], row["split"], row["modality"]) == ("a", "a", "train", "ct")
    assert json.loads(row["members"]) == [["q1", {"qa": 1}], ["q2", {"qa": 2}]]


def test_an_image_in_two_splits_is_two_rows_with_ids_of_their_own():
    rows = grouped(
        [index_row("q1", "a", "train"), index_row("q2", "a", "test"), index_row("q3", "b", "test")]
    )
    assert {(row["sample_id"], row["split"]) for row in rows} == {
        ("a@train", "train"),
        ("a@test", "test"),
        ("b", "test"),
    }


def test_bad_and_duplicate_records_are_named_beside_the_good_ones():
    rows = [
        index_row("q1", "a", "train"),
        index_row("q1", "a", "train", where="f.json record 9"),
        index_row("q2", "a", "train", error="no answer"),
    ]
    (row,) = grouped([rows[0] | {"where": "f.json record 1"}, *rows[1:]])
    assert [member[0] for member in json.loads(row["members"])] == ["q1"]
    assert {(bad["sample_id"], bad["file"], bad["reason"]) for bad in map(json.loads, row["bad"])} == {
        ("q1", "f.json record 9", "duplicate sample_id: the same record is in f.json record 1"),
        ("q2", "f.json record q2", "no answer"),
    }


def test_splits_are_drawn_by_patient_where_there_is_one():
    rows = [index_row(f"i{i}", group_id=f"p{i % 40}") for i in range(400)]
    splits = {}
    for row in grouped(rows):
        splits.setdefault(row["group_id"], set()).add(row["split"])
    assert all(len(found) == 1 for found in splits.values())
    assert (
        Counter(next(iter(found)) for found in splits.values())["val"]
        == sum(unit("split", f"p{i}") < 0.3 for i in range(40))
        > 0
    )
    assert split_of(index_row("x", split="test", group_id=None), SETTINGS) == "test"


@pytest.mark.ray
def test_duplicates_and_members_meet_whatever_block_they_come_in(ray_cluster):
    rows = [
        index_row(f"{part}-{i}" if i else "same", f"image-{i}", "train", where=f"{part}.json record {i}")
        for part in range(6)
        for i in range(8)
    ]
    index = ray_cluster.data.from_arrow([pa.Table.from_pylist(rows[at::5], schema=INDEX) for at in range(5)])
    found = {row["sample_id"]: row for row in groups_of(index, DataConfig(read_cpus=0.5)).iter_rows()}
    assert sorted(found) == [f"image-{i}" for i in range(8)]
    assert all(len(json.loads(row["members"])) == 6 for name, row in found.items() if name != "image-0")
    assert json.loads(found["image-0"]["members"]) == [["same", {}]]
    assert {json.loads(bad)["file"] for bad in found["image-0"]["bad"]} == {
        f"{part}.json record 0" for part in range(1, 6)
    }
