"""Whether medray can tune a model, found out before anything starts."""

from __future__ import annotations

import tempfile

from medray.config import DataConfig, ModelConfig
from medray.models.cache import small_files
from medray.models.support import _check_modules, _config
from medray.models.vlm import refuse_adapters, refuse_pickles, resolve_model


def check_support(path: str, model_config: ModelConfig, questioner: bool, kind: str = "sft") -> None:
    """Refuse a model that would be tuned wrongly, before anything starts.

    Reads a local folder, the small files of a remote address, or a hub id's (from the cache or the hub; one
    that cannot be reached is left to the stage that loads it).

    Args:
        questioner: the template must write model.questioner_role.
        kind: of rows that are trained on (medray.data.collate.Encoder).

    Raises ConfigError naming the family and the reason.
    """
    path = resolve_model(path)
    with tempfile.TemporaryDirectory(prefix="medray-model-") as scratch:
        folder = small_files(path, scratch)
        if folder != scratch:
            refuse_pickles(folder, path, "model.path")
        refuse_adapters(folder, path, "model.path")
        _check(folder, path, model_config, questioner, kind)


def _check(folder: str, path: str, model_config: ModelConfig, questioner: bool, kind: str) -> None:
    from medray.data.collate import Encoder

    config = _config(folder, path, model_config.trust_remote_code)
    if config is None:
        return
    _check_modules(config, path, model_config.trust_remote_code)
    encoder = Encoder(folder, model_config.model_dump(), DataConfig().model_dump(), kind)
    encoder.dialogues.info(questioner=questioner)
