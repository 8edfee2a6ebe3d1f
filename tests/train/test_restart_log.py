"""What interruptions cost, by the notes of the starts."""

import json

import pytest

from medray.files import seal, unseal
from medray.train.restart_log import FOLDER, Start, redone


def test_without_interruption_there_is_nothing_to_tell(tmp_path):
    assert redone(str(tmp_path)) == {}
    Start(str(tmp_path), 0, 0, 2).mark(9, 36)
    assert redone(str(tmp_path)) == {}


def test_what_came_after_the_checkpoint_is_done_again(tmp_path):
    """First start: 25 steps of 4 samples, checkpoint at 20; second: killed before it marked anything;
    third: from 20 to the end.
    """
    for begin, end, workers in ((0, 25, 2), (20, 20, 1), (20, 40, 2)):
        Start(str(tmp_path), begin, 4 * begin, workers).mark(end, 4 * end)
    files = sorted((tmp_path / FOLDER).iterdir())
    assert [json.loads(file.read_text())["workers"] for file in files] == [2, 1, 2]
    for number, (began, marked) in enumerate(((100.0, 160.0), (175.5, 176.0), (190.0, 250.0))):
        files[number].write_bytes(
            seal(unseal(files[number].read_bytes()) | {"began": began, "marked": marked})
        )
    assert redone(str(tmp_path)) == {
        "restarts": 2,
        "steps done again": 5,
        "samples done again": 20,
        "seconds between starts": 29.5,
        "workers": {"start 1": 2, "start 2": 1, "start 3": 2},
    }


def test_a_start_from_a_later_checkpoint_than_the_last_mark_costs_nothing(tmp_path):
    Start(str(tmp_path), 0, 0, 1).mark(7, 7)
    Start(str(tmp_path), 10, 10, 1)
    assert redone(str(tmp_path))["steps done again"] == 0


def test_every_step_is_noted_on_a_file_system(tmp_path):
    """A start that is killed right after its seventh step, with a checkpoint of the fourth: three steps
    are done again.
    """
    start = Start(str(tmp_path), 0, 0, 1)
    for step in range(1, 8):
        start.step_done(step, 4 * step)
    Start(str(tmp_path), 4, 16, 1).mark(9, 36)
    cost = redone(str(tmp_path))
    assert (cost["steps done again"], cost["samples done again"]) == (3, 12)
    assert {path.name for path in (tmp_path / FOLDER).iterdir()} == {"00000.json", "00001.json"}


def test_an_object_store_gets_few_requests():
    start = Start("memory://starts/stage", 0, 0, 1)
    written = start.fs.cat_file(start.path)
    for step in range(1, 100):
        start.step_done(step, step)
    assert start.fs.cat_file(start.path) == written
    start.last_mark -= 60
    start.step_done(100, 100)
    assert unseal(start.fs.cat_file(start.path))["step"] == 100


@pytest.mark.parametrize("damaged", [b"", b'{"workers": 1', b"[]", b"\xff\x00"])
def test_a_damaged_note_ends_no_stage(tmp_path, damaged, caplog):
    for begin in (0, 4, 8):
        Start(str(tmp_path), begin, begin, 1).mark(begin + 5, begin + 5)
    (tmp_path / FOLDER / "00001.json").write_bytes(damaged)
    cost = redone(str(tmp_path))
    assert "00001.json" in caplog.text
    assert (cost["restarts"], cost["steps done again"], cost["starts without a note"]) == (2, 0, 1)
    Start(str(tmp_path), 9, 9, 1)
    assert (tmp_path / FOLDER / "00003.json").exists()


def test_changed_bits_of_a_note_are_not_counted(tmp_path):
    for begin in (0, 4):
        Start(str(tmp_path), begin, begin, 1).mark(begin + 5, begin + 5)
    path = tmp_path / FOLDER / "00000.json"
    path.write_bytes(path.read_bytes().replace(b'"step": 5', b'"step": 7'))
    assert redone(str(tmp_path)) == {"starts without a note": 1}
