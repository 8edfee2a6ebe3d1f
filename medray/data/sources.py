"""Formats people have, as one stream of index rows: small, without pixels, in any order.

An index row says what one record of the source holds and where its image lies; `medray.data.prepare` orders the rows,
loads the images and writes the shards. A record that cannot be used becomes a row with `error`, never an exception.

Columns (INDEX): sample_id, image_id, image_file (path) or image (bytes), split (null: the source knows none), payload
(JSON: {"record": {...}} WBCAtt attributes, {"qa": {...}} one question and answer, {"turns": [...]} a dialogue,
{} an image alone), where (file and place, for the quarantine), error.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import posixpath
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from fsspec.core import url_to_fs

from medray.config import DataConfig
from medray.data.dialogues import check_record
from medray.data.shards import read_rows
from medray.errors import DataError
from medray.records import check_turns

INDEX = pa.schema([
    ("sample_id", pa.string()), ("image_id", pa.string()), ("image_file", pa.string()), ("image", pa.binary()), ("split", pa.string()),
    ("payload", pa.string()), ("where", pa.string()), ("error", pa.string()),
])

RANGE_BYTES = 4 * 2**20
IMAGE_TOKEN = "<image>"


class BadRecord(ValueError):
    """One record that cannot be used, with the reason."""


def detect(config: DataConfig) -> tuple[str, list[str]]:
    """(format, files to read) of data.source.

    Raises DataError naming what was looked for.
    """
    fs, root = url_to_fs(config.source)
    if not fs.exists(root):
        raise DataError(f"data.source: {config.source} does not exist")
    files = [root] if fs.isfile(root) else sorted(p for p in fs.find(root, maxdepth=2) if p.endswith((".jsonl", ".json", ".csv", ".parquet")))
    if config.format != "auto":
        wanted = {"shards": (".parquet",), "wbcatt": (".jsonl", ".csv"), "vqa-rad": (".jsonl", ".json"), "llava": (".jsonl", ".json")}[config.format]
        chosen = [p for p in files if p.endswith(wanted)]
        if config.format == "vqa-rad":
            chosen = _vqa_rad_files(chosen)
        if not chosen:
            raise DataError(f"data.source: {config.source} has no {' or '.join(wanted)} file, which data.format {config.format} needs")
        return config.format, chosen
    if any(p.endswith(".parquet") for p in files):
        return "shards", [p for p in files if p.endswith(".parquet")]
    for path in files:
        with fs.open(path, "rb") as handle:
            head = handle.read(4096).decode("utf-8", "replace")
        if '"nucleus_shape"' in head or "nucleus_shape," in head:
            return "wbcatt", [p for p in files if p.endswith(posixpath.splitext(path)[1])]
        if '"qid"' in head and '"question"' in head:
            return "vqa-rad", _vqa_rad_files([p for p in files if p.endswith((".jsonl", ".json"))])
        if '"conversations"' in head or '"conversatons"' in head:
            return "llava", [path]
    raise DataError(
        f"data.source: {config.source} is in no known format; looked for *.parquet shards, WBCAtt records.jsonl or CSV (nucleus_shape), "
        "VQA-RAD JSON (qid, question), LLaVA JSON (conversations); name it with data.format"
    )


def _vqa_rad_files(files: list[str]) -> list[str]:
    """The official file where it is there; its MEVF re-splits are read only when named themselves."""
    official = [p for p in files if "mevf" not in posixpath.basename(p)]
    return official or files


def read_index(config: DataConfig, num_cpus: float = 1.0) -> Any:
    """The source as a lazy ray.data.Dataset of INDEX rows. JSON Lines are read in byte ranges by many tasks."""
    import ray.data

    kind, files = detect(config)
    fs, _ = url_to_fs(config.source)
    protocol = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
    prefix = "" if protocol == "file" else f"{protocol}://"
    if kind == "shards":
        return read_rows([prefix + p for p in files], num_cpus=num_cpus).map_batches(
            lambda table: _shard_rows(table), batch_format="pyarrow", num_cpus=num_cpus,
        )
    root = config.source if fs.isdir(url_to_fs(config.source)[1]) else posixpath.dirname(config.source)
    images = config.images or root
    ranges = []
    for path in files:
        size = fs.size(path)
        step = RANGE_BYTES if path.endswith(".jsonl") else max(size, 1)  # a JSON array or CSV is read by one task
        ranges += [{"path": prefix + path, "start": at, "end": min(at + step, size), "kind": kind, "images": images} for at in range(0, size, step)]
    if not ranges:
        raise DataError(f"data.source: {config.source} is empty")
    return ray.data.from_items(ranges, override_num_blocks=len(ranges)).map_batches(_read_range, batch_size=1, batch_format="pyarrow", num_cpus=num_cpus)


def _read_range(table: pa.Table) -> Iterator[pa.Table]:
    for piece in table.to_pylist():
        rows: list[dict[str, Any]] = []
        for row in index_rows(**piece):
            rows.append(row)
            if len(rows) == 1024:
                yield pa.Table.from_pylist(rows, schema=INDEX)
                rows = []
        yield pa.Table.from_pylist(rows, schema=INDEX)


def index_rows(path: str, start: int, end: int, kind: str, images: str) -> Iterator[dict[str, Any]]:
    """INDEX rows of the records of one file that begin in the byte range [start, end)."""
    convert = {"wbcatt": _wbcatt, "vqa-rad": _vqa_rad, "llava": _llava}[kind]
    name = posixpath.basename(path)
    for where, record, error in _records(path, start, end):
        place = f"{name} {where}"
        if error is None and not isinstance(record, dict):
            error = f"the record is a {type(record).__name__}, not an object"
        if error is None:
            try:
                yield {**convert(record, images, name), "where": place, "error": None, "image": None}
                continue
            except BadRecord as bad:
                error = str(bad)
        known = record if isinstance(record, dict) else {}
        own = known.get("img_name") or known.get("id") or known.get("qid")
        identity = str(own) if own is not None else f"{name}@{where}"
        yield {"sample_id": identity, "image_id": identity, "image_file": None, "image": None, "split": None, "payload": "{}", "where": place, "error": error}


def _records(path: str, start: int, end: int) -> Iterator[tuple[str, Any, str | None]]:
    """(place, record, error) of each record that begins in the range."""
    fs, inner = url_to_fs(path)
    if not path.endswith(".jsonl"):
        with fs.open(inner, "rb") as handle:
            data = handle.read()
        try:
            text = data.decode("utf-8-sig")
            items: Any = list(csv.DictReader(io.StringIO(text))) if path.endswith(".csv") else json.loads(text)
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            yield "whole file", None, f"cannot be read: {error}"
            return
        if not isinstance(items, list):
            yield "whole file", None, "must hold a list of records"
            return
        for number, item in enumerate(items):
            yield f"record {number}", item, None
        return
    with fs.open(inner, "rb") as handle:
        if start:
            handle.seek(start - 1)
            handle.readline()  # the line that began before the range is another task's
        while (at := handle.tell()) < end:
            line = handle.readline()
            if not line.strip():
                continue
            try:
                yield f"byte {at}", json.loads(line.decode("utf-8")), None
            except UnicodeDecodeError as error:
                yield f"byte {at}", None, f"the line is not UTF-8: {error.reason} at byte {at + error.start}"
            except json.JSONDecodeError as error:
                yield f"byte {at}", None, f"the line is not JSON: {error.msg}"


def _need(record: dict[str, Any], field: str) -> Any:
    value = record.get(field)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BadRecord(f"field {field!r} is {'missing' if field not in record else 'empty'}")
    return value


def inside(folder: str, relative: str) -> str:
    """Path of an image in its folder. Raises BadRecord where the name leads out of the folder or to another address."""
    clean = posixpath.normpath(str(relative).replace("\\", "/"))
    if "://" in str(relative) or clean.startswith(("/", "..")):
        raise BadRecord(f"image path {relative!r} leads out of the image folder")
    return posixpath.join(folder, clean)


def _wbcatt(record: dict[str, Any], images: str, name: str) -> dict[str, Any]:
    identity = str(_need(record, "img_name"))
    try:
        check_record(record)
    except ValueError as error:
        raise BadRecord(str(error)) from None
    split = record.get("split") or next((s for s in ("train", "val", "test") if s in name), None)
    file = inside(images, record.get("image") or _need(record, "path"))
    return {"sample_id": identity, "image_id": identity, "image_file": file, "split": split, "payload": json.dumps({"record": record})}


def _vqa_rad(record: dict[str, Any], images: str, name: str) -> dict[str, Any]:
    """Official OSF fields or the MEVF split. Quirks: integer answers, answer_type with a trailing space, the split in
    phrase_type (test_*), no split in MEVF files (it is the file's name)."""
    answer = str(_need(record, "answer")).strip()
    image = record.get("image") or posixpath.join("images", str(_need(record, "image_name")))
    kind = str(record.get("answer_type") or "").strip().upper()
    if kind not in ("OPEN", "CLOSED"):
        raise BadRecord(f"answer_type is {record.get('answer_type')!r}; it must be OPEN or CLOSED")
    if "mevf" in name or name in ("trainset.json", "testset.json"):
        split = "test" if "test" in name else "train"
    else:
        split = "test" if str(record.get("phrase_type", "")).startswith("test") else "train"
    qa = {"question": str(_need(record, "question")).strip(), "reference": answer, "answer_type": kind.lower(), "attribute": record.get("question_type")}
    return {
        "sample_id": f"{posixpath.splitext(name)[0]}:{_need(record, 'qid')}", "image_id": str(image), "image_file": inside(images, image),
        "split": split, "payload": json.dumps({"qa": qa}),
    }


_LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "vuser": "questioner", "system": "system"}


