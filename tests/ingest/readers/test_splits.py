"""Splits in file names, folders and records, in the spellings people use; what is held out is never
trained on."""

import pytest
from pydantic import ValidationError

from medray.config import DataConfig
from medray.errors import DataError
from medray.split_names import UnknownSplit, known_split, record_split, split_of
from tests.support.sources import dialogue, index, write


@pytest.mark.parametrize(
    ("word", "split"),
    [
        ("train", "train"),
        ("Train", "train"),
        ("TRAINING", "train"),
        ("train_set", "train"),
        ("trainset", "train"),
        ("val", "val"),
        ("valid", "val"),
        ("Validation", "val"),
        ("dev", "val"),
        ("TEST", "test"),
        ("testing", "test"),
        ("Test Set", "test"),
        ("eval", "test"),
        ("evaluation", "test"),
        (" test ", "test"),
        (None, None),
        ("", None),
        (float("nan"), None),
        ("nan", None),
    ],
)
def test_words_for_splits(word, split):
    assert known_split(word) == split


@pytest.mark.parametrize("word", ["holdback", 0, 1, True, "1", "fold3", ["train"], "not-test"])
def test_unknown_words_are_errors(word):
    with pytest.raises(UnknownSplit, match=r"write train, val or test"):
        known_split(word)
    if isinstance(word, str):
        assert known_split(word, [word]) == word


def test_other_fields_count_if_they_hold_a_split():
    assert record_split({"Split": "Test", "subset": "train"}) == "test"
    assert record_split({"subset": "Testing"}) == "test"
    assert record_split({"subset": "chest"}) is None
    assert record_split({"dataset_split": "test"}) == record_split({"split_type": "Test"}) == "test"
    assert record_split({"split_type": "random"}) is None
    assert record_split({"partition": "dev"}) == "val"


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("d/train-00000-of-00003.parquet", "train"),
        ("d/VQATest.json", "test"),
        ("d/dataTest2.json", "test"),
        ("d/my_TRAIN.jsonl", "train"),
        ("d/dev.json", "val"),
        ("d/test/a.json", "test"),
        ("d/test/labels/a.json", "test"),
        ("d/test_data/a.json", "test"),
        ("d/Test Images/x/a.json", "test"),
        ("d/latest/a.json", None),
        ("d/greatest.json", None),
        ("d/train/test.json", "test"),
        ("d/training_set/a.json", "train"),
        ("d/test-project/a.json", None),
    ],
)
def test_splits_of_paths_below_a_source(path, split):
    assert split_of(path, "d") == split


def test_folders_above_the_source_do_not_count():
    assert split_of("/test/me/d/x/a.json", "/test/me/d") is None


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train.json", "test.json"),
        ("Train.json", "TEST.json"),
        ("training.jsonl", "testing.jsonl"),
        ("train/data.json", "test/data.json"),
        ("train/labels/data.json", "test/labels/data.json"),
        ("a_train.json", "a_test.jsonl"),
        ("train_set/x.json", "test_set/x.json"),
        ("data/train.json", "data/test.json"),
        ("train/x.json", "test/deeper/x.json"),
        ("train.json", "test/x.json"),
        ("train/deeper/x.json", "test/x.json"),
    ],
)
def test_a_test_file_is_never_trained_on(tmp_path, train, test):
    write(tmp_path / train, [dialogue(f"tr{n}.png") for n in range(3)])
    write(tmp_path / test, [dialogue(f"te{n}.png") for n in range(2)])
    kind, rows, _ = index(tmp_path)
    assert kind == "llava"
    assert sorted((row["image_id"], row["split"]) for row in rows) == [
        ("te0.png", "test"),
        ("te1.png", "test"),
        *((f"tr{n}.png", "train") for n in range(3)),
    ]


def test_files_without_split_words_are_all_read(tmp_path):
    for name in ("conversation_58k.json", "detail_23k.json", "reasoning.jsonl"):
        write(tmp_path / name, [dialogue(f"{name}.png")])
    rows = index(tmp_path)[1]
    assert len(rows) == 3
    assert {row["split"] for row in rows} == {None}


def test_records_say_their_split_in_any_spelling(tmp_path):
    words = ["Train", "validation", "TEST", "dev", "eval", "nowhere", 0]
    write(tmp_path / "data.json", [dialogue(f"{n}.png", split=word) for n, word in enumerate(words)])
    rows = index(tmp_path)[1]
    assert [row["split"] for row in rows[:5]] == ["train", "val", "test", "val", "test"]
    assert ["'nowhere'" in (rows[5]["error"] or ""), "is 0" in (rows[6]["error"] or "")] == [True, True]


def test_split_folders_of_images_at_any_depth(tmp_path):
    for name in ("images/train/a.png", "images/Test/b.png", "test_images/c.png", "x/d.png"):
        write(tmp_path / name, b"x")
    assert [(row["image_id"], row["split"]) for row in index(tmp_path)[1]] == [
        ("images/Test/b.png", "test"),
        ("images/train/a.png", "train"),
        ("test_images/c.png", "test"),
        ("x/d.png", None),
    ]


def test_the_configurations_words_for_splits():
    config = DataConfig(train_split="Training", eval_split="validation")
    assert (config.train_split, config.eval_split) == ("train", "val")
    assert DataConfig(eval_split="fold2").eval_split == "fold2"
    with pytest.raises(ValidationError):
        DataConfig(eval_split="")


def test_images_in_folders_that_are_named_after_splits(tmp_path):
    write(tmp_path / "metadata.csv", "file_name,text\ntrain/a.png,x\ntest/b.png,y\nother/c.png,z\n")
    write(
        tmp_path / "deeper/data.json",
        [dialogue("images/Test/b.png"), dialogue("images/Test/b.png", split="train")],
    )
    assert [row["split"] for row in index(tmp_path)[1]] == ["train", "test", None]
    assert [row["split"] for row in index(tmp_path / "deeper")[1]] == ["test", "train"]


def test_a_split_beside_the_records_is_theirs(tmp_path):
    for number, word in enumerate(("test", "Validation", "nowhere")):
        write(tmp_path / f"{number}.json", {"split": word, "data": [dialogue(f"{number}.png")]})
    rows = index(tmp_path)[1]
    assert [row["split"] for row in rows[:2]] == ["test", "val"]
    assert "'nowhere'" in rows[2]["error"]


def test_a_split_after_its_records_is_refused(tmp_path):
    write(tmp_path / "a.json", {"data": [dialogue("a.png")], "split": "test"})
    with pytest.raises(DataError, match="field 'split' is 'test'"):
        index(tmp_path)


def test_a_member_whose_name_is_a_split_needs_no_other(tmp_path):
    write(
        tmp_path / "a.json",
        {"name": "set one", "subset": "chest", "test": [dialogue("a.png")], "split": "test"},
    )
    assert [row["split"] for row in index(tmp_path)[1]] == ["test"]


@pytest.mark.parametrize(
    ("own", "split"), [(None, "test"), ("", "test"), ("nan", "test"), ("train", "train")]
)
def test_a_section_gives_its_split_to_records_whose_own_is_empty(tmp_path, own, split):
    write(tmp_path / "a.json", {"test": [{**dialogue("a.png"), "Split": own}]})
    assert [row["split"] for row in index(tmp_path)[1]] == [split]
