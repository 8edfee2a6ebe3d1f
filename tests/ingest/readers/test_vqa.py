"""Question sets in the files their makers publish: SLAKE, PMC-VQA (both versions), OmniMedVQA."""

import csv
import json

import pytest

from medray.data.attribute_questions import MCQ_LETTER, _mcq
from tests.ingest.test_source_index import rows_of

SLAKE = {
    "img_id": 1,
    "img_name": "xmlab1/source.jpg",
    "question": "What modality is used to take this image?",
    "answer": "MRI",
    "q_lang": "en",
    "location": "Abdomen",
    "modality": "MRI",
    "answer_type": "OPEN",
    "base_type": "vqa",
    "content_type": "Modality",
    "triple": ["vhead", "_", "_"],
    "qid": 11,
}
PMC_1 = {
    "Figure_path": "PMC1064097_F1.jpg",
    "Question": "What is the uptake pattern in the breast? ",
    "Answer": "Focal uptake pattern",
    "Choice A": " A:Diffuse uptake pattern ",
    "Choice B": " B:Focal uptake pattern ",
    "Choice C": " C:No uptake pattern ",
    "Choice D": " D:Cannot determine from the information given ",
    "Answer_label": "B",
}
PMC_2 = {
    "": "0",
    "Figure_path": "PMC8253797_Fig4_41.jpg",
    "Caption": "Axial slice, arrow at the nodule",
    "Question": "What does the arrow point at?",
    "Choice A": "A: A nodule",
    "Choice B": "B: A vessel",
    "Choice C": "C: A rib",
    "Choice D": "D: Air",
    "Answer": "A",
    "split": "train",
}
OMNI = {
    "dataset": "ACRIMA",
    "question_id": "ACRIMA_0001",
    "question_type": "Modality Recognition",
    "question": "What imaging technique was used?",
    "gt_answer": "Fundus imaging",
    "image_path": "Images/ACRIMA/Im553_g_ACRIMA.png",
    "option_A": "PET scan",
    "option_B": "CT scan",
    "option_C": "Blood test",
    "option_D": "Fundus imaging",
    "modality_type": "Fundus Photography",
}


def json_rows(tmp_path, name, kind, records):
    path = tmp_path / name
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return rows_of(path, kind)


def csv_rows(tmp_path, name, kind, records):
    path = tmp_path / name
    with path.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    return rows_of(path, kind)


def asked(row):
    assert row["error"] is None
    return json.loads(row["payload"])["qa"]


@pytest.mark.parametrize(
    ("name", "split"),
    [("train.json", "train"), ("validate.json", "val"), ("validation.json", "val"), ("test.json", "test")],
)
def test_slake_takes_the_split_from_the_file(tmp_path, name, split):
    (row,) = json_rows(tmp_path, name, "slake", [SLAKE])
    assert (row["split"], row["modality"], row["group_id"]) == (split, "mri", None)
    assert row["sample_id"] == f"{name.removesuffix('.json')}:11"
    assert (row["image_id"], row["image_file"]) == ("xmlab1/source.jpg", str(tmp_path / "xmlab1/source.jpg"))
    assert asked(row) == {
        "question": "What modality is used to take this image?",
        "reference": "MRI",
        "answer_type": "open",
        "attribute": "Modality",
        "choices": None,
        "language": "en",
    }


def test_slake_in_chinese(tmp_path):
    (row,) = json_rows(
        tmp_path,
        "test.json",
        "slake",
        [SLAKE | {"q_lang": "zh", "question": "图像里有肝脏吗?", "answer": "有", "answer_type": "CLOSED"}],
    )
    assert (asked(row)["language"], asked(row)["reference"], asked(row)["answer_type"]) == (
        "zh",
        "有",
        "closed",
    )


