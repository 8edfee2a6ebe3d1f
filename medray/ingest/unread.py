"""Count the files of a source that nothing was read from, by suffix, so that no file is passed over
without a word.
"""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import xxhash
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from medray.config import DataConfig
from medray.ids import contains
from medray.ingest.files.notes import UNREAD, UNUSED, read_notes
from medray.ingest.files.walk import subfolders, suffix_of, walk_files

READ_AT_ONCE = 2**24  # hashes of files that were read, in memory (128 MiB); more are counted in several walks
WALKERS = 16  # folders that are listed at once: listing waits for a disk or an object store
# Files that stand beside data and hold none.
COMPANIONS = frozenset(
    (".md", ".rst", ".html", ".pdf", ".sh", ".py", ".ipynb", ".log", ".lock", ".crc", ".md5", ".sha256")
)

_PLACE = re.compile(r"#(?:(?:frame|page)=\d+|offset=\d+&size=\d+)$")


def unread_files(
    source: str, tables: Iterable[str], images: Callable[[], Iterator[Iterable[str | None]]], rows: int
) -> dict[str, int]:
    """Number of files below the folder `source` that nothing was read from, by suffix; {} if it is a single
    file.

    Args:
        tables: paths of the files that records were read from.
        images: batches of the image_file of every row, in any order and as often as there are rows of an
            image.
        rows: number of rows, at least.

    Memory does not grow with the number of files; time does.
    """
    fs, root = url_to_fs(source)
    if not fs.isdir(root):
        return {}
    # As rows name their files: from the root of the file system.
    source = root if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(root)
    counts: Counter[str] = Counter()
    walks = rows // READ_AT_ONCE + 1
    own = {_file_hash(path) for path in tables}
    pieces = [(source, 1), *((folder, None) for folder in subfolders(source))]
    for walk in range(walks):
        read = _hashes(images, walks, walk)
        with ThreadPoolExecutor(WALKERS) as pool:
            for found in pool.map(
                partial(_count, source=source, read=read, own=own, walks=walks, walk=walk), pieces
            ):
                counts.update(found)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _file_hash(path: str) -> int:
    """Hash of a file's path, however its file system writes it: an image's place inside the file does not
    count.
    """
    if "://" in path:
        path = path.split("://", 1)[1].lstrip("/")
    return xxhash.xxh64_intdigest(posixpath.normpath(_PLACE.sub("", path)).encode("utf-8", "surrogatepass"))


def _hashes(images: Callable[[], Iterator[Iterable[str | None]]], walks: int, walk: int) -> np.ndarray:
    """Sorted hashes of the files that were read, those of one walk."""
    parts = [np.empty(0, np.uint64)]
    for batch in images():
        found = np.fromiter((_file_hash(path) for path in batch if path), np.uint64)
        parts.append(np.unique(found[found % np.uint64(walks) == walk]))
        if len(parts) == 256:  # rows of one image come again and again
            parts = [np.unique(np.concatenate(parts))]
    return np.unique(np.concatenate(parts))


def _count(
    piece: tuple[str, int | None], source: str, read: np.ndarray, own: set[int], walks: int, walk: int
) -> Counter[str]:
    counts: Counter[str] = Counter()
    files = walk_files(*piece, in_order=False, part_of=source)
    while part := list(islice(files, 2**14)):
        paths = [found.path for found in part if found.problem is None]
        hashes = np.fromiter(map(_file_hash, paths), np.uint64)
        new = (hashes % np.uint64(walks) == walk) & ~contains(read, hashes)
        counts.update(suffix_of(paths[at]) for at in np.flatnonzero(new) if int(hashes[at]) not in own)
    return counts


def account_of(
    config: DataConfig,
    notes_uri: str,
    images: Callable[[], Iterator[Iterable[str | None]]],
    rows: int,
) -> dict[str, Any]:
    """What a source holds beside what was read, for manifests, reports and summaries: {"unread": number of
    files by suffix, members of archives too; "unused": number of records with a field that no reader
    understands, by file}.

    Args:
        notes_uri: where the reading tasks left their notes.
        images, rows: see `unread_files`.
    """
    from medray.ingest.source_index import detect, manifest_of

    notes = read_notes(notes_uri)
    if manifest_of(config.source) is None:  # what stands beside the shards of jobs/prepare_data.py is ours
        _, files = detect(config)
        for suffix, number in unread_files(config.source, files, images, rows).items():
            notes.add(UNREAD, "", suffix, number)
    return {"unread": notes.total(UNREAD), "unused": notes.by_file(UNUSED)}


def unread_line(unread: dict[str, int], most: int = 12) -> str:
    """ "files not read: 12 .heic, 3 .txt" for logs and summaries; "" for none."""
    if not unread:
        return ""
    shown = sorted(unread.items(), key=lambda item: (item[0] in COMPANIONS, -item[1], item[0]))
    parts = [
        f"{number:,} {suffix if suffix.startswith('.') else 'without a suffix'}"
        for suffix, number in shown[:most]
    ]
    rest = sum(number for _, number in shown[most:])
    return f"files not read: {', '.join(parts)}{f' and {rest:,} of other kinds' if rest else ''}"
