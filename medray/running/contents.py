"""What a finished stage wrote, file by file, so that files that are gone, cut or changed are noticed before
they are used.

`files.jsonl` in the stage's folder has a line per file: path in the run, bytes, XXH3-128, and the file
system's change mark (an ETag or the time of the last change). A later start lists the folder once and
compares names, sizes and marks; only files whose mark changed are read, and a disk's weights, which are to be
loaded anyway. Hashes are taken when a stage ends, by tasks of the cluster when there is much to read.

The first line says what the record is of: the stage's inputs (`key`), the digest of all contents, and the
`hash` that later stages depend on. That is the key, unless a finished stage had to be made again and came out
otherwise.

A stage's folder is emptied when its inputs change, and may get the former inputs again, while later stages
still hold what they made of the first outcome. So `results/STAGE.json`, outside of it, keeps content and hash
for each key.
"""

from __future__ import annotations

import json
import logging
import posixpath
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import xxhash
from fsspec.implementations.local import LocalFileSystem

from medray.files import CHECKSUM, hash_file, seal, unseal, write_whole

logger = logging.getLogger("medray")

FILES = "files.jsonl"
RESULTS = "results"
_RESULTS = 100  # keys remembered for each stage
# Parts of a stage that only the stage itself reads when it resumes; each has checks of its own.
_OWN = {"inputs.json", "manifest.json", FILES, "train", "done", "cells"}
_OWN_ENDS = ("committed", "committed-begun", ".part")
_WEIGHTS = (".safetensors", ".bin", ".pt")
_CARD = "README.md"  # of an exported model, written when the whole run is done
_IN_TASKS, _PER_TASK = 2**30, 2**28  # bytes: from so many on, the cluster hashes, so many a task
_THREADS = 8


class File(NamedTuple):
    """A file of a stage: path from the run's root, bytes, change mark, XXH3-128 (None: not taken yet)."""

    path: str
    bytes: int
    mark: str
    hash: str | None = None


class Record(NamedTuple):
    """`key`, `hash` and `content` are those of the first line, see above."""

    key: str
    hash: str
    content: str
    files: list[File]


def content_of(files: list[File]) -> str:
    """Digest of the files' contents. Their names do not count: those of rows are random."""
    return xxhash.xxh3_128_hexdigest("\n".join(sorted(file.hash or "" for file in files)).encode())


def listed(fs: Any, root: str, folders: list[str]) -> list[File]:
    """The files of a stage's folders that other stages may read.

    Args:
        root: of the run.
        folders: paths from the root: the stage's folder, and what it wrote elsewhere.
    """
    found = []
    for folder in folders:
        base = posixpath.join(root, folder)
        fs.invalidate_cache(base)
        for path, info in sorted(fs.find(base, detail=True).items()):
            inner = path[len(base) :].lstrip("/")
            top = inner.partition("/")[0]
            hidden = any(part.startswith(".") for part in inner.split("/"))
            if hidden or posixpath.basename(path) == _CARD or top in _OWN or top.endswith(_OWN_ENDS):
                continue
            mark = (
                info.get("ETag")
                or info.get("etag")
                or info.get("mtime")
                or info.get("LastModified")
                or info.get("created")
            )
            found.append(File(posixpath.join(folder, inner) if inner else folder, info["size"], str(mark)))
    return found


def hashed(fs: Any, root: str, files: list[File]) -> list[File]:
    """The same files with their hashes."""
    paths = [posixpath.join(root, file.path) for file in files]
    if sum(file.bytes for file in files) > _IN_TASKS and _on_cluster():
        hashes = list(_by_tasks(fs, paths, files))
    else:
        with ThreadPoolExecutor(_THREADS) as pool:
            hashes = list(pool.map(lambda path: hash_file(fs, path), paths))
    return [file._replace(hash=value) for file, value in zip(files, hashes, strict=True)]


def _on_cluster() -> bool:
    import ray

    return ray.is_initialized()


def _by_tasks(fs: Any, paths: list[str], files: list[File]) -> Iterator[str]:
    import ray

    task = ray.remote(_hash_all).options(num_cpus=0.5, scheduling_strategy="SPREAD")
    groups: list[list[str]] = []
    room = 0
    for path, file in zip(paths, files, strict=True):
        if room <= 0:
            groups.append([])
            room = _PER_TASK
        groups[-1].append(path)
        room -= file.bytes
    for hashes in ray.get([task.remote(fs, group) for group in groups]):
        yield from hashes


def _hash_all(fs: Any, paths: list[str]) -> list[str]:
    return [hash_file(fs, path) for path in paths]


def record(fs: Any, root: str, stage: str, folders: list[str], key: str) -> Record:
    """Hash a finished stage's files and write its `files.jsonl`.

    Args:
        stage: the stage's folder, from the root.
        folders: see `listed`.
        key: digest of the stage's inputs.
    """
    before = recorded(fs, root, stage)
    if before is None or (isinstance(before, Record) and before.key != key):
        results, complete = _results(fs, root, stage)
        if key in results:
            before = Record(key, **results[key], files=[])
        elif not complete:
            before = "is forgotten"
    files = hashed(fs, root, listed(fs, root, folders))
    content = content_of(files)
    if before is None or (isinstance(before, Record) and before.key != key):
        made = Record(key, key, content, files)
    elif isinstance(before, Record) and before.content == content:
        made = before._replace(files=files)
    else:  # finished before, and other files now: what was made of the former ones is not made of these
        made = Record(key, xxhash.xxh3_64_hexdigest(f"{key} {content}".encode()), content, files)
    write(fs, root, stage, made)
    remember(fs, root, stage, made)
    return made


