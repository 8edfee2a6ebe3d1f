"""Walk a source's folders: every file once, linked folders too, and what cannot be read is named instead
of left out.
"""

from __future__ import annotations

import os
import posixpath
import re
import stat
from collections.abc import Iterator
from typing import Any, NamedTuple

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from medray.errors import DataError

NO_SUFFIX = "(none)"
# four digits in a row may be a patient's number
_SUFFIX = re.compile(r"\.(?=[^.]*[a-z])(?![^.]*\d{4})[a-z0-9_+~-]{1,10}$")
_PACKED = (".gz", ".bz2", ".xz", ".zst")


class Found(NamedTuple):
    """A file, or a place with a `problem` that keeps it from being read."""

    path: str  # URI
    problem: str | None = None


def suffix_of(name: str) -> str:
    """A file's suffix in lower case, ".nii.gz" for packed files, NO_SUFFIX if it has none.

    What follows the last dot of an id (1.2.840.113619) is no suffix, and a hidden file (.DS_Store) has none.
    """
    stem, suffix = posixpath.splitext(posixpath.basename(name).lower())
    if _SUFFIX.fullmatch(suffix) is None:
        return NO_SUFFIX
    inner = posixpath.splitext(stem)[1] if suffix in _PACKED else ""
    return (inner if _SUFFIX.fullmatch(inner) else "") + suffix


def walk_files(
    folder: str,
    depth: int | None = None,
    in_order: bool = True,
    part_of: str | None = None,
) -> Iterator[Found]:
    """The files of a folder (or the one file), folder by folder.

    Args:
        depth: levels to read; None for all.
        in_order: by name. Without it a folder of any number of files takes no memory.
        part_of: the source, if `folder` is one of its folders: a link that leads back to the source is not
            followed, and a `folder` that cannot be read is a problem among others.

    A linked folder is followed unless it leads back to a folder above it. Folders that cannot be listed, such
    links, and what is no file (pipes, sockets, devices) come with their problem.

    Raises DataError if `folder` itself cannot be read.
    """
    fs, root = url_to_fs(folder)
    if fs.isfile(root):
        yield Found(folder)
    elif isinstance(fs, LocalFileSystem):
        # The address goes out as it came in: ids are paths relative to it.
        apart = part_of is not None and part_of.rstrip("/") != folder.rstrip("/")
        yield from _walk_local(folder, root, depth, in_order, (_identity(part_of),) if apart else ())
    else:
        yield from _walk_remote(fs, folder, root, depth)


def _identity(folder: str) -> tuple[int, int]:
    found = os.stat(url_to_fs(folder)[1])
    return found.st_dev, found.st_ino


def subfolders(folder: str) -> list[str]:
    """URIs of the folders in a folder, in order of name; linked ones too. Raises DataError if it cannot
    be read.
    """
    fs, root = url_to_fs(folder)
    try:
        return _subfolders(fs, folder, root)
    except OSError as error:
        raise DataError(f"data.source: {folder} cannot be read: {error.strerror or error}") from None


def _subfolders(fs: Any, folder: str, root: str) -> list[str]:
    if not isinstance(fs, LocalFileSystem):
        names = [
            entry["name"].rstrip("/") for entry in fs.ls(root, detail=True) if entry["type"] == "directory"
        ]
        return sorted(posixpath.join(folder, posixpath.basename(name)) for name in names if name != root)
    with os.scandir(root) as entries:
        return sorted(posixpath.join(folder, entry.name) for entry in entries if _is_folder(entry))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _walk_local(
    uri: str,
    path: str,
    depth: int | None,
    in_order: bool,
    above: tuple[tuple[int, int], ...],
) -> Iterator[Found]:
    try:
        own = os.stat(path)
        listing = os.scandir(path)
    except OSError as error:
        if not above:
            raise DataError(f"data.source: {uri} cannot be read: {error.strerror}") from None
        yield Found(uri, f"the folder cannot be read: {error.strerror}")
        return
    if (own.st_dev, own.st_ino) in above:
        listing.close()
        yield Found(uri, "the link leads back to a folder above it and is not followed")
        return
    folders = []
    with listing:
        for entry in sorted(listing, key=lambda entry: entry.name) if in_order else listing:
            if _is_folder(entry):
                folders.append(entry.name)
            else:
                yield Found(posixpath.join(uri, entry.name), _problem(entry))
    if depth == 1:
        return
    for name in folders:
        below = posixpath.join(uri, name), posixpath.join(path, name)
        yield from _walk_local(*below, depth and depth - 1, in_order, (*above, (own.st_dev, own.st_ino)))


def _problem(entry: os.DirEntry[str]) -> str | None:
    """Why a thing that is no folder is no file either. Links that lead nowhere count as files: opening
    them says why.
    """
    if entry.is_file(follow_symlinks=False):
        return None
    try:
        return (
            None if stat.S_ISREG(entry.stat().st_mode) else "it is a pipe, a socket or a device, not a file"
        )
    except OSError:
        return None


def _walk_remote(fs: Any, folder: str, root: str, depth: int | None) -> Iterator[Found]:
    failed: list[Exception] = []
    for parent, folders, names in fs.walk(root, maxdepth=depth, on_error=failed.append):
        folders.sort()  # the walk goes on in this order
        for name in sorted(names):
            if name:  # some object stores list a marker of the folder itself
                yield Found(posixpath.join(folder, parent.removeprefix(root).lstrip("/"), name))
    if failed:
        raise DataError(f"data.source: {folder} cannot be listed: {failed[0]}")
