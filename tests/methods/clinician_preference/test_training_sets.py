"""What clinician preference alignment reads of a source: captions, attributes apart from them, held-out
questions.
"""

import json
from pathlib import Path

import pyarrow.dataset
import pytest

from medray.config import CaptionedDataConfig, CaptionsConfig
from medray.data.attribute_questions import ATTRIBUTES
from medray.errors import DataError
from medray.methods.clinician_preference.training_sets import CaptionedRows, attributes_of, write_captioned
from medray.testbed.cells import write_cells

RECORD = {name: attribute.values[0] for name, attribute in ATTRIBUTES.items()}
GROUP = {"image_id": "i", "split": "train", "modality": None, "image_file": "i.jpg"}


def made(rows, part, payloads, group=GROUP):
    return [row for _, row in rows(part, group, [[f"i:{n}", payload] for n, payload in enumerate(payloads)])]


def test_a_caption_states_few_attributes_and_the_rest_stays_apart():
    rows = CaptionedRows("wbcatt", stated=3, modality="label")
    (row,) = made(rows, "labelled", [{"record": {**RECORD, "img_name": "i", "path": "basophil/i.jpg"}}])
    assert dict(row["attributes"]) == RECORD  # not the file's name, which tells the label
    assert row["modality"] == "Basophil"
    said = row["caption"].split(", ")
    assert 1 <= len(said) <= 3
    (again,) = made(rows, "labelled", [{"record": {**RECORD, "img_name": "other"}}])
    assert again["caption"] == row["caption"]  # fixed by the image's id
    assert (
        len(
            {
                made(rows, "labelled", [{"record": RECORD}], {**GROUP, "image_id": str(n)})[0]["caption"]
                for n in range(20)
            }
        )
        > 5
    )


def test_given_captions_and_contexts_are_kept_as_they_are():
    rows = CaptionedRows(None, stated=3)
    (row,) = made(
        rows,
        "labelled",
        [{"turns": []}, {"caption": "A <b>chest</b> film.", "context": "See Figure 2."}],
        {**GROUP, "modality": "x-ray"},
    )
    assert (row["caption"], row["context"], row["modality"], row["attributes"]) == (
        "A <b>chest</b> film.",
        "See Figure 2.",
        "x-ray",
        [],
    )


def test_all_captions_and_contexts_of_an_image_are_kept_once():
    rows = CaptionedRows(None, stated=3)
    payloads = [
        {"caption": "A chest film.", "context": None},
        {"caption": None, "context": "See Figure 2."},
        {"caption": "Left effusion.", "context": "Figure 2a."},
        {"caption": "A chest film.", "context": "See Figure 2."},
        {"qa": {"question": "Side?", "context": "for the judge alone"}},
    ]
    (row,) = made(rows, "labelled", payloads)
    assert (row["caption"], row["context"]) == ("A chest film.\nLeft effusion.", "See Figure 2.\nFigure 2a.")
    (stated,) = made(
        CaptionedRows("wbcatt", stated=3),
        "labelled",
        [{"record": RECORD}, {"caption": None, "context": "See Figure 2."}],
    )
    assert (
        stated["caption"] == CaptionedRows("wbcatt", stated=3).stated_caption(RECORD, "i")
        and stated["context"] == "See Figure 2."
    )


def test_an_image_alone_is_written_about_and_one_that_is_left_out_is_not():
    rows = CaptionedRows(None, stated=3)
    assert [row["caption"] for row in made(rows, "unlabelled", [{}])] == [None]
    assert made(rows, "unlabelled", [{"caption": "left out by label_fraction"}]) == []


def test_no_caption_where_nothing_is_stated_or_all_is_absent():
    assert made(CaptionedRows("wbcatt", stated=0), "labelled", [{"record": RECORD}])[0]["caption"] is None
    absent = {"cytoplasm_vacuole": "no"}
    assert CaptionedRows("wbcatt", stated=3).stated_caption(absent, "i") is None


def test_an_attribute_that_should_be_the_modality_and_is_missing_is_named():
    ((part, row),) = CaptionedRows("wbcatt", 3, modality="stain")(
        "labelled", GROUP, [["i:0", {"record": RECORD}]]
    )
    assert part == "quarantine"
    assert "stain" in row["reason"]


def test_attributes_of_several_payloads_are_one():
    assert attributes_of(
        [
            {},
            {"attributes": {"mass_shape": "oval"}},
            {"caption": "x"},
            {"attributes": {"pathology": "benign"}},
        ]
    ) == {"mass_shape": "oval", "pathology": "benign"}


@pytest.mark.ray
def test_the_parts_of_a_source(ray_cluster, tmp_path):
    """One row for each image, splits kept apart, and the same again for another seed of nothing that is
    drawn.
    """
    cells = write_cells(tmp_path / "cells", 40, seed=5, val_fraction=0.2)
    config = CaptionedDataConfig(source=str(cells), read_cpus=0.25)
    counts = write_captioned(
        config,
        CaptionsConfig(modality="label"),
        str(tmp_path / "out"),
        kinds=("open",),
        max_eval_images=2,
        eval_rows=1,
    )
    records = {
        row["img_name"]: row for row in map(json.loads, (cells / "records.jsonl").read_text().splitlines())
    }
    rows = pyarrow.dataset.dataset(str(tmp_path / "out/captioned")).to_table().to_pylist()
    train = {name for name, row in records.items() if row["split"] == "train"}
    assert sorted(row["sample_id"] for row in rows) == sorted(train)
    assert counts == {"captioned": 32, "questions": 24, "eval_conversations": 1, "quarantine": 0}
    for row in rows:
        record = records[row["sample_id"]]
        assert dict(row["attributes"]) == {name: record[name] for name in ATTRIBUTES}
        assert row["image"] == Path(cells, record["image"]).read_bytes()
    asked = (
        pyarrow.dataset.dataset(str(tmp_path / "out/questions")).to_table(columns=["image_id"]).to_pylist()
    )
    assert not {row["image_id"] for row in asked} & train
    with pytest.raises(DataError, match="no image in its split 'dev'"):
        write_captioned(
            config.model_copy(update={"train_split": "dev"}), CaptionsConfig(), str(tmp_path / "none")
        )
