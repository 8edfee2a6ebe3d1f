"""Open files that records and folders name: nothing that is no file, and every failure in a few words."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from fsspec.core import url_to_fs

# What to say of a path, by the number of the operating system's error.
_WORDS = {
    errno.ENOENT: "does not exist",
    errno.EISDIR: "is a folder",
    errno.ENOTDIR: "does not exist: a part of its path is a file",
    errno.EACCES: "cannot be read: permission denied",
    errno.EPERM: "cannot be read: permission denied",
    errno.ENAMETOOLONG: "has a name that is too long for a file",
    errno.ELOOP: "is a link that leads to itself",
    errno.ENXIO: "is a pipe or a device, not a file",
}

DICOM_HEAD = 132  # bytes that tell a DICOM file


def is_dicom(head: bytes) -> bool:
    """Whether a file's first bytes are a DICOM file's (PS3.10: a preamble of 128 bytes, then DICM)."""
    return head[DICOM_HEAD - 4 : DICOM_HEAD] == b"DICM"


@contextmanager
def open_file(path: str) -> Iterator[BinaryIO]:
    """A file of a disk or an object store, to read. Raises OSError for a folder, a pipe or a device:
    opening a pipe would wait for somebody to write into it.
    """
    if "://" in path:
        fs, inner = url_to_fs(path)
        with fs.open(inner, "rb") as handle:
            yield handle
        return
    # Without fsspec, which takes a quarter of the time that decoding an image does.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as handle:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            number = errno.EISDIR if stat.S_ISDIR(mode) else errno.ENXIO
            raise OSError(number, os.strerror(number))
        yield handle


def failure(error: BaseException) -> str:
    """Why a file could not be read, to follow its name: "does not exist". Quotes neither the path nor a
    value.
    """
    if isinstance(error, OSError) and error.errno in _WORDS:
        return _WORDS[error.errno]
    for kind, number in (
        (FileNotFoundError, errno.ENOENT),
        (IsADirectoryError, errno.EISDIR),
        (PermissionError, errno.EACCES),
    ):
        if isinstance(error, kind):  # of an object store, without a number
            return _WORDS[number]
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    if isinstance(error, ValueError):  # NUL, or half of a surrogate pair
        return "has a name that no file can have"
    return f"cannot be read ({type(error).__name__})"
