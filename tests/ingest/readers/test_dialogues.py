"""Dialogues, preferences, ids and empty texts as people have them."""

import json

import pytest

from medray.errors import BadRecord
from medray.ingest.group_by_image import _prepared
from medray.ingest.readers.conversations import preference_pair
from medray.ingest.readers.markers import markers_in, without_marker
from medray.ingest.readers.messages import dialogue_turns
from medray.ingest.source_index import INDEX
from tests.ingest.readers.test_files import tar
from tests.support.sources import dialogue, index, payloads, unused, write


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("<image>\nWhat?", "What?"),
        ("What?<image>", "What?"),
        ("In this film <image> what is seen?", "In this film what is seen?"),
        ("What\n<image>\nis seen?", "What\nis seen?"),
        ("In <image>, what?", "In, what?"),
        ("<Image>What?", "What?"),
        ("<img> What?", "What?"),
        ("<img></img>What?", "What?"),
        ("<image 1> What?", "What?"),
        ("<|image_1|>\nWhat?", "What?"),
        ("<|vision_start|><|image_pad|><|vision_end|>What?", "What?"),
        ("[IMG] What?", "What?"),
        ("<ImageHere>What?", "What?"),
        ("<image/>What?", "What?"),
        ("a < b and <b>bold</b>?", "a < b and <b>bold</b>?"),
    ],
)
def test_markers_of_the_image(text, plain):
    assert without_marker(text) == plain
    assert markers_in(text) == (text != plain)


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        (["<image> and <image>?", "A."], "2 image markers"),
        (["<image> What?", "A.", "<image> And?", "B."], "2 image markers"),
        (["What?", "<image> A."], "contains <image>"),
        (["What?", "A.", "<image> And?", "B."], "contains <image>"),
        (["<video> What?", "A."], "only images"),
        (["<image>", "A."], "empty user text"),
    ],
)
def test_markers_that_cannot_be_meant(turns, reason):
    record = {
        "conversations": [
            {"from": "gpt" if n % 2 else "human", "value": text} for n, text in enumerate(turns)
        ]
    }
    with pytest.raises(BadRecord, match=reason):
        dialogue_turns(record)


BLOCKS = [
    {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A."}]},
]
FORMS = [
    {"conversations": [{"from": "Human", "value": "<image>\nWhat?"}, {"from": "GPT", "value": "A."}]},
    {"conversatons": [{"from": "human", "value": "What?<image>"}, {"from": "gpt", "value": "A."}]},
    {"messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A."}]},
    {"messages": BLOCKS},
    {"prompt": BLOCKS[:1], "completion": BLOCKS[1:]},
    {"prompt": "<image>What?", "completion": "A."},
    {"conversations": json.dumps([{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A."}])},
    {"messages": "[{'role': 'user', 'content': 'What?'}, {'role': 'assistant', 'content': 'A.'}]"},
    {"conversations": {"from": ["human", "gpt"], "value": ["<image>What?", "A."]}},
]


@pytest.mark.parametrize("record", FORMS)
def test_dialogues_in_every_form(record):
    assert dialogue_turns(record) == [{"role": "user", "text": "What?"}, {"role": "assistant", "text": "A."}]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": BLOCKS, "label": False}, "KTO"),
        ({"messages": BLOCKS, "kto_tag": True}, "KTO"),
        ({"prompt": "<image>What?", "completion": "A.", "label": 0}, "KTO"),
        ({"prompt": "<image>What?", "completion": "A.", "label": "True"}, "KTO"),
        ({"conversations": "hello"}, "not a list"),
        ({"messages": []}, "holds no message"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "'tool'"),
        ({"messages": [{"role": "user", "content": None}]}, "no text"),
        ({"conversations": {"from": ["human"], "value": []}}, "different lengths"),
        ({}, "missing"),
    ],
)
def test_dialogues_that_cannot_be_used(record, reason):
    with pytest.raises(BadRecord, match=reason):
        dialogue_turns(record)


def test_messages_and_images_in_json(tmp_path):
    write(tmp_path / "data.json", [{"messages": BLOCKS, "images": ["a.png"], "system": "Be short."}])
    kind, rows, notes = index(tmp_path)
    assert (kind, rows[0]["image_id"], len(payloads(rows))) == ("llava", "a.png", 1)
    assert unused(notes) == {"data.json": {"system"}}


def test_a_label_that_is_a_class_is_named_as_unused(tmp_path):
    write(
        tmp_path / "data.json",
        [{"messages": BLOCKS, "images": ["a.png"], "label": label} for label in (0, 1, "pneumonia")],
    )
    _, rows, notes = index(tmp_path)
    assert [row["error"] for row in rows] == [None] * 3
    assert unused(notes) == {"data.json": {"label"}}


def ask(**more):
    return {
        "conversations": [{"from": "human", "value": "<image>Is there a mass?"}],
        "images": ["a.png"],
        **more,
    }


@pytest.mark.parametrize(
    "record",
    [
        ask(chosen={"from": "gpt", "value": "Yes."}, rejected={"from": "gpt", "value": "No."}),
        ask(chosen="Yes.", rejected="No."),
        {"question": "Is there a mass?", "chosen": "Yes.", "rejected": "No."},
        {"instruction": "Is there", "input": "a mass?", "chosen": "Yes.", "rejected": "No."},
        {
            "prompt": [{"role": "user", "content": "Is there a mass?"}],
            "chosen": [{"role": "assistant", "content": "Yes."}],
            "rejected": [{"role": "assistant", "content": "No."}],
        },
        ask(
            chosen=[{"role": "assistant", "content": "Yes."}],
            rejected=[{"role": "assistant", "content": "No."}],
        ),
    ],
)
def test_preferences_in_the_forms_of_llama_factory_and_others(record):
    assert preference_pair(record) | {"prompt": ""} == {"prompt": "", "chosen": "Yes.", "rejected": "No."}
    assert preference_pair(record)["prompt"].split() == ["Is", "there", "a", "mass?"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (
            ask(chosen={"from": "gpt", "value": "No."}, rejected={"from": "gpt", "value": "No."}),
            "are the same",
        ),
        (ask(chosen="Yes.", rejected="nan"), "'rejected'"),
        (ask(chosen="Yes.", rejected=float("nan")), "'rejected' is empty"),
        ({"chosen": "Yes.", "rejected": "No."}, "'prompt' is missing"),
        (ask(chosen="Yes. <image>", rejected="No."), "contains <image>"),
        (ask(chosen={"from": "robot", "value": "x"}, rejected="No."), "'robot'"),
    ],
)
def test_preferences_with_a_reason(record, reason):
    with pytest.raises(BadRecord, match=reason):
        preference_pair(record)


