"""How many rows the actors of a stage began to work on: more than it has written, where processes died and
rows were done again.

Every actor keeps its number in a file of its own beside the stage's committed ids, so that nothing is lost
with it, nor with the job.
"""

from __future__ import annotations

import contextlib
import logging
import posixpath
import threading
import uuid
from collections.abc import Iterator

from fsspec.core import url_to_fs

from medray.files import files_in, seal, unseal, write_whole

logger = logging.getLogger("medray")

_KEY = "medray_begun"  # of Ray Data's context, which comes along to every actor


class Begun:
    """An actor's number; outside `counted` it goes nowhere. To be made in the actor, and called with a
    batch's rows before they are worked on.
    """

    def __init__(self) -> None:
        from ray.data import DataContext

        folder = DataContext.get_current().get_config(_KEY)
        self.rows, self._lock = 0, threading.Lock()
        self._file = None
        if folder:
            self._fs, root = url_to_fs(folder)
            self._fs.makedirs(root, exist_ok=True)
            self._file = posixpath.join(root, uuid.uuid4().hex)

    def __call__(self, rows: int) -> None:
        with self._lock:
            self.rows += rows
            if self._file:
                write_whole(self._fs, self._file, seal({"rows": self.rows}))


@contextlib.contextmanager
def counted(folder: str) -> Iterator[None]:
    """Actors of datasets made under this keep their numbers in `folder`."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.set_config(_KEY, folder)
    try:
        yield
    finally:
        context.remove_config(_KEY)


def begun_rows(folder: str) -> int:
    """The sum of all actors' numbers, those of earlier attempts included; 0 where there are none.

    A number that cannot be read counts as 0 and is named in the log: it only makes "rows done again" too
    small.
    """
    fs, root = url_to_fs(folder)
    total = 0
    for path in files_in(fs, root):
        if path.endswith(".part"):  # of an actor killed while it wrote
            continue
        try:
            total += unseal(fs.cat_file(path))["rows"]
        except (ValueError, KeyError, TypeError):
            logger.warning('%s: damaged; "rows done again" will be too small', path)
    return total
