"""The one place that writes a vision-language model in Hugging Face format, and model folders whole."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medray.errors import StageError

# A CLIP tower built from its config under transformers 5 is saved as `vision_tower.embeddings...`; hub
# checkpoints, and vLLM, say `vision_tower.vision_model.embeddings...`. transformers reads both, of CLIP's and
# SigLIP's towers, and of no others.
_CLIP_TOWER = re.compile(
    r"^((?:model\.)?vision_tower\.)(?=(?:embeddings|encoder|pre_layrnorm|post_layernorm|head)\.)"
)


def save_vlm(model: Any, processor: Any, directory: str | os.PathLike, dtype: Any = None) -> None:
    """Write weights (safetensors), config, processor, tokenizer and chat template so that transformers and
    vLLM load them.

    Args:
        model: a plain transformers model (merge adapters first), any family.
        processor: its processor; its chat template is saved with it.
        directory: written as a whole or not at all (a temporary sibling is renamed into place).
        dtype: torch dtype to save in; default the model's own. The model itself is not changed.

    Raises StageError where the model holds numbers that are none, or what was written is not read back as it
    was.
    """
    with whole_folder(directory) as scratch:
        _write(model, scratch, dtype)
        check_export(model, scratch, dtype)
        _write_processor(processor, scratch)


@contextlib.contextmanager
def whole_folder(directory: str | os.PathLike) -> Iterator[Path]:
    """An empty folder to write into, which takes the place of `directory` when the block ends; where it
    fails, nothing changes.
    """
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        for path in scratch.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(scratch, directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write(model: Any, directory: Path, dtype: Any) -> None:
    state = model.state_dict()
    if dtype is not None:
        state = {name: _cast(tensor, dtype) for name, tensor in state.items()}
    before = model.config.dtype
    model.save_pretrained(directory, state_dict=state, safe_serialization=True)
    model.config.dtype = before  # save_pretrained turns it into text
    if dtype is not None:
        _state_dtype(directory / "config.json", str(dtype).removeprefix("torch."))
    if _tower_needs_prefix(model):
        _rename_clip_tower(directory)


def _write_processor(processor: Any, directory: Path) -> None:
    processor.save_pretrained(directory)
    tokenizer = getattr(processor, "tokenizer", processor)
    if getattr(processor, "chat_template", None) and not tokenizer.chat_template:
        tokenizer.chat_template = processor.chat_template
    tokenizer.save_pretrained(directory)


def check_export(model: Any, directory: str | os.PathLike, dtype: Any = None) -> None:
    """Read back what was written of a model, as anybody will: every tensor there, none that the model does
    not know, all values as in memory.

    Raises StageError naming tensors that are missing, not used, or of other values.
    """
    import torch

    where = f"export of a {model.config.model_type} model"
    broken = [name for name, parameter in model.named_parameters() if not torch.isfinite(parameter).all()]
    if broken:
        raise StageError(
            f"{where}: {len(broken)} tensors hold NaN or infinity, first {broken[0]}: the training diverged; "
            "lower its learning rates"
        )
    try:
        again, info = type(model).from_pretrained(
            directory, use_safetensors=True, output_loading_info=True, dtype=dtype or model.dtype
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise StageError(f"{where}: transformers cannot read what was written: {error}") from error
    for kind, what in (
        ("missing_keys", "are missing"),
        ("mismatched_keys", "are of another shape"),
        ("unexpected_keys", "are not read back"),
        ("error_msgs", "fail"),
    ):
        if info.get(kind):
            names = sorted(map(str, info[kind]))
            raise StageError(
                f"{where}: {len(names)} tensors {what}: {', '.join(names[:3])}; medray cannot export this "
                "family yet"
            )
    read = again.state_dict()
    for name, tensor in model.state_dict().items():
        if name not in read:
            raise StageError(
                f"{where}: {name} is missing in the model that is read back; medray cannot export this "
                "family yet"
            )
        if not torch.equal(_cast(tensor.cpu(), dtype).to(read[name].dtype), read[name]):
            raise StageError(
                f"{where}: {name} is read back with other values; medray cannot export this family yet"
            )


def _cast(tensor: Any, dtype: Any) -> Any:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _tower_needs_prefix(model: Any) -> bool:
    """Whether transformers strips `vision_model.` from the names of this model's tower when it loads
    them, as its own table says.
    """
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import extract_weight_conversions_for_model

    towers = (
        module
        for name, module in model.named_modules()
        if name.endswith("vision_tower") and isinstance(module, PreTrainedModel)
    )
    changes = [change for tower in towers for change in extract_weight_conversions_for_model(tower) or []]
    return any(getattr(change, "prefix_to_remove", None) == "vision_model" for change in changes)


def _state_dtype(path: Path, name: str) -> None:
    """save_pretrained writes the model's own dtype; loaders with dtype "auto" go by this entry."""

    def renamed(part: Any) -> Any:
        if not isinstance(part, dict):
            return part
        return {key: name if key == "dtype" else renamed(value) for key, value in part.items()}

    path.write_text(json.dumps(renamed(json.loads(path.read_text())), indent=2) + "\n")


def _rename_clip_tower(directory: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as handle:
            names = list(handle.keys())
            if not any(_CLIP_TOWER.match(name) for name in names):
                continue
            metadata = handle.metadata()
            tensors = {_CLIP_TOWER.sub(r"\1vision_model.", name): handle.get_tensor(name) for name in names}
        save_file(tensors, path, metadata=metadata)
    index = directory / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"] = {
            _CLIP_TOWER.sub(r"\1vision_model.", name): shard for name, shard in content["weight_map"].items()
        }
        index.write_text(json.dumps(content, indent=1))
