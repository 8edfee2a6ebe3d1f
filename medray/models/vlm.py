"""Loading, freezing, adapting and merging of vision-language models: any LLaVA or Qwen-VL class model of
transformers.

A model has three parts: `vision` (the tower), `projector` (what maps its features into the language model),
`llm`; every parameter belongs to one of them (`check_parts`). Nothing here knows Ray or vLLM.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError

from medray.config import LoraConfig, TrainConfig
from medray.errors import ConfigError
from medray.models.cache import localize
from medray.models.fingerprint import check_model, model_hash, pickles_problem

__all__ = ["check_model", "model_hash"]
logger = logging.getLogger("medray")

Part = Literal["vision", "projector", "llm"]
PARTS: tuple[Part, ...] = ("vision", "projector", "llm")

# Names at the top of a model, under PEFT's wrapper too. Anchored: a name deep in the language model decides
# nothing. Qwen-VL keeps its projector (the patch merger) inside the tower, so the projector is looked for
# first.
_TOP = r"^(?:base_model\.model\.)?(?:model\.)?"
_PROJECTOR = re.compile(
    _TOP
    + r"(multi_modal_projector|mm_projector|projector|vision_projection|connector|aligner|"
    + r"merger|embed_vision|image_newline|"
    r"visual\.merger|visual\.deepstack_merger_list)(\.|$)"
)
_VISION = re.compile(_TOP + r"(vision_tower|visual|vision_model|vision_encoder)(\.|$)")
_LLM = re.compile(_TOP + r"(language_model|text_model|lm_head)(\.|$)")


def part_of(name: str) -> Part | None:
    """The part a parameter or module belongs to, by its name in transformers; None for none of them (an
    audio tower, say).
    """
    if _PROJECTOR.match(name):
        return "projector"
    if _VISION.match(name):
        return "vision"
    if _LLM.match(name):
        return "llm"
    return None


def family_of(model: Any) -> str:
    """The model family's name in transformers, for messages: gemma3, internvl, ..."""
    return model.config.model_type


def check_parts(model: Any, field: str = "model.path") -> None:
    """Every parameter has a part, and the parts are where transformers itself sees decoder and tower.

    Raises ConfigError naming the family and the parameters: one without a part would be frozen without a
    word.
    """
    family = family_of(model)
    if model.config.is_encoder_decoder or model.config.get_text_config(decoder=True).is_encoder_decoder:
        raise ConfigError(
            f"{field}: {family} is an encoder-decoder model; medray tunes decoder-only vision-language "
            "models (LLaVA, Qwen-VL)"
        )
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    lost = [name for name in sizes if part_of(name) is None]
    if lost:
        share = sum(sizes[name] for name in lost) / sum(sizes.values())
        tops = sorted({".".join(_path(name)[:1]) for name in lost})
        raise ConfigError(
            f"{field}: {family}: {len(lost)} parameters ({share:.0%} of the model) belong to no part "
            "(vision, projector, llm) that medray knows, "
            f"and would stay frozen: {', '.join(tops[:6])}, first {lost[0]}; this family is not supported yet"
        )
    missing = [part for part in PARTS if part not in {part_of(name) for name in sizes}]
    if missing:
        raise ConfigError(
            f"{field}: {family} has no parameters in its {' and '.join(missing)} part; medray tunes "
            "vision-language models (LLaVA, Qwen-VL)"
        )
    for module, allowed in (
        (model.get_decoder(), ("llm",)),
        (model.get_encoder(modality="image"), ("vision", "projector")),
    ):
        own = {id(parameter) for parameter in module.parameters()}
        wrong = [
            name
            for name, parameter in model.named_parameters()
            if id(parameter) in own and part_of(name) not in allowed
        ]
        if wrong and module is not model:
            raise ConfigError(
                f"{field}: {family}: {wrong[0]} has the name of the {part_of(wrong[0])} part but lies in "
                f"{type(module).__name__}; this family is not supported yet"
            )


def _path(name: str) -> list[str]:
    parts = name.split(".")
    return parts[1:] if parts[0] == "model" and len(parts) > 1 else parts


def resolve_model(path: str) -> str:
    """A local folder for a bundled model (testbed:base, ...); other references unchanged.

    Raises ConfigError where a local folder does not exist.
    """
    if path.startswith("testbed:"):
        from medray.models.bundled import model_path

        return model_path(path.partition(":")[2])
    folder = Path(path).expanduser()
    if not path.startswith(("/", ".", "~")) and not folder.is_dir():
        return path
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model.path: {path} is no model folder (it has no config.json)")
    return str(folder.resolve())


