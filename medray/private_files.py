"""Files and folders that only their owner may read, whatever the umask: they hold patients' images, or
keys.
"""

from __future__ import annotations

import logging
import os
import secrets
import stat
from pathlib import Path

from fsspec.core import url_to_fs

FILE_MODE, FOLDER_MODE, _OTHERS = 0o600, 0o700, 0o077

log = logging.getLogger(__name__)


def private_folder(uri: str) -> None:
    """Make a local folder, and those above it that are missing, with mode 0700.

    A folder that is there keeps its mode, which its owner may have chosen; where others may read it, the log
    says so. Nothing happens at a remote address: who may read an object store is set there.
    """
    fs, root = url_to_fs(uri)
    if "file" not in ([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol):
        return
    folder = Path(root)
    missing = [part for part in (folder, *folder.parents) if not part.exists()]
    for part in reversed(missing):
        part.mkdir(mode=FOLDER_MODE, exist_ok=True)
    if folder not in missing and stat.S_IMODE(folder.stat().st_mode) & _OTHERS:
        log.warning(
            "%s can be read by others, and gets patients' data; to close it: chmod 700 %s", folder, folder
        )


def private_file(path: str | Path) -> None:
    """Make an empty file with mode 0600, or take the rights of group and others from the one that is there.

    Raises OSError if the file cannot be made.
    """
    # Read-only is enough, and also opens a file that is write-protected on purpose.
    handle = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
    os.close(handle)
    _tighten(Path(path))


def write_private(path: Path, text: str) -> None:
    """Write a file with mode 0600 as a whole or not at all.

    It is written beside its place under a name that nobody can foresee or have made before (O_EXCL follows no
    link), then moved there.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            os.fchmod(handle, FILE_MODE)
            file.write(text)
            file.flush()
            os.fsync(handle)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _tighten(path: Path) -> None:
    found = path.stat()
    mode = stat.S_IMODE(found.st_mode)
    if found.st_uid == os.geteuid() and mode & _OTHERS:
        try:
            path.chmod(mode & ~_OTHERS)
        except OSError as error:  # a file system that is read-only, or has no modes
            log.warning("%s can be read by others and its mode cannot be changed: %s", path, error.strerror)