def _llava(record: dict[str, Any], images: str, _: str) -> dict[str, Any]:
    """LLaVA conversations, with LLaVA-Med's `conversatons` too. The image marker is taken off the first turn only."""
    raw = record.get("conversations", record.get("conversatons"))
    if not isinstance(raw, list):
        raise BadRecord("field 'conversations' is missing or no list")
    turns = []
    for number, turn in enumerate(raw):
        if not isinstance(turn, dict) or turn.get("from") not in _LLAVA_ROLES or not isinstance(turn.get("value"), str):
            raise BadRecord(f"conversations[{number}] needs 'from' (human or gpt) and a text 'value'")
        text = turn["value"].strip()
        if number == 0:
            text = text.removeprefix(IMAGE_TOKEN).removesuffix(IMAGE_TOKEN).strip()
        if IMAGE_TOKEN in text:
            raise BadRecord(f"conversations[{number}] contains {IMAGE_TOKEN} inside its text")
        turns.append({"role": _LLAVA_ROLES[turn["from"]], "text": text})
    problem = check_turns(turns)
    if problem:
        raise BadRecord(f"conversations: {problem}")
    image = str(_need(record, "image"))
    return {
        "sample_id": str(_need(record, "id")), "image_id": image, "image_file": inside(images, image), "split": record.get("split"),
        "payload": json.dumps({"turns": turns}),
    }


