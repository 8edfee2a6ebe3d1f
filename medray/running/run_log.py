"""The log of a job in its run.

logs/job-0003.log has the lines of the third attempt, and the traceback of its failure.
"""

from __future__ import annotations

import logging
import os
import posixpath
import shutil
import tempfile
import threading
import time
import traceback
from typing import Any

logger = logging.getLogger("medray")

FOLDER = "logs"
UPLOAD_SECONDS = 60.0

_last: str | None = None
_open: list[logging.Handler] = []  # of the logs that are being written


def keep(record: logging.LogRecord) -> bool:
    """Write a record into the log of the run, and nowhere else. False where no log is open."""
    for handler in _open:
        handler.handle(record)
    return bool(_open)


def location() -> str | None:
    """Where this process's last log is; None where it has none."""
    return _last


class _QuietHandler(logging.FileHandler):
    """A log file without errors of its own: on a full disk each line would print a traceback."""

    def handleError(self, record: logging.LogRecord) -> None:
        return


class RunLog:
    """Write log lines into the run during the block, and the traceback of an exception that leaves it.

    In an object store the file is put anew every UPLOAD_SECONDS, and at the end.

    Args:
        run: a medray.running.run.Run.
        number: of the attempt.
    """

    def __init__(self, run: Any, number: int):
        name = f"job-{number:04d}.log"
        self.uri = run.path(FOLDER, name)
        self._run, self._remote = run, posixpath.join(run._root, FOLDER, name)
        self._scratch = None if run.is_local else tempfile.mkdtemp(prefix="medray-log-")
        self._file = self.uri if run.is_local else os.path.join(self._scratch, name)
        self._stop = threading.Event()
        self._sent = -1

    def __enter__(self) -> RunLog:
        global _last
        os.makedirs(os.path.dirname(self._file), exist_ok=True)
        self._handler = _QuietHandler(self._file, encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(self._handler)
        _open.append(self._handler)
        _last = self.uri
        if self._scratch is not None:
            threading.Thread(target=self._send_now_and_then, name="run-log", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        logging.getLogger().removeHandler(self._handler)
        _open.remove(self._handler)
        self._handler.close()
        self._stop.set()
        try:
            if error is not None:
                with open(self._file, "a", encoding="utf-8") as file:
                    file.write(time.strftime("%Y-%m-%d %H:%M:%S ") + written(error))
            if self._scratch is not None:
                self._send()
        except OSError as problem:  # a full disk: what failed matters more than its log
            logger.warning("%s could not be written: %s", self.uri, problem)
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _send_now_and_then(self) -> None:
        while not self._stop.wait(UPLOAD_SECONDS):
            try:
                self._send()
            except Exception as problem:  # whatever a store's client raises: the next one may go through
                logger.debug("%s was not uploaded: %s", self.uri, problem)

    def _send(self) -> None:
        size = os.path.getsize(self._file)
        if size != self._sent:
            self._run.fs.put_file(self._file, self._remote)
            self._sent = size


def written(error: BaseException) -> str:
    """An exception with its traceback."""
    return "".join(traceback.format_exception(error))


def kept_aside(error: BaseException) -> str:
    """Write an error's traceback into a temporary file, if no run was open; returns its path."""
    handle, path = tempfile.mkstemp(prefix="medray-", suffix=".log")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(written(error))
    return path
