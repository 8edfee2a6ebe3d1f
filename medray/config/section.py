"""What every part of the configuration is made of."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values are checked on assignment too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)

    def settings(self, *without: str) -> dict[str, Any]:
        """What a stage's outcome depends on, as plain data: all fields but those named, and but `place`, which says where the work runs."""
        return self.model_dump(mode="json", exclude={"place", *without})


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
        raise ValueError(f"{where}.{name} {own!r} differs from tune's {wanted!r}; leave it out, it is taken from tune")
    setattr(section, name, wanted)
