"""A small world for demo, tests and replication: synthetic blood cells and three tiny vision-language models."""

from pathlib import Path

from medray.errors import ConfigError

MODELS = ("base", "expert", "generalist")


def model_path(name: str) -> str:
    """The folder of a bundled model: "base" (the student), "expert" (the stronger judge) or "generalist" (base that also lists
    attributes and states choices). Imports no torch.

    Raises:
        ConfigError: an unknown name, or a model that `python -m medray.testbed.build` has not made yet.
    """
    if name not in MODELS:
        raise ConfigError(f"unknown bundled model {name!r}; there are {', '.join(MODELS)}")
    path = Path(__file__).parent / "models" / name
    if not (path / "config.json").is_file():
        raise ConfigError(f"{path} holds no model; make it with: python -m medray.testbed.build --only {name}")
    return str(path)