def load_vlm(path: str, precision: str = "bf16", trust_remote_code: bool = False, device: Any = "cpu") -> Any:
    """The model (local folder, hub id or remote address) in bf16 or fp32 on `device`, in eval mode. Weights
    are read from safetensors alone.

    Raises ConfigError where there is no such model, it is no image-text model, its weights lack tensors that
    the model has, or a parameter belongs to no part.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    model = load_whole(
        AutoModelForImageTextToText, path, "model.path", dtype=dtype, trust_remote_code=trust_remote_code
    )
    check_parts(model)
    make_generation_valid(model, path)
    return model.to(device).eval()


def make_generation_valid(model: Any, path: str) -> None:
    """Let a model's generation settings be written: transformers reads settings of sampling (temperature,
    top_p) without do_sample, and refuses to save them, which a training would meet at its end.

    Raises ConfigError where that is not what is wrong with them.
    """
    settings = getattr(model, "generation_config", None)
    if settings is None:
        return
    try:
        settings.validate(strict=True)
        return
    except ValueError:
        settings.do_sample = True
    try:
        settings.validate(strict=True)
    except ValueError as error:
        raise ConfigError(
            f"model.path: generation_config.json of {path} cannot be written again: {error}"
        ) from error
    logger.warning(
        "model.path: generation_config.json of %s has settings of sampling without do_sample; exports say "
        "do_sample: true",
        path,
    )


def load_whole(auto_class: Any, path: str, field: str, **options: Any) -> Any:
    """`auto_class.from_pretrained` from safetensors alone, with every tensor of the model found in the files.

    Raises ConfigError, which names `field`, for a folder without safetensors, a wrong id or path, another
    kind of model, and for missing tensors, which transformers would draw at random and only warn of.
    """
    folder = localize(path)
    refuse_pickles(folder, path, field)
    refuse_adapters(folder, path, field)
    try:
        model, info = auto_class.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, SafetensorError) as error:
        # What transformers raises for a wrong id or path, another kind of model, damaged files and tensors of
        # other shapes.
        raise ConfigError(f"{field}: cannot load {path}: {error}") from error
    missing = sorted(
        {
            *info["missing_keys"],
            *(key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]),
        }
    )
    if missing:
        raise ConfigError(
            f"{field}: {path} ({family_of(model)}) lacks {len(missing)} of the model's tensors, which would "
            f"be random: {', '.join(missing[:3])}; "
            "give a complete folder in the names that transformers reads"
        )
    if info["unexpected_keys"]:
        unused = sorted(info["unexpected_keys"])
        logger.warning(
            "%s: %s holds %d tensors that the model does not use: %s",
            field,
            path,
            len(unused),
            ", ".join(unused[:3]),
        )
    return model


def refuse_adapters(folder: str | os.PathLike, path: str | os.PathLike, field: str) -> None:
    """Raises ConfigError for a folder with an adapter: transformers would load it into the model without
    a word.
    """
    if Path(folder, "adapter_config.json").is_file():
        raise ConfigError(
            f"{field}: {path} holds an adapter (adapter_config.json); merge it into its model (peft's "
            "merge_and_unload, then save_pretrained), or remove that file"
        )


def refuse_pickles(folder: str | os.PathLike, path: str | os.PathLike, field: str) -> None:
    """Raises ConfigError for a local folder whose weights are not in safetensors: other formats are
    pickles, which can run code.
    """
    problem = pickles_problem(folder)
    if problem:
        raise ConfigError(f"{field}: {path} {problem}")


def load_processor(path: str, trust_remote_code: bool = False, field: str = "model.path") -> Any:
    """The model's processor.

    Raises ConfigError where the model has none, or none for images and text.
    """
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(localize(path), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError) as error:
        # What transformers raises for a wrong id or path, missing files or packages, and for a kind of model
        # that it knows no processor of.
        raise ConfigError(f"{field}: cannot load the processor of {path}: {error}") from error
    lacks = [name for name in ("tokenizer", "image_processor") if getattr(processor, name, None) is None]
    if lacks:
        raise ConfigError(
            f"{field}: {path} has no {' and no '.join(lacks)} ({type(processor).__name__}); it is no "
            "vision-language model: give a LLaVA or Qwen-VL class model"
        )
    return processor


def prepare_trainable(model: Any, config: TrainConfig) -> Any:
    """Freeze everything, then open what the config trains: adapters or whole parts.

    The LLM's and the tower's adapters differ in rank, alpha and dropout, so they are two PEFT adapters
    ("llm", "vision"), both active. A part whose learning rate is None stays frozen; the projector trains in
    full. Unlike the authors' code, the tower runs with gradients, so its adapter really trains.

    Returns the PEFT model, or the model itself where there are no adapters.
    """
    from peft import get_peft_model

    rates = {"vision": config.lr_vision, "projector": config.lr_projector, "llm": config.lr_llm}
    adapters = {
        part: _peft_config(model, part, lora)
        for part, lora in (("llm", config.lora_llm), ("vision", config.lora_vision))
        if lora is not None and rates[part] is not None
    }
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.config.use_cache = False
    wrapped = model
    for number, (part, adapter) in enumerate(adapters.items()):
        if number == 0:
            wrapped = get_peft_model(model, adapter, adapter_name=part, autocast_adapter_dtype=False)
        else:
            wrapped.add_adapter(part, adapter, autocast_adapter_dtype=False)
    if adapters:
        wrapped.base_model.set_adapter(list(adapters))
    opened: set[Part | None] = set()
    for name, parameter in wrapped.named_parameters():
        part = part_of(name)
        is_adapter = ".lora_" in name
        parameter.requires_grad_(
            part is not None and rates[part] is not None and (is_adapter or part not in adapters)
        )
        if parameter.requires_grad:
            opened.add(part)
    for part, rate in rates.items():
        if rate is not None and part not in opened:
            raise ConfigError(
                f"lr_{part}: a {family_of(model)} model has no parameter to train in its {part} part; set "
                f"lr_{part} to null"
            )
    return wrapped


def _peft_config(model: Any, part: Part, lora: LoraConfig) -> Any:
    import peft
    from torch import nn

    # All linear layers of the part but the output head, as LLaVA's training does.
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and part_of(name) == part and "lm_head" not in name
    ]
    if not names:
        raise ConfigError(
            f"lora_{part}: a {family_of(model)} model has no linear layers in its {part} part; set "
            f"lora_{part} to null to train the part in full"
        )
    adapted = {f"{name}.weight" for name in names}
    bare = [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() > 2 and part_of(name) == part and name not in adapted
    ]
    if part == "llm" and bare:  # experts of a mixture that are one tensor per layer
        logger.warning(
            "lora_%s: %d tensors of the part are no linear layers, get no adapter and stay as they are: %s",
            part,
            len(bare),
            ", ".join(bare[:2]),
        )
    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="|".join(re.escape(n) for n in names),
    )


def optimizer_groups(model: Any, config: TrainConfig) -> list[dict[str, Any]]:
    """AdamW parameter groups, one per trained part, each with its own peak learning rate in `lr` and
    `peak_lr`.
    """
    rates = {"vision": config.lr_vision, "projector": config.lr_projector, "llm": config.lr_llm}
    groups = []
    for part in PARTS:
        parameters = [p for name, p in model.named_parameters() if p.requires_grad and part_of(name) == part]
        if parameters:
            groups.append(
                {
                    "params": parameters,
                    "lr": rates[part],
                    "peak_lr": rates[part],
                    "weight_decay": config.weight_decay,
                    "name": part,
                }
            )
    return groups


def trainable_parameters(model: Any) -> dict[str, Any]:
    """Trained parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def merge(model: Any) -> Any:
    """The plain transformers model with every adapter added into its weights."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return model
    return model.merge_and_unload(adapter_names=list(model.peft_config))


def plain_model(model: Any) -> Any:
    """The transformers model under a training engine (which has it as `module`) and PEFT's wrapper."""
    from peft import PeftModel
    from transformers import PreTrainedModel

    while not isinstance(model, PreTrainedModel):
        model = model.get_base_model() if isinstance(model, PeftModel) else model.module
    return model