def remember(fs: Any, root: str, stage: str, made: Record) -> None:
    """Keep what a stage came out as with its inputs, outside of its folder."""
    results, complete = _results(fs, root, stage)
    results.pop(made.key, None)
    kept = dict(list(results.items())[-_RESULTS + 1 :])
    complete = complete and len(kept) == len(results)
    kept[made.key] = {"hash": made.hash, "content": made.content}
    path = _results_path(root, stage)
    fs.makedirs(posixpath.dirname(path), exist_ok=True)
    write_whole(fs, path, seal({"results": kept, "complete": complete}))


def _results_path(root: str, stage: str) -> str:
    return posixpath.join(root, RESULTS, f"{posixpath.basename(stage)}.json")


def _results(fs: Any, root: str, stage: str) -> tuple[dict[str, dict[str, str]], bool]:
    """By key, hash and content of what the stage came out as, and whether none of them was forgotten (a
    damaged file, or many).
    """
    try:
        kept = unseal(fs.cat_file(_results_path(root, stage)))
        return kept["results"], kept.get("complete", True)
    except FileNotFoundError:
        return {}, True
    except (ValueError, KeyError) as error:
        logger.warning("%s: damaged, %s", _results_path(root, stage), error)
        return {}, False


def write(fs: Any, root: str, stage: str, made: Record) -> None:
    """Write a stage's record, whole or not at all."""
    lines = "".join(json.dumps(file._asdict()) + "\n" for file in made.files)
    first = {"key": made.key, "hash": made.hash, "content": made.content}
    text = json.dumps(first | {CHECKSUM: _checksum(first, lines)}) + "\n" + lines
    fs.makedirs(posixpath.join(root, stage), exist_ok=True)
    write_whole(fs, posixpath.join(root, stage, FILES), text.encode())


def _checksum(first: dict[str, str], lines: str) -> str:
    return xxhash.xxh3_64_hexdigest((json.dumps(first) + lines).encode())


def recorded(fs: Any, root: str, stage: str) -> Record | str | None:
    """The record of a stage; None if there is none, and in a few words what is wrong with a damaged one."""
    path = posixpath.join(root, stage, FILES)
    if not fs.exists(path):
        return None
    try:
        head, _, lines = fs.cat_file(path).decode().partition("\n")
        first = json.loads(head)
        checksum = first.pop(CHECKSUM)
        made = Record(**first, files=[File(**json.loads(line)) for line in lines.splitlines()])
    except (ValueError, TypeError, KeyError, AttributeError):
        return "is empty, cut or changed"
    return made if checksum == _checksum(first, lines) else "is changed"


class Problem(NamedTuple):
    """A file, by its path from the run's root, and what is wrong with it."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path} {self.reason}"


def check(
    fs: Any, root: str, stage: str, folders: list[str], manifest: dict[str, Any], finished: bool = True
) -> list[Problem]:
    """Hold a finished stage's files against its record.

    Args:
        manifest: of the stage, with the digest of its contents.
        finished: False where the stage is being made again: what that has written already is not in the
            record.

    Returns what is wrong, for each file its path and a few words; nothing for a stage of an older version,
    which has no record.
    """
    if "content" not in manifest:
        return []
    made = recorded(fs, root, stage)
    there = listed(fs, root, folders)
    if not isinstance(made, Record) or made.content != manifest["content"]:
        files = hashed(fs, root, there)
        if content_of(files) != manifest["content"]:
            return [
                Problem(f"{stage}/{FILES}", made if isinstance(made, str) else "is missing or of other files")
            ]
        logger.warning(
            "%s/%s was damaged and is written anew; the files are those that the stage wrote", stage, FILES
        )
        write(fs, root, stage, Record(manifest["key"], manifest["hash"], manifest["content"], files))
        return []
    by_path = {file.path: file for file in there}
    elsewhere = {
        posixpath.dirname(file.path)
        for file in made.files
        if not any(file.path.startswith(folder) for folder in folders)
    }
    if elsewhere:  # of a stage whose manifest is lost, which named them
        by_path |= {file.path: file for file in listed(fs, root, sorted(elsewhere))}
    reads_weights = isinstance(fs, LocalFileSystem)  # object stores hold checksums of their own
    problems, unsure = [], []
    for file in made.files:
        now = by_path.pop(file.path, None)
        if now is None:
            problems.append(Problem(file.path, "is missing"))
        elif now.bytes != file.bytes:
            problems.append(Problem(file.path, f"has {now.bytes} bytes instead of {file.bytes}"))
        elif now.mark != file.mark or (reads_weights and now.path.endswith(_WEIGHTS)):
            unsure.append((file, now))
    known = {posixpath.dirname(file.path) for file in made.files}
    if finished:
        problems += [
            Problem(path, "was added after the stage")
            for path in by_path
            if path.endswith(".parquet") and posixpath.dirname(path) in known
        ]
    for (file, _), now in zip(unsure, hashed(fs, root, [now for _, now in unsure]), strict=True):
        if now.hash != file.hash:
            problems.append(Problem(file.path, "is changed"))
    if (
        any(now.mark != file.mark for file, now in unsure) and not problems
    ):  # a run that was copied: the marks are new
        marks = {now.path: now.mark for _, now in unsure}
        write(
            fs,
            root,
            stage,
            made._replace(files=[file._replace(mark=marks.get(file.path, file.mark)) for file in made.files]),
        )
    return problems


def remove(fs: Any, root: str, problems: list[Problem]) -> None:
    """Remove the files that `check` found wrong, so that the stage makes them again. Its record stays, to
    compare with.
    """
    for path, _ in problems:
        target = posixpath.join(root, path)
        if posixpath.basename(path) != FILES and fs.exists(target):
            fs.rm_file(target)
