"""Formats of sources: each record becomes an index row or names its place and problem."""

import json
import re

import pytest

from medray.config import DataConfig
from medray.errors import DataError
from medray.ingest.source_index import detect, index_rows

CELL = {
    "img_name": "BNE_1.jpg",
    "label": "Neutrophil",
    "cell_size": "big",
    "cell_shape": "round",
    "nucleus_shape": "unsegmented-band",
    "nuclear_cytoplasmic_ratio": "low",
    "chromatin_density": "densely",
    "cytoplasm_vacuole": "no",
    "cytoplasm_texture": "clear",
    "cytoplasm_colour": "light blue",
    "granule_type": "small",
    "granule_colour": "pink",
    "granularity": "yes",
    "split": "train",
    "image": "images/BNE_1.jpg",
}
QA = {
    "qid": 3,
    "image_name": "a.jpg",
    "question": "Is it?",
    "answer": 5,
    "answer_type": "CLOSED ",
    "question_type": "PRES",
    "phrase_type": "test_freeform",
}
LLAVA = {
    "id": "x",
    "image": "x.jpg",
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cell."}],
}


def rows_of(path, kind, start=0, end=None):
    return list(
        index_rows(str(path), start, path.stat().st_size if end is None else end, kind, str(path.parent))
    )


def written(tmp_path, lines, name="records.jsonl"):
    path = tmp_path / name
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    )
    return path


def test_wbcatt(tmp_path):
    (row,) = rows_of(written(tmp_path, [CELL]), "wbcatt")
    assert (row["sample_id"], row["split"], row["error"]) == ("BNE_1.jpg", "train", None)
    assert row["image_file"] == str(tmp_path / "images/BNE_1.jpg")
    assert json.loads(row["payload"])["record"]["label"] == "Neutrophil"


@pytest.mark.parametrize(
    ("phrase", "file", "split"),
    [
        ("freeform", "test.jsonl", "test"),
        ("para", "test.jsonl", "test"),
        ("test_para", "test.jsonl", "test"),
        (None, "test.jsonl", "test"),
        ("test_para", "train.jsonl", "test"),
        ("freeform", "train.jsonl", "train"),
        ("freeform", "VQA_RAD Dataset Public.jsonl", "train"),
    ],
)
def test_vqa_rad_records_that_either_word_calls_test_are_held_out(tmp_path, phrase, file, split):
    record = {name: value for name, value in QA.items() if name != "phrase_type"} | (
        {"phrase_type": phrase} if phrase else {}
    )
    (row,) = rows_of(written(tmp_path, [record], file), "vqa-rad")
    assert row["split"] == split


def test_vqa_rad_quirks(tmp_path):
    """Integer answers, a blank after the answer type, the test split in phrase_type."""
    (row,) = rows_of(written(tmp_path, [QA]), "vqa-rad")
    assert row["error"] is None
    assert row["split"] == "test"
    assert json.loads(row["payload"])["qa"] == {
        "question": "Is it?",
        "reference": "5",
        "answer_type": "closed",
        "attribute": "PRES",
        "choices": None,
        "language": None,
    }


@pytest.mark.parametrize("field", ["conversations", "conversatons"])
def test_llava_and_llava_meds_misspelling(tmp_path, field):
    record = {"id": "x", "image": "x.jpg", field: LLAVA["conversations"]}
    (row,) = rows_of(written(tmp_path, [record]), "llava")
    assert json.loads(row["payload"])["turns"] == [
        {"role": "user", "text": "What?"},
        {"role": "assistant", "text": "A cell."},
    ]


@pytest.mark.parametrize(
    ("kind", "line", "reason"),
    [
        ("wbcatt", b'{"img_name": ', "not JSON"),
        ("wbcatt", b'{"img_name": "\xff\xfe"}', "not UTF-8"),
        ("wbcatt", [1, 2], "not an object"),
        ("wbcatt", {k: v for k, v in CELL.items() if k != "cell_size"}, "cell_size"),
        ("wbcatt", CELL | {"cell_size": "huge"}, "huge"),
        ("wbcatt", CELL | {"image": "../../etc/passwd"}, "leads out of"),
        ("wbcatt", CELL | {"image": "https://example.org/a.png"}, "leads out of"),
        ("vqa-rad", QA | {"answer": " "}, "'answer' is empty"),
        ("vqa-rad", QA | {"answer_type": "MAYBE"}, "OPEN or CLOSED"),
        ("llava", {"id": "x", "image": "x.jpg"}, "'conversations' is missing"),
        ("llava", LLAVA | {"conversations": [{"from": "robot", "value": "a"}]}, r"conversations\[0\]"),
        (
            "llava",
            LLAVA
            | {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "<image> c"}]},
            "contains <image> inside",
        ),
        (
            "llava",
            LLAVA | {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": ""}]},
            "empty",
        ),
    ],
)
def test_bad_record_names_place_and_problem(tmp_path, kind, line, reason):
    good = {"wbcatt": CELL, "vqa-rad": QA, "llava": LLAVA}[kind]
    first, bad = rows_of(written(tmp_path, [good, line]), kind)
    assert first["error"] is None
    assert bad["where"].startswith("records.jsonl byte ")

    assert re.search(reason, bad["error"])
    assert bad["sample_id"]


@pytest.mark.parametrize("step", [1, 7, 100, 333, 5000])
def test_byte_ranges_read_each_line_exactly_once(tmp_path, step):
    path = written(tmp_path, [CELL | {"img_name": f"BNE_{i}.jpg"} for i in range(20)])
    size = path.stat().st_size
    found = [
        row["sample_id"]
        for start in range(0, size, step)
        for row in rows_of(path, "wbcatt", start, min(start + step, size))
    ]
    assert found == [f"BNE_{i}.jpg" for i in range(20)]


@pytest.mark.parametrize(("record", "kind"), [(CELL, "wbcatt"), (QA, "vqa-rad"), (LLAVA, "llava")])
def test_formats_are_told_apart_by_content(tmp_path, record, kind):
    written(tmp_path, [record])
    assert detect(DataConfig(source=str(tmp_path)))[0] == kind


def test_unknown_and_missing_sources_are_named(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        detect(DataConfig(source=str(tmp_path / "none")))
    written(tmp_path, [{"hello": 1}])
    with pytest.raises(DataError, match="no known format"):
        detect(DataConfig(source=str(tmp_path)))
    with pytest.raises(DataError, match=r"\.parquet"):
        detect(DataConfig(source=str(tmp_path), format="shards"))
