"""The recipes that come with medray: YAML files by job, and templates that they name."""

from __future__ import annotations

import os
import re
from pathlib import Path

from medray.errors import ConfigError

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
TEMPLATE = "medray:"  # begins the names of templates that come with medray
# where recipes lay before they came with the package; commands that name them go on working
_FORMER = re.compile(r"(?:.*/)?configs/(.+)")


def recipe_path(name: str | os.PathLike, job: str | None = None) -> Path:
    """A recipe's file by its path, or by the name of one that comes with medray: self_train/tiny-cpu, or
    tiny-cpu of the job.

    Raises ConfigError for a name that is neither; it lists those there are.
    """
    path = Path(name)
    if path.exists():
        return path
    former = _FORMER.fullmatch(path.as_posix())
    inner = former[1] if former else path.as_posix()
    for found in (
        RECIPES / inner,
        RECIPES / f"{inner}.yaml",
        *((RECIPES / job / inner, RECIPES / job / f"{inner}.yaml") if job else ()),
    ):
        if found.is_file() and found.resolve().is_relative_to(RECIPES):
            return found
    raise ConfigError(
        f"config file {name} does not exist; give a YAML file, or a recipe that comes with medray: "
        f"{', '.join(names(job))}"
    )


def names(job: str | None = None) -> list[str]:
    """The recipes that come with medray, of one job or of all."""
    return sorted(
        path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.glob(f"{job or '*'}/*.yaml")
    )


def template_path(name: str) -> Path:
    """A chat template's file: a path, or medray:NAME for one that comes with medray."""
    return RECIPES / "templates" / name.removeprefix(TEMPLATE) if name.startswith(TEMPLATE) else Path(name)


def read_template(name: str) -> str:
    """The text of a chat template. Raises OSError where there is none."""
    return template_path(name).read_text(encoding="utf-8")
