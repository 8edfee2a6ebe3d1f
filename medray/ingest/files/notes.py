"""Count what readers see and do not use: files of an archive, fields of a record.

Readers work in many tasks, and what they note must not travel with the rows. Each task writes its notes as
one small JSON file, named after the part of the source it read, so a task that runs again replaces its own
notes. The driver adds them up.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from fsspec.core import url_to_fs

UNREAD = "unread"  # files by suffix
UNUSED = "unused"  # fields or columns that the reader does not understand
MOST_NAMES = 200  # of one file; the rest are counted together
MOST_FILES = 1000  # of one kind, in what the driver holds
OTHERS = "(others)"


class Notes:
    """Counts by kind, file and name. Memory is bounded: names and files beyond the limits are counted as
    OTHERS.
    """

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, Counter[str]]] = {}

    def add(self, kind: str, file: str, name: str, number: int = 1) -> None:
        """Count `number` more of `name`.

        Args:
            kind: UNREAD or UNUSED.
            file: the file of the source the count belongs to, relative to the source; "" if it belongs to the
                source.
            name: a suffix or a field. Never a value of a record: it goes into reports.
        """
        files = self.counts.setdefault(kind, {})
        if file not in files and len(files) >= MOST_FILES:
            file = OTHERS
        names = files.setdefault(file, Counter())
        full = len(names) - (OTHERS in names) >= MOST_NAMES
        names[OTHERS if full and name not in names else name] += number

    def merge(self, other: dict[str, dict[str, dict[str, int]]]) -> None:
        """Add the counts of other notes."""
        for kind, files in other.items():
            for file, names in files.items():
                for name, number in names.items():
                    self.add(kind, file, name, number)

    def total(self, kind: str) -> dict[str, int]:
        """Counts of a kind by name, over all files; the most frequent first."""
        counts: Counter[str] = Counter()
        for names in self.counts.get(kind, {}).values():
            counts.update(names)
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def by_file(self, kind: str) -> dict[str, dict[str, int]]:
        """Counts of a kind by file, then by name, both in order."""
        return {
            file: dict(sorted(names.items())) for file, names in sorted(self.counts.get(kind, {}).items())
        }

    def write(self, folder: str | None, *part: Any) -> None:
        """Write the counts into the folder of notes, in the place of the part of the source they are of.
        Nothing is written if there are none, or without a folder.
        """
        if folder is None or not self.counts:
            return
        fs, root = url_to_fs(folder)
        fs.makedirs(root, exist_ok=True)
        name = hashlib.sha256("|".join(map(str, part)).encode("utf-8", "surrogatepass")).hexdigest()[:24]
        fs.pipe_file(f"{root}/{name}.json", json.dumps(self.counts, sort_keys=True).encode())


def read_notes(folder: str) -> Notes:
    """Add up what the tasks have written; empty notes for a folder that is not there."""
    notes = Notes()
    for data in _written(folder):
        notes.merge(json.loads(data))
    return notes


def _written(folder: str) -> Iterator[bytes]:
    fs, root = url_to_fs(folder)
    fs.invalidate_cache(root)  # other processes write
    if fs.exists(root):
        for path in sorted(name for name in fs.ls(root, detail=False) if name.endswith(".json")):
            yield fs.cat_file(path)
