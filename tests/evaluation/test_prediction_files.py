import csv
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medray.config import EvaluateConfig
from medray.errors import DataError
from medray.evaluation.prediction_files import (
    answers,
    by_id,
    read_lmms_eval,
    read_predictions,
    read_vlmevalkit,
    write_lmms_eval,
    write_predictions,
    write_vlmevalkit,
)
from medray.evaluation.scores import score
from medray.evaluation.targets import TargetError, documented_options, lettered, question_of
from medray.records import PREDICTION

EMPTY = dict.fromkeys(PREDICTION.names)
ROWS = [
    {
        **EMPTY,
        "sample_id": "q0",
        "image_id": "i0",
        "question": 'What is\tshown, "here"?',
        "reference": "肺 mass",
        "answer": "=1+1\nline",
        "answer_type": "open",
        "attribute": "organ",
        "model": "m",
        "finish_reason": "length",
        "tokens": 7,
        "modality": "ct",
        "language": "en",
        "benchmark": "slake",
    },
    {
        **EMPTY,
        "sample_id": "q1",
        "image_id": "i0",
        "question": "Which shape?\nA. round\nB. oval\nAnswer with the letter.",
        "reference": "B",
        "answer": "B",
        "answer_type": "mcq",
        "choices": ["round", "oval"],
        "model": "m",
        "option_logps": [-1.5, -0.25],
        "option_tokens": [1, 2],
    },
    {
        **EMPTY,
        "sample_id": "q2",
        "image_id": "i1",
        "question": "Left?",
        "reference": "yes",
        "answer_type": "closed",
        "model": "m",
        "error": "no image",
    },
    {
        **EMPTY,
        "sample_id": "q3",
        "image_id": "i2",
        "question": "Side?",
        "reference": "left",
        "answer": "",
        "answer_type": "closed",
        "choices": ["left", "right"],
        "model": "m",
    },
]


def test_predictions_are_written_and_read(tmp_path):
    assert write_predictions(ROWS, str(tmp_path / "p")) == 4
    assert list(read_predictions(str(tmp_path / "p"))) == ROWS
    with pytest.raises(DataError, match="already holds predictions"):
        write_predictions(ROWS, str(tmp_path / "p"))
    assert answers(str(tmp_path / "p")) == {"q0": "=1+1\nline", "q1": "B", "q3": ""}
    assert answers(str(tmp_path / "p"), "closed") == {"q3": ""}
    assert by_id(str(tmp_path / "p"), ["image_id", "modality"])["q0"] == {"image_id": "i0", "modality": "ct"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"sample_id": 3}', "line 2: field 'sample_id' is not of type string"),
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: holds a list"),
        ('{"sample_id": "q", "tokens": 1.5}', "field 'tokens'"),
        ('{"sample_id": "q", "option_logps": ["a"]}', "field 'option_logps'"),
    ],
)
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
    assert (
        lines[0]["target"] == "肺 mass"
        and lines[0]["filtered_resps"] == ["=1+1\nline"]
        and lines[0]["resps"] == [["=1+1\nline"]]
    )
    assert (
        lines[1]["doc_hash"]
        == hashlib.sha256(json.dumps(lines[1]["doc"], indent=2, ensure_ascii=False).encode()).hexdigest()
    )
    assert list(read_lmms_eval(path)) == ROWS
    assert score(path, EvaluateConfig(bootstrap=10))["by_type"]["mcq"]["accuracy"]["value"] == 1.0


