"""Models at remote addresses, copied to this node once."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from medray.errors import StageError

_SMALL = 2**28  # the largest tokenizers take some tens of MB


def localize(uri: str | os.PathLike) -> str:
    """A local path for a model: remote folders (s3://, gs://, ...) are copied to a cache first.

    Local paths and hub ids come back unchanged. The cache, MEDRAY_CACHE or ~/.cache/medray, is keyed by the
    address and by name, size and change mark of every file, so a model exported anew to the same address is
    copied anew. Actors on one node that ask at the same time copy once.

    Raises StageError where there is nothing at the address.
    """
    uri = os.fspath(uri)
    fs, root = _store(uri)
    if fs is None:
        return root
    files = _files(fs, root, uri)
    key = hashlib.sha256(
        repr((uri, [(path, size, str(mark)) for path, (size, mark) in files.items()])).encode()
    ).hexdigest()[:24]
    cache = Path(os.environ.get("MEDRAY_CACHE") or Path.home() / ".cache" / "medray") / "models"
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / key
    with _locked(cache / f"{key}.lock"):
        if not target.exists():
            scratch = tempfile.mkdtemp(prefix=f".{key}-", dir=cache)
            try:
                for path in files:
                    local = Path(scratch, path[len(root) :].lstrip("/"))
                    local.parent.mkdir(parents=True, exist_ok=True)
                    fs.get_file(path, str(local))
                os.rename(scratch, target)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return str(target)


def small_files(uri: str | os.PathLike, scratch: str | os.PathLike) -> str:
    """A local path for everything of a model but its weights: the files of a remote folder are copied to
    `scratch`, other references come back as they are.

    Raises StageError where there is nothing at the address.
    """
    uri = os.fspath(uri)
    fs, root = _store(uri)
    if fs is None:
        return root
    for path, (size, _) in _files(fs, root, uri).items():
        if size <= _SMALL and not path.endswith((".safetensors", ".bin", ".pt", ".pth")):
            local = Path(scratch, path[len(root) :].lstrip("/"))
            local.parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(path, str(local))
    return os.fspath(scratch)


def marks(uri: str | os.PathLike) -> dict[str, tuple[int, str]] | None:
    """Size and change mark of every file of a remote model, by its path in the model's folder, without a look
    into them; None for a local one, a hub id, and a store that marks no changes.

    Raises StageError where there is nothing at the address.
    """
    uri = os.fspath(uri)
    fs, root = _store(uri)
    if fs is None:
        return None
    files = _files(fs, root, uri)
    if any(mark is None for _, mark in files.values()):
        return None
    return {path[len(root) :].lstrip("/"): (size, str(mark)) for path, (size, mark) in files.items()}


def _store(uri: str) -> tuple[Any, str]:
    """(file system, folder in it) of a remote address; (None, itself) of a local path or hub id, and
    (None, path) of a file:// address.
    """
    if "://" not in uri:
        return None, uri
    from fsspec.core import url_to_fs

    fs, root = url_to_fs(uri)
    local = "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))
    return None if local else fs, root


def _files(fs: Any, root: str, uri: str) -> dict[str, tuple[int, Any]]:
    """(size, change mark; None where the store has none) by path."""
    files = {
        path: info for path, info in sorted(fs.find(root, detail=True).items()) if info["type"] == "file"
    }
    if not files:
        raise StageError(f"model {uri}: there are no files at this address")
    return {
        path: (
            info["size"],
            info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("LastModified"),
        )
        for path, info in files.items()
    }


@contextlib.contextmanager
def _locked(path: Path):
    import fcntl

    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # released with the file, also when the process is killed
        yield
