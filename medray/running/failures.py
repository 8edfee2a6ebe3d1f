"""What went wrong, in one line, for the person who started the job."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator

from medray.errors import MedrayError

_LINE = 500  # characters of a library's own message


def error_of_ours(error: BaseException) -> MedrayError | None:
    """The MedrayError inside one of Ray's: raised in a task, an actor's constructor, or a training worker."""
    for inner in _inside(error, set()):
        if isinstance(inner, MedrayError) and not _is_rays(inner):
            return inner
    return None


def describe(error: BaseException) -> str:
    """One line: the kind of error, what it says, and what to do about it where that is known."""
    for inner in _inside(error, set()):
        if isinstance(inner, OSError) and inner.errno in _FIXES:
            place = f" ({inner.filename})" if inner.filename else ""
            return f"{inner.strerror}{place}; {_FIXES[inner.errno]}"
    error = next((inner for inner in _inside(error, set()) if not _is_rays(inner)), error)
    if isinstance(error, MedrayError):
        return str(error)
    if _is_rays(error):
        said = f"Ray: {type(error).__name__}: {_first_line(error).rstrip('.')}"
        return f"{said}; a process or a machine of the cluster was lost, or Ray could not start one"
    if isinstance(error, json.JSONDecodeError):
        return f"a file of JSON is damaged: {_first_line(error)}"
    if isinstance(error, MemoryError):
        return "out of memory; use a machine with more, or fewer workers at once"
    return f"{type(error).__name__}: {_first_line(error)}"


_FIXES = {
    errno.ENOSPC: "free some space on that disk",
    errno.EDQUOT: "your quota on that disk is used up; free some space",
    errno.EROFS: "that disk is read-only; use another one",
    errno.EACCES: "change its permissions, or use another place",
    errno.EPERM: "change its permissions, or use another place",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ESTALE: "the network file system has lost that file; check its mount",
    errno.EIO: "the disk reports an error; check it",
}


def _inside(error: BaseException | None, seen: set[int]) -> Iterator[BaseException]:
    """An error and what it wraps, outermost first."""
    if not isinstance(error, BaseException) or id(error) in seen:
        return
    seen.add(id(error))
    yield error
    # RayTaskError keeps `cause`, ActorDiedError has the constructor's RayTaskError in its arguments, Ray
    # Train keeps what its workers or its controller raised.
    wrapped = [
        getattr(error, "cause", None),
        *error.args,
        getattr(error, "controller_failure", None),
        error.__cause__,
    ]
    wrapped += list(getattr(error, "worker_failures", {}).values()) + list(getattr(error, "exceptions", ()))
    for inner in wrapped:
        yield from _inside(inner, seen)


def _is_rays(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] == "ray" or any(
        kind.__module__ == "ray.exceptions" for kind in type(error).__mro__
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A remote traceback ends in what was raised.
    said = (
        next((line for line in reversed(lines) if not line.startswith(("File ", "^"))), "")
        if "Traceback" in str(error)
        else (lines or [""])[0]
    )
    return said[:_LINE] or "no message"
