"""One job holds a run: two starts, dead owners, owners on other machines, owners that slept."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import fsspec
import pytest

from medray.errors import ConfigError, RunHeld, RunLost, StageError
from medray.running import run_lock
from medray.running.run import Run
from medray.running.run_hold import held
from medray.running.run_lock import RunLock
from tests.support.run_locks import race

FILES = fsspec.filesystem("file")


def lock_of(root, **options):
    return RunLock(FILES, str(root), str(root), True, **options)


def owner_file(root):
    return max(Path(root, "lock").glob("*.json"))


def written_by(root, **changed):
    """Leave the lock of another owner in a run."""
    record = {
        "token": "another",
        "host": "elsewhere",
        "machine": "another boot/1",
        "pid": os.getpid(),
        "process_started": "1",
        "command": "self_train.py",
        "started": "2026-01-01 00:00:00 +0000",
        "beat": 0,
        "released": False,
        **changed,
    }
    folder = Path(root, "lock")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "000005.json").write_text(json.dumps(record))
    return folder / "000005.json"


def run_python(code, *arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


HOLDER = """
    import sys, time, fsspec
    from medray.running.run_lock import RunLock
    lock = RunLock(fsspec.filesystem("file"), sys.argv[1], sys.argv[1], True)
    lock.acquire()
    print("held", flush=True)
    time.sleep(600)
"""


def test_of_several_starts_in_one_moment_exactly_one_gets_the_run(tmp_path):
    roots = [tmp_path / f"r{number}" for number in range(90)]
    for number, root in enumerate(roots):
        if number % 3 == 1:  # its owner is dead
            written_by(root, machine=run_lock.machine(), pid=os.getpid(), process_started="1")
        elif number % 3 == 2:  # its owner is done
            written_by(root, released=True)
    for won, refused in race(FILES, [str(root) for root in roots]):
        assert len(won) == 1
        assert len(refused) == 3
        assert all("is held by host" in said for said in refused)


def test_a_store_without_conditional_puts_has_one_owner_too(tmp_path):
    """fsspec's own put looks and then writes: the last one wins."""
    for won, refused in race(
        fsspec.filesystem("file", auto_mkdir=True),
        [str(tmp_path / f"r{number}") for number in range(3)],
        local=False,
    ):
        assert (len(won), len(refused)) == (1, 3)


def test_second_job_is_told_who_holds_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["jobs/self_train.py", "--set", "clinicians.source=postgresql://me:s3cret@host/name"]
    )
    lock = lock_of(tmp_path)
    lock.acquire()
    with pytest.raises(
        RunHeld, match=rf"process {os.getpid()} \(self_train.py .*since .*last sign of life 0 s ago"
    ) as refused:
        lock_of(tmp_path).acquire()
    assert "s3cret" not in str(refused.value) + owner_file(tmp_path).read_text()
    lock.release()
    lock_of(tmp_path).acquire()


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_owner_is_replaced_at_once(tmp_path, reaped):
    holder = run_python(HOLDER, tmp_path)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RunHeld, match=f"process {holder.pid} "):
        lock_of(tmp_path).acquire()
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | (0 if reaped else os.WNOWAIT))
    lock = lock_of(tmp_path, lost=3600)  # watching it would take an hour
    lock.acquire()
    assert len(list(Path(tmp_path, "lock").iterdir())) == 1
    lock.release()
    with contextlib.suppress(ChildProcessError):
        holder.wait()


@pytest.fixture
def hidden(monkeypatch):
    """The processes of other users, as hidepid hides them."""

    def read_text(path, *_, **__):
        raise FileNotFoundError(path)

    here = run_lock.machine()
    monkeypatch.setattr(run_lock.Path, "read_text", read_text)
    monkeypatch.setattr(run_lock, "machine", lambda: here)
    return here


def test_an_owner_that_proc_hides_is_alive(hidden):
    assert run_lock.process_start(os.getpid()) == run_lock.HIDDEN
    assert run_lock.process_start(2**22 + 1) is None


@pytest.mark.parametrize("alive", [True, False])
def test_an_owner_that_proc_hides_is_told_by_its_heartbeat(tmp_path, hidden, alive):
    """Else a process that got its id later would hold the run for good."""
    file = written_by(tmp_path, machine=hidden, process_started="12")
    ended = threading.Event()

    def touch():
        while alive and not ended.wait(0.05):
            os.utime(file)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(RunHeld) if alive else contextlib.nullcontext():
            lock_of(tmp_path, lost=1).acquire()
    finally:
        ended.set()
        thread.join()


