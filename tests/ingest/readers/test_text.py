"""Captions, dialogues and preferences in the files people have."""

import json

import pytest

from medray.errors import BadRecord
from medray.ingest.readers.conversations import preference_pair
from tests.ingest.readers.test_vqa import csv_rows, json_rows
from tests.ingest.test_source_index import LLAVA, rows_of, written

FIGURE = {
    "pair_id": "18627621_F2",
    "pmid": "18627621",
    "fig_id": "F2",
    "fig_label": "Figure 2",
    "fig_caption": "Chest film with an effusion.",
    "in_text_mention": [
        {
            "tokens": "His status worsened ( Figure 2 ) .",
            "entities": [{"type": "figure", "entity_id": "2", "start_tok": 4, "end_tok": 6}],
        },
        "An effusion was seen .",
    ],
    "domain": {"chest_xray": True, "mri": False, "ct_scan": False, "histology": False, "gross": False},
}
PAIR = {
    "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is shown?"}]}],
    "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "A cell."}]}],
    "rejected": [{"role": "assistant", "content": "A bone."}],
    "images": ["a.png"],
}


CHAT = FIGURE | {
    "question_id": 3,
    "image": "18627621_F2.jpg",
    "text": "What is shown?\n<image>",
    "gpt4_answer": "An effusion.",
    "type": "conversation",
}


@pytest.mark.parametrize("records", [[FIGURE], {"chest_xray": [FIGURE], "mri": []}])
def test_llava_med_figure_captions(tmp_path, records):
    """A plain list, or the lists by domain of llava_med_instruct_fig_captions.json."""
    (row,) = json_rows(tmp_path, "fig_captions.json", "llava-med-captions", records)
    assert (row["sample_id"], row["image_file"]) == ("18627621_F2", str(tmp_path / "18627621_F2.jpg"))
    # sha256 of the article's pmid
    assert (row["modality"], row["group_id"], row["split"]) == ("x-ray", "2423688f395294aa", None)
    assert json.loads(row["payload"]) == {
        "caption": "Chest film with an effusion.",
        "context": "His status worsened ( Figure 2 ) .\nAn effusion was seen .",
    }


def test_llava_med_figure_without_mention_and_of_two_domains(tmp_path):
    record = FIGURE | {"in_text_mention": [], "domain": {"histology": True, "gross": True}}
    row, bad = json_rows(tmp_path, "c.json", "llava-med-captions", [record, FIGURE | {"fig_caption": " "}])
    assert (json.loads(row["payload"])["context"], row["modality"]) == (None, None)
    assert (bad["sample_id"], bad["error"]) == ("18627621_F2", "field 'fig_caption' is empty")


def test_llava_med_chat_questions(tmp_path):
    """What LLaVA-Med's judge reads of the figure is the question's context."""
    bare = CHAT | {"question_id": 5, "fig_label": None, "in_text_mention": []}
    row, bad, unlabelled, alone = json_rows(
        tmp_path,
        "qa50.json",
        "llava-med-qa",
        [
            CHAT,
            CHAT | {"question_id": 4, "gpt4_answer": ""},
            bare,
            bare | {"question_id": 6, "fig_caption": ""},
        ],
    )
    assert (row["sample_id"], row["image_id"], row["split"], row["modality"]) == (
        "qa50:3",
        "18627621_F2",
        "test",
        "x-ray",
    )
    assert json.loads(row["payload"])["qa"] == {
        "question": "What is shown?",
        "reference": "An effusion.",
        "answer_type": "open",
        "attribute": "conversation",
        "choices": None,
        "language": None,
        "context": "Figure Caption:\nFigure 2: Chest film with an effusion.\n\nFigure Context:\n\t- His "
        "status worsened ( Figure 2 ) .\n\t- An effusion was seen .",
    }
    assert bad["error"] == "field 'gpt4_answer' is empty"
    assert (
        json.loads(unlabelled["payload"])["qa"]["context"] == "Figure Caption:\nChest film with an effusion."
    )
    assert "context" not in json.loads(alone["payload"])["qa"]


