"""Configurations from YAML files and dotted overrides; errors that name the field and the fix."""

from __future__ import annotations

import os
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from medray.config.recipes import recipe_path
from medray.config.section import Section
from medray.errors import ConfigError

ConfigT = TypeVar("ConfigT", bound=Section)


def load_config(
    cls: type[ConfigT], path: str | os.PathLike | None = None, overrides: list[str] | tuple[str, ...] = ()
) -> ConfigT:
    """Read a YAML file (a path, or the name of a recipe that comes with medray), apply `a.b=value` overrides
    (values are YAML) and validate.

    Raises ConfigError naming the field, what is wrong and where the value came from.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values = _read_yaml(recipe_path(path, cls.recipes))
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(
                f"--set {override!r}: write it as section.field=value, for example dpo.beta=0.2"
            )
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {override!r}: the value is not YAML ({error})") from error
        _assign(cls, values, key.split("."), _numeric(value), override)
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        where = f" (in {path})" if path is not None else ""
        raise ConfigError("\n".join(_explain(cls, item) for item in error.errors()) + where) from None


def fields_of(cls: type[Section]) -> dict[str, type[Section] | None]:
    """Field names of a section, each with its own section class or None for a plain value."""
    return {name: _section(info.annotation) for name, info in cls.model_fields.items()}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:  # a folder, or a file that may not be read
        raise ConfigError(f"config file {path} cannot be read ({error.strerror}); give a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} is not YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"config file {path} must hold sections such as 'model:', not a {type(values).__name__}"
        )
    return _numeric(values)


def _numeric(value: Any) -> Any:
    """YAML 1.1 reads 2e-4 (no dot) as text; every number here may be written so."""
    if isinstance(value, dict):
        return {key: _numeric(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numeric(item) for item in value]
    if isinstance(value, str):
        mantissa, e, exponent = value.lower().partition("e")
        if e and mantissa.replace(".", "", 1).isdigit() and exponent.lstrip("+-").isdigit():
            return float(value)
    return value


def _assign(cls: type[Section], values: dict, keys: list[str], value: Any, override: str) -> None:
    section: type[Section] | None = cls
    holds_names = False  # a field whose value is a mapping of the user's own names
    for depth, key in enumerate(keys):
        if holds_names and depth == len(keys) - 1:
            values[key] = value  # judge.rename.max_tokens=...
            return
        if section is None or key not in section.model_fields:
            at = ".".join(keys[:depth]) or "the top level"
            raise ConfigError(f"--set {override!r}: {_unknown(section, key, cls)} at {at}")
        if depth == len(keys) - 1:
            values[key] = value
            return
        holds_names = typing.get_origin(section.model_fields[key].annotation) is dict
        section = fields_of(section)[key]
        if not isinstance(values.get(key), dict):
            values[key] = {}
        values = values[key]


def _section(annotation: Any) -> type[Section] | None:
    options = (
        typing.get_args(annotation)
        if typing.get_origin(annotation) in (typing.Union, types.UnionType)
        else (annotation,)
    )
    return next((o for o in options if isinstance(o, type) and issubclass(o, Section)), None)


# What other trainers call these fields.
SYNONYMS = {
    "lr": "lr_llm",
    "learning_rate": "lr_llm",
    "r": "rank",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora": "lora_llm",
    "per_device_train_batch_size": "micro_batch",
    "batch_size": "global_batch",
    "gradient_accumulation_steps": "accumulation",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "save_steps": "checkpoint_every",
    "save_total_limit": "keep_checkpoints",
    "lr_scheduler_type": "schedule",
    "max_steps": "epochs",
    "gpu_memory_utilization": "memory_utilization",
    "model_name_or_path": "path",
    "name_or_path": "path",
    "cutoff_len": "max_length",
    "max_seq_length": "max_length",
    "model_max_length": "max_length",
    "dataset": "source",
    "path": "source",
    "dtype": "precision",
    "torch_dtype": "precision",
    "bf16": "precision",
    "api_key": "key_env",
    "url": "base_url",
    "api_base": "base_url",
    "deepspeed": "zero_stage",
    "clip_grad": "max_grad_norm",
    "max_new_tokens": "max_tokens",
}


def _unknown(section: type[Section] | None, key: str, whole: type[Section] | None = None) -> str:
    """What is wrong with a field's name, with what is close to it: in its section, by another trainer's name,
    or elsewhere.

    Args:
        whole: the job's configuration, whose other sections may have the field.
    """
    import difflib

    names = list(section.model_fields) if section else []
    near = difflib.get_close_matches(key, names, n=1) or [
        name for name in (SYNONYMS.get(key.lower()),) if name in names
    ]
    if near:
        return f"unknown field {key!r}, did you mean {near[0]!r}?"
    wanted = {key, SYNONYMS.get(key.lower(), key)}
    elsewhere = [path for path in _paths(whole) if path.rpartition(".")[2] in wanted] if whole else []
    if elsewhere:
        return f"unknown field {key!r}, did you mean {' or '.join(elsewhere[:4])}?"
    return f"unknown field {key!r}; known: {', '.join(names)}"


def _paths(section: type[Section], at: str = "") -> list[str]:
    """The dotted names of all fields of a configuration."""
    found = []
    for name, inner in fields_of(section).items():
        found.append(f"{at}{name}")
        found += _paths(inner, f"{at}{name}.") if inner else []
    return found


def _explain(cls: type[Section], item: Any) -> str:
    # Tuple unions put type tags into `loc`; only names and indices help a reader.
    location = [part for part in item["loc"] if isinstance(part, int) or str(part).replace("_", "").isalnum()]
    section: type[Section] | None = cls
    for part in location[:-1]:
        section = fields_of(section).get(part) if section else None
    field = ".".join(str(part) for part in location) or "config"
    if item["type"] == "extra_forbidden":
        return f"{field}: {_unknown(section, str(location[-1]), cls)}"
    message = item["msg"].removeprefix("Value error, ")
    given = item.get("input")
    return f"{field}: {message}" + ("" if isinstance(given, (dict, BaseModel)) else f" (given: {given!r})")
