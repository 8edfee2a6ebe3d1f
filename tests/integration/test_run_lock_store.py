"""The lock of a run in an object store."""

import os
import time

import pytest

from medray.errors import RunHeld, RunLost
from medray.running.run import Run
from medray.running.run_hold import held
from medray.running.run_lock import RunLock
from tests.integration.conftest import BUCKET
from tests.support.run_locks import race


@pytest.fixture
def environment(s3, monkeypatch):
    for name, value in s3[0].items():
        monkeypatch.setenv(name, value)
    return s3[1]


def lock_of(run, **options):
    return RunLock(run.fs, run._root, run.uri, False, **options)


def test_of_several_starts_in_one_moment_exactly_one_gets_the_run(environment):
    roots = [f"{BUCKET}/race/r{number}" for number in range(4)]
    for root in roots[:2]:  # taken over from a dead owner, and from one that is done
        lock = RunLock(environment, root, root, False)
        lock._record["process_started"] = "1"
        lock.acquire()
        if root == roots[0]:
            lock.release()
        lock._stop.set()
    for won, refused in race(environment, roots, local=False, processes=3):
        assert (len(won), len(refused)) == (1, 2)


def test_a_block_holds_a_remote_run_and_leaves_its_log(environment):
    uri = f"s3://{BUCKET}/held"
    with pytest.raises(ValueError, match="broken"), held(Run(uri)):
        with (
            pytest.raises(RunHeld, match=f"run {uri} is held by host .*, process {os.getpid()} "),
            held(Run(uri)),
        ):
            pass
        raise ValueError("broken")
    with held(Run(uri)):
        pass
    first = Run(uri).read_text("logs", "job-0001.log")
    assert "Traceback" in first and "broken" in first
    assert Run(uri).exists("logs", "job-0002.log")


@pytest.mark.parametrize("alive", [True, False])
def test_an_owner_on_another_machine_is_watched(environment, alive):
    run = Run(f"s3://{BUCKET}/watched-{alive}")
    other = lock_of(run, beat=0.1 if alive else 3600)
    other._record["machine"] = "another"
    other.acquire()
    if alive:
        with pytest.raises(RunHeld, match="last sign of life 0 s ago"):
            lock_of(run, lost=3600).acquire()
        other.check()
        other.release()
    else:
        mine = lock_of(run, lost=1.5)
        mine.acquire()
        assert mine.number == 2
        other._lost_after = 0
        with pytest.raises(RunLost, match="taken over by host"):
            other.check()
        mine.check()
        mine.release()


def test_an_owner_that_cannot_reach_the_store_goes_on_when_it_can(environment, monkeypatch):
    lock = lock_of(Run(f"s3://{BUCKET}/cut"), beat=0.1)
    lock.acquire()

    def cut(*_):
        raise ConnectionError("no route")

    with monkeypatch.context() as patched:
        patched.setattr(lock._place, "numbers", cut)
        time.sleep(0.5)
    lock._lost_after = 0
    lock.check()
    beats = lock._record["beat"]
    until = time.monotonic() + 60
    while lock._record["beat"] == beats and time.monotonic() < until:
        time.sleep(0.1)
    assert lock._record["beat"] > beats
    lock.release()
