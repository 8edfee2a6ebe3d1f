"""Checkpoints that can be trusted: a checksum file in each, and what a training resumes from.

Ray Train keeps a list of its checkpoints in `checkpoint_manager_snapshot.json`, which it overwrites in place
(2.60): a full disk or a kill leaves it empty, and then no training starts. It also believes that a folder it
lists is whole. Here the folders decide: `settle` looks through them before a training starts, removes what is
incomplete or damaged, and writes the list anew from what is left. Checkpoints that were uploaded whole but
not listed yet count too.
"""

from __future__ import annotations

import json
import logging
import os
import posixpath
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import xxhash
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from medray.errors import StageError
from medray.files import hash_file, remove_folder, seal, unseal, write_whole

logger = logging.getLogger("medray")

NAME = "training"  # of Ray Train's run in the stage's folder
_PREFIX = "checkpoint_"
_SNAPSHOT = "checkpoint_manager_snapshot.json"


def checksums_file(rank: int) -> str:
    return f"checksums-{rank:05d}.json"


def write_checksums(folder: Path, rank: int, world_size: int) -> None:
    """Size and XXH3-128 of every file that this worker adds to a checkpoint. To be called when they are
    all written.
    """
    fs = LocalFileSystem()
    files = {
        path.name: {"bytes": path.stat().st_size, "xxh3_128": hash_file(fs, str(path))}
        for path in sorted(folder.iterdir())
    }
    (folder / checksums_file(rank)).write_bytes(seal({"world_size": world_size, "files": files}))


