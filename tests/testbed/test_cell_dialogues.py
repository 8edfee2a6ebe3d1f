"""Conversations and questions from records: right answers in every form."""

import random
import re
from collections import Counter

import pytest

from medray.data.attribute_descriptions import LEAD
from medray.data.attribute_questions import (
    ATTRIBUTES,
    KINDS,
    LETTERS,
    attribute_dialogue,
    attribute_questions,
    describe,
    question,
    right_answer,
)
from medray.testbed.cells import sample_record
from medray.testbed.corpus import (
    QUESTIONER,
    SCENE,
    SHAPES,
    general_dialogue,
    general_report,
    listing,
    report_dialogue,
    sample_uniform,
    scene_dialogue,
    scene_questions,
    stated,
)

RECORD = {
    "label": "Monocyte",
    "cell_size": "big",
    "cell_shape": "irregular",
    "nucleus_shape": "unsegmented-indented",
    "nuclear_cytoplasmic_ratio": "low",
    "chromatin_density": "loosely",
    "cytoplasm_vacuole": "yes",
    "cytoplasm_texture": "frosted",
    "cytoplasm_colour": "purple blue",
    "granule_type": "nil",
    "granule_colour": "nil",
    "granularity": "no",
}


def test_one_question_per_attribute_and_kind():
    rows = attribute_questions(RECORD, rng=random.Random(0))
    assert [(r["attribute"], r["answer_type"]) for r in rows] == [
        (name, kind) for name in ATTRIBUTES for kind in KINDS
    ]
    by = {(r["attribute"], r["answer_type"]): r for r in rows}
    assert by["label", "open"]["reference"] == "monocyte"
    assert by["cytoplasm_vacuole", "open"]["reference"] == "present"
    assert by["granularity", "open"]["reference"] == "agranular"
    assert by["cytoplasm_colour", "open"] == {
        "attribute": "cytoplasm_colour",
        "answer_type": "open",
        "question": "What is the cytoplasm colour?",
        "reference": "purple blue",
        "choices": None,
    }


def test_mcq_letters_point_at_the_right_option():
    for seed in range(20):
        for row in attribute_questions(RECORD, ("mcq",), random.Random(seed)):
            options = dict(re.findall(r"^([A-D])\. (.+)$", row["question"], re.M))
            word = ATTRIBUTES[row["attribute"]].word(RECORD[row["attribute"]])
            assert options[row["reference"]] == word
            assert (
                list(options) == list(LETTERS[: len(row["choices"])])
                and list(options.values()) == row["choices"]
            )


def test_closed_answers_are_balanced_and_true():
    answers = Counter()
    for seed in range(100):
        for row in attribute_questions(RECORD, ("closed",), random.Random(seed)):
            attribute = ATTRIBUTES[row["attribute"]]
            said = [
                v
                for v in attribute.values
                if row["question"] == attribute.closed[0].format(word=attribute.word(v))
            ]
            assert row["reference"] == ("yes" if said == [RECORD[row["attribute"]]] else "no")
            answers[row["reference"]] += 1
    assert answers["yes"] / 1200 == pytest.approx(0.5, abs=0.06)


def test_the_same_record_gives_the_same_questions_without_a_generator():
    assert attribute_questions(RECORD) == attribute_questions(dict(RECORD))


def test_dialogues_alternate_and_answer_from_the_record():
    rng, kinds = random.Random(0), Counter()
    for _ in range(200):
        record = sample_record(rng)
        turns = attribute_dialogue(record, rng, 5)
        assert [t["role"] for t in turns] == ["user", "assistant"] * 5
        words = {a.word(record[name]) for name, a in ATTRIBUTES.items()}
        for asked, answer in zip(turns[::2], turns[1::2]):
            if answer["text"] in ("yes", "no"):
                kinds["closed"] += 1
            elif answer["text"] in LETTERS:
                kinds["letter"] += 1
                option = re.search(rf"^{answer['text']}\. (.+)$", asked["text"], re.M)[1]
                assert option in words
            elif len(answer["text"]) > 60:
                kinds["description"] += 1
                assert all(word in answer["text"] for word in words)
            else:
                kinds["words"] += 1
                assert answer["text"] in words
    assert min(kinds.values()) > 40 and set(kinds) == {"closed", "letter", "description", "words"}


