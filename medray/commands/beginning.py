"""Signals that come while a script in jobs/ still imports or reads its configuration, before
medray.commands.command_line owns them.

It imports next to nothing: the imports that it guards take seconds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import Any

INTERRUPTED = 130
_SAY_SECONDS = 1.0

_mine: list[int] = []


def end_at_signals() -> None:
    """From here on SIGINT, SIGTERM and SIGHUP end the process with status 130 and one line."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # else nohup wants it to live on
        if number != signal.SIGHUP or signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)
            _mine.append(number)


def over() -> None:
    """The script has its exit status; a signal that comes now changes nothing."""
    for number in _mine:
        signal.signal(number, signal.SIG_IGN)
    _mine.clear()


def _end(*_: Any) -> None:
    by_force = threading.Timer(_SAY_SECONDS, os._exit, [INTERRUPTED])  # nobody may read the line
    by_force.daemon = True
    by_force.start()
    with contextlib.suppress(OSError):
        os.write(2, b"\ninterrupted; nothing was started\n")
    os._exit(INTERRUPTED)
