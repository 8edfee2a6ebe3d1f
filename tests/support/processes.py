"""The processes that a test started, to kill one of them."""

import contextlib
import time

import psutil


def descendants(title: str) -> list[psutil.Process]:
    """Those of this process whose command line holds `title`; Ray's workers name their actor there."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if title in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:  # it ended while we looked
            continue
    return found


def kill_one(title: str, seconds: float = 600) -> int:
    """SIGKILL the last of them as soon as there is one; returns its process id."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for process in reversed(descendants(title)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
                return process.pid
        time.sleep(0.05)
    raise AssertionError(f"no process {title} to kill after {seconds} s")
