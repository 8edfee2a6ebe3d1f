"""Records that remember which of their fields were read, so that the others can be named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from medray.ingest.files.notes import MOST_NAMES, UNUSED, Notes
from medray.ingest.readers.common import as_unicode, is_empty


class Tracked(dict):
    """A record that remembers which of its fields were read, by key or by `get`."""

    def __init__(self, record: Mapping[str, Any], used: set[str]):
        super().__init__(record)
        self.used = used

    def __getitem__(self, name: str) -> Any:
        self.used.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.used.add(name)
        return super().get(name, default)


class FieldUse:
    """Fields that say something in one piece of a file, and which of them its reader used."""

    def __init__(self) -> None:
        self.used: set[str] = set()
        self.fields: Counter[str] = Counter()

    def tracked(self, record: Mapping[str, Any]) -> Tracked:
        """The record, to be read by a format's reader."""
        for name, value in record.items():
            if (
                str(name).strip()
                and not is_empty(value)
                and value != []
                and value != {}
                and (name in self.fields or len(self.fields) < MOST_NAMES)
            ):
                self.fields[name] += 1
        return Tracked(record, self.used)

    def note(self, notes: Notes, file: str) -> None:
        """Count the records with a field that the reader used in no record of the piece."""
        for name, number in self.fields.items():
            if name not in self.used:
                notes.add(UNUSED, as_unicode(file), as_unicode(str(name)), number)
