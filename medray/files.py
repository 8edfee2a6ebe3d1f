"""Files on any fsspec file system: list a folder by its literal name, write whole, hash contents."""

from __future__ import annotations

import os
import uuid
from typing import Any

import xxhash
from fsspec.implementations.local import LocalFileSystem

_BLOCK = 2**22  # bytes hashed at once


def files_in(fs: Any, folder: str, suffix: str = "") -> list[str]:
    """Paths of a folder's files whose names end with `suffix`, in order of name; none if there is no such folder.

    Unlike `fs.glob` it takes the folder's name literally: a run may lie under `results[2026]/`.
    """
    fs.invalidate_cache(folder)  # of an object store's listing: other processes write
    try:
        entries = fs.ls(folder, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    files = (entry["name"] for entry in entries if entry["type"] == "file")
    return sorted(path for path in files if path.endswith(suffix) and path.rstrip("/") != folder.rstrip("/"))


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
