"""SAMPLE rows hold what a reader gave, and give it back."""

import json

import fsspec
import pyarrow as pa
import pytest

from medray.config import DataConfig
from medray.ingest.canonical_rows import ToSamples
from medray.ingest.group_by_image import GROUP, image_of
from medray.ingest.readers.canonical import members_of
from tests.images.test_decoding import noise, saved
from tests.ingest.test_source_index import CELL

QA = {
    "question": "Is it?",
    "reference": "yes",
    "answer_type": "closed",
    "attribute": "PRES",
    "choices": None,
    "language": "en",
}
TURNS = [{"role": "user", "text": "What?"}, {"role": "assistant", "text": "A cell."}]


def sample(members, source="llava", **changes):
    group = {
        "sample_id": "a",
        "image_id": "a",
        "image_file": "/x/a.png",
        "image": saved(noise()),
        "split": "train",
        "group_id": None,
        "modality": "ct",
        "members": json.dumps(members),
        "bad": [],
    } | changes
    return ToSamples(DataConfig().model_dump(), source).sample(group, lambda: image_of(group, DataConfig()))


@pytest.mark.parametrize(
    "members",
    [
        [
            ["q1", {"qa": QA}],
            ["q2", {"qa": QA | {"answer_type": "mcq", "choices": ["x", "y"], "reference": "B"}}],
        ],
        [["d", {"turns": TURNS}]],
        [
            ["a", {"caption": "A lung.", "context": None}],
            ["a/attributes", {"attributes": {"shape": "round"}}],
        ],
        [["a", {"attributes": {"shape": "round"}}]],
        [["p", {"preference": {"prompt": "What?", "chosen": "This.", "rejected": "That."}}]],
        [["a", {}]],
    ],
)
def test_members_come_back(members):
    row = sample(members)
    assert (row["error"], row["width"], row["height"], row["image_format"]) == (None, 40, 30, "PNG")
    assert dict(members_of(row)) == dict(members)


def test_a_wbcatt_record_comes_back_without_its_file_names():
    ((identity, payload),) = members_of(sample([["a", {"record": CELL}]], "wbcatt"))
    assert identity == "a"
    assert payload["record"] == {
        name: value for name, value in CELL.items() if name not in ("img_name", "split", "image", "path")
    }


def test_an_unreadable_image_sets_all_its_records_aside():
    row = sample(
        [["q1", {"qa": QA}], ["q2", {"qa": QA}]],
        image=b"no image",
        bad=[json.dumps({"sample_id": "q3", "file": "f", "reason": "no answer"})],
    )
    assert "cannot be decoded" in row["error"] and "image" not in row
    assert [one["sample_id"] for one in row["set_aside"]] == ["q3", "q1", "q2"]
    assert row["set_aside"][1]["file"] == "a.png"
    dicom = sample([["a", {}]], image=None, image_file="/data/DOE^JANE/1.dcm#frame=0", image_id="dcm-1")
    assert "JANE" not in json.dumps(dicom)


def test_images_of_a_store_are_read_at_once_and_stay_with_their_rows():
    store = fsspec.filesystem("memory")
    pictures = {f"memory://pictures/{i}.png": saved(noise((10 + i, 10), i)) for i in range(40)}
    for path, data in pictures.items():
        store.pipe_file(path, data)
    rows = [
        {
            "sample_id": path,
            "image_id": path,
            "image_file": path,
            "members": json.dumps([[path, {}]]),
            "bad": [],
        }
        for path in [*pictures, "memory://pictures/gone.png"]
    ]
    made = ToSamples(DataConfig().model_dump(), "images")(
        pa.Table.from_pylist(rows, schema=GROUP)
    ).to_pylist()
    assert [(row["sample_id"], row["image"], row["width"]) for row in made[:-1]] == [
        (path, data, 10 + i) for i, (path, data) in enumerate(pictures.items())
    ]
    assert (made[-1]["image"], made[-1]["error"]) == (None, "image file 'gone.png' does not exist")
