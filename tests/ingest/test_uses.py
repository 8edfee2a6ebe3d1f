"""What the images of a source serve for, and refusals that name what there is and the field to set."""

import json

import pyarrow as pa
import pytest
from PIL import Image

from medray.config import CaptionsConfig, DataConfig
from medray.errors import DataError
from medray.ingest.group_by_image import GROUP
from medray.ingest.uses import BAD_RECORDS, RECORDS, Needs, Uses, uses_of
from medray.methods.clinician_preference.training_sets import write_captioned
from medray.methods.instruction_free.training_sets import write_descriptions
from medray.methods.shared.training_sets import NEEDS, part_of, prepare, read_account
from tests.images.test_decoding import saved

TURNS = {"turns": [{"role": "user", "text": "What?"}, {"role": "assistant", "text": "A cell."}]}
CAPTION = {"caption": "A cell.", "context": None}
QA = {"qa": {"question": "Big?", "reference": "yes"}}


def uses(groups, config=None, labels=None):
    """Of (split, payloads, reasons of bad records) of each image, as `write_parts` counts them."""
    config = config or DataConfig(source="there", label_fraction=1.0)
    rows = [
        {
            "sample_id": f"i{number}",
            "image_id": f"i{number}",
            "split": split,
            "members": json.dumps([[f"s{place}", one] for place, one in enumerate(payloads)]),
            "bad": [json.dumps({"sample_id": "b", "file": "f", "reason": reason}) for reason in bad],
        }
        for number, (split, payloads, bad) in enumerate(groups)
    ]
    table = pa.Table.from_pylist(rows, schema=GROUP)
    parts = [part_of(row, config, 0, labels) for row in rows]
    found = Uses()
    for start in (0, 2):  # blocks
        found.add(
            uses_of(
                table.append_column("part", pa.array(parts, pa.string())).slice(
                    start, 2 if start == 0 else None
                )
            ).to_pylist()
        )
    return config, found


def test_images_are_counted_once_however_much_is_known_of_them():
    _, found = uses(
        [
            ("train", [TURNS, CAPTION, QA], []),
            ("train", [TURNS, TURNS], ["no turns", "duplicate sample_id: the first row is kept"]),
            ("test", [{}], []),
            (None, [], ["cut"]),
        ]
    )
    assert found.splits == {"train": 2, "test": 1}
    assert found.parts == {("train", "labelled"): 2, ("test", "unused"): 1}
    assert found.forms_of("train") == {"turns": 2, "caption": 1, "qa": 1}
    assert found.records == {RECORDS: 8, BAD_RECORDS: 2}, "a duplicate is there as another record"


@pytest.mark.parametrize(
    ("splits", "eval_split", "words"),
    [
        (
            ["train"] * 3 + ["test"] * 2,
            "val",
            "data.eval_split: no image of split 'val' in there; there are train (3), test (2): --set "
            "data.eval_split=test",
        ),
        (
            ["train", "test", "test", "validation"],
            "val",
            "there are test (2), train (1), validation (1): --set data.eval_split=validation",
        ),
        (
            ["train"] * 3,
            "val",
            "there are train (3); give a source with another split, or one without splits, of which "
            "data.testbed_val_fraction",
        ),
        (
            ["training"] * 3 + ["val"],
            "val",
            "data.train_split: there has no image in its split 'train'; there are training (3), val (1): "
            "--set data.train_split=training",
        ),
    ],
)
def test_a_split_that_is_not_there(splits, eval_split, words):
    config, found = uses(
        [(split, [TURNS], []) for split in splits],
        DataConfig(source="there", label_fraction=1.0, eval_split=eval_split),
    )
    with pytest.raises(DataError) as error:
        found.check(config, NEEDS)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("payloads", "needs", "words"),
    [
        (
            [CAPTION],
            NEEDS,
            "data.source: all 2 images of split 'train' in there have captions; self_train needs dialogues "
            "or questions with answers or attribute records: jobs/instruction_free.py",
        ),
        ([{}], NEEDS, "have nothing but the image; self_train needs"),
        ([{"preference": {"prompt": "p"}}], NEEDS, "have preference pairs; self_train needs"),
        (
            [QA],
            Needs("instruction_free", ("caption",), ("caption",)),
            "have questions with answers; instruction_free needs captions",
        ),
    ],
)
def test_another_form_than_the_method_needs(payloads, needs, words):
    config, found = uses(
        [("train", payloads, []), ("train", payloads, []), ("val", payloads, [])], labels=needs.labels
    )
    with pytest.raises(DataError) as error:
        found.check(config, needs)
    assert words in str(error.value)