def test_what_a_job_leaves_that_was_killed_while_it_took_the_run_is_removed(tmp_path):
    """Not what another one writes now."""
    file = written_by(tmp_path, released=True)
    for name, age in (("old", 7200), ("new", 0)):
        left = file.with_name(f"{run_lock.SCRATCH}{name}")
        left.write_text("x")
        os.utime(left, (time.time() - age, time.time() - age))
    lock_of(tmp_path, lost=3600).acquire()
    assert [path.name for path in file.parent.glob(f"{run_lock.SCRATCH}*")] == [f"{run_lock.SCRATCH}new"]


def test_a_process_that_got_the_dead_owners_id_is_not_its_owner(tmp_path):
    written_by(tmp_path, machine=run_lock.machine(), pid=os.getpid(), process_started="12")
    lock_of(tmp_path, lost=3600).acquire()


@pytest.mark.parametrize(
    "clock", [0, -(10**9), 10**9], ids=["equal clocks", "its clock is behind", "its clock is ahead"]
)
@pytest.mark.parametrize("alive", [True, False])
def test_an_owner_on_another_machine_is_watched(tmp_path, alive, clock):
    file = written_by(tmp_path)
    ended = threading.Event()
    os.utime(file, (1.7e9 + clock, 1.7e9 + clock))

    def touch():
        beat = 0
        while alive and not ended.wait(0.05):
            beat += 1
            os.utime(file, (1.7e9 + clock + beat, 1.7e9 + clock + beat))

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        if alive:
            with pytest.raises(RunHeld, match=r"host elsewhere.*last sign of life 0 s ago"):
                lock_of(tmp_path, lost=3600).acquire()
        else:
            lock = lock_of(tmp_path, lost=1.0)
            lock.acquire()
            assert lock.number == 6
    finally:
        ended.set()
        thread.join()


def test_an_owner_on_another_machine_that_releases_is_waited_for(tmp_path):
    file = written_by(tmp_path)

    def release():
        part = tmp_path / "released"  # whole at once, as an owner writes it
        part.write_text(json.dumps({**json.loads(file.read_text()), "released": True}))
        part.replace(file)

    threading.Timer(0.5, release).start()
    lock_of(tmp_path, lost=3600).acquire()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null"])
def test_a_damaged_lock_is_taken_over_after_the_time_of_a_dead_owner(tmp_path, text):
    written_by(tmp_path).write_text(text)
    lock = lock_of(tmp_path, lost=0.5)
    lock.acquire()
    assert lock.number == 6


def test_an_owner_that_was_taken_over_hears_of_it_and_writes_nothing(tmp_path):
    reasons = []
    lock = lock_of(tmp_path, beat=0.05, on_lost=reasons.append)
    lock.acquire()
    run = Run(tmp_path)
    run.lock = lock
    run.write_text("x", "before")
    other = written_by(tmp_path)  # number 5, ours is 1
    until = time.monotonic() + 60
    while not reasons and time.monotonic() < until:
        time.sleep(0.02)
    assert len(reasons) == 1 and "taken over by host elsewhere" in reasons[0]
    for write in (
        lambda: run.write_text("x", "after"),
        lambda: run.remove("before"),
        lambda: run.stage("a", {}, lambda _: pytest.fail("worked")),
    ):
        with pytest.raises(RunLost, match="taken over by host elsewhere"):
            write()
    lock.release()
    assert {path.name for path in tmp_path.iterdir()} == {"before", "lock"}
    assert owner_file(tmp_path) == other, "the other owner's lock is as it was"


SLEEPER = """
    import sys
    from medray.running import run_lock
    run_lock.machine = lambda: "another machine"
    from medray.errors import RunLost
    from medray.running.run import Run
    from medray.running.run_lock import RunLock
    run = Run(sys.argv[1])
    run.lock = RunLock(run.fs, run._root, run.uri, True, beat=0.1, lost=1.0)
    run.lock.acquire()
    print("held", flush=True)
    try:
        while True:
            run.write_text(str(__import__("time").time_ns()), "written")
    except RunLost as lost:
        print("lost", flush=True)
"""


