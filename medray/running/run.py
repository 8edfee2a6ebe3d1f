"""A run is a directory: the resolved config, a folder per stage with its manifest, metrics, the models, the
report.

The directory may be a local path, NFS, s3:// or gs:// (anything fsspec opens). Running the same job again on
it
continues: a stage whose manifest carries the same hash of its inputs, and whose files are those that it
wrote, is skipped, an unfinished stage, or one whose files are gone or damaged, goes on from what there is, a
stage whose inputs changed starts over in an emptied folder. A stage may also work through parts that come and
go: where only those changed it goes on too.

Layout::

    schema.json              the version of this layout
    config.yaml              the resolved configuration, without the passwords of its URLs
    stages/03-self_play/     inputs.json (written first), whatever the stage writes, files.jsonl (what it
                             wrote: medray.running.contents), manifest.json (written last)
    results/03-self_play.json  what the stage came out as, for each of the inputs it was run with:
                             medray.running.contents
    metrics.jsonl            every training metric, one line per step, with its stage
    report.html  results.json
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import posixpath
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import yaml
from fsspec.core import url_to_fs

from medray.config import Section
from medray.config.section import without_passwords
from medray.errors import ConfigError, StageError, TooManySetAside
from medray.files import remove_folder, seal, unseal
from medray.running import contents
from medray.running.run_lock import SCRATCH, RunLock, unwritable

logger = logging.getLogger("medray")

SCHEMA_FILE, SCHEMA = "schema.json", 2  # of a run directory; 1 had no such file
MANIFEST = "manifest.json"
INPUTS = "inputs.json"
# patients' images are in a run: for its owner alone, until the owner says otherwise
FOLDER_MODE, FILE_MODE = 0o700, 0o600

_in_progress: str | None = None


def stage_in_progress() -> str | None:
    """The stage that this process works on, or that failed in it."""
    return _in_progress


def digest(value: Any) -> str:
    """A short stable hash of anything JSON can hold (and of pydantic sections). Passwords in URLs do not
    count: a new one starts nothing over.
    """
    text = json.dumps(without_passwords(value), sort_keys=True, default=_plain, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.settings()
    raise TypeError(
        f"{type(value).__name__} cannot be an input of a stage; give something that JSON can hold"
    )


class Run:
    """One run directory.

    Args:
        uri: local path or fsspec URL. Created if absent, a local one for its owner alone (mode 0700).

    Attributes:
        lock: held by this process while it works in the run (medray.running.run_hold.held); None in a worker,
            which works for one that holds it.

    Raises ConfigError if the place cannot be written, StageError if there is no space.
    """

    def __init__(self, uri: str | os.PathLike):
        uri = os.fspath(uri)
        try:
            self.fs, path = url_to_fs(uri)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"--run {uri}: {error}; install the matching extra (medray[s3], medray[gcs]) or give a local "
                "path"
            ) from error
        self.is_local = isinstance(self.fs, fsspec.get_filesystem_class("file"))
        self._root = path
        self.uri = os.path.abspath(path) if self.is_local else uri.rstrip("/")
        self.lock: RunLock | None = None
        if self.is_local and os.path.exists(path) and not os.path.isdir(path):
            raise ConfigError(
                f"--run {uri}: cannot be written: it is a file; give a directory, or a name that does not "
                "exist yet"
            )
        try:
            if self.is_local:
                _make_private(Path(path))
            else:
                self.fs.makedirs(path, exist_ok=True)
        except OSError as error:
            raise unwritable(uri, error) from error
        self.timeline: list[dict[str, Any]] = []
        self.opened = time.time()

    def path(self, *parts: str) -> str:
        """URI of something in the run, usable by Ray Data, Ray Train and fsspec."""
        return posixpath.join(self.uri, *parts)

    def exists(self, *parts: str) -> bool:
        return self.fs.exists(posixpath.join(self._root, *parts))

    def read_text(self, *parts: str) -> str:
        return self.fs.cat_file(posixpath.join(self._root, *parts)).decode()

    def write_text(self, text: str, *parts: str) -> None:
        """Write whole or not at all: object stores put atomically, file systems rename."""
        self.write_bytes(text.encode(), *parts)

    def write_bytes(self, data: bytes, *parts: str) -> None:
        """Write whole or not at all. Raises RunLost if another job has taken the run over."""
        self.check_held()
        target = posixpath.join(self._root, *parts)
        self.fs.makedirs(posixpath.dirname(target), exist_ok=True)
        if not self.is_local:
            self.fs.pipe_file(target, data)
            return
        handle, scratch = tempfile.mkstemp(prefix=SCRATCH, dir=posixpath.dirname(target))  # mode 0600
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, target)
        except OSError:  # no space: what there is of it would take some
            os.unlink(scratch)
            raise

    def check_schema(self) -> None:
        """Mark a new run directory with the schema that this version of medray works in.

        Raises ConfigError for a run of another version: its records mean something else.
        """
        if self.exists(SCHEMA_FILE):
            found = self.read_json(SCHEMA_FILE).get("schema")
        elif self.exists("stages"):
            found = 1
        else:
            self.write_json({"schema": SCHEMA}, SCHEMA_FILE)
            return
        if found != SCHEMA:
            raise ConfigError(
                f"run {self.uri} was made by another version of medray (schema {found}, this one works with "
                f"{SCHEMA}); "
                "give another directory, or remove this one"
            )

    def check_held(self) -> None:
        """Raise RunLost if another job has taken the run over since this process began to hold it."""
        if self.lock is not None:
            self.lock.check()

    def write_json(self, value: Any, *parts: str) -> None:
        self.write_text(json.dumps(value, indent=1, default=_plain) + "\n", *parts)

    def read_json(self, *parts: str) -> Any:
        """Raises StageError, which names the file, for one that is cut or changed so that it is no JSON."""
        try:
            return json.loads(self.read_text(*parts))
        except ValueError as error:
            raise StageError(
                f"{self.path(*parts)}: damaged ({error}); rerun the run's own command to write it anew"
            ) from error

    def write_sealed(self, value: dict[str, Any], *parts: str) -> None:
        """Write a JSON object with a checksum, which `read_sealed` holds it against."""
        self.write_bytes(seal(value, _plain), *parts)

    def read_sealed(self, *parts: str) -> dict[str, Any] | None:
        """A JSON object that a stage wrote; None, and a line in the log, if it is damaged, None if there
        is none.
        """
        try:
            return unseal(self.fs.cat_file(posixpath.join(self._root, *parts)))
        except FileNotFoundError:
            return None
        except ValueError as error:
            logger.warning("%s: damaged, %s", self.path(*parts), error)
            return None

    def write_config(self, config: Section) -> None:
        self.write_text(
            yaml.safe_dump(without_passwords(config.model_dump(mode="json")), sort_keys=False), "config.yaml"
        )

    def stage(
        self,
        name: str,
        inputs: dict[str, Any],
        work: Callable[[Stage], dict[str, Any]],
        parts: dict[str, str] | None = None,
    ) -> dict[str, Any]:
        """Run one stage, or skip it when it is done with the same inputs.

        Args:
            name: folder under stages/, e.g. "03-self_play".
            inputs: everything the stage's outcome depends on, JSON-able; upstream stages by their `hash`.
            work: does the stage inside `stage.dir` and returns its outputs (JSON-able, with optional
                "counts"). It must continue what an earlier, killed attempt left there.
            parts: hashes of what it works through, where what it made of one part is still good when there
                are others: when parts change `work` is called again, in the folder as it is.

        Returns the manifest: {"stage", "hash", "key", "content", "outputs", "seconds", "attempts", "started",
        "finished"}. `hash` is what later stages depend on; it is the `key`, a digest of the inputs, unless
        the stage was made again and came out otherwise.

        Raises RunLost if another job has taken the run over, and what `work` raises.
        """
        global _in_progress
        _in_progress = name
        self.check_held()
        settings = digest({"stage": name, "inputs": inputs})
        fingerprint = settings if parts is None else digest({"stage": settings, "parts": parts})
        folder = posixpath.join("stages", name)
        manifest, lost = self.read_sealed(folder, MANIFEST), []
        before = self.read_sealed(folder, INPUTS) or {"hash": None}
        same = before["hash"] == settings and (parts is not None or manifest is None)
        written = contents.recorded(self.fs, self._root, folder)
        kept = written if isinstance(written, contents.Record) and written.key == fingerprint else None
        if manifest is not None and manifest.get("key", manifest["hash"]) == fingerprint:
            lost = contents.check(
                self.fs, self._root, folder, self._written(folder, manifest["outputs"]), manifest
            )
            if not lost:
                logger.info("stage %s: cached (took %.0f s), skipping", name, manifest["seconds"])
                self.timeline.append(manifest)
                _in_progress = None
                return manifest
            same, before = True, {"attempts": manifest["attempts"]} | before
        elif manifest is None and same and kept is not None:  # it had finished, and its manifest is lost
            lost = contents.check(self.fs, self._root, folder, [folder], kept._asdict(), finished=False)
        if lost:
            logger.warning(
                "stage %s: %s%s; making what is lost again, and later stages if it comes out otherwise",
                name,
                lost[0],
                f" (and {len(lost) - 1} more files)" if len(lost) > 1 else "",
            )
            contents.remove(self.fs, self._root, lost)
            self.remove(folder, MANIFEST)
        if same:
            attempts = before["attempts"] + 1
            logger.info("stage %s: resuming (attempt %d)", name, attempts)
        else:
            attempts = 1
            if self.exists(folder):
                logger.info(
                    "stage %s: %s, restarting",
                    name,
                    "inputs changed" if before["hash"] else f"no readable {INPUTS}",
                )
                # of a version that did not remember it when the stage was done
                if isinstance(written, contents.Record):
                    contents.remember(self.fs, self._root, folder, written)
                # first: a folder without them that a killed run was emptying is not gone on with
                self.remove(folder, INPUTS)
                self.remove(folder)
                if kept is not None:  # what inputs.json said is lost; later stages were made of these files
                    contents.write(self.fs, self._root, folder, kept)
        started = time.time()
        self.write_sealed(
            {"hash": settings, "inputs": without_passwords(inputs), "parts": parts, "attempts": attempts},
            folder,
            INPUTS,
        )
        logger.info("stage %s: started", name)
        earlier = set(self.fs.find(posixpath.join(self._root, folder))) if attempts > 1 else set()
        stage = Stage(self, folder)
        try:
            outputs = work(stage)
        except TooManySetAside as error:
            # What set these rows aside may be fixed by now: an image, a server. Rows of this attempt would
            # fare no better.
            again = [path for file in error.files if (path := url_to_fs(file)[1]) in earlier]
            if not again:
                raise
            logger.warning(
                "stage %s: %s\nmaking the rows of %d file(s) of earlier attempts again",
                name,
                error,
                len(again),
            )
            for path in again:
                self.fs.rm_file(path)
            outputs = work(stage)
        made = contents.record(self.fs, self._root, folder, self._written(folder, outputs), fingerprint)
        manifest = {
            "stage": name,
            "hash": made.hash,
            "key": fingerprint,
            "content": made.content,
            "outputs": outputs,
            "attempts": attempts,
            "started": started,
            "finished": time.time(),
            "seconds": time.time() - started,
        }
        self.write_sealed(manifest, folder, MANIFEST)
        logger.info("stage %s: done in %.0f s", name, manifest["seconds"])
        self.timeline.append(manifest)
        _in_progress = None
        return manifest

    def _written(self, folder: str, outputs: dict[str, Any]) -> list[str]:
        """Where a stage wrote: its folder, and what its outputs name elsewhere in the run (prepared data
        lie at the run's top).
        """
        uris = [
            value for value in outputs.values() if isinstance(value, str) and value.startswith(f"{self.uri}/")
        ]
        inner = [uri.removeprefix(f"{self.uri}/") for uri in uris]
        return [folder, *sorted({path for path in inner if not path.startswith("stages/")})]

    def reread(self, read: Callable[[], Any], index: str, rows: str) -> Any:
        """What `read` returns, which runs stages that read a source. Where more is set aside than allowed of
        what an earlier job read, they read it again, once: the source may be fixed by now.

        Args:
            index: the stage that lists the source, which starts over.
            rows: the stage that makes rows of that list; as long as the list is the same, only its files with
                rows set aside are made again.
        """
        before = len(self.timeline)
        try:
            return read()
        except TooManySetAside as error:
            if all(manifest["started"] > self.opened for manifest in self.timeline[before:]):
                raise
            logger.warning("%s\nthis was read by an earlier job; reading the source again", error)
            del self.timeline[before:]
            self.remove("stages", index)
            self.remove("stages", rows, MANIFEST)
            for path in (url_to_fs(file)[1] for file in error.files):
                if self.fs.exists(path):
                    self.fs.rm_file(path)
            return read()

    def remove(self, *parts: str) -> None:
        self.check_held()
        target = posixpath.join(self._root, *parts)
        if self.fs.exists(target):
            remove_folder(self.fs, target)


def _make_private(folder: Path) -> None:
    """Make a folder for its owner alone, and the folders it lies in as usual; one that is there keeps its
    mode, which its owner may have chosen.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=FOLDER_MODE, exist_ok=True)