def damage_of(fs: Any, folder: str, contents: bool = True) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if it is whole.

    Args:
        contents: read every file, instead of names and sizes alone.
    """
    fs.invalidate_cache(folder)
    sizes = {
        posixpath.basename(entry["name"]): entry["size"]
        for entry in fs.ls(folder, detail=True)
        if entry["type"] == "file"
    }
    world_size, rank = 1, 0
    while rank < world_size:
        name = checksums_file(rank)
        if name not in sizes:
            return f"{name} is missing"
        try:
            sums = unseal(fs.cat_file(posixpath.join(folder, name)))
            world_size, files = int(sums["world_size"]), sums["files"].items()
        except (ValueError, KeyError, AttributeError) as error:
            return f"{name} is damaged: {error}"
        for file, known in files:
            if file not in sizes:
                return f"{file} is missing"
            if sizes[file] != known["bytes"]:
                return f"{file} has {sizes[file]} bytes instead of {known['bytes']}"
            if contents and hash_file(fs, posixpath.join(folder, file)) != known["xxh3_128"]:
                return f"{file} is changed"
        rank += 1
    return None


def check_local(folder: str | os.PathLike) -> None:
    """Raises StageError, which names the file, for a damaged checkpoint that a worker is about to load."""
    damage = damage_of(LocalFileSystem(), os.fspath(folder))
    if damage:
        raise StageError(
            f"checkpoint {folder}: {damage}; rerun the same command to resume from the checkpoint before it"
        )


class Kept(NamedTuple):
    """A whole checkpoint: the name of its folder, optimiser steps, whether its epoch is finished, and
    what was measured last.
    """

    name: str
    steps: int
    finished: bool
    metrics: dict[str, Any]


def settle(stage_dir: str, best_by: str | None = None) -> None:
    """Make a stage's checkpoints and Ray Train's list of them agree, before a training starts or resumes.

    The newest checkpoint is read as a whole; of the older ones, which are only a way back, names and sizes
    are compared.

    Args:
        stage_dir: of the training: a path or URL.
        best_by: metric by which the best checkpoint is chosen beside the last one; then all are read as a
            whole.
    """
    fs, root = url_to_fs(stage_dir)
    root = posixpath.join(root, NAME)
    listing = _listing(fs, root)
    whole, damaged = [], []
    for name in sorted(_folders(fs, root), reverse=True):
        damage = damage_of(fs, posixpath.join(root, name), contents=best_by is not None)
        kept = damage or _kept(fs, root, name, best_by)
        if isinstance(kept, str):
            damaged.append((name, kept))
        else:
            whole.append(kept)
    whole.sort(key=lambda kept: (kept.steps, kept.finished, kept.name))
    while whole and best_by is None and (damage := damage_of(fs, posixpath.join(root, whole[-1].name))):
        damaged.append((whole.pop().name, damage))
    for name, damage in damaged:
        known = listing is None or name in listing["names"]
        logger.log(
            logging.WARNING if known else logging.INFO,
            "%s/%s/%s: %s; removed",
            stage_dir.rstrip("/"),
            NAME,
            name,
            damage,
        )
        remove_folder(fs, posixpath.join(root, name))
    names = [kept.name for kept in whole]
    if (
        listing is not None
        and set(listing["names"]) == set(names)
        and listing["latest"] == (names[-1] if names else None)
    ):
        return
    path = posixpath.join(root, _SNAPSHOT)
    if listing is None and not names and not fs.exists(path):
        return  # nothing was trained yet
    where = f"step {whole[-1].steps}" if whole else None
    if damaged or listing is None:
        logger.warning(
            "%s/%s: %s",
            stage_dir.rstrip("/"),
            NAME,
            f"resuming from {where}, the last whole checkpoint"
            if where
            else "no whole checkpoint is left, starting over",
        )
    if whole:
        write_whole(fs, path, _snapshot(whole, best_by).encode())
    elif fs.exists(path):
        fs.rm_file(path)


def _folders(fs: Any, root: str) -> list[str]:
    fs.invalidate_cache(root)
    if not fs.exists(root):
        return []
    return [
        posixpath.basename(entry["name"].rstrip("/"))
        for entry in fs.ls(root, detail=True)
        if entry["type"] == "directory" and posixpath.basename(entry["name"].rstrip("/")).startswith(_PREFIX)
    ]


def _kept(fs: Any, root: str, name: str, best_by: str | None) -> Kept | str:
    """A checkpoint whose names and sizes are right, or what is wrong with it."""
    file = "progress.json"
    try:
        progress = json.loads(fs.cat_file(posixpath.join(root, name, file)))
        steps, finished = int(progress["steps"]), bool(progress["finished"])
        file = "metrics.jsonl"
        lines = fs.cat_file(posixpath.join(root, name, file)).decode().splitlines()
        last = json.loads(lines[-1]) if lines else {}
        return Kept(
            name, steps, finished, {best_by: -1.0, **last} if best_by else last
        )  # as the training reported them
    except (ValueError, KeyError, TypeError):
        return f"{file} is changed"


def _listing(fs: Any, root: str) -> dict[str, Any] | None:
    """Names of the checkpoints in Ray Train's list and of the latest one; None if there is no list that
    Ray Train would take.
    """
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import (
        _CheckpointManagerState,
    )

    try:
        state = _CheckpointManagerState.parse_obj(json.loads(fs.cat_file(posixpath.join(root, _SNAPSHOT))))
    except (ValueError, FileNotFoundError):  # pydantic's errors are ValueErrors
        return None
    names = [result.checkpoint_dir_name for result in state.checkpoint_results]
    if len(names) != len(state.checkpoint_report_indices):
        return None
    latest = state.latest_checkpoint_result
    return {"names": names, "latest": None if latest is None else latest.checkpoint_dir_name}


def _snapshot(whole: list[Kept], best_by: str | None) -> str:
    """Ray Train's list, in its own words: ascending by score where one chooses the best, else by time."""
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import (
        _CheckpointManagerState,
        _TrainingResultState,
    )

    indices = {kept.name: number for number, kept in enumerate(whole)}
    ordered = (
        sorted(whole, key=lambda kept: (kept.metrics[best_by], indices[kept.name])) if best_by else whole
    )
    states = {
        kept.name: _TrainingResultState(checkpoint_dir_name=kept.name, metrics=kept.metrics) for kept in whole
    }
    return _CheckpointManagerState(
        checkpoint_results=[states[kept.name] for kept in ordered],
        checkpoint_report_indices=[indices[kept.name] for kept in ordered],
        latest_checkpoint_result=states[whole[-1].name],
        pending_training_results=[],
        pending_validation_specs=[],
        current_report_index=len(whole),
        validated_checkpoint_dir_names=[],
        timed_out_validation_checkpoint_dir_names=[],
        failed_validation_checkpoint_dir_names=[],
    ).json()


class Scratch:
    """Where a training's workers write checkpoints before they are uploaded: in the stage's folder where that
    is on a file system, else under TMPDIR of each node, in a folder named after the stage. What killed
    workers left there goes at the next start.

    Args:
        stage_dir: of the training: a path or URL.
    """

    def __init__(self, stage_dir: str):
        fs, root = url_to_fs(stage_dir)
        self.shared = isinstance(fs, LocalFileSystem)
        name = f"medray-{os.getuid()}-{xxhash.xxh3_64_hexdigest(stage_dir.encode())}"
        self.folder = Path(root, "scratch") if self.shared else Path(tempfile.gettempdir(), name)

    def clear(self, rank: int, local_rank: int) -> None:
        """Remove what earlier starts left. Each worker calls it before the first collective operation of
        a start.
        """
        if (rank if self.shared else local_rank) == 0:
            self.remove()

    def remove(self) -> None:
        """Remove the folder, if it is there."""
        if self.folder.is_symlink():
            self.folder.unlink()
        shutil.rmtree(self.folder, ignore_errors=True)

    def new(self, prefix: str) -> Path:
        """A new empty folder, for this user alone."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.folder.stat().st_uid != os.getuid() or self.folder.is_symlink():
            raise StageError(
                f"{self.folder} belongs to another user; remove it, or set TMPDIR to a folder of your own"
            )
        return Path(tempfile.mkdtemp(prefix=f"{prefix}-", dir=self.folder))