def test_a_job_that_slept_while_it_was_taken_over_writes_nothing_more(tmp_path):
    sleeper = run_python(SLEEPER, tmp_path)
    assert sleeper.stdout.readline() == "held\n"
    time.sleep(0.3)
    sleeper.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, sleeper.pid, os.WSTOPPED | os.WNOWAIT)
    lock = lock_of(tmp_path, lost=1.0)
    lock.acquire()
    taken_over = time.time_ns()
    sleeper.send_signal(signal.SIGCONT)
    assert sleeper.communicate(timeout=60)[0] == "lost\n"
    assert int((tmp_path / "written").read_text()) < taken_over
    lock.check()  # ours is as it was


def test_a_removed_lock_ends_its_owner(tmp_path):
    lock = lock_of(tmp_path, lost=0)
    lock.acquire()
    owner_file(tmp_path).unlink()
    with pytest.raises(RunLost, match="its lock is gone"):
        lock.check()


def test_a_heartbeat_needs_no_space_on_the_disk(tmp_path, monkeypatch):
    lock = lock_of(tmp_path, beat=0.05)
    lock.acquire()
    before = owner_file(tmp_path).stat().st_mtime_ns

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    until = time.monotonic() + 60
    while owner_file(tmp_path).stat().st_mtime_ns == before and time.monotonic() < until:
        time.sleep(0.02)
    lock.check()
    lock.release()  # cannot be written either; its process's end frees the run
    with pytest.raises(StageError, match="no space left on the disk"), held(Run(tmp_path / "other")):
        pass


def test_a_disk_without_hard_links(tmp_path, monkeypatch):
    def none(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", none)
    lock = lock_of(tmp_path)
    lock.acquire()
    with pytest.raises(RunHeld):
        lock_of(tmp_path).acquire()
    assert [path.name for path in Path(tmp_path, "lock").iterdir()] == ["000001.json"]


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="file: cannot be written: it is a file"):
        Run(tmp_path / "file")
    with (
        pytest.raises(ConfigError, match="/proc/sys: cannot be written"),
        held(Run("/proc/sys")),
    ):  # there, and read-only for root too
        pass


def test_a_block_holds_all_its_runs_and_releases_them_whatever_happens(tmp_path):
    run, shared = Run(tmp_path / "run"), Run(tmp_path / "shared")
    for ending in (None, ValueError, KeyboardInterrupt):
        with contextlib.suppress(ValueError, KeyboardInterrupt), held(run, shared, shared):
            for other in ("run", "shared"):
                with pytest.raises(RunHeld), held(Run(tmp_path / other)):
                    pass
            if ending is not None:
                raise ending
    with held(Run(tmp_path / "run")), held(Run(tmp_path / "shared")):
        pass
    logs = sorted((tmp_path / "run" / "logs").iterdir())
    assert len(logs) == 4
    assert "ValueError" in logs[1].read_text() and "Traceback" in logs[1].read_text()


def test_a_refused_job_leaves_the_run_as_it_is(tmp_path):
    with held(Run(tmp_path)):
        (tmp_path / ".part-model-x").mkdir()  # the owner is writing it
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "lock"}
        with pytest.raises(RunHeld), held(Run(tmp_path)):
            pass
        assert {
            path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "lock"
        } == before


def test_a_callers_block_ends_when_the_run_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.05)
    with pytest.raises(RunLost, match="taken over"), held(Run(tmp_path)):
        written_by(tmp_path)
        time.sleep(60)


def test_an_export_leaves_no_lock_beside_its_files(tmp_path):
    with held(Run(tmp_path), keep=False), pytest.raises(RunHeld), held(Run(tmp_path), keep=False):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("written", [None, '{"schema": 1}', '{"schema": 3}'])
def test_a_run_of_another_version_is_refused(tmp_path, written):
    run = Run(tmp_path / "run")
    with held(run):
        pass
    (tmp_path / "run/stages/a").mkdir(parents=True)
    with held(run):
        pass
    schema = tmp_path / "run/schema.json"
    schema.unlink() if written is None else schema.write_text(written)
    with pytest.raises(ConfigError, match="another version of medray"), held(Run(tmp_path / "run")):
        raise AssertionError("it was not refused")
    assert RunLock(run.fs, str(tmp_path / "run"), run.uri, True).acquire() is None, "and is held by nobody"
