"""Rows written for other tools are the same rows when they are read again."""

import json
import tarfile

import pytest

from medray.errors import DataError
from medray.ingest.export import write_llava, write_preferences, write_webdataset
from medray.ingest.source_index import index_rows, read_image_bytes
from tests.images.test_decoding import noise, saved
from tests.ingest.test_source_index import rows_of

PNG, JPEG = saved(noise((30, 20))), saved(noise((20, 30)), "JPEG")
TURNS = [
    {"role": "system", "text": "Be short."},
    {"role": "user", "text": "What is it?"},
    {"role": "assistant", "text": "Une cellule, 细胞."},
    {"role": "questioner", "text": "Is it big?"},
    {"role": "assistant", "text": "Yes."},
]
QUESTION = {
    "question": "Which?\nA. one\nB. two\nAnswer with the letter.",
    "reference": "B",
    "answer_type": "mcq",
    "attribute": "x",
    "choices": ["one", "two"],
}
PAIR = {"prompt": "What is it?", "chosen": "A cell.", "rejected": "A bone."}


def test_webdataset_round_trip(tmp_path):
    rows = [
        {
            "sample_id": "a.b/1",
            "image": PNG,
            "image_format": "PNG",
            "caption": "A lung.",
            "context": "See figure 1.",
            "split": "val",
            "modality": "ct",
        },
        {"sample_id": "2", "image_id": "i", "image": JPEG, "turns": TURNS, "group_id": "0123456789abcdef"},
        {"sample_id": "3", "image_id": "i", "image": JPEG, **QUESTION, "context": "Figure 2: a cell."},
        {"sample_id": "4", "image": PNG, **PAIR},
        {"sample_id": "5", "image": PNG, "attributes": [("mass_shape", "oval")]},
        {"sample_id": "6", "image": PNG},
    ]
    assert write_webdataset(iter(rows), str(tmp_path / "out"), rows_per_tar=4) == 6
    tars = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in tars] == ["data-000000.tar", "data-000001.tar"]
    with tarfile.open(tars[1]) as second:
        assert second.getnames() == ["000000004.png", "000000004.json", "000000005.png", "000000005.json"]
    found = [row for path in tars for row in index_rows(str(path), 0, 0, "webdataset", "")]
    assert [row["error"] for row in found] == [None] * 6
    assert [
        (row["sample_id"], row["image_id"], row["split"], row["modality"], row["group_id"]) for row in found
    ] == [
        ("a.b/1", "a.b/1", "val", "ct", None),
        ("2", "i", None, None, "0123456789abcdef"),
        ("3", "i", None, None, None),
        ("4", "4", None, None, None),
        ("5", "5", None, None, None),
        ("6", "6", None, None, None),
    ]
    assert [json.loads(row["payload"]) for row in found] == [
        {"caption": "A lung.", "context": "See figure 1."},
        {"turns": TURNS},
        {"qa": QUESTION | {"language": None, "context": "Figure 2: a cell."}},
        {"preference": PAIR},
        {"attributes": {"mass_shape": "oval"}},
        {},
    ]
    assert [read_image_bytes(row["image_file"], 10**6) for row in found] == [row["image"] for row in rows]


def test_the_same_rows_give_the_same_tar(tmp_path):
    for name in ("one", "two"):
        write_webdataset([{"sample_id": "1", "image": PNG, "caption": "c"}], str(tmp_path / name))
    assert (tmp_path / "one/data-000000.tar").read_bytes() == (tmp_path / "two/data-000000.tar").read_bytes()


def test_llava_round_trip(tmp_path):
    rows = [
        {"sample_id": "1", "image": PNG, "turns": TURNS, "split": "train"},
        {"sample_id": "2", "image": PNG, **QUESTION},
        {"sample_id": "3", "image": JPEG, "caption": "A lung."},
    ]
    assert write_llava(iter(rows), str(tmp_path)) == 3
    first, second, third = rows_of(tmp_path / "data.json", "llava")
    assert [row["error"] for row in (first, second, third)] == [None] * 3
    assert (first["sample_id"], first["split"], second["split"]) == ("1", "train", None)
    assert json.loads(first["payload"]) == {"turns": TURNS}
    assert [turn["text"] for turn in json.loads(second["payload"])["turns"]] == [QUESTION["question"], "B"]
    assert [turn["text"] for turn in json.loads(third["payload"])["turns"]] == [
        "Describe the image in detail.",
        "A lung.",
    ]
    assert first["image_file"] == second["image_file"]
    assert sorted(path.suffix for path in (tmp_path / "images").iterdir()) == [".jpg", ".png"]
    assert read_image_bytes(third["image_file"], 10**6) == JPEG


def test_preference_round_trip(tmp_path):
    assert (
        write_preferences(iter([{"sample_id": "p", "image": JPEG, **PAIR, "split": "val"}]), str(tmp_path))
        == 1
    )
    (row,) = rows_of(tmp_path / "preferences.jsonl", "preference")
    assert (row["sample_id"], row["split"], row["error"]) == ("p", "val", None)
    assert json.loads(row["payload"]) == {"preference": PAIR}
    assert read_image_bytes(row["image_file"], 10**6) == JPEG
    line = json.loads((tmp_path / "preferences.jsonl").read_text())
    assert line["prompt"] == [{"role": "user", "content": "What is it?"}]


def test_no_rows_are_an_empty_list_and_no_tar(tmp_path):
    assert write_llava([], str(tmp_path)) == write_webdataset([], str(tmp_path)) == 0
    assert json.loads((tmp_path / "data.json").read_text()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]


@pytest.mark.parametrize(
    ("write", "row", "reason"),
    [
        (write_webdataset, {"image": b"hello"}, "s7: image format 'unknown'"),
        (write_llava, {"image": PNG}, "s7: LLaVA JSON holds dialogues"),
        (
            write_preferences,
            {"image": PNG, "prompt": "p", "chosen": "c"},
            "s7: a preference row needs rejected",
        ),
    ],
)
def test_rows_that_a_format_cannot_hold_are_named(tmp_path, write, row, reason):
    with pytest.raises(DataError, match=reason):
        write([{"sample_id": "s7", **row}], str(tmp_path))
