"""WebDataset tars: key.jpg beside key.json or key.txt. Index rows point into the tar; no image passes
through them.
"""

from __future__ import annotations

import json
import posixpath
import re
import tarfile
from collections.abc import Collection, Iterator
from functools import partial
from typing import Any

from medray.errors import BadRecord
from medray.ingest.files.notes import UNREAD, Notes
from medray.ingest.files.reading import failure, open_file
from medray.ingest.files.walk import suffix_of
from medray.ingest.readers.canonical import payloads
from medray.ingest.readers.common import IMAGE_SUFFIXES, Row, error_row, identity_of, is_empty, row
from medray.ingest.readers.tracked import FieldUse
from medray.pseudonyms import shown_path
from medray.split_names import UnknownSplit, record_split, split_of
from medray.stable_draws import digest

# A member's text that is longer than this is not read (bytes).
LONGEST_TEXT = 16 * 2**20

# WebDataset's rules: the key ends at the first dot of the file's name, and __names__ are not samples.
_MEMBER = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_META = re.compile(r"__[^/]*__($|/)")


def tar_rows(
    path: str,
    notes: Notes,
    patient_key: bytes | None = None,
    root: str | None = None,
    more: Collection[str] = (),
) -> Iterator[Row]:
    """Index rows of a tar's samples, read once from begin to end; the members of a sample stand together.
    Members that nothing is read from are noted by their suffix, fields that are not used by their name.

    `image_file` is "<path>#offset=<byte>&size=<bytes>". The id is the JSON's sample_id, else "<tar's path
    below root>/<key>".

    Args:
        root, more: see readers.splits.split_of and known_split.
    """
    name = _below(path, root)
    sample: dict[str, Any] = {}
    use = FieldUse()
    rows = partial(
        _sample_rows,
        path=path,
        name=name,
        patient_key=patient_key,
        split=split_of(path, root),
        more=more,
        use=use,
    )
    try:
        with open_file(path) as handle, tarfile.open(fileobj=handle, mode="r:") as tar:
            for member in tar:
                tar.members = []  # tarfile would keep every header of the file
                match = _MEMBER.match(member.name)
                if member.isdir():
                    continue
                if not member.isfile() or match is None or _META.match(member.name):
                    notes.add(UNREAD, name, suffix_of(member.name))
                    continue
                key, suffix = match[1], f".{match[2].lower()}"
                if sample and sample["key"] != key:
                    yield from rows(sample)
                    sample = {}
                sample = sample or {"key": key, "images": [], "texts": {}}
                if suffix in IMAGE_SUFFIXES:
                    sample["images"].append(f"{path}#offset={member.offset_data}&size={member.size}")
                elif suffix in (".json", ".txt", ".caption"):
                    sample["texts"][suffix] = (
                        tar.extractfile(member).read() if member.size <= LONGEST_TEXT else None
                    )
                else:
                    notes.add(UNREAD, name, suffix_of(member.name))
            handle.seek(tar.offset)
            if handle.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes a broken header for the end
                raise tarfile.ReadError("broken header")
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        why = str(error) if isinstance(error, tarfile.TarError) else f"it {failure(error)}"
        after = shown_path(sample.get("key", "its begin"), key=patient_key)
        yield error_row(
            f"{name}@end",
            f"{shown_path(name, key=patient_key)} after {after}",
            f"the tar cannot be read on: {why}",
        )
    if sample:
        yield from rows(sample)
    use.note(notes, name)


def _below(path: str, root: str | None) -> str:
    """A tar's path below the source: two folders may each hold a 000.tar."""
    inside = root is not None and path.startswith(root.rstrip("/") + "/")
    return path[len(root.rstrip("/")) + 1 :] if inside else posixpath.basename(path)


def _sample_rows(
    sample: dict[str, Any],
    path: str,
    name: str,
    patient_key: bytes | None,
    split: str | None,
    more: Collection[str],
    use: FieldUse,
) -> Iterator[Row]:
    where = f"{shown_path(name, key=patient_key)} {shown_path(sample['key'], key=patient_key)}"
    identity = f"{name.removesuffix('.tar')}/{sample['key']}"
    try:
        record = use.tracked(_record(sample["texts"]))
        if len(sample["images"]) != 1:
            raise BadRecord(f"the sample has {len(sample['images'])} images; it must have one")
        identity = identity_of(record.get("sample_id")) or identity_of(record.get("id")) or identity
        image_id = identity_of(record.get("image_id")) or identity
        common = {
            "split": record_split(record, more) or split,
            "modality": record.get("modality"),
            "group_id": _group(record.get("group_id")),
        }
        made = [
            row(identity + suffix, image_id, sample["images"][0], payload, **common)
            for suffix, payload in payloads(record)
        ]
    except (BadRecord, UnknownSplit) as bad:
        yield error_row(identity, where, str(bad))
        return
    except MemoryError:
        raise
    except Exception as odd:  # one sample in a shape that nobody thought of
        yield error_row(identity, where, f"the sample cannot be read ({type(odd).__name__})")
        return
    yield from ({**one, "where": where, "error": None} for one in made)


def _group(value: Any) -> str | None:
    """A hash of what the JSON calls the group; what is one already stays."""
    if value is None:
        return None
    return value if isinstance(value, str) and re.fullmatch("[0-9a-f]{16}", value) else digest(value)


def _record(texts: dict[str, bytes | None]) -> dict[str, Any]:
    """The sample's JSON object, with the text file as its caption where it has none."""
    if long := [suffix for suffix, text in texts.items() if text is None]:
        raise BadRecord(f"the sample's {long[0]} is longer than {LONGEST_TEXT} bytes")
    try:
        record = json.loads(texts[".json"]) if ".json" in texts else {}
        caption = texts.get(".txt", texts.get(".caption", b"")).decode("utf-8").strip()
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"the sample's text cannot be read: {error}") from None
    if not isinstance(record, dict):
        raise BadRecord(f"the sample's JSON is a {type(record).__name__}, not an object")
    if caption and is_empty(record.get("caption")):
        record["caption"] = caption
    elif caption and caption != str(record["caption"]).strip():
        raise BadRecord(
            "the sample's text file says something else than field 'caption' of its JSON; leave one of them "
            "out"
        )
    return record
