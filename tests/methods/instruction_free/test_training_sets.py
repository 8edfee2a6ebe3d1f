"""Sources to descriptions and questions: which rows an image gives, and the whole way through Ray Data."""

import json

import pyarrow.dataset
import pytest

from medray.config import DataConfig
from medray.data.attribute_descriptions import choice_questions, describe_attributes
from medray.errors import DataError
from medray.methods.instruction_free.training_sets import (
    DescriptionRows,
    form_of,
    write_descriptions,
    write_general,
)
from tests.data.test_attribute_descriptions import BARE_CELL, CELL, WBCATT
from tests.images.test_decoding import noise, saved

GROUP = {"image_id": "i", "image_file": "i.png", "image": None}
QA = {
    "qa": {
        "question": "Is it big?",
        "reference": "yes",
        "answer_type": "closed",
        "attribute": None,
        "choices": None,
        "language": None,
    }
}


def made(form, part, *members):
    return list(
        DescriptionRows(form, "Describe it.")(
            part, GROUP, [[f"s{n}", payload] for n, payload in enumerate(members)]
        )
    )


def test_training_images_give_descriptions_only():
    assert made("wbcatt", "labelled", {"record": CELL}, QA) == [
        ("descriptions", {"sample_id": "s0", "description": describe_attributes(CELL, WBCATT)})
    ]
    captions = [{"caption": "A lung. Clear.", "context": None}, QA, {"caption": "Normal.", "context": "x"}]
    assert made(None, "labelled", *captions) == [
        ("descriptions", {"sample_id": "s0", "description": "A lung. Clear."}),
        ("descriptions", {"sample_id": "s2", "description": "Normal."}),
    ]
    assert made(None, "labelled", {"record": CELL}) == []  # attributes of no known form are no description


def test_held_out_images_give_descriptions_and_all_questions():
    rows = made("wbcatt", "eval", {"record": BARE_CELL})
    assert [part for part, _ in rows[:2]] == ["eval_descriptions", "described"]
    described = rows[1][1]
    assert (described["question"], described["reference"], described["answer_type"]) == (
        "Describe it.",
        describe_attributes(BARE_CELL, WBCATT),
        "open",
    )
    assert (described["benchmark"], described["key"]) == ("described", "described/s0")
    asked = [row for part, row in rows if part == "choices"]
    assert [row["question"] for row in asked] == [
        row["question"] for row in choice_questions(BARE_CELL, WBCATT, "s0")
    ]
    assert len(asked) == 10  # granule type and colour are nil
    assert asked[0]["key"] == "choices/s0/cell_size"
    assert len({row["key"] for row in asked}) == 10
    plain = [row for part, row in rows if part == "plain"]
    assert (len(plain), plain[0]["key"]) == (3 * 12, "plain/s0/label/open")
    rows = list(
        DescriptionRows("wbcatt", "?", ("closed",))("eval", GROUP, [["s", {"record": CELL}], ["q", QA]])
    )
    assert [row["sample_id"] for part, row in rows if part == "plain"][-2:] == ["s/granularity/closed", "q"]


def test_held_out_captions_come_with_the_sources_own_questions():
    rows = made(None, "eval", {"caption": "A lung.", "context": None}, QA)
    assert [part for part, _ in rows] == ["eval_descriptions", "described", "plain"]
    assert (rows[2][1]["question"], rows[2][1]["reference"], rows[2][1]["key"]) == (
        "Is it big?",
        "yes",
        "plain/s1",
    )


def test_nothing_to_describe_is_set_aside():
    rows = made(
        "skincon",
        "labelled",
        {"attributes": {"papule": "absent"}},
        {"attributes": {"papule": "present", "cyst": "present"}},
    )
    assert rows[1] == ("descriptions", {"sample_id": "s1", "description": "papule, cyst"})
    part, bad = rows[0]
    assert (part, bad["sample_id"], bad["file"], bad["stage"]) == ("quarantine", "s0", "i.png", "data")
    assert "nothing to describe" in bad["reason"]


def table(folder, part):
    return pyarrow.dataset.dataset(str(folder / part), format="parquet").to_table().to_pylist()


