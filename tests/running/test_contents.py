"""Files of finished stages: whatever is cut, emptied, deleted, changed or added is made again, and never
taken for what the stage wrote.
"""

import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medray.errors import StageError
from medray.running.contents import FILES, hashed, listed
from medray.running.run import Run
from medray.storage.shards import count_rows, write_shard
from tests.support.damage import cut, delete, empty, flip

ROWS = "stages/a/rows/part-000001-00.parquet"


class Job:
    """Two stages, the second of which reads what the first wrote. `text` is what the first one writes."""

    def __init__(self, folder, text="x"):
        self.folder, self.text = folder, text
        self.calls = []

    def first(self, stage):
        self.calls.append("a")
        stage.reset("rows")
        os.makedirs(stage.path("rows"))
        for part in range(3):
            table = pa.table(
                {
                    "sample_id": [f"{part}-{i}" for i in range(8)],
                    "text": [self.text * (i + 1) for i in range(8)],
                }
            )
            write_shard([table], stage.path("rows"), f"part-{part:06d}")
        stage.publish(
            "model", lambda folder: Path(folder, "model.safetensors").write_bytes(self.text.encode() * 5000)
        )
        stage.run.write_text('{"loss": 1.0}\n{"loss": 0.5}\n', stage.folder, "metrics.jsonl")
        return {"rows": stage.path("rows"), "model": stage.path("model")}

    def second(self, stage):
        self.calls.append("b")
        rows = stage.run.path("stages", "a", "rows")
        return {"counts": {"rows": count_rows(rows)}, "text": pq.read_table(rows)["text"].to_pylist()[0]}

    def __call__(self):
        run = Run(self.folder)
        self.calls = []
        a = run.stage("a", {"x": 1}, self.first)
        return a, run.stage("b", {"a": a["hash"]}, self.second)


@pytest.fixture
def job(tmp_path):
    job = Job(tmp_path / "run [1]")
    job()
    return job


@pytest.mark.parametrize("file", [ROWS, "stages/a/model/model.safetensors", "stages/a/metrics.jsonl"])
@pytest.mark.parametrize("damage", [cut, empty, flip, delete])
def test_damaged_outputs_are_made_again_and_named(job, caplog, file, damage):
    """What is made again comes out as before, so the next stage stays."""
    before = {
        path: path.read_bytes()
        for path in Path(job.folder).rglob("*")
        if path.is_file() and path.parent.name != "a"
    }
    damage(Path(job.folder, file))
    with caplog.at_level("WARNING"):
        _, b = job()
    assert job.calls == ["a"]
    assert f"stage a: {file}" in caplog.text
    assert b["outputs"] == {"counts": {"rows": 24}, "text": "x"}
    assert {path: path.read_bytes() for path in before} == before
    job()
    assert job.calls == []


@pytest.mark.parametrize("file", ["manifest.json", "inputs.json", FILES])
@pytest.mark.parametrize("damage", [cut, empty, flip, delete])
def test_damaged_records_of_a_stage_cost_no_later_stage(job, caplog, file, damage):
    path = Path(job.folder, "stages/a", file)
    damage(path)
    with caplog.at_level("WARNING"):
        a, b = job()
    assert job.calls in ([], ["a"])
    assert (
        damage is delete
        or file == "inputs.json"
        or str(path) in caplog.text
        or f"stages/a/{file}" in caplog.text
    )
    assert b["outputs"]["counts"] == {"rows": 24}
    assert a == json.loads(json.dumps(a)) and a["hash"] == a["key"]
    job()
    assert job.calls == []


def test_every_bit_of_a_manifest_counts(job):
    """No flipped bit is taken for what was written, and none ends in an error."""
    path = Path(job.folder, "stages/b/manifest.json")
    whole = path.read_bytes()
    expected = json.loads(whole)
    for place in range(0, len(whole), 7):
        for bit in (0, 5):
            data = bytearray(whole)
            data[place] ^= 1 << bit
            path.write_bytes(bytes(data))
            found = Run(job.folder).read_sealed("stages/b/manifest.json")
            same = found is not None and {name: found[name] for name in expected if name in found} | {
                "checksum": 0
            } == expected | {"checksum": 0}
            assert found is None or same, (place, bit)


