"""Whether medray can tune a model, told from its small files: config, tokenizer, template and processor,
without its weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medray.errors import ConfigError
from medray.models.cache import localize
from medray.models.vlm import check_parts


def _config(folder: str, path: str, trust_remote_code: bool) -> Any:
    """The model's config; None where a hub id cannot be reached from here."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except OSError:
        if Path(folder).is_dir():
            raise
        return None
    except (
        ValueError,
        KeyError,
    ) as error:  # a model_type that this transformers does not know; code that may not run
        raise ConfigError(f"model.path: cannot read the config of {path}: {error}") from error


def _check_modules(config: Any, path: str, trust_remote_code: bool) -> None:
    import torch
    from transformers import AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    ships_code = trust_remote_code and hasattr(config, "auto_map")
    if not ships_code and type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ConfigError(
            f"model.path: {path} is a {config.model_type} model, which takes no images and texts to text; "
            "give a LLaVA or Qwen-VL class model"
        )
    if quantised := getattr(config, "quantization_config", None):
        method = (
            quantised.get("quant_method")
            if isinstance(quantised, dict)
            else getattr(quantised, "quant_method", None)
        )
        raise ConfigError(
            f"model.path: {path} ({config.model_type}) is quantised ({method or 'quantization_config'}); "
            "give the model in bf16 or fp32 that it was made of"
        )
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code)
    check_parts(model)


def family_and_stops(path: str, processor: Any, trust_remote_code: bool = False) -> tuple[str, set[int]]:
    """(the family's name in transformers, ids at which the model stops generating)."""
    from transformers import AutoConfig, GenerationConfig

    folder = localize(path)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    try:
        named = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:  # a folder without generation_config.json
        named = config.get_text_config().eos_token_id
    stops = {processor.tokenizer.eos_token_id, *(named if isinstance(named, (list, tuple)) else [named])}
    return config.model_type, stops - {None}
