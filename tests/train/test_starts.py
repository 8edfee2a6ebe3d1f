"""What interruptions cost, by the notes of the starts."""

import json

from medray.train.starts import FOLDER, Start, redone


def test_without_interruption_there_is_nothing_to_tell(tmp_path):
    assert redone(str(tmp_path)) == {}
    Start(str(tmp_path), 0, 0, 2).mark(9, 36)
    assert redone(str(tmp_path)) == {}


def test_what_came_after_the_checkpoint_is_done_again(tmp_path):
    """First start: 25 steps of 4 samples, checkpoint at 20; second: killed before it marked anything; third: from 20 to the end."""
    for begin, end, workers in ((0, 25, 2), (20, 20, 1), (20, 40, 2)):
        Start(str(tmp_path), begin, 4 * begin, workers).mark(end, 4 * end)
    files = sorted((tmp_path / FOLDER).iterdir())
    assert [json.loads(file.read_text())["workers"] for file in files] == [2, 1, 2]
    for number, (began, marked) in enumerate(((100.0, 160.0), (175.5, 176.0), (190.0, 250.0))):
        note = json.loads(files[number].read_text()) | {"began": began, "marked": marked}
        files[number].write_text(json.dumps(note))
    assert redone(str(tmp_path)) == {"restarts": 2, "steps done again": 5, "samples done again": 20, "seconds between starts": 29.5, "workers": {"start 1": 2, "start 2": 1, "start 3": 2}}


def test_a_start_from_a_later_checkpoint_than_the_last_mark_costs_nothing(tmp_path):
    Start(str(tmp_path), 0, 0, 1).mark(7, 7)
    Start(str(tmp_path), 10, 10, 1)
    assert redone(str(tmp_path))["steps done again"] == 0
