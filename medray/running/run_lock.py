"""Let one job at a time write a run, by a lock with a heartbeat on local disks, NFS and object stores.

    lock/000007.json    who holds the run, or held it last

The file with the highest number counts. A job takes a free run by creating the next number, which only one
of several can do: by a hard link on a file system, by a conditional put on S3 and Google Cloud Storage.
On other stores the last put wins, and every job looks again after a moment. The owner touches its file every
BEAT_SECONDS.

A run is free when its owner released it, or is dead:

- On the same machine (one boot, one namespace of process ids) its process is looked up, so a dead owner is
  noticed at once.
- On another machine, or where the system hides the processes of other users, its heartbeat is watched. An
  owner whose heartbeat does not change for LOST_SECONDS is dead. Clocks are never compared.

An owner that was taken over (a laptop that slept, a network that was cut) finds a higher number at its next
heartbeat, or before its next write, whichever comes first, and stops.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import posixpath
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medray.config.section import without_passwords
from medray.errors import ConfigError, RunHeld, RunLost, StageError
from medray.running.run_owner import HIDDEN, machine, process_start

logger = logging.getLogger("medray")

FOLDER = "lock"
BEAT_SECONDS = 10.0
LOST_SECONDS = 60.0
SETTLE_SECONDS = 1.0
WATCH_SECONDS = 0.5
SCRATCH = ".part-"  # begins the name of every file that is renamed when it is whole
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
_FIELDS = {"token", "host", "machine", "pid", "process_started", "command", "started"}
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}


def _clocks() -> tuple[float, float]:
    """Seconds that a suspended machine counts too, by its own count and by the wall."""
    own = time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
    return own, time.time()


def _command() -> str:
    return " ".join(
        without_passwords(argument) for argument in [os.path.basename(sys.argv[0]), *sys.argv[1:]]
    )


class _Folder:
    """Lock files on a file system."""

    def __init__(self, fs: Any, path: str):
        self.path = path

    def prepare(self) -> None:
        os.makedirs(self.path, exist_ok=True)

    def numbers(self) -> list[int]:
        try:
            names = os.listdir(self.path)
        except FileNotFoundError:
            return []
        return sorted(int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdigit())

    def read(self, number: int) -> tuple[bytes, Any]:
        """Content, and a mark that each heartbeat changes.

        The file is opened since NFS asks the server for a file's time only then.
        """
        with open(self._file(number), "rb") as handle:
            return handle.read(), os.fstat(handle.fileno()).st_mtime_ns

    def create(self, number: int, data: bytes) -> None:
        """Create the file, unless there is one."""
        scratch = self._scratch(data)
        try:
            os.link(scratch, self._file(number))
        except FileExistsError:
            pass
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with contextlib.suppress(FileExistsError), open(self._file(number), "xb") as file:
                file.write(data)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(scratch)

    def write(self, number: int, data: bytes) -> None:
        os.replace(self._scratch(data), self._file(number))

    def beat(self, number: int, data: bytes) -> None:
        """Set a new time: that needs no space on a full disk, and on NFS the time is the server's."""
        os.utime(self._file(number))

    def remove(self, number: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._file(number))

    def tidy(self, seconds: float) -> None:
        """Remove what jobs that were killed while they took the run left half written, so long ago."""
        for path in Path(self.path).glob(f"{SCRATCH}*"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > seconds:
                    path.unlink()

    def drop(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def settle(self) -> None:
        """Nothing: creating a file is exclusive here."""

    def _file(self, number: int) -> str:
        return os.path.join(self.path, f"{number:06d}.json")

    def _scratch(self, data: bytes) -> str:
        handle, name = tempfile.mkstemp(prefix=SCRATCH, dir=self.path)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            os.unlink(name)
            raise
        return name


class _Store:
    """Lock files in an object store."""

    def __init__(self, fs: Any, path: str):
        self.fs, self.path = fs, path

    def prepare(self) -> None:
        """Nothing: a store needs no folders."""

    def numbers(self) -> list[int]:
        self.fs.invalidate_cache()
        try:
            names = [posixpath.basename(path) for path in self.fs.ls(self.path, detail=False)]
        except FileNotFoundError:
            return []
        return sorted(int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdigit())

    def read(self, number: int) -> tuple[bytes, Any]:
        data = self.fs.cat_file(self._file(number))
        return data, data

    def create(self, number: int, data: bytes) -> None:
        """Create the file, unless there is one."""
        try:
            self.fs.pipe_file(self._file(number), data, mode="create")
        except OSError:
            self.fs.invalidate_cache()
            if not self.fs.exists(self._file(number)):
                raise

    def write(self, number: int, data: bytes) -> None:
        self.fs.pipe_file(self._file(number), data)

    beat = write

    def remove(self, number: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self._file(number))

    def tidy(self, seconds: float) -> None:
        """Nothing: a store shows whole objects only."""

    def drop(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm(self.path, recursive=True)

    def settle(self) -> None:
        """Some stores do not know conditional puts: let the puts of others arrive."""
        time.sleep(SETTLE_SECONDS)

    def _file(self, number: int) -> str:
        return posixpath.join(self.path, f"{number:06d}.json")


class RunLock:
    """The lock of one run.

    Args:
        fs, root: filesystem and path of the run.
        uri: what it is called in messages.
        local: whether the filesystem is the operating system's.
        on_lost: called once, by the thread of the heartbeat, when another job has taken the run over.
        keep: leave the file of the last owner in the folder.
        beat, lost: seconds between heartbeats, and without one until the owner is held for dead.
    """

    def __init__(
        self,
        fs: Any,
        root: str,
        uri: str,
        local: bool,
        on_lost: Callable[[str], None] | None = None,
        keep: bool = True,
        beat: float | None = None,
        lost: float | None = None,
    ):
        self.uri, self.keep = uri, keep
        self.number: int | None = None
        self._place = (_Folder if local else _Store)(fs, posixpath.join(root, FOLDER))
        self._on_lost = on_lost
        self._beat = BEAT_SECONDS if beat is None else beat
        self._lost_after = LOST_SECONDS if lost is None else lost
        self.lost_to: str | None = None
        self._guard = threading.RLock()
        self._stop = threading.Event()
        self._confirmed = _clocks()
        self._record: dict[str, Any] = {
            "token": secrets.token_hex(8),
            "host": socket.gethostname(),
            "machine": machine(),
            "pid": os.getpid(),
            "process_started": process_start(os.getpid()),
            "command": _command(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "beat": 0,
            "released": False,
        }

    def acquire(self) -> None:
        """Take the run, after a while of watching where its owner is on another machine.

        Raises RunHeld if another job holds it, ConfigError if nothing can be written, StageError if there is
        no space.
        """
        try:
            self._place.prepare()
            while self.number is None:
                self._try()
            for number in self._place.numbers():
                if number < self.number:
                    self._place.remove(number)
            self._place.tidy(self._lost_after)
        except OSError as error:
            raise unwritable(self.uri, error) from error
        _held_here.add(self)
        threading.Thread(target=self._keep_alive, name="run-lock", daemon=True).start()

    def check(self) -> None:
        """Raise RunLost if another job has taken the run over.

        Looks again if the last heartbeat is so long ago that another job may have.
        """
        if (
            self.lost_to is None
            and max(now - then for now, then in zip(_clocks(), self._confirmed, strict=True))
            > self._lost_after / 2
        ):
            self._confirm()
        if self.lost_to is not None:
            raise RunLost(self.lost_to)

    def release(self) -> None:
        """Let the next job have the run."""
        self._stop.set()
        _held_here.discard(self)
        with self._guard:
            if self.number is None or self.lost_to is not None:
                return
            try:
                if self.keep:
                    self._record["released"] = True
                    self._place.write(self.number, self._data())
                else:
                    self._confirm()
                    if self.lost_to is None:
                        self._place.drop()
            except OSError as error:  # a full disk; the owner's end is noticed without it
                logger.warning(
                    "the lock of %s could not be released (%s); it ends with this process", self.uri, error
                )
            self.number = None

    def _try(self) -> None:
        """Create the next number if the run is free."""
        numbers = self._place.numbers()
        top = numbers[-1] if numbers else 0
        if top:
            self._wait_until_free(top)
        if self._place.numbers()[-1:] != numbers[-1:]:
            return  # somebody else was faster
        now = _clocks()
        try:
            self._place.create(top + 1, self._data())
        except FileNotFoundError:  # the last owner has removed the folder with its lock
            self._place.prepare()
            return
        self._place.settle()
        # Not by what `create` returned: a store may answer a put twice, and some know no conditional put.
        if self._owner(top + 1).get("token") != self._record["token"]:
            return
        if self._place.numbers()[-1:] == [top + 1]:
            self.number, self._confirmed = top + 1, now
        else:
            self._place.remove(top + 1)

    def _wait_until_free(self, number: int) -> None:
        """Return when the owner has released the run or is dead. Raises RunHeld where it is alive."""
        owner, mark = self._look(number)
        if owner is None or owner.get("released"):
            return
        if owner.get("machine") == self._record["machine"]:
            started = process_start(owner["pid"])
            if started == owner["process_started"]:
                raise _held(self.uri, owner, time.time() - mark / 1e9 if isinstance(mark, int) else None)
            # else it is the owner, or another process that got its id: the heartbeat tells
            if started != HIDDEN:
                logger.info("run %s: its last job (process %s) is dead; taking over", self.uri, owner["pid"])
                return
        who = f"host {owner['host']}, process {owner['pid']}" if owner else "an unknown host"
        logger.info(
            "run %s is held by %s; waiting up to %.0f s for a sign of life", self.uri, who, self._lost_after
        )
        until = time.monotonic() + self._lost_after
        while time.monotonic() < until:
            time.sleep(min(WATCH_SECONDS, self._lost_after / 10))
            now, changed = self._look(number)
            if now is None or now.get("released"):
                return
            if changed != mark:
                raise _held(self.uri, now, 0.0)
        logger.info("run %s: no sign of life of %s for %.0f s; taking over", self.uri, who, self._lost_after)

    def _look(self, number: int) -> tuple[dict[str, Any] | None, Any]:
        """(owner, mark): None where the file is gone, {} where it cannot be read (a disk that was full)."""
        try:
            data, mark = self._place.read(number)
        except FileNotFoundError:
            return None, None
        try:
            owner = json.loads(data)
        except ValueError:
            return {}, mark
        return (owner if isinstance(owner, dict) and owner.keys() >= _FIELDS else {}), mark

    def _owner(self, number: int) -> dict[str, Any]:
        return self._look(number)[0] or {}

    def _keep_alive(self) -> None:
        pause = self._beat
        while not self._stop.wait(pause):
            pause = self._beat
            try:
                self._confirm()
            except Exception as error:  # whatever a store's client raises: the next heartbeat may go through
                pause = min(self._beat, 2.0)
                logger.debug("heartbeat of %s failed: %s", self.uri, error)
            if self.lost_to is not None:
                if self._on_lost is not None and not self._stop.is_set():
                    self._on_lost(self.lost_to)
                return

    def _confirm(self) -> None:
        """One heartbeat, if the run is still ours."""
        with self._guard:
            if self.number is None or self.lost_to is not None:
                return
            numbers = self._place.numbers()
            if numbers[-1:] != [self.number]:
                self.lost_to = f"run {self.uri} was taken over by {self._describe(numbers)}; this job stops"
                return
            if self._owner(self.number).get("token") != self._record["token"]:
                self.lost_to = (
                    f"run {self.uri} was taken over by {self._describe([self.number])}; this job stops"
                )
                return
            self._record["beat"] += 1
            now = _clocks()  # before it: the others count from the heartbeat, not from our return
            self._place.beat(self.number, self._data())
            self._confirmed = now

    def _describe(self, numbers: list[int]) -> str:
        owner = self._owner(numbers[-1]) if numbers else {}
        return (
            f"host {owner['host']}, process {owner['pid']}, since {owner['started']}"
            if owner
            else f"nobody, but the file of its lock is gone from {FOLDER}/"
        )

    def _data(self) -> bytes:
        return (json.dumps(self._record, indent=1) + "\n").encode()


_held_here: set[RunLock] = set()


def release_all(seconds: float) -> None:
    """Release what this process holds before it ends by force; skip a store that does not answer in time."""

    def release() -> None:
        for lock in list(_held_here):
            lock.release()

    thread = threading.Thread(target=release, daemon=True)
    thread.start()
    thread.join(seconds)


def _held(uri: str, owner: dict[str, Any], seconds: float | None) -> RunHeld:
    last = "" if seconds is None else f" (last sign of life {max(0.0, seconds):.0f} s ago)"
    who = (
        f"host {owner['host']}, process {owner['pid']} ({owner['command']}), since {owner['started']}"
        if owner
        else "another job"
    )
    return RunHeld(
        f"run {uri} is held by {who}{last}; "
        "wait until that job has ended, or stop it, or give another run directory"
    )


def unwritable(uri: str, error: OSError) -> ConfigError | StageError:
    """The error for a run whose first file could not be written."""
    if error.errno in _NO_SPACE:
        return StageError(f"run {uri}: no space left on the disk that holds it; free some space")
    reason = error.strerror or str(error)
    return ConfigError(
        f"--run {uri}: cannot be written ({reason}); "
        "give a directory that you may write, or change its permissions"
    )
