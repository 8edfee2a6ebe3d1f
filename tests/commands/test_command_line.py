"""How jobs end: interrupted, failed, killed, held by another one."""

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pytest

from medray.commands.command_line import run_job
from medray.errors import ConfigError, StageError, Waiting
from medray.running import failures
from medray.running.failures import describe, error_of_ours
from medray.running.run import Run
from medray.running.run_hold import held

ROOT = Path(__file__).resolve().parents[2]
ENDS = {"Ctrl-C": signal.SIGINT, "job stop": signal.SIGTERM, "closed terminal": signal.SIGHUP}
IN_ORDER = ["sleeping", "interrupt_made_an_error", "waiting_for_http", "in_another_thread", "with_a_child"]
BY_FORCE = ["handlers_replaced", "in_c_code", "interrupt_dropped", "shutdown_hangs"]


class Started:
    """tests/support/interrupted_job.py at work on a case."""

    def __init__(self, case, run, grace):
        self.log = run.with_name(f"{time.monotonic_ns()}.log")
        environment = {**os.environ, "RAY_ADDRESS": "", "PYTHONPATH": str(ROOT)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, ROOT / "tests" / "support" / "interrupted_job.py", case, run, str(grace)],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    def wait_until_there(self):
        assert self.process.stdout.readline() == "now\n", self.said()
        time.sleep(0.3)

    def family(self):
        return psutil.Process(self.process.pid).children(recursive=True)

    def said(self):
        return self.log.read_text()


def alive(processes):
    return [
        process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    ]


def wait_until_gone(processes, seconds=60):
    until = time.monotonic() + seconds
    while alive(processes) and time.monotonic() < until:
        time.sleep(0.1)
    assert not alive(processes)


def check_interrupted(job, run, family):
    assert job.process.wait(120) == 130, job.said()
    assert f"interrupted; rerun the same command with --run {run} to resume" in job.said()
    assert "failed" not in job.said()
    wait_until_gone(family)
    with held(Run(run)):  # it was released
        pass


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("case", IN_ORDER)
def test_a_signal_ends_a_job_in_order(tmp_path, case, end):
    run = tmp_path / "run"
    job = Started(case, run, grace=600)
    job.wait_until_there()
    family = job.family()
    job.process.send_signal(ENDS[end])
    check_interrupted(job, run, family)


@pytest.mark.parametrize("end", ["Ctrl-C", "job stop"])
@pytest.mark.parametrize("case", BY_FORCE)
def test_a_signal_that_the_work_does_not_heed_ends_it_by_force(tmp_path, case, end):
    run = tmp_path / "run"
    job = Started(case, run, grace=1)
    job.wait_until_there()
    family = job.family()
    job.process.send_signal(ENDS[end])
    check_interrupted(job, run, family)


@pytest.mark.parametrize("end", ["Ctrl-C", "job stop"])
@pytest.mark.parametrize("case", ["nobody_reads", "nobody_reads_why_it_failed"])
def test_a_job_whose_lines_nobody_reads_ends_too(tmp_path, case, end):
    job = Started(case, tmp_path / "run", grace=1)
    job.wait_until_there()
    job.process.send_signal(ENDS[end])
    assert job.process.wait(120) == 130


def test_the_second_ctrl_c_ends_a_job_at_once(tmp_path):
    run = tmp_path / "run"
    job = Started("shutdown_hangs", run, grace=600)
    job.wait_until_there()
    job.process.send_signal(signal.SIGINT)
    job.process.send_signal(signal.SIGINT)  # the same press: make sends what the terminal has sent
    time.sleep(1.5)
    assert job.process.poll() is None
    job.process.send_signal(signal.SIGINT)
    check_interrupted(job, run, [])


def test_a_background_shells_deafness_to_ctrl_c_is_not_the_jobs(tmp_path):
    """A shell without job control starts its background jobs with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        job = Started("sleeping", tmp_path / "run", grace=600)
    finally:
        signal.signal(signal.SIGINT, before)
    job.wait_until_there()
    job.process.send_signal(signal.SIGINT)
    check_interrupted(job, tmp_path / "run", [])


@pytest.mark.whole_job
@pytest.mark.ray
@pytest.mark.parametrize("case", ["ray_starts", "training", "after_a_training"])
def test_ctrl_c_while_ray_works(tmp_path, case):
    """Ray Train's own handler ended a training with status 1, and dropped every Ctrl-C after it."""
    run = tmp_path / "run"
    job = Started(case, run, grace=7)
    job.wait_until_there()
    family = job.family()
    job.process.send_signal(signal.SIGINT)
    check_interrupted(job, run, family)


@pytest.mark.ray
@pytest.mark.faults
def test_a_job_that_ray_ends_in_cpp_says_how_to_resume(tmp_path):
    job = Started("raylet_dies", tmp_path / "run", grace=7)
    assert job.process.wait(300) == 1
    check_line_of_the_watcher(job, tmp_path / "run")


