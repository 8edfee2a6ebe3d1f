"""Runs inside vLLM's own processes: ends them when the process that owns the engine is gone.

A killed Ray actor (kill -9, out of memory, a lost node's worker) cannot shut its engine down, and vLLM's
engine process then lives on, holding memory and GPUs. This module is named as `worker_extension_cls`, so vLLM
imports it in the engine's processes; the import starts a thread that waits for the owner's end.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading

OWNER_ENV = "MEDRAY_ENGINE_OWNER_PID"


class EngineGuard:
    """The (empty) class vLLM mixes into its worker; importing the module does the work."""


def _follow(owner: int, targets: tuple[int, ...]) -> None:
    with contextlib.suppress(ProcessLookupError):
        handle = os.pidfd_open(owner)
        # Readable when the process has ended; costs nothing until then, and a reused pid cannot be mistaken
        # for it.
        select.select([handle], [], [])
    for target in targets:
        with contextlib.suppress(ProcessLookupError):
            os.kill(target, signal.SIGKILL)


def _start() -> None:
    owner = int(os.environ.get(OWNER_ENV, 0))
    if not owner or owner == os.getpid():
        return
    # With tensor parallelism the worker is a grandchild: its parent, the engine core, has to go too.
    parent = os.getppid()
    targets = (os.getpid(),) if parent in (owner, 1) else (parent, os.getpid())
    threading.Thread(target=_follow, args=(owner, targets), name="engine-guard", daemon=True).start()


_start()
