"""The errors medray raises itself. Each message names the field, file or sample and the fix."""

from collections.abc import Iterable


class MedrayError(Exception):
    """Base of every error a user is meant to read; jobs print it without a traceback."""


class ConfigError(MedrayError):
    """A configuration that cannot run. Raised before any process is started."""


class DataError(MedrayError):
    """A data source that cannot be read at all (single bad rows are quarantined, not raised)."""


class StageError(MedrayError):
    """A stage of a run that cannot go on; the run directory stays and the same command continues it."""


class TooManySetAside(StageError):
    """A stage set aside more of its rows than the job allows.

    Args:
        files: of rows, by their addresses, that hold rows set aside; a later attempt may make these again.
    """

    def __init__(self, message: str, files: Iterable[str] = ()):
        super().__init__(message)
        self.files = sorted(files)


class Waiting(MedrayError):
    """Not a failure: a run that can go on only when people have done their part; the same command then
    continues it.
    """


class RunHeld(MedrayError):
    """Another job holds the run directory. Nothing was started or changed."""


class RunLost(StageError):
    """Another job has taken the run directory over; this one must write nothing more."""


class BadRecord(ValueError):
    """One record that cannot be used, with the reason."""
