"""The models that come with medray, by name."""

from pathlib import Path

from medray.errors import ConfigError

MODELS = ("base", "expert", "generalist")


ENCODERS = ("encoder",)  # of images and texts, CLIP-family


def model_path(name: str) -> str:
    """The folder of a bundled model: "base" (the student), "expert" (the stronger judge), "generalist" (base
    that also lists attributes and states choices) or "encoder" (a CLIP). Imports no torch.

    Raises:
        ConfigError: an unknown name, or a model that `python -m medray.testbed.build` has not made yet.
    """
    if name not in MODELS + ENCODERS:
        raise ConfigError(f"unknown bundled model {name!r}; there are {', '.join(MODELS + ENCODERS)}")
    path = Path(__file__).resolve().parents[1] / "testbed" / "models" / name
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"{path} holds no model; make it with: python -m medray.testbed.build --only {name}"
        )
    return str(path)
