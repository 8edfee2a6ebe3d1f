"""Which models an app serves: those of run directories by their models.json, and those that are named."""

from __future__ import annotations

import json
import posixpath
from typing import Any

import yaml
from fsspec.core import url_to_fs
from pydantic import ValidationError

from medray.config import EngineConfig, ModelConfig
from medray.config.serving import ServeConfig, ServedModel
from medray.errors import ConfigError
from medray.models.published import MODELS


class Hosted(ServedModel):
    """A model that is served.

    Attributes:
        about: one line for people.
        engine: settings of its engine.
    """

    about: str = ""
    engine: EngineConfig


def hosted(config: ServeConfig) -> list[Hosted]:
    """The models of an app by the names they answer under, tuned ones before base ones.

    Raises ConfigError for a run directory that is none or is not finished, for names that are taken twice,
    and for bundled or local models that are not there.
    """
    found: dict[str, Hosted] = {}
    bases: dict[str, Hosted] = {}
    runs = {**({"": config.run} if config.run else {}), **config.runs}
    for name, uri in runs.items():
        tuned, base = _of_run(name, uri, config)
        found[tuned.name] = tuned
        # Runs tuned from one base share it, where it is asked in the same way.
        bases.setdefault(
            json.dumps([base.path, base.precision, base.pad_to_square, base.system_prompt]), base
        )
    for model in config.models:
        found[model.name] = Hosted(**model.model_dump(), engine=config.engine_of(), about=model.path)
    for base in bases.values() if config.base else ():
        if base.name in found:
            raise ConfigError(
                f"two models are named {base.name}; give the run another name, or set base=false"
            )
        found[base.name] = base
    for model in found.values():
        _check_path(model)
    return list(found.values())


def _of_run(name: str, uri: str, config: ServeConfig) -> tuple[Hosted, Hosted]:
    """The tuned model of a run and its base."""
    settings, made = _read(uri, "config.yaml", yaml.safe_load), _read(uri, MODELS, json.loads)
    try:
        model = ModelConfig.model_validate(settings["model"])
        engine = config.engine_of(None if config.engine else EngineConfig.model_validate(settings["engine"]))
        tuned, base = (made["models"][made[which]]["path"] for which in ("tuned", "base"))
    except (KeyError, TypeError, ValidationError) as error:
        raise ConfigError(
            f"{uri}: config.yaml or {MODELS} is of another version or was edited ({error}); run the job once "
            "more"
        ) from error
    common = {
        "engine": engine,
        "precision": model.precision,
        "pad_to_square": model.pad_to_square,
        "system_prompt": model.system_prompt,
        "trust_remote_code": model.trust_remote_code,
    }
    # A model in the run is named by its place there, so that a run can be moved.
    places = [
        posixpath.join(uri.rstrip("/"), place) if place.startswith("stages/") else place
        for place in (tuned, base)
    ]
    label = posixpath.basename(uri.rstrip("/"))
    return (
        Hosted(name=name or "tuned", path=places[0], about=f"{made['method']}, run {label}", **common),
        Hosted(
            name=f"{name}-base" if name else "base",
            path=places[1],
            about=f"what {label} was tuned from",
            **common,
        ),
    )


def _read(uri: str, name: str, parse: Any) -> Any:
    try:
        fs, root = url_to_fs(uri)
        return parse(fs.cat_file(posixpath.join(root, name)))
    except FileNotFoundError:
        raise ConfigError(
            f"{uri} has no {name}: it is no run directory, or its job is not finished; the job's own command "
            f"with --run {uri} finishes it and skips what is done"
        ) from None
    except (ImportError, ValueError, yaml.YAMLError, OSError) as error:
        raise ConfigError(f"{uri}: {name} cannot be read: {error}") from error


def _check_path(model: Hosted) -> None:
    from medray.models.vlm import resolve_model

    try:
        model.path = resolve_model(model.path)
    except ConfigError as error:
        raise ConfigError(f"model {model.name}: {error}") from error