def test_records_without_an_id_have_one_of_their_content(tmp_path):
    write(
        tmp_path / "data.json",
        [
            dialogue("a.png", "One."),
            dialogue("a.png", "Two."),
            dialogue("b.png", id=None),
            dialogue("c.png", id=7),
            dialogue("d.png", id=8.0),
        ],
    )
    ids = [row["sample_id"] for row in index(tmp_path)[1]]
    assert len(set(ids)) == 5
    assert [identity.partition(":")[0] for identity in ids[:3]] == ["a.png", "a.png", "b.png"]
    assert ids[3:] == ["7", "8"]
    assert [row["sample_id"] for row in index(tmp_path)[1]] == ids


def prepared(rows):
    import pyarrow as pa

    return _prepared(pa.Table.from_pylist(rows, schema=INDEX)).to_pylist()


def test_equal_ids_of_different_records(tmp_path):
    """LLaVA's id is the image's: its dialogues are all kept, whatever the order of the records; equal
    ones are duplicates.
    """
    records = [dialogue("a.png", answer, id="0001") for answer in ("One.", "Two.", "One.", "Three.")]
    write(tmp_path / "1/data.json", records)
    write(tmp_path / "2/data.json", records[::-1])
    found = []
    for name in "12":
        rows = prepared(index(tmp_path / name)[1])
        good = [row for row in rows if row["error"] is None]
        assert len({row["sample_id"] for row in good}) == 3
        assert [row["error"] for row in rows if row["error"]] == [
            "duplicate sample_id: the same record is in data.json record 0"
            if name == "1"
            else "duplicate sample_id: the same record is in data.json record 1"
        ]
        found.append({row["sample_id"]: row["payload"] for row in good})
    assert found[0] == found[1]


def test_a_record_in_two_splits_stays_held_out(tmp_path):
    write(tmp_path / "train.json", [dialogue("a.png", id="1"), dialogue("b.png", id="2")])
    write(tmp_path / "test.json", [dialogue("a.png", id="1")])
    rows = prepared(index(tmp_path)[1])
    assert sorted((row["sample_id"], row["split"], row["error"] is None) for row in rows) == [
        ("1", "test", True),
        ("1", "train", False),
        ("2", "train", True),
    ]


@pytest.mark.parametrize("value", [float("nan"), None, "", " ", "nan", "NaN", "null", "<NA>"])
def test_nothing_as_text_is_set_aside(tmp_path, value):
    write(
        tmp_path / "metadata.jsonl",
        json.dumps({"file_name": "a.png", "text": value})
        + "\n"
        + json.dumps({"file_name": "b.png", "text": "A lung."}),
    )
    bad, good = index(tmp_path)[1]
    assert "'text' is empty" in bad["error"]
    assert good["error"] is None


def test_truth_values_are_no_text_and_numbers_are(tmp_path):
    write(
        tmp_path / "metadata.jsonl",
        "\n".join(json.dumps({"file_name": "a.png", "text": value}) for value in (True, 3, 2.0, 2.5, "None")),
    )
    rows = index(tmp_path)[1]
    assert "is true, not text" in rows[0]["error"] and "empty" in rows[4]["error"]
    assert [one["caption"] for one in payloads(rows[1:4])] == ["3", "2", "2.5"]


RAD = {
    "qid": 1,
    "phrase_type": "freeform",
    "image_name": "synpic1.jpg",
    "question": "Is there a mass?",
    "answer": "Yes",
    "answer_type": "CLOSED",
}


