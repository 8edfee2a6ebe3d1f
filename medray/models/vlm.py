"""Loading, freezing, adapting and merging of vision-language models: any LLaVA or Qwen-VL class model of transformers.

A model has three parts: `vision` (the tower), `projector` (what maps its features into the language model), `llm`.
Nothing here knows Ray or vLLM.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from medray.config import LoraConfig, TrainConfig
from medray.errors import ConfigError
from medray.models.cache import localize, marks

Part = Literal["vision", "projector", "llm"]
PARTS: tuple[Part, ...] = ("vision", "projector", "llm")

# Qwen-VL keeps its projector (the patch merger) inside the tower, so the projector is looked for first.
_PROJECTOR = re.compile(r"(^|\.)(multi_modal_projector|visual\.merger|visual\.deepstack_merger_list|mm_projector)\.")
_VISION = re.compile(r"(^|\.)(vision_tower|visual|vision_model)\.")
_LLM = re.compile(r"(^|\.)(language_model|lm_head)(\.|$)")


def part_of(name: str) -> Part | None:
    """The part a parameter or module belongs to, by its name in transformers; None for neither (say, a newline vector)."""
    if _PROJECTOR.search(name + "."):
        return "projector"
    if _VISION.search(name + "."):
        return "vision"
    if _LLM.search(name):
        return "llm"
    return None


def resolve_model(path: str) -> str:
    """A local folder for a bundled model (testbed:base, ...); other references unchanged.

    Raises ConfigError where a local folder does not exist.
    """
    if path.startswith("testbed:"):
        from medray.testbed import model_path

        return model_path(path.partition(":")[2])
    folder = Path(path).expanduser()
    if not path.startswith(("/", ".", "~")) and not folder.is_dir():
        return path
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model.path: {path} is no model folder (it has no config.json)")
    return str(folder.resolve())


def model_hash(path: str | os.PathLike) -> str:
    """Stable hash of a model: of its weight files where it is a local folder, of their names, sizes and change marks (ETags) where it is a remote
    one (which is not copied for it: 7B are 14 GB, and a job's own node may be small), of its name where it is a hub id."""
    remote = marks(path)
    if remote is not None:
        own = {name: mark for name, mark in remote.items() if "/" not in name and (name.endswith(".safetensors") or name == "config.json")}
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(localize(path))
    if not folder.is_dir():
        return hashlib.sha256(os.fspath(path).encode()).hexdigest()[:16]
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")]):
        digest.update(file.name.encode())
        with file.open("rb") as handle:
            while block := handle.read(2**22):
                digest.update(block)
    return digest.hexdigest()[:16]


def load_vlm(path: str, precision: str = "bf16", trust_remote_code: bool = False, device: Any = "cpu") -> Any:
    """The model (local folder, hub id or remote address) in bf16 or fp32 on `device`, in eval mode.

    Raises ConfigError where there is no such model, or it is no image-text model.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    try:
        model = AutoModelForImageTextToText.from_pretrained(localize(path), dtype=dtype, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:  # what transformers raises for a wrong id or path, and for another kind of model
        raise ConfigError(f"model.path: cannot load {path}: {error}") from error
    return model.to(device).eval()


def load_processor(path: str, trust_remote_code: bool = False) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(localize(path), trust_remote_code=trust_remote_code)


def prepare_trainable(model: Any, config: TrainConfig) -> Any:
    """Freeze everything, then open what the config trains: adapters or whole parts.

    The LLM's and the tower's adapters differ in rank, alpha and dropout, so they are two PEFT adapters ("llm",
    "vision"), both active. A part whose learning rate is None stays frozen; the projector trains in full.
    Unlike the authors' code, the tower runs with gradients, so its adapter really trains.

    Returns the PEFT model, or the model itself where there are no adapters.
    """
    from peft import get_peft_model

    rates = {"vision": config.lr_vision, "projector": config.lr_projector, "llm": config.lr_llm}
    adapters = {
        part: _peft_config(model, part, lora)
        for part, lora in (("llm", config.lora_llm), ("vision", config.lora_vision)) if lora is not None and rates[part] is not None
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
    for name, parameter in wrapped.named_parameters():
        part = part_of(name)
        is_adapter = ".lora_" in name
        parameter.requires_grad_(part is not None and rates[part] is not None and (is_adapter or part not in adapters))
    return wrapped


def _peft_config(model: Any, part: Part, lora: LoraConfig) -> Any:
    import peft
    from torch import nn

    # All linear layers of the part but the output head, as LLaVA's training does.
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and part_of(name) == part and "lm_head" not in name]
    if not names:
        raise ConfigError(f"lora_{part}: the model has no linear layers in its {part} part")
    return peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules="|".join(re.escape(n) for n in names))


def optimizer_groups(model: Any, config: TrainConfig) -> list[dict[str, Any]]:
    """AdamW parameter groups, one per trained part, each with its own peak learning rate in `lr` and `peak_lr`."""
    rates = {"vision": config.lr_vision, "projector": config.lr_projector, "llm": config.lr_llm}
    groups = []
    for part in PARTS:
        parameters = [p for name, p in model.named_parameters() if p.requires_grad and part_of(name) == part]
        if parameters:
            groups.append({"params": parameters, "lr": rates[part], "peak_lr": rates[part], "weight_decay": config.weight_decay, "name": part})
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

    Give pixel_values of the B images, and image_grid_thw (Qwen-VL) repeated for all sequences, which must be ordered
    as whole copies of the batch: [first copy | second copy ...].
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