def _shard_rows(table: pa.Table) -> pa.Table:
    """Rows of records.CONVERSATION, QUESTION or IMAGE_TEXT shards, told apart by their columns."""
    names = set(table.column_names)
    if not {"sample_id", "image"} <= names:
        raise DataError(f"Parquet shards need the columns sample_id and image; found {sorted(names)}")
    rows = []
    for row in table.to_pylist():
        payload: dict[str, Any] = {}
        error = None
        if row.get("turns"):
            error = check_turns(row["turns"])
            payload = {"turns": row["turns"]}
        elif row.get("question") is not None:
            payload = {"qa": {key: row.get(key) for key in ("question", "reference", "answer_type", "attribute", "choices")}}
            error = None if row.get("reference") else "empty reference answer"
        elif row.get("attributes"):
            payload = {"record": dict(row["attributes"])}
            try:
                check_record(payload["record"])
            except ValueError as bad:
                error = str(bad)
        elif row.get("caption"):
            payload = {"turns": [{"role": "user", "text": "Describe this medical image in detail."}, {"role": "assistant", "text": row["caption"]}]}
        identity = row["sample_id"]
        if not identity:
            digest = hashlib.sha256(row["image"] or b"").hexdigest()[:16]
            identity, error = f"image-{digest}", "sample_id is empty"
        rows.append({
            "sample_id": identity, "image_id": row.get("image_id") or identity, "image_file": None, "image": row["image"], "split": row.get("split"),
            "payload": json.dumps(payload), "where": f"shard row {identity}", "error": error,
        })
    return pa.Table.from_pylist(rows, schema=INDEX)
