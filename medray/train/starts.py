"""What interruptions cost a training: every start of its workers leaves a note of where it began and how far it came.

A killed worker, a preempted node and a killed driver all end a start; the next one begins from the last checkpoint and trains again what came
after it. The notes lie in the stage's folder, `starts/00000.json`, ..., and only rank 0 writes them.
"""

from __future__ import annotations

import itertools
import json
import posixpath
import time
from typing import Any

from fsspec.core import url_to_fs

from medray.files import files_in, write_whole

FOLDER = "starts"


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
        self.path = posixpath.join(folder, f"{len(_notes(self.fs, folder)):05d}.json")
        self.note = {"workers": workers, "from_step": step, "from_samples": samples, "began": time.time()}
        self.mark(step, samples)

    def mark(self, step: int, samples: int) -> None:
        """So far it came. Steps after the last mark count for nothing in `redone`: mark every few seconds, and at the end."""
        self.note |= {"step": step, "samples": samples, "marked": time.time()}
        write_whole(self.fs, self.path, json.dumps(self.note).encode())


def redone(stage_dir: str) -> dict[str, Any]:
    """What a training's interruptions cost: `restarts`, `steps done again`, `samples done again`, `seconds between starts` (from the last mark of
    one to the beginning of the next) and `workers` {"start 1": number, ...}; {} where there was no interruption. Workers that become more
    are an interruption too: Ray Train starts the group anew."""
    fs, root = url_to_fs(stage_dir)
    notes = [json.loads(fs.cat_file(path)) for path in _notes(fs, posixpath.join(root, FOLDER))]
    pairs = list(itertools.pairwise(notes))
    if not pairs:
        return {}
    return {
        "restarts": len(pairs),
        "steps done again": sum(max(0, before["step"] - after["from_step"]) for before, after in pairs),
        "samples done again": sum(max(0, before["samples"] - after["from_samples"]) for before, after in pairs),
        "seconds between starts": round(sum(max(0.0, after["began"] - before["marked"]) for before, after in pairs), 1),
        "workers": {f"start {number}": note["workers"] for number, note in enumerate(notes, 1)},
    }


def _notes(fs: Any, folder: str) -> list[str]:
    return files_in(fs, folder, ".json")
