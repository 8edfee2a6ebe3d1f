"""Hashes of model folders: of everything that decides what a model answers, and of nothing else.

That is weights, index, config, generation config, tokenizer, chat templates, processor and preprocessor
configs, and the code of models that bring some, in nested folders too. A README, a licence or a picture is
not part of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from medray.errors import StageError
from medray.models.cache import localize, marks

# Of tokenizers (.txt, .model, .tiktoken, .bpe, .spm, .vocab), templates (.jinja), weights and code.
_PARTS = {
    ".json",
    ".jinja",
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".model",
    ".txt",
    ".tiktoken",
    ".bpe",
    ".spm",
    ".vocab",
    ".py",
}
_REMEDY = (
    "restore it, or delete the folder of the stage that made it, then rerun the same command to make it again"
)
_TEXTS = ("readme", "license", "licence", "notice", "changelog", "use_policy", "requirements")


def belongs(name: str) -> bool:
    """Whether a file, by its path in a model's folder, is part of the model."""
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and path.suffix.lower() in _PARTS and not path.name.lower().startswith(_TEXTS)


def pickles_problem(folder: str | os.PathLike) -> str | None:
    """What is wrong with a local folder's weight files; None for nothing, and for what is no local folder."""
    folder = Path(folder)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return None
    pickled = sorted(
        file.name
        for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
        for file in folder.glob(pattern)
    )
    kept = (
        f"its weights are {', '.join(pickled[:3])}, which are not read (a pickle can run code)"
        if pickled
        else "it holds no weights"
    )
    return f"has no *.safetensors file: {kept}; save the model with save_pretrained of a current transformers"


def model_hash(path: str | os.PathLike) -> str:
    """Stable hash of a model: of the content of its files where it is a local folder, of their names,
    sizes and change marks (ETags) where it is a remote one (which is not copied for it: 7B are 14 GB, and
    a job's own node may be small), of its name where it is a hub id.
    """
    remote = _remote_hash(path)
    if remote is not None:
        return remote
    folder = Path(localize(path))
    if not folder.is_dir():
        return hashlib.sha256(os.fspath(path).encode()).hexdigest()[:16]
    return _combined({name: _digest(folder / name) for name in _own_files(folder)})


def check_model(path: str | os.PathLike, expected_hash: str) -> None:
    """Hold a model against the hash that a run recorded of it; call it once per stage, before its weights are
    loaded.

    Reads every byte of a local folder (7B: some seconds to a minute); a remote one is copied to this node's
    cache first, as loading would.

    Raises StageError naming the damaged file where that can be told, else the folder.
    """
    if _remote_hash(path) == expected_hash:  # of a base model, by its marks
        return
    folder = localize(path)
    if model_hash(folder) == expected_hash:
        return
    names = _own_files(Path(folder)) if os.path.isdir(folder) else []
    if not names:
        raise StageError(f"model {path}: there is no model in this folder; {_REMEDY}")
    damaged = next(
        (problem for name in names if (problem := _damage(Path(folder, name)))),
        "its files are not those that the run recorded",
    )
    raise StageError(f"model {path}: {damaged}; {_REMEDY}")


def _remote_hash(path: str | os.PathLike) -> str | None:
    remote = marks(path)
    if remote is None:
        return None
    own = {name: mark for name, mark in remote.items() if belongs(name)}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]


def bytes_of(folder: str | os.PathLike) -> int:
    """Bytes of the files of a local model."""
    return sum(Path(folder, name).stat().st_size for name in _own_files(Path(folder)))


def _own_files(folder: Path) -> list[str]:
    names = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return sorted(name for name in names if belongs(name))


def _combined(digests: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:16]


def _digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _damage(file: Path) -> str | None:
    """What is visibly wrong with a file: a cut, an unreadable header."""
    size = file.stat().st_size
    if size == 0 and file.suffix in (".json", ".safetensors", ".jinja"):
        return f"{file.name} is empty"
    if file.suffix == ".json":
        try:
            json.loads(file.read_bytes())
        except ValueError as error:  # no JSON, no UTF-8
            return f"{file.name} is damaged ({error})"
    if file.suffix == ".safetensors":
        with file.open("rb") as handle:
            start = handle.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            try:
                header = json.loads(handle.read(length) if length <= size - 8 else b"")
            except ValueError:
                return f"{file.name} is damaged (its header cannot be read)"
        if size != 8 + length + _end(
            value["data_offsets"] for name, value in header.items() if name != "__metadata__"
        ):
            return f"{file.name} is cut or longer than its header says ({size} bytes)"
    return None


def _end(offsets: Iterable[list[int]]) -> int:
    return max((end for _, end in offsets), default=0)
