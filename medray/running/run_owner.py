"""Which process holds a run, told apart from another one that gets its id later."""

from __future__ import annotations

import errno
import os
import socket
import sys
from pathlib import Path

import psutil

HIDDEN = "hidden"


def machine() -> str:
    """Where process ids mean the same as here: the boot of the kernel and the namespace of process ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # no Linux
        return f"{socket.gethostname()}/{int(psutil.boot_time())}"


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno != errno.ESRCH
    return True


def process_start(pid: int) -> str | None:
    """Start of the process in the system's own count; None if there is none, or it is dead and not
    reaped, HIDDEN where only its existence can be seen.
    """
    if sys.platform == "linux":
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return HIDDEN if _exists(pid) else None  # /proc may hide the processes of other users (hidepid)
        return None if fields[0] in "ZX" else fields[19]
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.2f}"
    except psutil.Error:
        return None
