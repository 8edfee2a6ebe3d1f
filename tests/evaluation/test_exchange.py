import csv
import hashlib
import json
from pathlib import Path

import pytest

from medray.config import EvaluateConfig
from medray.errors import DataError
from medray.evaluation.exchange import (
    answers,
    by_id,
    lettered,
    read_lmms_eval,
    read_predictions,
    read_vlmevalkit,
    write_lmms_eval,
    write_predictions,
    write_vlmevalkit,
)
from medray.evaluation.scores import score
from medray.records import PREDICTION

EMPTY = dict.fromkeys(PREDICTION.names)
ROWS = [
    {
        **EMPTY, "sample_id": "q0", "image_id": "i0", "question": 'What is\tshown, "here"?', "reference": "肺 mass", "answer": "=1+1\nline", "answer_type": "open",
        "attribute": "organ", "model": "m", "finish_reason": "length", "tokens": 7, "modality": "ct", "language": "en", "benchmark": "slake",
    },
    {
        **EMPTY, "sample_id": "q1", "image_id": "i0", "question": "Which shape?\nA. round\nB. oval\nAnswer with the letter.", "reference": "B", "answer": "B",
        "answer_type": "mcq", "choices": ["round", "oval"], "model": "m", "option_logps": [-1.5, -0.25], "option_tokens": [1, 2],
    },
    {**EMPTY, "sample_id": "q2", "image_id": "i1", "question": "Left?", "reference": "yes", "answer_type": "closed", "model": "m", "error": "no image"},
    {**EMPTY, "sample_id": "q3", "image_id": "i2", "question": "Side?", "reference": "left", "answer": "", "answer_type": "closed", "choices": ["left", "right"], "model": "m"},
]


def test_predictions_are_written_and_read(tmp_path):
    assert write_predictions(ROWS, str(tmp_path / "p")) == 4
    assert list(read_predictions(str(tmp_path / "p"))) == ROWS
    with pytest.raises(DataError, match="already holds predictions"):
        write_predictions(ROWS, str(tmp_path / "p"))
    assert answers(str(tmp_path / "p")) == {"q0": "=1+1\nline", "q1": "B", "q3": ""}
    assert answers(str(tmp_path / "p"), "closed") == {"q3": ""}
    assert by_id(str(tmp_path / "p"), ["image_id", "modality"])["q0"] == {"image_id": "i0", "modality": "ct"}


@pytest.mark.parametrize(("line", "message"), [
    ('{"sample_id": 3}', "line 2: field 'sample_id' is not of type string"), ("{", "line 2: not JSON"), ("[1]", "line 2: holds a list"),
    ('{"sample_id": "q", "tokens": 1.5}', "field 'tokens'"), ('{"sample_id": "q", "option_logps": ["a"]}', "field 'option_logps'"),
])
def test_a_wrong_line_is_named(tmp_path, line, message):
    (tmp_path / "p.jsonl").write_text(f'{{"sample_id": "q0", "option_logps": [-1, -2.5]}}\n{line}\n')
    with pytest.raises(DataError, match=message):
        list(read_predictions(str(tmp_path / "p.jsonl")))


def test_what_is_not_there_is_said(tmp_path):
    for uri in (str(tmp_path / "none"), str(tmp_path)):
        with pytest.raises(DataError, match="predictions: "):
            list(read_predictions(uri))
    with pytest.raises(DataError, match="does not exist"):
        list(read_vlmevalkit(str(tmp_path / "none.tsv")))


def test_lmms_eval_round_trip(tmp_path):
    path = write_lmms_eval(ROWS, str(tmp_path), "slake", "20250131_120000")
    assert path.endswith("/20250131_120000_samples_slake.jsonl")
    lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    assert [line["doc_id"] for line in lines] == [0, 1, 2, 3]
    assert lines[0]["target"] == "肺 mass" and lines[0]["filtered_resps"] == ["=1+1\nline"] and lines[0]["resps"] == [["=1+1\nline"]]
    assert lines[1]["doc_hash"] == hashlib.sha256(json.dumps(lines[1]["doc"], indent=2, ensure_ascii=False).encode()).hexdigest()
    assert list(read_lmms_eval(path)) == ROWS
    assert score(path, EvaluateConfig(bootstrap=10))["by_type"]["mcq"]["accuracy"]["value"] == 1.0