def test_lmms_eval_logs_as_it_writes_them(tmp_path):
    folder = tmp_path / "org__model"
    folder.mkdir()
    logged = [
        {
            "doc_id": 7,
            "target": "Yes",
            "input": "Is it?",
            "filtered_resps": ["yes, it is"],
            "doc_hash": "ab",
            "token_counts": [{"output_tokens": 4}],
        },
        {
            "doc_id": 8,
            "target": "lung",
            "input": "Where?",
            "resps": [["In the lung."]],
            "filtered_resps": ["lung"],
            "doc_hash": "ab",
        },
        {
            "doc_id": 9,
            "target": "oval",
            "input": "Shape?\nA. round\nB. oval\nAnswer with the letter.",
            "filtered_resps": ["B"],
            "doc": {"img_name": "x.jpg"},
        },
        {"doc_id": 10, "target": "0", "filtered_resps": [["-1.5", "False"], ["-2.0", "False"]], "resps": []},
        {"target": "no id"},
    ]
    path = folder / "20250131_120000_samples_vqa_rad.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in logged) + "{\n")
    rows = list(read_lmms_eval(str(path)))
    assert [row["sample_id"] for row in rows[:3]] == ["vqa_rad:7", "vqa_rad:8", "vqa_rad:9"]
    assert [(row["answer_type"], row["reference"], row["answer"]) for row in rows[:3]] == [
        ("closed", "Yes", "yes, it is"),
        ("open", "lung", "lung"),
        ("mcq", "B", "B"),
    ]
    assert (
        rows[2]["choices"] == ["round", "oval"]
        and rows[2]["image_id"] == "x.jpg"
        and rows[0]["image_id"] == "vqa_rad:7"
    )
    assert rows[0]["model"] == "org__model" and rows[0]["benchmark"] == "vqa_rad" and rows[0]["tokens"] == 4
    assert [row["error"] for row in rows[3:]] == [
        "neither 'filtered_resps' nor 'resps' holds one text",
        "field 'doc_id' is missing",
        "the line is not JSON: Expecting property name enclosed in double quotes",
    ]
    result = score(str(path), EvaluateConfig(bootstrap=10))
    assert (
        result["errors"] == 3
        and result["overall"]["accuracy"]["value"] == 1.0
        and set(result["by_type"]) == {"open", "closed", "mcq"}
    )


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
    assert (
        table[1]["question"],
        table[1]["A"],
        table[1]["B"],
        table[1]["answer"],
        table[1]["prediction"],
    ) == ("Which shape?", "round", "oval", "B", "B")
    assert (
        table[2]["prediction"] == "Failed to obtain answer: no image"
        and table[0]["category"] == "organ"
        and table[0]["A"] == ""
    )


def test_vlmevalkit_tables_as_it_writes_them(tmp_path):
    path = tmp_path / "LLaVA_SLAKE.tsv"
    with open(path, "w", encoding="utf-8", newline="") as handle:
        csv.writer(handle, delimiter="\t", quoting=csv.QUOTE_ALL).writerows(
            [
                ["index", "Question", "A", "B", "answer", "category", "image_path", "prediction"],
                ["4", "Shape?", "round", "oval", "B", "shape", "x.jpg", "(B)"],
                ["5", "Is it?", "", "", "No", "", "x.jpg", "no"],
                ["6", "Where?", "", "", "lung", "", "", "Failed to obtain answer via API."],
                ["7", "Where?", "", "", "", "", "", "lung"],
            ]
        )
    rows = list(read_vlmevalkit(str(path)))
    assert [(row["sample_id"], row["answer_type"], row["image_id"]) for row in rows[:2]] == [
        ("LLaVA_SLAKE:4", "mcq", "x.jpg"),
        ("LLaVA_SLAKE:5", "closed", "x.jpg"),
    ]
    assert (
        rows[0]["choices"] == ["round", "oval"]
        and rows[0]["attribute"] == "shape"
        and rows[0]["model"] == "LLaVA_SLAKE"
    )
    assert [row["error"] for row in rows[2:]] == [
        "Failed to obtain answer via API.",
        "column 'answer' is empty",
    ] and rows[2]["answer"] is None
    result = score(str(path), EvaluateConfig(bootstrap=10))
    assert result["overall"]["accuracy"]["value"] == 1.0 and result["errors"] == 2
    with open(path, "a", encoding="utf-8") as handle:
        handle.write('"8"\t"Where?"\n')
    assert list(read_vlmevalkit(str(path)))[-1]["error"] == "the row has 2 cells, the table 8 columns"
    path.write_text("index\tquestion\tanswer\tprediction\tanswer\n")
    with pytest.raises(DataError, match="'answer' is there twice"):
        list(read_vlmevalkit(str(path)))
    path.write_bytes(b"index\tquestion\tanswer\tprediction\n1\tx\ty\t\xff\n")
    with pytest.raises(DataError, match="not UTF-8"):
        list(read_vlmevalkit(str(path)))
    path.write_text("index\tquestion\n1\tx\n")
    with pytest.raises(DataError, match="needs the column 'answer'"):
        list(read_vlmevalkit(str(path)))


OPTIONS = "Which organ is shown?\nA. liver\nB. lung\nC. heart\nD. None"


@pytest.mark.parametrize(
    ("question", "target", "letter"),
    [
        (OPTIONS, 0, "A"),
        (OPTIONS, 3, "D"),
        (OPTIONS, "1", "B"),
        (OPTIONS, 2.0, "C"),
        (OPTIONS, "Lung.", "B"),
        (OPTIONS, "(c)", "C"),
        (OPTIONS, "Ｂ", "B"),
        (OPTIONS, "B. lung", "B"),
        (OPTIONS, ["D"], "D"),
        (OPTIONS, "['heart']", "C"),
        (OPTIONS, "None", "D"),
        ("How many?\nA. 0\nB. 1\nC. 2", 1, "B"),
        ("How many?\nA. 1\nB. 2", 0, "A"),
        ("Which? (A) lung, (B) liver", "liver", "B"),
        ("Which? A. lung B. liver", 1, "B"),
        ("Welches?\nＡ．Leber\n\nＢ．Lunge", "Lunge", "B"),
        ("哪个？\nA、肝\nB、肺", 1, "B"),
        ("Which letter?", "B", "B"),
        ("Which?\na) liver\nb) lung", 1, "B"),
        ("Which?\nA - liver\nB – lung", "lung", "B"),
        ("Which?\n（Ａ）liver\n（Ｂ）lung", 0, "A"),
    ],
)
def test_a_target_may_be_a_letter_a_place_or_a_text(question, target, letter):
    found = question_of(question, target, None)
    assert (found["reference"], found["answer_type"]) == (letter, "mcq")


@pytest.mark.parametrize(
    ("question", "target", "message"),
    [
        (OPTIONS, 4, "4 is not the place"),
        (OPTIONS, "brain", "'brain' is not one of the 4 options"),
        (OPTIONS, None, "is missing"),
        (OPTIONS, True, "is a bool"),
        (OPTIONS, ["A", "B"], "holds 2 answers"),
        (OPTIONS, {}, "is a dict"),
        (OPTIONS, " ", "is empty"),
        ("How many?\nA. 1\nB. 2", 1, "the place of one option and the text of another"),
        ("Which organ?", 2, "may be the place of an option"),
    ],
)
def test_a_target_that_tells_no_answer_is_no_open_question(question, target, message):
    with pytest.raises(TargetError, match=message):
        question_of(question, target, None, answer="B")


def test_the_kind_of_a_question_without_options():
    assert question_of("How many?", "2", None, answer="2") == {
        "reference": "2",
        "answer_type": "open",
        "choices": None,
    }
    assert question_of("Is it?", "ＹＥＳ", None)["answer_type"] == "closed"
    assert question_of("Is vitamin A. in (B) vitamin?", "yes", None)["answer_type"] == "closed"


@pytest.mark.parametrize(
    ("doc", "options"),
    [
        ({"choices": ["liver", "lung"]}, ["liver", "lung"]),
        ({"options": ["A. liver", "B. lung"]}, ["liver", "lung"]),
        ({"choices": {"text": ["x", "y"], "label": ["A", "B"]}}, ["x", "y"]),
        ({"options": {"A": "x", "B": "y"}}, ["x", "y"]),
        ({"A": "x", "B": "y", "C": None}, ["x", "y"]),
        ({"question": "x"}, []),
    ],
)
def test_options_stand_in_a_logs_copy_of_the_data(doc, options):
    assert documented_options(doc) == options


def test_logs_whose_target_is_a_place_are_multiple_choice(tmp_path, caplog):
    lines = [
        {"doc_id": 0, "input": OPTIONS, "target": 1, "filtered_resps": ["B"], "medqa_acc": 1.0},
        {"doc_id": 1, "input": OPTIONS, "target": "3", "filtered_resps": ["D."]},
        {"doc_id": 2, "input": OPTIONS, "target": "spleen", "filtered_resps": ["B"]},
        {
            "doc_id": 3,
            "doc": {"choices": ["x", "y"]},
            "arguments": {"gen_args_0": {"arg_0": "Which?"}},
            "target": "1",
            "resps": [["B"]],
        },
        {"doc_id": 4, "input": "Is it?", "target": "Yes", "filtered_resps": ["<think>no</think>Yes"]},
        {"doc_id": 5, "input": "Is it?", "target": "Yes", "filtered_resps": ["<think>no"]},
    ]
    path = tmp_path / "20250101_000000_samples_medqa.jsonl"
    path.write_text("\n" + "".join(json.dumps(line) + "\n" for line in lines))
    rows = list(read_predictions(str(path)))
    assert [(row["answer_type"], row["reference"]) for row in rows] == [
        ("mcq", "B"),
        ("mcq", "D"),
        (None, None),
        ("mcq", "B"),
        ("closed", "Yes"),
        ("closed", "Yes"),
    ]
    assert rows[3]["question"] == "Which?" and rows[3]["choices"] == ["x", "y"]
    assert "the target 'spleen' is not one of the 4 options" in rows[2]["error"]
    assert "fields that are not read: medqa_acc" in caplog.text
    result = score(str(path), EvaluateConfig(bootstrap=10))
    assert result["error_reasons"] == {"the target '...' is not one of the # options": 1} and result[
        "thinking"
    ] == {"answers": 2, "unfinished": 1}
    assert (
        result["by_type"]["mcq"]["accuracy"]["value"] == 1.0
        and result["by_type"]["closed"]["accuracy"]["value"] == 0.5
    )
    assert result["by_type"]["closed"]["unfinished_thinking"] == 0.5


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".xlsx"])
def test_letters_stay_with_their_columns_where_an_option_is_lost(tmp_path, suffix, caplog):
    table = [
        ["index", "question", "A", "B", "C", "D", "E", "answer", "prediction", "hint"],
        ["1", "How many?", "", "Two", "One", "Three", "", "D", "D", ""],
        ["2", "How many?", "Zero", "", "One", "Three", "", "C", "D", ""],
        ["3", "Which?", "x", "y", "z", "", "", "D", "D", "h"],
        ["4", "Which?", "None", "NA", "null", "nan", "", "NA", "B", ""],
        ["5", "Which?", "x", "y", "", "", "", "z", "A", ""],
    ]
    path = str(tmp_path / f"m_seed{suffix}")
    if suffix == ".xlsx":
        import openpyxl

        book = openpyxl.Workbook()
        for line in table:
            book.active.append([cell or None for cell in line])
        book.save(path)
    else:
        with open(path, "w", encoding="utf-8", newline="") as handle:
            csv.writer(handle, delimiter="\t" if suffix == ".tsv" else ",").writerows(table)
    rows = list(read_predictions(path))
    assert [row["reference"] for row in rows] == ["D", "C", "D", "B", None]
    assert [row["choices"] for row in rows[:4]] == [
        ["", "Two", "One", "Three"],
        ["Zero", "", "One", "Three"],
        ["x", "y", "z", ""],
        ["None", "NA", "null", "nan"],
    ]
    assert "column 'answer': the target 'z' is not one of the 2 options" in rows[4]["error"]
    assert "columns that are not read: hint" in caplog.text
    assert score(path, EvaluateConfig(bootstrap=10))["by_type"]["mcq"]["accuracy"]["value"] == 3 / 4


