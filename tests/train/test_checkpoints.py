"""Checkpoints after a full disk, a kill, or damage: what Ray Train's own manager then takes for the
latest one.
"""

import json
import shutil
from pathlib import Path

import pytest
from ray.air.config import CheckpointConfig
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext

from medray.errors import StageError
from medray.train.checkpoints import Scratch, check_local, damage_of, settle, write_checksums
from medray.train.objectives import BEST_BY
from tests.support.damage import cut, delete, empty, flip

SNAPSHOT = "training/checkpoint_manager_snapshot.json"
PARTS = (
    "state.safetensors",
    "progress.json",
    "rows-00000.parquet",
    "rows-00001.parquet",
    "metrics.jsonl",
    "checksums-00001.json",
)


def upload(stage, number, steps, score=None, workers=2):
    """A checkpoint as two workers upload it."""
    folder = stage / f"training/checkpoint_2026-01-01_00-00-0{number}.000000"
    for rank in range(workers):
        part = stage / f"part{rank}"
        part.mkdir()
        (part / f"rows-{rank:05d}.parquet").write_bytes(b"rows" * 50)
        if rank == 0:
            (part / "state.safetensors").write_bytes(b"weights" * steps * 100)
            (part / "progress.json").write_text(json.dumps({"steps": steps, "finished": False}))
            last = {"step": steps, "loss": 1.0} | ({} if score is None else {BEST_BY: score})
            (part / "metrics.jsonl").write_text(json.dumps(last) + "\n")
        write_checksums(part, rank, workers)
        shutil.copytree(part, folder, dirs_exist_ok=True)
        shutil.rmtree(part)
    return folder


def manager(stage, **options):
    """Ray Train's own, on what lies in the stage."""
    return CheckpointManager(
        CheckpointConfig(num_to_keep=2, **options), StorageContext(str(stage), "training")
    )


def latest(stage, **options):
    result = manager(stage, **options).latest_checkpoint_result
    return None if result is None else Path(result.checkpoint.path)


@pytest.fixture
def stage(tmp_path):
    """A stage with two checkpoints, in a folder whose name has glob characters."""
    stage = tmp_path / "run [1]" / "train"
    stage.mkdir(parents=True)
    upload(stage, 1, 2), upload(stage, 2, 4)
    settle(str(stage))
    return stage


def folders(stage):
    return sorted(path for path in (stage / "training").iterdir() if path.is_dir())