def test_llava_marker_is_taken_off_the_first_turn_after_the_systems(tmp_path):
    turns = [
        {"from": "system", "value": "Be short."},
        {"from": "human", "value": "What?\n<image>"},
        {"from": "gpt", "value": "A cell."},
    ]
    row, several = rows_of(
        written(
            tmp_path, [LLAVA | {"conversations": turns}, LLAVA | {"id": "y", "image": ["a.jpg", "b.jpg"]}]
        ),
        "llava",
    )
    assert [turn["text"] for turn in json.loads(row["payload"])["turns"]] == ["Be short.", "What?", "A cell."]
    assert several["error"] == "field 'image' holds 2 images; a row must have one"


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("metadata.csv", None),
        ("test/metadata.csv", "test"),
        ("reports_valid.csv", "val"),
        ("train_and_test.csv", None),
    ],
)
def test_imagefolder_metadata_and_other_tables(tmp_path, name, split):
    (tmp_path / "test").mkdir()
    row, second = csv_rows(
        tmp_path,
        name,
        "captions",
        [
            {"file_name": "sub/1.png", "Text": " A lung, clear. ", "age": "40"},
            {"file_name": "2.png", "Text": "Two\nlines", "age": ""},
        ],
    )
    assert row["split"] == split
    assert row["image_file"] == str((tmp_path / name).parent / "sub/1.png")
    assert row["image_id"] == ("test/sub/1.png" if split == "test" else "sub/1.png")
    assert [json.loads(r["payload"])["caption"] for r in (row, second)] == ["A lung, clear.", "Two\nlines"]


def test_metadata_jsonl_and_a_split_column(tmp_path):
    lines = [
        {"file_name": "1.png", "text": "A", "split": "Validation"},
        {"file_name": "1.png", "text": "B"},
        {"file_name": "2.png"},
    ]
    first, second, bad = rows_of(written(tmp_path, lines, "metadata.jsonl"), "captions")
    assert (first["split"], second["split"]) == ("val", None)
    assert first["image_id"] == second["image_id"] == "1.png"
    assert first["sample_id"] != second["sample_id"]
    assert bad["error"] == "none of the fields caption, text, report is there"


@pytest.mark.parametrize(
    "record",
    [
        PAIR,
        {"prompt": "<image>\nWhat is shown?", "chosen": "A cell.", "rejected": "A bone.", "image": "a.png"},
        {"prompt": "What is shown?", "chosen": PAIR["chosen"], "rejected": PAIR["rejected"]},
        {"chosen": PAIR["prompt"] + PAIR["chosen"], "rejected": PAIR["prompt"] + PAIR["rejected"]},
        {**PAIR, "prompt": [{"role": "system", "content": "Be short."}, *PAIR["prompt"]]},
    ],
    ids=["messages", "text", "mixed", "implicit prompt", "system message"],
)
def test_preferences_in_each_of_trls_forms(record):
    assert preference_pair(record) == {"prompt": "What is shown?", "chosen": "A cell.", "rejected": "A bone."}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rejected": PAIR["chosen"]}, "are the same"),
        ({"chosen": None}, "'chosen' is empty"),
        ({"prompt": ""}, "'prompt' is empty"),
        ({"prompt": None}, "do not begin with the same question"),
        ({"prompt": "a <image> b <image>"}, "2 image markers"),
        ({"prompt": PAIR["prompt"] + PAIR["chosen"] + PAIR["prompt"]}, "3 messages"),
        ({"chosen": PAIR["chosen"] * 2}, "only answer"),
        ({"chosen": [{"role": "robot", "content": "x"}]}, "has the role 'robot'"),
        ({"chosen": [{"role": "assistant", "content": None}]}, "has no text"),
    ],
)
def test_preferences_that_cannot_be_used(change, reason):
    with pytest.raises(BadRecord, match=reason):
        preference_pair(PAIR | change)


def test_preference_lines(tmp_path):
    row, named, several = rows_of(
        written(tmp_path, [PAIR, PAIR | {"id": "p1"}, PAIR | {"images": ["a.png", "b.png"]}], "train.jsonl"),
        "preference",
    )
    assert (row["image_file"], row["split"], row["error"]) == (str(tmp_path / "a.png"), "train", None)
    assert json.loads(row["payload"]) == {
        "preference": {"prompt": "What is shown?", "chosen": "A cell.", "rejected": "A bone."}
    }
    assert row["sample_id"].startswith("a.png:")
    assert named["sample_id"] == "p1"
    assert several["error"] == "field 'images' holds 2 images; a row must have one"