def test_a_tables_column_of_thinking_is_counted_and_not_scored(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text(
        "index,question,answer,prediction,thinking\n1,Is it?,Yes,Yes,No... or yes\n2,Is it?,Yes,Yes,\n3,Is "
        "it?,Yes,,unfinished\n4,Is it?,Yes,<think>no</think>Yes,\n"
    )
    assert [row["thinking"] for row in read_predictions(str(path))] == ["finished", None, "unfinished", None]
    result = score(str(path), EvaluateConfig(bootstrap=10))
    assert (
        result["thinking"] == {"answers": 3, "unfinished": 1}
        and result["overall"]["accuracy"]["value"] == 3 / 4
    )


def test_what_is_not_read_of_our_own_files_is_named_once(tmp_path, caplog):
    rows = [
        {
            "sample_id": f"q{number}",
            "image_id": "i",
            "answer": "yes",
            "reference": "yes",
            "answer_type": "closed",
            "confidence": 1,
        }
        for number in range(3)
    ]
    folder = tmp_path / "p"
    folder.mkdir()
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "notes.txt").write_text("x")
    list(read_predictions(str(folder)))
    assert (
        caplog.text.count("fields that are not read: confidence") == 1
        and "only the .jsonl files are read, of 1 x .jsonl, 1 x .txt" in caplog.text
    )
    (folder / "p.jsonl").write_text('{"question_id": 1, "text": "yes"}\n')
    with pytest.raises(DataError, match=r"line 1: has neither 'sample_id'.*it has question_id, text"):
        list(read_predictions(str(folder)))
    (folder / "p.jsonl").unlink()
    with pytest.raises(DataError, match=r"holds no .*; there is 1 x \.txt"):
        list(read_predictions(str(folder)))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Stem?\nA. x\nB. y\nAnswer.", ("Stem?", ["x", "y"])),
        ("Stem? (A) x (B) y", ("", [])),
        ("A. only one", ("", [])),
        ("Stem\nA: x\nC: y", ("", [])),
        ("1\n2\n(A) x\n(B) y\n(C) z", ("1\n2", ["x", "y", "z"])),
    ],
)
def test_lettered_options(text, found):
    assert lettered(text) == found


def test_a_quotation_mark_that_is_never_closed_swallows_no_rows(tmp_path):
    (tmp_path / "a.tsv").write_text(
        'index\tquestion\tanswer\tprediction\n1\t"Is it?\tyes\tyes\n2\tIs it?\tyes\tno\n'
    )
    with pytest.raises(DataError, match="not a table of tab-separated values"):
        list(read_vlmevalkit(str(tmp_path / "a.tsv")))


@pytest.mark.parametrize("read", [answers, lambda uri: by_id(uri, ["answer"])])
def test_an_answer_that_comes_twice_is_refused(tmp_path, read):
    row = dict.fromkeys(PREDICTION.names) | {"sample_id": "q", "answer": "yes", "answer_type": "open"}
    pq.write_table(pa.Table.from_pylist([row, row], schema=PREDICTION), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="'q' comes twice"):
        read(str(tmp_path))