def test_nothing_is_done_to_a_sound_stage(stage, tmp_path):
    before = (stage / SNAPSHOT).stat().st_mtime_ns
    assert latest(stage) == folders(stage)[1]
    settle(str(stage))
    assert (stage / SNAPSHOT).stat().st_mtime_ns == before and len(folders(stage)) == 2
    settle(str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("damage", [cut, empty, delete])
def test_the_list_of_checkpoints_is_made_anew(stage, damage, caplog):
    """What a full disk leaves: the list is empty. Ray Train alone never starts again, or starts from
    nothing.
    """
    damage(stage / SNAPSHOT)
    if damage is not delete:
        with pytest.raises(Exception, match=r"Expecting|Unterminated|Invalid"):
            manager(stage)
    settle(str(stage))
    assert latest(stage) == folders(stage)[1]
    assert "resuming from step 4" in caplog.text


@pytest.mark.parametrize("text", ["[]", "{}", "null", '{"checkpoint_results": []}'])
def test_a_list_of_another_kind_is_made_anew(stage, text):
    (stage / SNAPSHOT).write_text(text)
    settle(str(stage))
    assert latest(stage) == folders(stage)[1]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("damage", [cut, empty, delete, flip])
def test_a_damaged_checkpoint_is_left_for_the_one_before_it(stage, damage, part, caplog):
    first, second = folders(stage)
    damage(second / part)
    with pytest.raises(StageError, match=rf"{part}.*rerun the same command"):
        check_local(second)
    settle(str(stage))
    assert latest(stage) == first and folders(stage) == [first]
    assert f"{second.name}: {part}" in caplog.text and "resuming from step 2" in caplog.text


def test_without_a_whole_checkpoint_it_starts_over(stage, caplog):
    for folder in folders(stage):
        empty(folder / "state.safetensors")
    settle(str(stage))
    assert latest(stage) is None and folders(stage) == []
    assert "starting over" in caplog.text


def test_a_list_that_names_a_folder_which_is_gone_is_made_anew(stage):
    shutil.rmtree(folders(stage)[1])
    with pytest.raises(Exception, match="does not exist anymore"):
        manager(stage)
    settle(str(stage))
    assert latest(stage) == folders(stage)[0]


def test_an_upload_that_died_is_removed_without_alarm(stage, caplog):
    """One worker's part is there, the other's is not."""
    died = upload(stage, 3, 6)
    (died / "checksums-00001.json").unlink()
    settle(str(stage))
    assert latest(stage) == folders(stage)[1] and not died.exists()
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_whole_checkpoint_that_was_not_listed_yet_counts(stage):
    """Ray Train lists checkpoints up to two seconds after their upload."""
    third = upload(stage, 3, 6)
    assert latest(stage) != third
    settle(str(stage))
    assert latest(stage) == third


def test_the_best_checkpoint_is_kept_beside_the_last(tmp_path):
    """Made of the checkpoints' own metrics; the last one is not the best."""
    best, last = upload(tmp_path, 1, 2, 0.9), upload(tmp_path, 2, 4, 0.7)
    settle(str(tmp_path), BEST_BY)
    made = manager(tmp_path, checkpoint_score_attribute=BEST_BY)
    assert Path(made.latest_checkpoint_result.checkpoint.path) == last
    assert Path(made.best_checkpoint_result.checkpoint.path) == best
    assert made.best_checkpoint_result.metrics[BEST_BY] == 0.9
    flip(best / "state.safetensors")
    settle(str(tmp_path), BEST_BY)
    assert folders(tmp_path) == [last]


def test_remote_checkpoints(stage):
    import fsspec

    fs = fsspec.filesystem("memory")
    root = "/checkpoints [1]/train"
    for path in (stage / "training").rglob("*"):
        if path.is_file():
            fs.pipe_file(f"{root}/{path.relative_to(stage)}", path.read_bytes())
    second = folders(stage)[1].name
    fs.pipe_file(f"{root}/training/{second}/progress.json", b"")
    fs.pipe_file(f"{root}/{SNAPSHOT}", b"")
    settle(f"memory:/{root}")
    state = json.loads(fs.cat_file(f"{root}/{SNAPSHOT}"))
    assert state["latest_checkpoint_result"]["checkpoint_dir_name"] == folders(stage)[0].name
    assert not fs.exists(f"{root}/training/{second}/state.safetensors")
    assert damage_of(fs, f"{root}/training/{folders(stage)[0].name}") is None


def test_scratch_lies_in_the_run_or_under_the_runs_own_name(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    local, remote = Scratch(str(tmp_path / "stage")), Scratch("memory://bucket/stage")
    assert local.new("checkpoint").parent == tmp_path / "stage/scratch"
    assert remote.new("done").parent.parent == tmp_path / "tmp"
    assert (remote.folder.stat().st_mode & 0o777) == 0o700
    assert remote.folder != Scratch("memory://bucket/other").folder


def test_the_next_start_clears_what_a_killed_one_left(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for scratch, clears in (
        (Scratch(str(tmp_path / "stage")), (0, 3)),
        (Scratch("memory://bucket/stage"), (3, 0)),
    ):
        left = scratch.new("checkpoint")
        scratch.clear(1, 1)  # another worker of the node
        assert left.exists()
        scratch.clear(*clears)
        assert not left.exists()
        scratch.remove()