@pytest.mark.faults
def test_a_killed_job_says_how_to_resume(tmp_path):
    run = tmp_path / "run"
    job = Started("sleeping", run, grace=7)
    job.wait_until_there()
    family = job.family()
    os.killpg(job.process.pid, signal.SIGKILL)  # the whole group: the watcher is not in it
    job.process.wait()
    check_line_of_the_watcher(job, run)
    wait_until_gone(family)
    with held(Run(run)):
        pass


def check_line_of_the_watcher(job, run):
    until = time.monotonic() + 60
    while "to resume" not in job.said() and time.monotonic() < until:
        time.sleep(0.1)
    assert (
        f"log: {run}/logs/job-0001.log\nfix the cause, then rerun the same command with --run {run} to resume"
        in job.said()
    )


def test_a_second_start_is_refused_with_a_status_of_its_own(tmp_path):
    run = tmp_path / "run"
    first = Started("sleeping", run, grace=7)
    first.wait_until_there()
    second = Started("sleeping", run, grace=7)
    assert second.process.wait(120) == 4
    assert (
        f"failed: run {run} is held by host" in second.said()
        and f"process {first.process.pid} " in second.said()
    )
    first.process.send_signal(signal.SIGTERM)
    check_interrupted(first, run, [])


FAULTS = {
    "full disk": (
        lambda: OSError(errno.ENOSPC, "No space left on device", "/r/x"),
        "No space left on device (/r/x); free some space",
    ),
    "read-only disk": (
        lambda: OSError(errno.EROFS, "Read-only file system", "/r/x"),
        "Read-only file system (/r/x); that disk is read-only",
    ),
    "damaged JSON": (
        lambda: json.JSONDecodeError("Expecting value", "", 0),
        "a file of JSON is damaged: Expecting value",
    ),
    "damaged Parquet": (
        lambda: pa.ArrowInvalid("Parquet magic bytes not found"),
        "ArrowInvalid: Parquet magic bytes not found",
    ),
    "no memory": (MemoryError, "out of memory"),
    "a fault of ours": (lambda: KeyError("rows"), "KeyError: 'rows'"),
    "an error of ours": (
        lambda: StageError("no pair is left; lower judge.min_margin"),
        "no pair is left; lower judge.min_margin",
    ),
    "a library's exit": (lambda: SystemExit(3), "SystemExit: 3"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_leaves_a_stage_ends_in_a_line_and_its_traceback_in_the_log(tmp_path, capsys, fault):
    make, said = FAULTS[fault]

    def fails(stage):
        raise make()

    def work():
        run = Run(tmp_path / "run")
        with held(run):
            run.stage("01-first", {}, lambda _: {})
            run.stage("02-second", {}, fails)

    assert run_job(work, f"--run {tmp_path}/run") == 1
    last = capsys.readouterr().err
    assert "Traceback" not in last
    assert f"failed: stage 02-second: {said}" in last
    log = tmp_path / "run" / "logs" / "job-0001.log"
    assert last.endswith(
        f"log: {log}\nfix the cause, then rerun the same command with --run {tmp_path}/run to resume\n"
    )
    assert "Traceback" in log.read_text() and "in fails" in log.read_text()
    assert run_job(lambda: work() and {}, "") == 1 and (tmp_path / "run" / "logs" / "job-0002.log").exists()


def test_an_error_before_a_run_is_open_has_its_traceback_in_a_file(capsys, monkeypatch):
    monkeypatch.setattr("medray.running.run_log._last", None)
    monkeypatch.setattr("medray.running.run._in_progress", None)

    def work():
        raise ZeroDivisionError("x")

    assert run_job(work, "--run r") == 1
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "failed: ZeroDivisionError: x"
    log = Path(said[1].removeprefix("log: "))
    assert "ZeroDivisionError" in log.read_text()
    log.unlink()


@pytest.mark.parametrize(
    ("error", "status"), [(Waiting("judge more"), 3), (ConfigError("--run x: cannot be written"), 2)]
)
def test_statuses_of_known_endings(capsys, monkeypatch, error, status):
    monkeypatch.setattr("medray.running.run._in_progress", None)

    def work():
        raise error

    assert run_job(work, "--run r") == status
    assert str(error) in capsys.readouterr().err


def test_a_jobs_signals_are_as_before_after_it():
    before = [signal.getsignal(number) for number in ENDS.values()]
    assert run_job(dict, "") == 0
    assert [signal.getsignal(number) for number in ENDS.values()] == before


def test_errors_of_ours_are_found_inside_rays():
    import ray
    from ray.train import TrainingFailedError

    ours = StageError("the model is gone")
    task = ray.exceptions.RayTaskError("f", "Traceback\n...", ours)
    for error in (
        task,
        task.as_instanceof_cause(),
        ray.exceptions.ActorDiedError(task),
        ExceptionGroup("some", [KeyError("x"), ours]),
    ):
        assert str(error_of_ours(error)) == "the model is gone"
    assert error_of_ours(ray.exceptions.ActorDiedError()) is None
    assert describe(ray.exceptions.ActorDiedError(task)) == "the model is gone"
    assert describe(ray.exceptions.RayTaskError("f", "Traceback\n...", KeyError("x"))) == "KeyError: 'x'"
    assert describe(ray.exceptions.OwnerDiedError("a" * 56, None, "x")).startswith("Ray: OwnerDiedError: ")
    assert issubclass(TrainingFailedError, Exception)


@pytest.mark.parametrize("number", failures._FIXES)
def test_a_systems_error_inside_rays_is_said_with_its_fix(number):
    import ray

    error = OSError(number, os.strerror(number), "/r/x")
    assert (
        describe(ray.exceptions.RayTaskError("f", "Traceback\n...", error))
        == f"{os.strerror(number)} (/r/x); {failures._FIXES[number]}"
    )


def test_what_a_run_holds_is_for_its_owner_alone(tmp_path):
    def model(folder):
        Path(folder, "weights").write_text("x")
        os.chmod(folder, 0o755)  # as writers of models do
        os.chmod(Path(folder, "weights"), 0o644)

    with held(run := Run(tmp_path / "runs" / "run")):
        run.stage("01-first", {}, lambda stage: stage.publish("model", model) or {})
        run.write_bytes(b"x", "leaks", "pairs.png")
        Path(run.path("report.html")).write_text("x")  # as writers do that know nothing of modes
        Path(run.path("folder")).mkdir()
    modes = {
        path.relative_to(tmp_path): stat.S_IMODE(path.stat().st_mode)
        for path in (tmp_path / "runs").rglob("*")
    }
    assert len(modes) > 10
    assert {path: mode for path, mode in modes.items() if mode & 0o077} == {}
    assert stat.S_IMODE((tmp_path / "runs").stat().st_mode) == 0o755, "the folder it lies in is not the run's"
    os.chmod(run.uri, 0o750)
    with held(Run(run.uri)):
        pass
    assert stat.S_IMODE(os.stat(run.uri).st_mode) == 0o750, "its owner let a group in"


def test_what_a_killed_job_left_half_written_is_removed(tmp_path):
    run = Run(tmp_path / "run")
    with held(run):
        pass  # an earlier job
    for left in (
        ".part-abc",
        "stages/15-dpo/.part-model-x/weights",
        "stages/15-dpo/rows/a.parquet.0a1b2c3d.part",
        "stages/15-dpo/model/a/b/c/d/e/.part-x",
    ):
        path = tmp_path / "run" / left
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    (tmp_path / "run" / "stages/15-dpo/rows/a.parquet").write_text("x")
    waiting = tmp_path / "run" / "lock" / ".part-of-another-job"
    waiting.parent.mkdir(exist_ok=True)
    waiting.write_text("x")
    with held(run):
        assert waiting.exists()
        assert [path.name for path in (tmp_path / "run" / "stages").rglob("*") if path.is_file()] == [
            "a.parquet"
        ]
    assert not (tmp_path / "run" / ".part-abc").exists()


def test_a_full_disk_leaves_no_half_written_file(tmp_path, monkeypatch):
    run = Run(tmp_path / "run")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run.write_text("x", "results.json")
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize(
    "script", ["self_train", "instruction_free", "clinician_preference", "evaluate", "prepare_data"]
)
def test_a_signal_before_a_job_is_started(tmp_path, script, end):
    """While its configuration is read, here from a pipe that nobody writes."""
    pipe = tmp_path / "recipe.yaml"
    os.mkfifo(pipe)
    arguments = {"evaluate": ["--model", "testbed:base"], "prepare_data": ["testbed:cells"]}.get(script, [])
    process = subprocess.Popen(
        [sys.executable, f"jobs/{script}.py", *arguments, "--config", pipe],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with pipe.open("w"):  # opened when the job has opened it
        time.sleep(0.3)
        process.send_signal(ENDS[end])
        assert process.communicate(timeout=60)[1] == "\ninterrupted; nothing was started\n"
    assert process.returncode == 130


@pytest.mark.parametrize("end", ENDS)
def test_a_signal_while_a_job_imports(tmp_path, end):
    """A module that waits stands in for one that takes seconds."""
    (tmp_path / "yaml.py").write_text("import time\nprint('now', flush=True)\ntime.sleep(600)\n")
    process = subprocess.Popen(
        [sys.executable, "jobs/self_train.py", "--check"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "now\n"
    process.send_signal(ENDS[end])
    assert process.communicate(timeout=60)[1] == "\ninterrupted; nothing was started\n"
    assert process.returncode == 130
