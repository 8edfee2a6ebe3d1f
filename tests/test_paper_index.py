"""docs/paper_index.md leads to functions and fields that are there."""

import importlib
import re
from pathlib import Path

import pytest

from medray.config import (
    ClinicianPreferenceConfig,
    InstructionFreeConfig,
    Section,
    SelfTrainingConfig,
    fields_of,
)

PAGE = (Path(__file__).resolve().parents[1] / "docs/paper_index.md").read_text()
METHODS = dict(
    zip(
        (SelfTrainingConfig, InstructionFreeConfig, ClinicianPreferenceConfig),
        PAGE.split("\n## ")[1:],
        strict=True,
    )
)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(medray\.[\w.]+:\w+)`", PAGE))))
def test_functions_are_there(name):
    module, _, function = name.partition(":")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("config", METHODS, ids=lambda config: config.__name__)
def test_fields_are_there(config):
    rows = [
        line.split("|")[3]
        for line in METHODS[config].splitlines()
        if line.startswith("| ") and "In the paper" not in line
    ]
    named = [field for row in rows for field in re.findall(r"`([\w.]+)`", row)]
    assert len(rows) > 8 and all(re.findall(r"`([\w.]+)`", row) for row in rows)
    for field in named:
        section: type[Section] | None = config
        for part in field.split("."):
            fields = fields_of(section)
            assert part in fields, field
            section = fields[part]