@contextlib.contextmanager
def shared_image_features(model: Any, copies: int) -> Iterator[None]:
    """Within the block, B images are encoded once and their features serve copies * B sequences.

    Give pixel_values of the B images, and image_grid_thw (Qwen-VL) repeated for all sequences, which must be
    ordered as whole copies of the batch: [first copy | second copy ...].
    """
    inner = plain_model(model).model
    encode = inner.get_image_features

    def once(*args: Any, **kwargs: Any) -> Any:
        grid = kwargs.get("image_grid_thw")
        if grid is None and len(args) > 1:
            grid = args[1]
            args = (args[0], grid[: len(grid) // copies], *args[2:])
        elif grid is not None:
            kwargs["image_grid_thw"] = grid[: len(grid) // copies]
        output = encode(*args, **kwargs)
        features = output.pooler_output
        if getattr(output, "deepstack_features", None) is not None:  # Qwen3-VL: features for inner layers too
            output.deepstack_features = [layer.repeat(copies, 1) for layer in output.deepstack_features]
        if isinstance(features, (list, tuple)):
            output.pooler_output = type(features)(list(features) * copies)
        else:
            output.pooler_output = features.repeat(copies, *([1] * (features.dim() - 1)))
        return output

    inner.get_image_features = once
    try:
        yield
    finally:
        del inner.get_image_features