@pytest.mark.parametrize(
    ("folder", "images"),
    [
        ("VQA_RAD Image Folder", None),
        ("images", None),
        ("", None),
        ("VQA_RAD Image Folder", "VQA_RAD Image Folder"),
        ("elsewhere/images", "elsewhere"),
        ("elsewhere", "elsewhere"),
    ],
)
def test_vqa_rad_finds_its_images(tmp_path, folder, images):
    write(tmp_path / "VQA_RAD Dataset Public.json", [RAD])
    write(tmp_path / folder / "synpic1.jpg", b"x")
    (row,) = index(tmp_path, **({"images": str(tmp_path / images)} if images else {}))[1]
    assert (row["image_file"], row["image_id"], row["split"]) == (
        str(tmp_path / folder / "synpic1.jpg"),
        "images/synpic1.jpg",
        "train",
    )


def test_images_in_a_usual_folder_of_any_table(tmp_path):
    write(tmp_path / "train.json", [dialogue("a.png")])
    write(tmp_path / "images/a.png", b"x")
    assert index(tmp_path)[1][0]["image_file"] == str(tmp_path / "images/a.png")


@pytest.mark.parametrize("name", ["data.json", "metadata.csv", "questions.csv"])
def test_folders_that_call_different_images_alike(tmp_path, name):
    """Each folder's records stay with its own images."""
    content = {
        "data.json": [dialogue("0.png")],
        "metadata.csv": "file_name,text\n0.png,A lung.\n",
        "questions.csv": "image,question,answer\n0.png,Is it?,yes\n",
    }[name]
    for site in ("site_a", "site_b", "train", "test"):
        write(tmp_path / site / name, content)
        write(tmp_path / site / "0.png", b"x")
    rows = index(tmp_path)[1]
    assert {(row["image_id"], row["image_file"]) for row in rows} == {
        (f"{site}/0.png", str(tmp_path / site / "0.png")) for site in ("site_a", "site_b", "train", "test")
    }
    assert sorted(str(row["split"]) for row in rows) == ["None", "None", "test", "train"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("data.csv", "Image;Question;Answer;organ\n0.png;Is it?;yes;lung\n"),
        (
            "metadata.jsonl",
            '{"file_name": "0.png", "question": "Is it?", "answer": "yes", "organ": "lung"}\n',
        ),
        (
            "data.json",
            '[{"images": ["0.png"], "question": "<image>Is it?", "answer": ["yes"], "organ": "lung"}]',
        ),
    ],
)
def test_questions_in_tables_of_any_making(tmp_path, name, text):
    write(tmp_path / name, text)
    kind, rows, notes = index(tmp_path)
    assert (kind, rows[0]["image_id"]) == ("questions", "0.png")
    (asked,) = payloads(rows)
    assert (asked["qa"]["question"], asked["qa"]["reference"], asked["qa"]["answer_type"]) == (
        "Is it?",
        "yes",
        "closed",
    )
    assert unused(notes) == {name: {"organ"}}


def test_multiple_choice_in_a_table(tmp_path):
    write(
        tmp_path / "mcq.csv",
        "image,question,A,B,C,answer\n0.png,Which?,liver,,heart,C\n0.png,Which?,liver,lung,heart,2\n",
    )
    row, bad = index(tmp_path)[1]
    (asked,) = payloads([row])
    assert (asked["qa"]["choices"], asked["qa"]["reference"]) == (["liver", "heart"], "B")
    assert "from 0 or from 1" in bad["error"]


@pytest.mark.parametrize(
    ("record", "payload"),
    [
        ({"question": "Which?", "choices": ["liver", "lung"], "answer": "lung"}, ("B", "mcq")),
        ({"question": "Which?", "choices": ["liver", "lung"], "answer": "A"}, ("A", "mcq")),
        ({"question": "<image>Is it?", "answer": "Yes"}, ("Yes", "closed")),
        ({"question": "How many?", "answer": 2.0}, ("2", "open")),
    ],
)
def test_questions_in_tars(tmp_path, record, payload):
    """A model sees the options of a question, whoever made the tar; fields that are not used are named."""
    tar(
        tmp_path / "test-000.tar",
        [("1.png", b"x"), ("1.json", json.dumps(record | {"organ": "lung"}).encode())],
    )
    _, rows, notes = index(tmp_path)
    qa = payloads(rows)[0]["qa"]
    assert ((qa["reference"], qa["answer_type"]), rows[0]["split"]) == (payload, "test")
    assert not qa["choices"] or all(choice in qa["question"] for choice in qa["choices"])
    assert unused(notes) == {"test-000.tar": {"organ"}}


@pytest.mark.parametrize(
    "record",
    [
        {"question": "Is it?", "answer": float("nan")},
        {"question": "Is it?", "answer": "nan"},
        {"split": "somewhere", "caption": "x"},
        {"caption": "<image> x"},
    ],
)
def test_records_in_tars_that_are_set_aside(tmp_path, record):
    tar(tmp_path / "a.tar", [("1.png", b"x"), ("1.json", json.dumps(record).encode())])
    assert index(tmp_path)[1][0]["error"]