def test_added_rows_are_noticed(job, caplog):
    """A piece twice, as a second job would write it."""
    shutil.copy(Path(job.folder, ROWS), Path(job.folder, "stages/a/rows/second.parquet"))
    with caplog.at_level("WARNING"):
        _, b = job()
    assert job.calls == ["a"] and "second.parquet was added" in caplog.text
    assert count_rows(f"{job.folder}/stages/a/rows") == b["outputs"]["counts"]["rows"] == 24


def test_weights_that_rotted_on_the_disk_are_noticed(job, caplog):
    """Other bits, though the file system knows of no change."""
    path = Path(job.folder, "stages/a/model/model.safetensors")
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    job()
    assert job.calls == ["a"] and "model.safetensors is changed" in caplog.text
    assert set(path.read_bytes()) == {ord("x")}


@pytest.mark.parametrize("manifest_too", [False, True])
def test_other_rows_make_later_stages_again(job, manifest_too):
    """A judge gives other verdicts the second time: what was made of the former ones is made again,
    though the manifest is lost too.
    """
    Path(job.folder, ROWS).unlink()
    if manifest_too:
        Path(job.folder, "stages/a/manifest.json").unlink()
    job.text = "y"
    a, b = job()
    assert job.calls == ["a", "b"]
    assert b["outputs"]["text"] == "y" and a["hash"] != a["key"]
    assert job() == (a, b) and job.calls == []


def test_a_lost_manifest_and_damaged_rows(job, caplog):
    """The record of the files is there still: what is flipped is made again, whether or not the stage
    looks at it.
    """
    Path(job.folder, "stages/a/manifest.json").unlink()
    flip(Path(job.folder, ROWS))
    with caplog.at_level("WARNING"):
        _, b = job()
    assert job.calls == ["a"] and f"{ROWS} is changed" in caplog.text
    assert b["outputs"] == {"counts": {"rows": 24}, "text": "x"}


def test_lost_inputs_and_manifest_make_later_stages_again_if_the_outcome_differs(job):
    """Nothing says what the folder was made of, so it is made anew; the record says that later stages
    were made of other rows.
    """
    for name in ("manifest.json", "inputs.json"):
        Path(job.folder, "stages/a", name).unlink()
    job.text = "y"
    assert job()[1]["outputs"]["text"] == "y" and job.calls == ["a", "b"]
    job()
    assert job.calls == []


def test_a_kill_between_record_and_manifest_loses_no_change(job, monkeypatch):
    Path(job.folder, ROWS).unlink()
    job.text = "y"
    write = Run.write_sealed

    def killed(run, value, *parts):
        if parts[-1] == "manifest.json":
            raise KeyboardInterrupt
        write(run, value, *parts)

    monkeypatch.setattr(Run, "write_sealed", killed)
    with pytest.raises(KeyboardInterrupt):
        job()
    monkeypatch.undo()
    assert job()[1]["outputs"]["text"] == "y"


def test_a_copied_run_is_read_once_and_kept(job, tmp_path):
    """Other times of change, the same contents."""
    shutil.copytree(job.folder, tmp_path / "copy", copy_function=shutil.copyfile)
    copy = Job(tmp_path / "copy")
    files = tmp_path / "copy/stages/a" / FILES
    before = files.read_text()
    copy()
    assert copy.calls == [] and files.read_text() != before
    flip(tmp_path / "copy" / ROWS)
    copy()
    assert copy.calls == ["a"]


def test_undisturbed_hashes_depend_on_inputs_alone(tmp_path):
    one, other = (Job(tmp_path / name, text)() for name, text in (("one", "x"), ("other", "y")))
    assert [stage["hash"] for stage in one] == [stage["hash"] for stage in other]


