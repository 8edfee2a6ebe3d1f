"""What every part of the configuration is made of."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S+")
# user:password@, where a password may hold a slash (SQLAlchemy takes it) unless what stands before the slash
# can be a port.
_USERINFO = re.compile(r"(://[^/?#:@\[]*):(?:[^/?#]+|(?!\d*[/?#])[^@]+)@")
_QUERY = re.compile(r"(?<=[?&])(?:ssl)?password=[^&#]*&?", re.IGNORECASE)


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values are checked on assignment too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)

    recipes: ClassVar[str | None] = None  # of a job's whole configuration: the folder of its recipes

    # Fields that say how, where and at what price the work is done, and change nothing of what is made. A
    # subclass names its own; a field named nowhere counts as one that changes the outcome.
    execution_only: ClassVar[frozenset[str]] = frozenset({"place"})

    def settings(self, *without: str) -> dict[str, Any]:
        """All fields as plain data, but those named, and but `place`, which says where the work runs."""
        return self.model_dump(mode="json", exclude={"place", *without})

    def outcome(self, *without: str) -> dict[str, Any]:
        """What a stage's outcome depends on, as plain data: all fields, those of inner sections too, but
        the execution-only ones and those named.
        """
        left_out = {
            name for kind in type(self).__mro__ for name in vars(kind).get("execution_only", ())
        } | set(without)
        plain = self.model_dump(mode="json", exclude=left_out)
        inner = {name: getattr(self, name) for name in plain}
        return plain | {
            name: section.outcome() for name, section in inner.items() if isinstance(section, Section)
        }


def set_seed(seed: int | None, *sections: Any) -> None:
    """Give the sections that have another seed this one; None leaves them as they are."""
    for section in sections:
        if seed is not None and section.seed != seed:
            section.seed = seed


def adopt(section: Section, leader: Section, name: str, where: str) -> None:
    """Set a field to the leader's value. Raises ValueError where it was given another one."""
    own, wanted = getattr(section, name), getattr(leader, name)
    if own == wanted:
        return
    if name in section.model_fields_set:
        raise ValueError(
            f"{where}.{name} {own!r} differs from tune's {wanted!r}; leave it out, it is taken from tune"
        )
    setattr(section, name, wanted)


def without_passwords(value: Any) -> Any:
    """Plain data (sections become it) as it may be written down: the passwords of its URLs are left out.

    What is left is the same URL for a client that finds the password elsewhere, as libpq does in PGPASSWORD.
    """
    match value:
        case str():
            return _URL.sub(lambda found: _without_password(found[0]), value)
        case Section():
            return without_passwords(value.settings())
        case dict():
            return {key: without_passwords(item) for key, item in value.items()}
        case list() | tuple():
            return [without_passwords(item) for item in value]
    return value


def _without_password(url: str) -> str:
    bare, asked = _QUERY.subn("", _USERINFO.sub(r"\1@", url))
    return bare.rstrip("?&") if asked else bare