def test_a_share_that_leaves_no_label():
    config, found = uses(
        [("train", [TURNS], []), ("val", [TURNS], [])],
        DataConfig(source="there", label_fraction=0.0),
        NEEDS.labels,
    )
    with pytest.raises(
        DataError,
        match=r"data\.label_fraction: 0 leaves none of the 1 images of split 'train' labelled.*--set "
        r"data\.label_fraction=1",
    ):
        found.check(config, NEEDS)


def test_what_serves_for_what_is_a_table():
    config = DataConfig(source="there", label_fraction=0.5, max_unlabelled=2)
    config, found = uses(
        [("train", [TURNS], [])] * 12
        + [("train", [CAPTION], [])] * 3
        + [("val", [TURNS], [])] * 2
        + [("test", [TURNS], [])],
        config,
        NEEDS.labels,
    )
    found.check(config, NEEDS)
    labelled, unlabelled = found.parts["train", "labelled"], found.parts["train", "unlabelled"]
    assert labelled + unlabelled == 15 and labelled <= 12, (
        "a caption is no label to self-training: its image is questioned"
    )
    text = found.table(
        config, {"labelled": None, "unlabelled": 2, "eval": None, "unused": None}, NEEDS.labels
    )
    lines = {tuple(line.split()[:2]): " ".join(line.split()[2:]) for line in text.splitlines()}
    assert lines["train", "labelled"] == f"{labelled} with dialogues"
    assert lines["train", "unlabelled"] == (
        f"{unlabelled} 2 taken (data.max_unlabelled), {unlabelled - 2} not read; {unlabelled - 3} have "
        "labels that data.label_fraction=0.5 leaves unused"
    )
    assert lines["val", "eval"] == "2" and lines["test", "unused"] == "1 not read"


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """A folder of captions without splits of their own, of which a tenth is held out."""
    folder = tmp_path_factory.mktemp("captions")
    for number in range(20):
        (folder / f"{number}.png").write_bytes(saved(Image.new("RGB", (20, 20), (number, 0, 0))))
    (folder / "captions.csv").write_text(
        "image,caption\n" + "".join(f"{number}.png,Cell {number}.\n" for number in range(20))
    )
    return DataConfig(source=str(folder), read_cpus=0.5, testbed_val_fraction=0.3)


@pytest.mark.ray
def test_refused_before_an_image_is_read(ray_cluster, captions, tmp_path):
    with pytest.raises(DataError, match="have captions; self_train needs dialogues"):
        prepare(captions, str(tmp_path / "self_train"))
    assert not list(tmp_path.glob("self_train/*/*.parquet"))
    with pytest.raises(
        DataError, match=r"data\.eval_split: no image of split 'test' .*: --set data\.eval_split=val"
    ):
        with_splits = DataConfig(
            source=str(_with_splits(tmp_path)), read_cpus=0.5, eval_split="test", label_fraction=1.0
        )
        write_descriptions(with_splits, str(tmp_path / "split"), "Describe it.")
    with pytest.raises(DataError, match="have captions; clinician_preference needs"):
        write_captioned(captions, CaptionsConfig(), str(tmp_path / "captioned"))


def _with_splits(tmp_path):
    """The same captions with splits of their own."""
    folder = tmp_path / "split-source"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.png").write_bytes(saved(Image.new("RGB", (20, 20), (number, 0, 0))))
    lines = [f"{number}.png,Cell {number}.,{'val' if number > 15 else 'train'}\n" for number in range(20)]
    (folder / "captions.csv").write_text("image,caption,split\n" + "".join(lines))
    return folder


@pytest.mark.ray
def test_the_account_tells_it(ray_cluster, captions, tmp_path):
    counts = write_descriptions(
        captions.model_copy(update={"label_fraction": 1.0}), str(tmp_path / "out"), "Describe it."
    )
    account = read_account(str(tmp_path / "out"))
    assert counts["descriptions"] + counts["described"] == 20
    assert account["set_aside"] == {"records": 20, "bad records": 0, "read records": 20, "bad images": 0}
    lines = [line.split() for line in account["uses"].splitlines()]
    assert ["train", "labelled", str(counts["descriptions"]), "with", "captions"] in lines
