"""What a job does around its work in a run: hold it, log into it, keep its files for their owner alone."""

from __future__ import annotations

import contextlib
import fnmatch
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from medray.errors import RunLost
from medray.running import interrupts
from medray.running.run import Run
from medray.running.run_lock import FOLDER as LOCK
from medray.running.run_lock import SCRATCH, RunLock
from medray.running.run_log import RunLog

logger = logging.getLogger("medray")

UMASK = 0o077
_LEFTOVERS = (f"{SCRATCH}*", "*.????????.part")  # of this module's kind, and of medray.files.write_whole

announce: Callable[[str], None] | None = None  # a job's way to tell its watcher where the log is


@contextlib.contextmanager
def held(*runs: Run, keep: bool = True) -> Iterator[None]:
    """Hold runs for the time of the block: no other job writes them; log lines go into the first one's logs/.

    New files are for their owner alone (a Ray that is started in the block inherits that). What a killed job
    left half written is removed.

    Args:
        keep: leave a note of who held them.

    Raises RunHeld if another job holds one of them, ConfigError or StageError if one cannot be written.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(os.umask, os.umask(UMASK))
        locks: dict[str, RunLock] = {}
        for run in runs:
            if run.uri not in locks:
                lock = RunLock(
                    run.fs, run._root, run.uri, run.is_local, on_lost=interrupts.end_lost, keep=keep
                )
                lock.acquire()
                stack.callback(lock.release)
                locks[run.uri] = lock
                remove_leftovers(run)
                if keep:
                    run.check_schema()
            run.lock = locks[run.uri]
            stack.callback(setattr, run, "lock", None)
        if keep:
            log = stack.enter_context(RunLog(runs[0], locks[runs[0].uri].number))
            logger.info("log: %s", log.uri)
            if announce is not None:
                announce(log.uri)
        try:
            yield
        except KeyboardInterrupt as interrupt:
            for lock in locks.values():
                if lock.lost_to is not None:
                    raise RunLost(lock.lost_to) from interrupt
            raise


def remove_leftovers(run: Run) -> None:
    """Remove files that a killed job was writing and had not renamed yet. The run must be held."""
    if not run.is_local:
        return
    for folder, folders, files in os.walk(run.uri):
        if folder == run.uri and LOCK in folders:
            folders.remove(LOCK)  # other jobs write there while they try to take the run
        left = [
            name
            for name in (*folders, *files)
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in _LEFTOVERS)
        ]
        for path in (Path(folder, name) for name in left):
            logger.info("removing %s, which a killed job left", path)
            if path.is_dir() and not path.is_symlink():
                folders.remove(path.name)
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