def test_outputs_at_the_top_of_the_run_are_held_too(tmp_path):
    calls = []

    def work(stage):
        calls.append(1)
        stage.run.write_text("rows", "shards", "part.txt")
        return {"rows": stage.run.path("shards")}

    Run(tmp_path / "r").stage("a", {}, work)
    (tmp_path / "r/shards/part.txt").unlink()
    Run(tmp_path / "r").stage("a", {}, work)
    assert len(calls) == 2


def test_former_inputs_with_another_outcome_reach_the_stages_after(job):
    """Other inputs, stopped before the next stage, then the former ones again: what that stage holds is
    of the first outcome.
    """
    run = Run(job.folder)
    run.stage("a", {"x": 2}, job.first)
    job.text = "z"
    a, b = job()
    assert (job.calls, b["outputs"]["text"]) == (["a", "b"], "z")
    run.stage("a", {"x": 2}, job.first)
    again, _ = job()
    assert (job.calls, again["hash"]) == (["a"], a["hash"]), "the same outcome as the last time"


@pytest.mark.parametrize("damage", [cut, empty, flip, delete])
def test_an_outcome_that_was_forgotten_is_not_taken_for_the_former_one(job, damage):
    """The file that remembers it is damaged, or of a version that had none; the stage's own record is
    emptied with its folder.
    """
    damage(Path(job.folder, "results/a.json"))
    run = Run(job.folder)
    run.stage("a", {"x": 2}, job.first)
    job.text = "z"
    _, b = job()
    assert (job.calls, b["outputs"]["text"]) == (["a", "b"], "z")


def test_a_repair_that_was_interrupted_keeps_what_it_had_made(job):
    made = f"{job.folder}/stages/a/rows/more-000000.parquet"
    (Path(job.folder) / ROWS).unlink()

    def killed(stage):
        pq.write_table(pa.table({"sample_id": ["1"]}), made)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Run(job.folder).stage("a", {"x": 1}, killed)
    with pytest.raises(KeyboardInterrupt):
        Run(job.folder).stage("a", {"x": 1}, lambda stage: killed(stage) if Path(made).exists() else None)
    assert Path(made).exists()


def test_what_a_stage_keeps_for_itself_and_a_card_are_no_outputs(tmp_path):
    """Nor are files that are being written."""
    for name in (
        "train/checkpoint_1/x",
        "committed/x.parquet",
        "held_out_committed-begun/x",
        "model/README.md",
        ".model-1/x",
        "inputs.json",
        "rows/.x",
    ):
        path = tmp_path / "stages/a" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    (tmp_path / "stages/a/rows/x.parquet").write_text("x")
    run = Run(tmp_path)
    assert [file.path for file in listed(run.fs, run._root, ["stages/a"])] == ["stages/a/rows/x.parquet"]


def test_remote_runs_are_held_too():
    run = Run("memory://held/run")
    calls = []

    def work(stage):
        calls.append(1)
        stage.run.write_text("x", stage.folder, "rows", "part.txt")
        return {"rows": stage.path("rows")}

    run.stage("a", {}, work)
    run.stage("a", {}, work)
    assert len(calls) == 1
    run.fs.pipe_file("/held/run/stages/a/rows/part.txt", b"y")
    run.stage("a", {}, work)
    assert len(calls) == 2


@pytest.mark.ray
def test_tasks_of_the_cluster_hash_large_outputs(ray_cluster, job, monkeypatch):
    run = Run(job.folder)
    files = listed(run.fs, run._root, ["stages/a"])
    here = hashed(run.fs, run._root, files)
    monkeypatch.setattr("medray.running.contents._IN_TASKS", 10)
    monkeypatch.setattr("medray.running.contents._PER_TASK", 3000)
    monkeypatch.setattr("medray.running.contents.ThreadPoolExecutor", None)
    assert hashed(run.fs, run._root, files) == here


def test_damaged_json_is_named(tmp_path):
    run = Run(tmp_path / "r")
    run.write_text("{", "results.json")
    with pytest.raises(StageError, match=r"results.json: damaged"):
        run.read_json("results.json")