class Stage:
    """The folder a stage works in."""

    def __init__(self, run: Run, folder: str):
        self.run = run
        self.folder = folder

    @property
    def dir(self) -> str:
        return self.run.path(self.folder)

    def path(self, *parts: str) -> str:
        return self.run.path(self.folder, *parts)

    def exists(self, *parts: str) -> bool:
        return self.run.exists(self.folder, *parts)

    def reset(self, *parts: str) -> None:
        """Empty a part of the stage that is made anew by each attempt."""
        self.run.remove(self.folder, *parts)

    def publish(self, name: str, make: Callable[[str], Any]) -> Any:
        """Make a folder locally with `make(local_dir)`, then put it into the stage under `name`.

        For writers that only know local files (model exports). On a local run it is written beside its place
        and renamed; on an object store it is uploaded. Returns what `make` returned.
        """
        if self.run.is_local:
            target = Path(self.path(name))
            target.parent.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=f"{SCRATCH}{name}-", dir=target.parent))  # mode 0700
            value = make(str(scratch))
            for path in (scratch, *scratch.rglob("*")):  # writers of models set modes of their own
                path.chmod(FOLDER_MODE if path.is_dir() else FILE_MODE)
            self.run.check_held()
            shutil.rmtree(target, ignore_errors=True)
            os.replace(scratch, target)
            return value
        with tempfile.TemporaryDirectory() as scratch:
            value = make(scratch)
            self.reset(name)  # of files that an earlier export had and this one has not
            self.run.check_held()
            self.run.fs.put(
                scratch.rstrip("/") + "/",
                posixpath.join(self.run._root, self.folder, name) + "/",
                recursive=True,
            )
            return value
