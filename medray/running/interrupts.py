"""Signals of a job's process, owned in one place: Ctrl-C and SIGTERM end it within ten seconds.

Libraries install handlers of their own (ray.init for SIGTERM, Ray Train's fit for SIGINT), the main thread
may be in C++ where no Python handler runs, and Python drops a KeyboardInterrupt that is raised in a callback.
So a thread hears each signal too, through signal.set_wakeup_fd: it ends the process by force if the main
thread has not ended it in time, or if the user presses Ctrl-C again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import psutil

GRACE_SECONDS = 7.0  # for an end in order; what is done by force after it takes less than the rest of the ten
SAME_PRESS_SECONDS = 1.0  # `make` and some shells send a signal that the terminal has sent already

_owner: JobSignals | None = None


class JobSignals:
    """For the time of the block SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt in the main thread, once.

    SIGINT is handled even if the parent ignores it: a shell without job control ignores it for background
    jobs.

    Args:
        leave: ends the process at once, by the thread that heard the signal.
        notice: called by that thread at the first signal.
        lost: ends the process at once, because another job has taken its run over; called by any thread, with
            the reason.
    """

    def __init__(
        self,
        leave: Callable[[], NoReturn],
        notice: Callable[[], None],
        lost: Callable[[str], NoReturn],
        grace: float | None = None,
    ):
        self.received = False
        self.lost = lost
        self.family: set[psutil.Process] = set()
        self._leave, self._notice, self._grace = leave, notice, GRACE_SECONDS if grace is None else grace
        self._raised = False
        self._numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # else nohup wants the job to live on
            self._numbers.append(signal.SIGHUP)

    def __enter__(self) -> JobSignals:
        global _owner
        self._ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._theirs = theirs
        self._before = {number: signal.getsignal(number) for number in self._numbers}
        self._wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        _owner = self
        self.install()
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        global _owner
        _owner = None
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._theirs.close()  # ends the thread

    def install(self) -> None:
        """Put the handlers in, once more where a library has replaced them."""
        for number in self._numbers:
            signal.signal(number, self._raise)

    def over(self) -> None:
        """The work is over: what comes now interrupts nothing any more."""
        self._raised = True

    def _raise(self, *_: Any) -> None:
        self.received = True
        if not self._raised:
            self._raised = True
            raise KeyboardInterrupt

    def _listen(self) -> None:
        first: float | None = None
        while True:
            left = None if first is None else max(0.01, first + self._grace - time.monotonic())
            self._ours.settimeout(left)
            try:
                heard = self._ours.recv(64)
            except TimeoutError:
                self._leave()
            if not heard:
                self._ours.close()
                return
            if not any(number in self._numbers for number in heard):
                continue
            self.received = True
            if first is None:
                first = time.monotonic()
                self.family = descendants()
                # In a thread of its own: a terminal, or a pipe that nobody reads, may take no line any more.
                threading.Thread(target=self._notice, daemon=True).start()
            elif time.monotonic() - first > SAME_PRESS_SECONDS:
                self._leave()


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """Restore the handlers of the signals that end a job, after a library's call in the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)


def end_lost(reason: str) -> None:
    """End the work on a run that another job has taken over: a job at once, a caller by KeyboardInterrupt."""
    if _owner is not None:
        _owner.lost(reason)
    signal.pthread_kill(
        threading.main_thread().ident, signal.SIGINT
    )  # a real one wakes a sleeping thread too


def descendants() -> set[psutil.Process]:
    """All processes that this one has started, and those that they have."""
    with contextlib.suppress(psutil.Error):
        return set(psutil.Process(os.getpid()).children(recursive=True))
    return set()


def kill(processes: set[psutil.Process]) -> None:
    """SIGKILL; psutil makes sure that a process id has not been given to another one since."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
