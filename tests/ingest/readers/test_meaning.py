"""What could be taken for something else is read as what it is, or refused by name."""

import base64
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from medray.errors import BadRecord, DataError
from medray.ingest.readers.markers import asked, markers_in, without_marker
from medray.ingest.readers.options import options_in, options_of, right_option
from medray.split_names import record_split, split_of_folder
from tests.support.sources import dialogue, index, payloads, unused, write


def png(number=0):
    buffer = io.BytesIO()
    Image.fromarray(np.random.RandomState(number).randint(0, 255, (8, 8, 3), dtype=np.uint8)).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


def tar(path, **members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as out:
        for name, data in members.items():
            member = tarfile.TarInfo(name.replace("__", "."))
            member.size = len(data)
            out.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("partial-train", "train"),
        ("images_test", "test"),
        ("train_data", "train"),
        ("VQA_test", "test"),
        ("valQuestions", "val"),
        ("test_v2", "test"),
        ("blood_test", None),
        ("stress-test images", None),
        ("test-project", None),
        ("train_and_test", None),
        ("latest", None),
    ],
)
def test_folders_and_sections_with_other_words(name, split):
    assert split_of_folder(name) == split


def test_sections_with_other_words_are_splits(tmp_path):
    write(tmp_path / "a.json", {"train_data": [dialogue("0.png")], "images_test": [dialogue("1.png")]})
    assert [row["split"] for row in index(tmp_path)[1]] == ["train", "test"]


@pytest.mark.parametrize(
    ("record", "split"),
    [
        ({"is_test": True}, "test"),
        ({"isTrain": 1}, "train"),
        ({"is_test": "false"}, None),
        ({"in_val": "yes"}, "val"),
        ({"metadata": {"split": "Test"}}, "test"),
        ({"meta": {"Split": "dev"}}, "val"),
        ({"metadata": {"source": "x"}}, None),
        ({"is_testing_site": True}, None),
    ],
)
def test_splits_in_flags_and_metadata(record, split):
    assert record_split(record) == split


def test_tars_of_one_name_in_two_folders_are_apart(tmp_path):
    for number, folder in enumerate(("a", "b")):
        tar(tmp_path / folder / "000.tar", x__png=png(number), x__txt=b"A cell.")
    rows = index(tmp_path)[1]
    assert len({row["image_id"] for row in rows}) == 2 and not any(row["error"] for row in rows)


@pytest.mark.parametrize(("caption", "error"), [("  ", None), ("Another.", "says something else")])
def test_a_text_beside_the_json_of_a_tar(tmp_path, caption, error):
    tar(
        tmp_path / "a.tar", x__png=png(), x__json=json.dumps({"caption": caption}).encode(), x__txt=b"A cell."
    )
    (row,) = index(tmp_path)[1]
    assert (error in row["error"]) if error else payloads([row]) == [{"caption": "A cell.", "context": None}]


def test_other_peoples_tables_with_a_sample_id_are_not_our_shards(tmp_path):
    row = {
        "sample_id": "1",
        "image": {"bytes": png()},
        "question": "Which?",
        "options": ["lung", "heart"],
        "answer": "B",
    }
    write(tmp_path / "test-00000.parquet", [row])
    kind, (row,), _ = index(tmp_path)
    assert (kind, row["split"], payloads([row])[0]["qa"]["choices"]) == (
        "hf-parquet",
        "test",
        ["lung", "heart"],
    )


def test_questions_without_answers_are_no_captions(tmp_path):
    write(
        tmp_path / "q.jsonl",
        json.dumps({"question_id": 1, "image": "1.png", "text": "What is it?", "category": "conv"}) + "\n",
    )
    with pytest.raises(DataError, match=r"questions .* without answers"):
        index(tmp_path)


def test_the_image_beside_a_table_comes_before_one_of_that_name_elsewhere(tmp_path):
    write(tmp_path / "sub/q.json", [{"image": "1.png", "question": "Is it?", "answer": "yes"}])
    write(tmp_path / "shards/a.parquet", [{"image": "1.png", "question": "Is it?", "answer": "yes"}])
    for folder in (".", "sub", "shards"):
        write(tmp_path / folder / "1.png", png())
    for folder in ("sub", "shards"):
        (row,) = index(tmp_path / folder)[1]
        assert row["image_file"] == str(tmp_path / folder / "1.png")
    (tmp_path / "shards/a.parquet").unlink()
    (row,) = index(tmp_path)[1]
    assert row["image_file"] == str(tmp_path / "sub/1.png")


@pytest.mark.parametrize(
    "names", [("option1", "option2"), ("choice_1", "choice_2"), ("Option 0", "Option 1")]
)
def test_options_in_numbered_columns(names):
    assert options_of(dict(zip(names, ("lung", "heart")))) == [("A", "lung"), ("B", "heart")]


def test_options_among_candidates():
    assert options_of({"candidates": ["lung", "heart"]}) == [("A", "lung"), ("B", "heart")]