def test_a_bad_record_is_named():
    for bad in (
        {**RECORD, "granule_type": "fluffy"},
        {k: v for k, v in RECORD.items() if k != "granule_type"},
    ):
        for call in (
            lambda r: attribute_questions(r),
            lambda r: attribute_dialogue(r, random.Random(0), 2),
            lambda r: describe(r, random.Random(0)),
        ):
            with pytest.raises(
                ValueError, match=r"granule_type is .*; allowed values: small, round, coarse, nil"
            ):
                call(bad)
    with pytest.raises(ValueError, match="turns is 0"):
        attribute_dialogue(RECORD, random.Random(0), 0)


def test_the_base_corpus_has_questioners_and_answers_reports_from_their_text():
    rng, roles = random.Random(0), Counter()
    for _ in range(150):
        roles.update(turn["role"] for turn in scene_dialogue(sample_uniform(SHAPES, rng), rng))
        report = report_dialogue(rng)
        roles.update(turn["role"] for turn in report)
        assert report[0]["role"] == "user"
        text = report[0]["text"].lower()
        for turn in report[1::2]:
            if len(turn["text"]) < 40 and turn["text"] not in ("yes", "no", *LETTERS):
                assert turn["text"] in text
    assert roles[QUESTIONER] > 200 and roles["user"] > 400 and roles["system"] > 5


def test_the_generalists_lists_and_choices_are_right():
    """Of pictures and, from their text, of reports; it keeps the base's forms beside them."""
    rng, forms = random.Random(0), Counter()
    scene = {
        "shape": "star",
        "colour": "red",
        "size": "big",
        "position": "left",
        "texture": "plain",
        "background": "white",
        "dots": "few",
        "frame": "no",
        "focus": "sharp",
    }
    _, answer = listing(scene, SCENE, rng)
    assert sorted(answer["text"].split(", ")) == [
        "big size",
        "few dots",
        "left position",
        "plain texture",
        "red colour",
        "sharp focus",
        "star",
        "white background",
    ]
    turns = stated(scene, SCENE, rng, turns=9)
    for asked, answer in zip(turns[::2], turns[1::2]):
        name = re.match(r"What is the (.+)\?", asked["text"])[1]
        letter = re.fullmatch(rf"{LEAD} ([A-Z])\.", answer["text"])[1]
        assert f"\n{letter}. {scene[name]}\n" in asked["text"]
    for _ in range(200):
        turns = general_report(rng)
        text, said = turns[0]["text"].partition("\n")[0].lower(), turns[1]["text"]
        forms["stated" if said.startswith(LEAD) else "list" if ", " in said else "other"] += 1
        if ", " in said and ";" in text:
            values = [
                part.split(" ")[0].lower()
                for part in said.split(", ")
                if part not in ("granularity", "cytoplasm vacuole", "frame")
            ]
            assert all(value in text for value in values)
        first = general_dialogue(sample_uniform(SHAPES, rng), rng)
        forms[
            "pictured list"
            if ", " in first[1]["text"] and "." not in first[1]["text"]
            else "pictured choice"
            if first[1]["text"].startswith(LEAD)
            else "pictured base"
        ] += 1
    assert min(forms.values()) > 25 and len(forms) == 6, forms


def test_scene_questions_depend_on_their_number_only():
    few, more = list(scene_questions(1)), list(scene_questions(2, ("mcq",)))
    assert len(few) == 27
    assert [row["sample_id"] for row in more] == [
        f"scene-0-{number:05d}/{name}/mcq" for number in range(2) for name in SHAPES
    ]
    assert few[0]["image"] == more[0]["image"] != more[9]["image"]


@pytest.mark.parametrize("schema", [ATTRIBUTES, SHAPES], ids=["cells", "shapes"])
def test_right_answer_inverts_question_making(schema):
    rng = random.Random(3)
    for _ in range(300):
        record = sample_uniform(schema, rng)
        name, kind = rng.choice(list(schema)), rng.choice(KINDS)
        row = question(record, name, kind, rng, schema, canonical=rng.random() < 0.5)
        assert right_answer(row["question"], record, schema) == row["reference"]


@pytest.mark.parametrize(
    "text",
    [
        "Describe the image.",
        "What is this?",
        "What is the cell shape?\nA. huge\nB. tiny\nAnswer with the letter.",
        "",
    ],
)
def test_right_answer_does_not_guess(text):
    assert right_answer(text, RECORD) is None
