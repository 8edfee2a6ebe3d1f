"""What interruptions cost a training: every start of its workers leaves a note of where it began and how far
it came.

A killed worker, a preempted node and a killed driver all end a start; the next one begins from the last
checkpoint and trains again what came after it. The notes lie in the stage's folder, `starts/00000.json`, ...,
and only rank 0 writes them.
"""

from __future__ import annotations

import itertools
import logging
import posixpath
import time
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from medray.files import files_in, seal, unseal, write_whole

logger = logging.getLogger("medray")

FOLDER = "starts"
SECONDS_BETWEEN_MARKS = 10.0  # in an object store, where each mark is a request


class Start:
    """The note of one start.

    Args:
        stage_dir: of the training, reached from every node.
        step, samples: that it goes on from.
        workers: of this start.
    """

    def __init__(self, stage_dir: str, step: int, samples: int, workers: int):
        self.fs, root = url_to_fs(stage_dir)
        folder = posixpath.join(root, FOLDER)
        self.fs.makedirs(folder, exist_ok=True)
        self.path = posixpath.join(folder, f"{_next_number(self.fs, folder):05d}.json")
        self.note = {"workers": workers, "from_step": step, "from_samples": samples, "began": time.time()}
        # A file of some hundred bytes is written in a fraction of a millisecond, a request to an object store
        # takes as long as a small step.
        self.seconds_between = 0.0 if isinstance(self.fs, LocalFileSystem) else SECONDS_BETWEEN_MARKS
        self.mark(step, samples)

    def step_done(self, step: int, samples: int) -> None:
        """Note a step that is done: on file systems each one, in object stores one every ten seconds, so
        that `redone` there may be too small by the steps of ten seconds for each interruption.
        """
        if time.monotonic() - self.last_mark >= self.seconds_between:
            self.mark(step, samples)

    def mark(self, step: int, samples: int) -> None:
        """Note how far this start came."""
        self.last_mark = time.monotonic()
        self.note |= {"step": step, "samples": samples, "marked": time.time()}
        write_whole(self.fs, self.path, seal(self.note))


def redone(stage_dir: str) -> dict[str, Any]:
    """What a training's interruptions cost: `restarts`, `steps done again`, `samples done again`,
    `seconds between starts` (from the last mark of one to the beginning of the next) and `workers`
    {"start 1": number, ...}; {} where there was no interruption. Workers that become more are an
    interruption too: Ray Train starts the group anew. Notes that cannot be read are left out, and counted
    as `starts without a note`.
    """
    fs, root = url_to_fs(stage_dir)
    notes, damaged = [], 0
    for path in files_in(fs, posixpath.join(root, FOLDER), ".json"):
        try:
            note = unseal(fs.cat_file(path))
            notes.append(
                {
                    name: note[name]
                    for name in ("workers", "step", "samples", "from_step", "from_samples", "began", "marked")
                }
            )
        except (ValueError, KeyError) as error:
            damaged += 1
            logger.warning("%s: damaged (%s); what interruptions cost is counted without it", path, error)
    pairs = list(itertools.pairwise(notes))
    unreadable = {"starts without a note": damaged} if damaged else {}
    if not pairs:
        return unreadable
    return {
        "restarts": len(pairs) + damaged,
        "steps done again": sum(max(0, before["step"] - after["from_step"]) for before, after in pairs),
        "samples done again": sum(
            max(0, before["samples"] - after["from_samples"]) for before, after in pairs
        ),
        "seconds between starts": round(
            sum(max(0.0, after["began"] - before["marked"]) for before, after in pairs), 1
        ),
        "workers": {f"start {number}": note["workers"] for number, note in enumerate(notes, 1)},
        **unreadable,
    }


def _next_number(fs: Any, folder: str) -> int:
    numbers = [posixpath.basename(path).removesuffix(".json") for path in files_in(fs, folder, ".json")]
    return max((int(number) + 1 for number in numbers if number.isdigit()), default=0)
