"""What of Ray's output reaches the terminal: no traceback of Ray's or of a worker's, and no housekeeping,
which go into the run's log instead.

A stage that fails ends in one line of its own (medray.commands.command_line). Ray prints tracebacks before
it: Ray Data for what it takes for an error of its own, the driver for each retry of a task, and whatever
dying workers write to their standard error.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from typing import Any

from medray.running import run_log

_TRACEBACK = "Traceback (most recent call last)"
_ANNOUNCED = re.compile(r"stack trace below", re.IGNORECASE)  # of Ray Data (2.60)
_RAYS = "ray_print_logs"  # the name of Ray's own handler (2.60)
# of vLLM's lines
_PREFIX = re.compile(r"^(\(\w+ pid=\d+\) )?((ERROR|WARNING|INFO|CRITICAL) [\d-]+ [\d:,.]+ \[[^\]]+\] ?)?")
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
# Lines that only a traceback has: Ray's C++ prints that of an actor's constructor without its first line.
_BEGIN = re.compile(
    r'Traceback \(most recent call last\)|^\s*File "[^"]+", line \d+|^\s*[\^~]+\s*$|^ray::\S+\(\) '
    r"\(|Exception raised in creation task|^Exception in thread "
    r"|^The above exception was|^During handling of the above"
)
# Lines of a traceback, and those that join one to the next.
_INNER = re.compile(r"^(\s|$|\w+(\.\w+)*(Error|Exception|Exit|Interrupt|Warning|Dead|Died)\b)")

# What Ray, Ray Train and vLLM say of their own housekeeping: a reader of the terminal can make nothing of it.
_HOUSEKEEPING = re.compile(
    r"Progress bars disabled|^Setting up process group for|^Requesting resources: "
    r"|training worker group of size|^- \(ip=[\d.]+, pid=\d+\) world_rank|NUMA"
    r"|Token authentication is enabled|generation flags are not valid"
    r"|default values have been overridden by model's `generation_config"
)


class TracebackFilter(logging.Filter):
    """For the handlers of a terminal: records with a traceback, or that announce one, go into the run's
    log, if there is one.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        said = record.getMessage()
        hidden = _TRACEBACK in said or _ANNOUNCED.search(said) or _HOUSEKEEPING.search(said)
        if not record.exc_info and not hidden:
            return True
        return not run_log.keep(record)


class WorkerLines:
    """Handler of the lines that Ray forwards from its workers: hands on all but tracebacks, which go into the
    run's log.

    Args:
        show: prints what is left of a batch.
    """

    def __init__(self, show: Any):
        self._show = show
        self._inside: set[Any] = set()  # processes in the middle of a traceback

    def __call__(self, data: dict[str, Any]) -> None:
        who = (data.get("ip"), data.get("pid"), data.get("is_err"))
        shown, kept = [], []
        for line in data["lines"]:
            text = _PREFIX.sub("", _COLOUR.sub("", line))
            if _BEGIN.search(text):
                self._inside.add(who)
            elif who in self._inside and not _INNER.match(text):
                self._inside.discard(who)
            (kept if who in self._inside or _HOUSEKEEPING.search(text) else shown).append(line)
        if kept:
            record = logging.makeLogRecord(
                {
                    "name": f"worker {data.get('pid')}",
                    "levelno": logging.ERROR,
                    "levelname": "ERROR",
                    "msg": "\n".join(map(str, kept)),
                }
            )
            if not run_log.keep(record):
                shown = data["lines"]
        if shown:
            self._show({**data, "lines": shown})


@contextlib.contextmanager
def without_tracebacks() -> Iterator[None]:
    """Keep tracebacks of Ray and of its workers off the terminal, for the time of the block. Ray must be
    initialised.
    """
    from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

    quiet = TracebackFilter()
    handlers = [
        handler
        for name in ("ray", "ray.data", "ray.train")
        for handler in logging.getLogger(name).handlers
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)
    ]
    for handler in handlers:
        handler.addFilter(quiet)
    rays = dict(dispatcher.handlers).get(_RAYS)
    if rays is not None:
        dispatcher.remove_handler(_RAYS)
        dispatcher.add_handler(_RAYS, WorkerLines(rays))  # by its name: Ray takes it away when it disconnects
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(quiet)
        if rays is not None and _RAYS in dict(dispatcher.handlers):
            dispatcher.remove_handler(_RAYS)
            dispatcher.add_handler(_RAYS, rays)
