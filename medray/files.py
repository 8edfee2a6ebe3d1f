"""Files on any fsspec file system: list a folder by its literal name, write whole, hash contents, seal
small JSON files.
"""

from __future__ import annotations

import json
import os
import uuid
from glob import has_magic
from typing import Any

import xxhash
from fsspec.implementations.local import LocalFileSystem

CHECKSUM = "checksum"
_BLOCK = 2**22  # bytes hashed at once


def files_in(fs: Any, folder: str, suffix: str = "") -> list[str]:
    """Paths of a folder's files whose names end with `suffix`, in order of name; none if there is no such
    folder.

    Unlike `fs.glob` it takes the folder's name literally: a run may lie under `results[2026]/`.
    """
    fs.invalidate_cache(folder)  # of an object store's listing: other processes write
    try:
        entries = fs.ls(folder, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    files = (entry["name"] for entry in entries if entry["type"] == "file")
    return sorted(path for path in files if path.endswith(suffix) and path.rstrip("/") != folder.rstrip("/"))


def remove_folder(fs: Any, path: str) -> None:
    """Remove a folder with all that is in it. Unlike `fs.rm` of object stores it takes the name literally."""
    if isinstance(fs, LocalFileSystem) or not has_magic(path):
        fs.rm(path, recursive=True)
        return
    for file in fs.find(path):
        fs.rm_file(file)


def write_whole(fs: Any, path: str, data: bytes) -> None:
    """Write a small file so that readers see it whole or not at all, also when the writer is killed."""
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(path, data)  # object stores show an upload only when it is complete
        return
    part = f"{path}.{uuid.uuid4().hex[:8]}.part"
    try:
        with open(part, "wb") as handle:
            handle.write(data)
        os.replace(part, path)
    except OSError:
        if os.path.exists(part):
            os.unlink(part)
        raise


def hash_file(fs: Any, path: str) -> str:
    """XXH3-128 of a file's bytes in hexadecimal, in constant memory."""
    digest = xxhash.xxh3_128()
    with fs.open(path, "rb") as handle:
        while block := handle.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def seal(value: dict[str, Any], default: Any = None) -> bytes:
    """A JSON object as the bytes of a file, with a checksum of its contents under "checksum"."""
    plain = json.loads(json.dumps(value, default=default))  # as it will be read
    return (json.dumps(plain | {CHECKSUM: _checksum(plain)}, indent=1) + "\n").encode()


def unseal(data: bytes) -> dict[str, Any]:
    """The object that `seal` was given.

    Raises ValueError, in a few words, if the file is empty, cut or changed.
    """
    try:
        value = json.loads(data)
    except ValueError as error:
        raise ValueError("it is empty" if not data else "it is cut or changed") from error
    if not isinstance(value, dict):
        raise ValueError("it is changed")
    if CHECKSUM not in value:  # cut in its name, or of another program
        raise ValueError("it has no checksum")
    if value.pop(CHECKSUM) != _checksum(value):
        raise ValueError("its contents do not match its checksum")
    return value


def _checksum(value: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())