def test_pmc_vqa_version_1(tmp_path):
    (row,) = csv_rows(tmp_path, "train.csv", "pmc-vqa", [PMC_1])
    question = asked(row)
    assert (row["split"], row["image_file"]) == ("train", str(tmp_path / "PMC1064097_F1.jpg"))
    assert question["choices"] == [
        "Diffuse uptake pattern",
        "Focal uptake pattern",
        "No uptake pattern",
        "Cannot determine from the information given",
    ]
    assert (question["reference"], question["answer_type"]) == ("B", "mcq")
    assert question["question"] == _mcq(
        "What is the uptake pattern in the breast?", question["choices"], MCQ_LETTER[0]
    )


def test_pmc_vqa_version_2(tmp_path):
    """The answer is a letter, the split a column, and there is a caption."""
    other = PMC_2 | {"Figure_path": "PMC8253797_Fig4_42.jpg", "Answer": "C:A rib", "split": "test"}
    row, second = csv_rows(tmp_path, "train_2.csv", "pmc-vqa", [PMC_2, other])
    assert (asked(row)["reference"], row["split"]) == ("A", "train")
    assert (asked(second)["reference"], second["split"]) == ("C", "test")
    assert asked(row)["choices"] == ["A nodule", "A vessel", "A rib", "Air"]
    assert row["sample_id"] != second["sample_id"]
    # sha256 of PMC8253797: figures of one article
    assert row["group_id"] == second["group_id"] == "46fe7484fc829684"


def test_omnimedvqa(tmp_path):
    """Some records have fewer options, others differ from their option by case or the stop; one file
    writes `modality`.
    """
    fewer = OMNI | {
        "question_id": "B_1",
        "gt_answer": "ct Scan",
        "option_A": "X-ray.",
        "option_B": "CT scan.",
        "option_C": None,
        "option_D": "",
        "modality": "CT",
    }
    del fewer["modality_type"]
    row, second = json_rows(tmp_path, "ACRIMA.json", "omnimedvqa", [OMNI, fewer])
    assert (row["sample_id"], row["split"], row["modality"]) == ("ACRIMA_0001", None, "fundus photography")
    assert row["image_file"] == str(tmp_path / "Images/ACRIMA/Im553_g_ACRIMA.png")
    assert (asked(row)["reference"], asked(row)["attribute"]) == ("D", "Modality Recognition")
    assert (asked(second)["choices"], asked(second)["reference"], second["modality"]) == (
        ["X-ray.", "CT scan."],
        "B",
        "ct",
    )


@pytest.mark.parametrize(
    ("kind", "record", "reason"),
    [
        ("slake", SLAKE | {"q_lang": "fr"}, "q_lang"),
        ("slake", SLAKE | {"answer_type": ""}, "answer_type"),
        ("slake", SLAKE | {"img_name": "../x.jpg"}, "leads out of"),
        ("slake", SLAKE | {"answer": ["MRI"]}, "'answer' is a list"),
        ("omnimedvqa", OMNI | {"gt_answer": "MRI"}, "none of the options"),
        ("omnimedvqa", OMNI | {"option_A": "fundus imaging"}, "stands there twice"),
        ("omnimedvqa", OMNI | {"option_A": "", "option_B": "", "option_C": ""}, "2 to 26 options"),
        ("pmc-vqa", PMC_1 | {"Answer": "Something else", "Answer_label": ""}, "neither a letter"),
        ("pmc-vqa", PMC_1 | {"Choice C": " C: "}, "'Choice C' is empty"),
        ("pmc-vqa", PMC_1 | {"Figure_path": ""}, "'Figure_path' is empty"),
    ],
)
def test_bad_records_say_which_field(tmp_path, kind, record, reason):
    good = {"slake": SLAKE, "omnimedvqa": OMNI, "pmc-vqa": PMC_1}[kind]
    made = (
        csv_rows(tmp_path, "train.csv", kind, [good, record])
        if kind == "pmc-vqa"
        else json_rows(tmp_path, "train.json", kind, [good, record])
    )
    assert [row["error"] is None for row in made] == [True, False]
    assert reason in made[1]["error"]
    assert made[1]["where"].endswith("record 1")