def test_lmms_eval_logs_as_it_writes_them(tmp_path):
    folder = tmp_path / "org__model"
    folder.mkdir()
    logged = [
        {"doc_id": 7, "target": "Yes", "input": "Is it?", "filtered_resps": ["yes, it is"], "doc_hash": "ab", "token_counts": [{"output_tokens": 4}]},
        {"doc_id": 8, "target": "lung", "input": "Where?", "resps": [["In the lung."]], "filtered_resps": ["lung"], "doc_hash": "ab"},
        {"doc_id": 9, "target": "oval", "input": "Shape?\nA. round\nB. oval\nAnswer with the letter.", "filtered_resps": ["B"], "doc": {"img_name": "x.jpg"}},
        {"doc_id": 10, "target": "0", "filtered_resps": [["-1.5", "False"], ["-2.0", "False"]], "resps": []},
        {"target": "no id"},
    ]
    path = folder / "20250131_120000_samples_vqa_rad.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in logged) + "{\n")
    rows = list(read_lmms_eval(str(path)))
    assert [row["sample_id"] for row in rows[:3]] == ["vqa_rad:7", "vqa_rad:8", "vqa_rad:9"]
    assert [(row["answer_type"], row["reference"], row["answer"]) for row in rows[:3]] == [
        ("closed", "Yes", "yes, it is"), ("open", "lung", "lung"), ("mcq", "B", "B"),
    ]
    assert rows[2]["choices"] == ["round", "oval"] and rows[2]["image_id"] == "x.jpg" and rows[0]["image_id"] == "vqa_rad:7"
    assert rows[0]["model"] == "org__model" and rows[0]["benchmark"] == "vqa_rad" and rows[0]["tokens"] == 4
    assert [row["error"] for row in rows[3:]] == [
        "neither 'filtered_resps' nor 'resps' holds one text", "field 'doc_id' is missing", "the line is not JSON: Expecting property name enclosed in double quotes",
    ]
    result = score(str(path), EvaluateConfig(bootstrap=10))
    assert result["errors"] == 3 and result["overall"]["accuracy"]["value"] == 1.0 and set(result["by_type"]) == {"open", "closed", "mcq"}


@pytest.mark.parametrize("suffix", [".tsv", ".xlsx"])
def test_vlmevalkit_round_trip(tmp_path, suffix):
    path = str(tmp_path / f"m_slake{suffix}")
    assert write_vlmevalkit(ROWS, path) == 4
    assert list(read_vlmevalkit(path)) == ROWS
    assert score(path, EvaluateConfig(bootstrap=10))["errors"] == 1


def test_vlmevalkit_sees_its_own_columns(tmp_path):
    path = tmp_path / "t.tsv"
    write_vlmevalkit(ROWS, str(path))
    with open(path, encoding="utf-8", newline="") as handle:
        table = list(csv.DictReader(handle, delimiter="\t"))
    assert [row["index"] for row in table] == ["0", "1", "2", "3"]
    assert (table[1]["question"], table[1]["A"], table[1]["B"], table[1]["answer"], table[1]["prediction"]) == ("Which shape?", "round", "oval", "B", "B")
    assert table[2]["prediction"] == "Failed to obtain answer: no image" and table[0]["category"] == "organ" and table[0]["A"] == ""


def test_vlmevalkit_tables_as_it_writes_them(tmp_path):
    path = tmp_path / "LLaVA_SLAKE.tsv"
    with open(path, "w", encoding="utf-8", newline="") as handle:
        csv.writer(handle, delimiter="\t", quoting=csv.QUOTE_ALL).writerows([
            ["index", "Question", "A", "B", "answer", "category", "image_path", "prediction"],
            ["4", "Shape?", "round", "oval", "B", "shape", "x.jpg", "(B)"], ["5", "Is it?", "", "", "No", "", "x.jpg", "no"],
            ["6", "Where?", "", "", "lung", "", "", "Failed to obtain answer via API."], ["7", "Where?", "", "", "", "", "", "lung"],
        ])
    rows = list(read_vlmevalkit(str(path)))
    assert [(row["sample_id"], row["answer_type"], row["image_id"]) for row in rows[:2]] == [("LLaVA_SLAKE:4", "mcq", "x.jpg"), ("LLaVA_SLAKE:5", "closed", "x.jpg")]
    assert rows[0]["choices"] == ["round", "oval"] and rows[0]["attribute"] == "shape" and rows[0]["model"] == "LLaVA_SLAKE"
    assert [row["error"] for row in rows[2:]] == ["Failed to obtain answer via API.", "column 'answer' is empty"] and rows[2]["answer"] is None
    result = score(str(path), EvaluateConfig(bootstrap=10))
    assert result["overall"]["accuracy"]["value"] == 1.0 and result["errors"] == 2
    path.write_text("index\tquestion\n1\tx\n")
    with pytest.raises(DataError, match="needs the column 'answer'"):
        list(read_vlmevalkit(str(path)))


@pytest.mark.parametrize(("text", "found"), [
    ("Stem?\nA. x\nB. y\nAnswer.", ("Stem?", ["x", "y"])), ("Stem? (A) x (B) y", ("", [])), ("A. only one", ("", [])),
    ("Stem\nA: x\nC: y", ("", [])), ("1\n2\n(A) x\n(B) y\n(C) z", ("1\n2", ["x", "y", "z"])),
])
def test_lettered_options(text, found):
    assert lettered(text) == found