@pytest.mark.parametrize(
    ("answer", "options", "place"),
    [
        ("B", ["B", "A", "C"], None),
        ("A", ["A", "B"], 0),
        (1, ["2", "1", "3"], 1),
        (1, ["3", "2", "1"], None),
        ("1", ["3", "2", "1"], 2),
    ],
)
def test_an_answer_of_two_meanings_is_refused(answer, options, place):
    if place is None:
        with pytest.raises(BadRecord, match="'answer' is"):
            right_option({}, answer, list(zip("ABC", options)))
    else:
        assert right_option({}, answer, list(zip("ABC", options))) == place


@pytest.mark.parametrize(
    ("question", "options"),
    [
        ("Which organ?\nA. lung\nB. heart", [("A", "lung"), ("B", "heart")]),
        ("Which?\n(A) lung\n(B) heart\n(C) liver", [("A", "lung"), ("B", "heart"), ("C", "liver")]),
        ("A. lung\nB. heart", []),
        ("Which?\nA. lung", []),
        ("Which?\nB. lung\nC. heart", []),
        ("Is it?", []),
    ],
)
def test_options_inside_the_question(question, options):
    stem, found = options_in(question)
    assert found == options and stem == (question.split("\n")[0] if options else question)


@pytest.mark.parametrize("text", ["<img>a/b 1.jpg</img>What?", "<IMG_CONTEXT>What?", "<image>What?"])
def test_more_markers_of_images(text):
    assert (markers_in(text), without_marker(text)) == (1, "What?")


@pytest.mark.parametrize("text", ["Find <ref-object>.", "What is at <bbox>?"])
def test_placeholders_of_other_fields_are_refused(text):
    with pytest.raises(BadRecord, match="another field"):
        asked(text, "question")


@pytest.mark.parametrize(
    ("value", "caption"),
    [("['A cell.']", "A cell."), ("['A cell.', 'Two cells.']", None), ("[A] cell", "[A] cell")],
)
def test_captions_in_lists(tmp_path, value, caption):
    write(tmp_path / "metadata.csv", f'file_name,text\n1.png,"{value}"\n')
    (row,) = index(tmp_path)[1]
    assert ("2 texts" in row["error"]) if caption is None else payloads([row])[0]["caption"] == caption


def test_csv_with_blanks_after_commas_and_images_in_a_list(tmp_path):
    write(tmp_path / "a.csv", 'image, question, answer\n"[\'1.png\']", "Is it, here?", yes\n')
    (row,) = index(tmp_path)[1]
    assert payloads([row])[0]["qa"]["question"] == "Is it, here?" and row["image_file"].endswith("/1.png")


def test_an_image_in_the_record_comes_before_a_path(tmp_path):
    """VLMEvalKit's tables have both, and the path is one of another machine."""
    write(
        tmp_path / "a.tsv",
        f"index\timage\timage_path\tquestion\tanswer\n1\t{base64.b64encode(png()).decode()}\tx/1.png\tIs "
        "it?\tyes\n",
    )
    _, (row,), notes = index(tmp_path)
    assert row["image"] == png() and unused(notes) == {"a.tsv": {"index", "image_path"}}


@pytest.mark.parametrize("beside", ["reports/1.txt", "labels/1.txt", "qas/train.pkl", "tables/labels.xlsx"])
def test_labels_in_a_folder_of_their_own_make_no_bare_images(tmp_path, beside):
    write(tmp_path / "images/1.png", png())
    write(tmp_path / beside, "Clear lungs.")
    with pytest.raises(DataError, match="not read"):
        index(tmp_path)
    assert index(tmp_path, format="images")[0] == "images"


def test_columns_as_pandas_writes_them_are_named(tmp_path):
    write(tmp_path / "a.json", {"image": {"0": "1.png"}, "question": {"0": "Is it?"}, "answer": {"0": "yes"}})
    assert "orient='records'" in index(tmp_path)[1][0]["error"]


def test_a_column_named_twice_is_refused_in_a_format_that_is_named(tmp_path):
    write(tmp_path / "a.csv", "image,question,answer,answer\n1.png,Is it?,yes,no\n")
    with pytest.raises(DataError, match="'answer' twice"):
        index(tmp_path, format="questions")


def test_a_qid_alone_is_not_vqa_rads(tmp_path):
    write(tmp_path / "a.json", [{"qid": 1, "image": "1.png", "question": "Is it?", "answer": "yes"}])
    kind, rows, _ = index(tmp_path)
    assert kind == "questions" and payloads(rows)[0]["qa"]["reference"] == "yes"


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.jsonl"])
def test_images_of_a_patient_share_a_group_whatever_the_format(tmp_path, name):
    rows = [
        {"image": f"{number}.png", "patient_id": f"p{number // 2}x", "question": "Is it?", "answer": "yes"}
        for number in range(4)
    ]
    text = (
        "".join(json.dumps(row) + "\n" for row in rows)
        if name.endswith("l")
        else "image,patient_id,question,answer\n" + "".join(",".join(row.values()) + "\n" for row in rows)
    )
    write(tmp_path / name, rows if name.endswith("parquet") else text)
    groups = [row["group_id"] for row in index(tmp_path)[1]]
    assert groups[0] == groups[1] != groups[2] == groups[3] and "p0x" not in groups