@pytest.fixture
def cells(tmp_path, ray_cluster):
    (tmp_path / "source" / "images").mkdir(parents=True)
    records = []
    for number in range(12):
        name = f"c{number}.png"
        (tmp_path / "source" / "images" / name).write_bytes(saved(noise((20 + number, 20))))
        records.append(
            (CELL if number % 2 else BARE_CELL)
            | {"img_name": name, "image": f"images/{name}", "split": "train" if number < 8 else "val"}
        )
    records.append(CELL | {"img_name": "c99.png", "image": "images/c99.png", "split": "train"})
    (tmp_path / "source" / "records.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records)
    )
    return DataConfig(source=str(tmp_path / "source"), label_fraction=1.0, read_cpus=0.5)


@pytest.mark.ray
def test_a_source_becomes_parts(cells, tmp_path):
    out = tmp_path / "out"
    assert form_of(cells) == "wbcatt"
    counts = write_descriptions(cells, str(out), "Describe it.", max_eval_images=3, eval_rows=2)
    assert counts["descriptions"] == 8
    assert {row["sample_id"]: row["description"] for row in table(out, "descriptions")} == {
        f"c{number}.png": describe_attributes(CELL if number % 2 else BARE_CELL, WBCATT)
        for number in range(8)
    }
    held_out = {row["image_id"] for row in table(out, "described")}
    assert len(held_out) == counts["described"] == 3
    assert held_out <= {f"c{number}.png" for number in range(8, 12)}
    assert counts["eval_descriptions"] == 2
    odd = sum(int(name[1:-4]) % 2 for name in held_out)
    assert (
        counts["choices"] == len({row["key"] for row in table(out, "choices")}) == 12 * odd + 10 * (3 - odd)
    )
    assert counts["plain"] == 3 * 36
    assert [(row["sample_id"], "does not exist" in row["reason"]) for row in table(out, "quarantine")] == [
        ("c99.png", True)
    ]
    fewer = write_descriptions(cells.model_copy(update={"max_labelled": 5}), str(out), "Describe it.")
    # the fifth image is the missing one
    assert (fewer["descriptions"], fewer["eval_descriptions"], len(table(out, "descriptions"))) == (4, 0, 4)


@pytest.mark.ray
def test_a_split_without_descriptions_is_an_error(cells, tmp_path):
    with pytest.raises(
        DataError, match=r"data\.eval_split: no image of split 'test' .*: --set data\.eval_split=val"
    ):
        write_descriptions(
            cells.model_copy(update={"eval_split": "test"}), str(tmp_path / "out"), "Describe it."
        )


def test_scenes_are_general_questions(tmp_path):
    count = write_general(DataConfig(), str(tmp_path), "testbed:scenes", "test", max_images=2)
    rows = table(tmp_path, "questions")
    assert len(rows) == count == 2 * 9 * 3
    assert len({row["image"] for row in rows}) == 2
    assert {row["benchmark"] for row in rows} == {"general"}
    again = tmp_path / "again"
    assert write_general(DataConfig(), str(again), "testbed:scenes", "test", max_images=1) == 27
    assert table(again, "questions") == rows[:27]


@pytest.mark.ray
def test_any_source_of_questions_can_be_general(ray_cluster, tmp_path):
    (tmp_path / "source" / "images").mkdir(parents=True)
    rows = [
        {
            "qid": n,
            "image_name": f"{n}.png",
            "question": "Is there a mass?",
            "answer": "Yes",
            "answer_type": "CLOSED",
            "phrase_type": "test_freeform" if n else "freeform",
        }
        for n in range(3)
    ]
    for row in rows:
        (tmp_path / "source" / "images" / row["image_name"]).write_bytes(saved(noise((20 + row["qid"], 20))))
    (tmp_path / "source" / "qa.json").write_text(json.dumps(rows))
    assert (
        write_general(DataConfig(read_cpus=0.5), str(tmp_path / "out"), str(tmp_path / "source"), "test") == 2
    )
    assert {row["key"] for row in table(tmp_path / "out", "questions")} == {"general/qa:1", "general/qa:2"}
    with pytest.raises(DataError, match=r"evaluate\.general_split"):
        write_general(DataConfig(read_cpus=0.5), str(tmp_path / "out"), str(tmp_path / "source"), "val")
