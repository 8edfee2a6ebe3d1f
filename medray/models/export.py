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

# A CLIP tower built from its config under transformers 5 is saved as `vision_tower.embeddings...`; hub checkpoints,
# and vLLM, say `vision_tower.vision_model.embeddings...`. transformers reads both.
_CLIP_TOWER = re.compile(r"^((?:model\.)?vision_tower\.)(?=(?:embeddings|encoder|pre_layrnorm|post_layernorm)\.)")


def save_vlm(model: Any, processor: Any, directory: str | os.PathLike, dtype: Any = None) -> None:
    """Write weights (safetensors), config, processor, tokenizer and chat template so that transformers and vLLM load them.

    Args:
        model: a plain transformers model (merge adapters first), any family.
        processor: its processor; its chat template is saved with it.
        directory: written as a whole or not at all (a temporary sibling is renamed into place).
        dtype: torch dtype to save in; default the model's own. The model itself is not changed.
    """
    with whole_folder(directory) as scratch:
        _write(model, processor, scratch, dtype)


@contextlib.contextmanager
def whole_folder(directory: str | os.PathLike) -> Iterator[Path]:
    """An empty folder to write into, which takes the place of `directory` when the block ends; where it fails, nothing changes."""
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        for path in scratch.iterdir():
            path.chmod(0o644)
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(scratch, directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write(model: Any, processor: Any, directory: Path, dtype: Any) -> None:
    state = model.state_dict()
    if dtype is not None:
        state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    before = model.config.dtype
    model.save_pretrained(directory, state_dict=state, safe_serialization=True)
    model.config.dtype = before  # save_pretrained turns it into text
    if dtype is not None:
        _state_dtype(directory / "config.json", str(dtype).removeprefix("torch."))
    _rename_clip_tower(directory)
    processor.save_pretrained(directory)
    tokenizer = getattr(processor, "tokenizer", processor)
    if getattr(processor, "chat_template", None) and not tokenizer.chat_template:
        tokenizer.chat_template = processor.chat_template
    tokenizer.save_pretrained(directory)


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
        content["weight_map"] = {_CLIP_TOWER.sub(r"\1vision_model.", name): shard for name, shard in content["weight_map"].items()}
        index.write_text(json.dumps(content, indent=1))
