"""Source -> Parquet shards of conversations, unlabelled images, held-out questions and the quarantine.

Rows travel through Ray Data: a light index of the source is ordered by a hash of the image's id (so that splits,
samples and order depend on ids alone and the same image's rows are neighbours), then images are loaded, checked and
written by the tasks that hold them. The driver sees only counts.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from medray import records
from medray.config import DataConfig
from medray.data.dialogues import attribute_dialogue, attribute_questions, turns_of
from medray.data.images import ImageError, decode
from medray.data.sources import read_index
from medray.errors import DataError

PARTS = {
    "conversations": records.CONVERSATION, "eval_conversations": records.CONVERSATION,
    "images": pa.schema([("sample_id", pa.string()), ("image", pa.binary())]),
    "questions": records.QUESTION, "quarantine": records.QUARANTINE,
}
# A group: everything the source says of one image.
_GROUP = pa.schema([
    ("sample_id", pa.string()), ("image_file", pa.string()), ("image", pa.binary()), ("part", pa.string()),
    ("members", pa.string()),  # JSON list of [sample_id, payload]
    ("order", pa.int64()), ("bad", pa.list_(records.QUARANTINE.field("reason").type)),  # JSON quarantine rows
])


def unit(*keys: Any) -> float:
    """A number in [0, 1) fixed by the keys: the same on every machine."""
    return int.from_bytes(hashlib.sha256("|".join(map(str, keys)).encode()).digest()[:7], "big") / 2**56


def prepare(
    config: DataConfig, out_dir: str, seed: int = 0, eval_kinds: Sequence[str] = ("open", "closed", "mcq"), eval_seed: int = 0,
    max_eval_images: int | None = None, eval_conversations: int = 0,
) -> dict[str, int]:
    """Write the parts under `out_dir` (local or remote) and return the number of rows of each.

    Which images are labelled is decided by a hash of (seed, image id), so another seed labels others; the held-out
    questions depend on eval_seed only. An earlier, unfinished attempt is emptied first.

    Raises DataError where the source has no usable format or nothing to train or evaluate on.
    """
    from ray.data.expressions import col

    fs, root = url_to_fs(out_dir)
    for part in PARTS:
        if fs.exists(f"{root}/{part}"):
            fs.rm(f"{root}/{part}", recursive=True)
        fs.makedirs(f"{root}/{part}", exist_ok=True)
    config = _rendered(config, out_dir)
    groups = _grouped(config, seed).materialize()
    rows = Counter()
    limits = {"labelled": config.max_labelled, "unlabelled": config.max_unlabelled, "eval": max_eval_images, "unused": None}
    for part, most in limits.items():
        # Index rows are small, and materialised once: each pass only picks its own.
        chosen = groups.filter(expr=col("part") == part, num_cpus=config.read_cpus)
        if most is not None:
            chosen = chosen.limit(most)
        settings = {
            "config": config.model_dump(), "out_dir": out_dir, "part": part, "seed": seed, "eval_kinds": tuple(eval_kinds), "eval_seed": eval_seed,
            "eval_conversations": eval_conversations,
        }
        chosen = chosen.repartition(target_num_rows_per_block=config.rows_per_shard)
        written = chosen.map_batches(_write_shards, fn_kwargs=settings, batch_size=None, batch_format="pyarrow", num_cpus=config.read_cpus)
        for batch in written.iter_batches(batch_size=None, batch_format="pyarrow"):
            for row in batch.to_pylist():
                rows[row["part"]] += row["rows"]
    counts = {part: rows[part] for part in PARTS}
    if not counts["conversations"]:
        raise DataError(f"data.source: no labelled training conversation came out of {config.source} ({counts}); look at {out_dir}/quarantine, data.train_split and data.label_fraction")
    return counts


def _rendered(config: DataConfig, out_dir: str) -> DataConfig:
    """testbed:cells is rendered into the stage's folder; rendering is seeded apart from the run's seed."""
    if config.source != "testbed:cells":
        return config
    from medray.testbed.cells import write_cells

    fs, root = url_to_fs(out_dir)
    if fs.protocol not in ("file", ("file", "local")):
        raise DataError("data.source: testbed:cells renders to a local run directory only; render it with python -m medray.testbed.cells and upload it")
    write_cells(f"{root}/cells", config.testbed_rows, seed=0, val_fraction=config.testbed_val_fraction)
    return config.model_copy(update={"source": f"{root}/cells", "format": "wbcatt"})


def _grouped(config: DataConfig, seed: int) -> Any:
    """Lazy dataset of groups in hash order: one row per image, with its part (labelled, unlabelled, eval, unused)."""
    index = read_index(config, config.read_cpus).map_batches(_with_order, batch_format="pyarrow", num_cpus=config.read_cpus)
    # After the sort all rows of an image are in one block: duplicates and members meet without a shuffle of images.
    return index.sort(["order", "sample_id", "where"]).map_batches(
        _group, fn_kwargs={"config": config.model_dump(), "seed": seed}, batch_size=None, batch_format="pyarrow", num_cpus=config.read_cpus,
    )


def _with_order(table: pa.Table) -> pa.Table:
    order = [int(unit("order", image) * 2**62) for image in table["image_id"].to_pylist()]
    return table.append_column("order", pa.array(order, pa.int64()))


def _group(table: pa.Table, config: dict[str, Any], seed: int) -> pa.Table:
    settings = DataConfig.model_validate(config)
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    seen: set[str] = set()
    for row in table.to_pylist():
        part = _part_of(row, settings, seed)
        key = (row["image_id"], part)
        group = groups.setdefault(key, {
            "sample_id": row["image_id"], "image_file": row["image_file"], "image": row["image"], "part": part, "members": [],
            "order": row["order"], "bad": [],
        })
        error = row["error"]
        if error is None and row["sample_id"] in seen:
            error = "duplicate sample_id: the first row is kept"
        seen.add(row["sample_id"])
        if error is not None:
            group["bad"].append(json.dumps({"sample_id": row["sample_id"], "file": row["where"], "stage": "data", "reason": error}))
        else:
            group["members"].append([row["sample_id"], json.loads(row["payload"])])
            group["image_file"] = group["image_file"] or row["image_file"]
    for group in groups.values():
        group["members"] = json.dumps(group["members"])
    return pa.Table.from_pylist(list(groups.values()), schema=_GROUP)


def _part_of(row: dict[str, Any], config: DataConfig, seed: int) -> str:
    split = row["split"]
    if split is None and row["error"] is None:
        split = config.eval_split if unit("split", row["image_id"]) < config.testbed_val_fraction else config.train_split
    if split == config.eval_split:
        return "eval"
    if split != config.train_split:
        return "unused"
    return "labelled" if unit("label", seed, row["image_id"]) < config.label_fraction and row["payload"] != "{}" else "unlabelled"


def _write_shards(
    table: pa.Table, config: dict[str, Any], out_dir: str, part: str, seed: int, eval_kinds: Sequence[str], eval_seed: int, eval_conversations: int,
) -> pa.Table:
    """Load and check a block's images and write its shards; returns counts. Names come from the ids, so a retried task
    writes the same files again."""
    settings = DataConfig.model_validate(config)
    out: dict[str, list[dict[str, Any]]] = {name: [] for name in PARTS}
    for group in table.to_pylist():
        out["quarantine"] += [json.loads(bad) for bad in group["bad"]]
        members = json.loads(group["members"])
        if not members or part == "unused":
            continue
        try:
            image = group["image"] if group["image"] is not None else _load(group["image_file"], settings)
            decode(image, settings)
        except ImageError as error:
            out["quarantine"] += [
                {"sample_id": identity, "file": group["image_file"] or group["sample_id"], "stage": "data", "reason": str(error)} for identity, _ in members
            ]
            continue
        base = {"image_id": group["sample_id"], "image": image}
        if part == "unlabelled":
            out["images"].append({"sample_id": group["sample_id"], "image": image})
        elif part == "labelled":
            out["conversations"] += [{**base, **row} for row in conversations(members, group["sample_id"], settings.turns, seed)]
        else:
            out["questions"] += [{**base, **row} for row in questions(members, eval_kinds, eval_seed)]
            if len(out["eval_conversations"]) < eval_conversations:
                out["eval_conversations"] += [{**base, **row} for row in conversations(members, group["sample_id"], settings.turns, eval_seed)]
    name = hashlib.sha256("|".join(table["sample_id"].to_pylist()).encode()).hexdigest()[:16]
    fs, root = url_to_fs(out_dir)
    counts = []
    for kind, rows in out.items():
        if rows:
            for start in range(0, len(rows), settings.rows_per_shard):
                chunk = pa.Table.from_pylist(rows[start: start + settings.rows_per_shard], schema=PARTS[kind])
                with fs.open(f"{root}/{kind}/{part}-{name}-{start // settings.rows_per_shard:04d}.parquet", "wb") as handle:
                    pq.write_table(chunk, handle, row_group_size=64)
            counts.append({"part": kind, "rows": len(rows)})
    return pa.Table.from_pylist(counts, schema=pa.schema([("part", pa.string()), ("rows", pa.int64())]))


def _load(path: str, config: DataConfig) -> bytes:
    fs, inner = url_to_fs(path)
    try:
        if fs.size(inner) > config.max_image_bytes:
            raise ImageError(f"image file is over data.max_image_bytes {config.max_image_bytes}")
        return fs.cat_file(inner)
    except FileNotFoundError:
        raise ImageError(f"image file {posixpath.basename(path)} does not exist") from None
    except IsADirectoryError:
        raise ImageError(f"image path {posixpath.basename(path)} is a folder") from None


def conversations(members: list[list[Any]], image_id: str, turns: int, seed: int) -> Iterator[dict[str, Any]]:
    """Dialogues of one image: as given, made from its attributes, or all its questions and answers as one dialogue."""
    pairs = []
    for identity, payload in members:
        if "turns" in payload:
            yield {"sample_id": identity, "turns": payload["turns"]}
        elif "record" in payload:
            yield {"sample_id": identity, "turns": attribute_dialogue(payload["record"], random.Random(f"{seed}|{identity}"), turns)}
        elif "qa" in payload:
            pairs.append(payload["qa"])
    if pairs:
        yield {"sample_id": image_id, "turns": turns_of(pairs)}


def questions(members: list[list[Any]], kinds: Sequence[str], seed: int) -> Iterator[dict[str, Any]]:
    """Held-out questions of one image."""
    for identity, payload in members:
        if "record" in payload:
            for row in attribute_questions(payload["record"], kinds, random.Random(f"{seed}|{identity}")):
                yield {**row, "sample_id": f"{identity}/{row['attribute']}/{row['answer_type']}"}
        elif "qa" in payload:
            qa = payload["qa"]
            yield {**qa, "sample_id": identity, "choices": qa.get("choices")}
        elif "turns" in payload:
            user, assistant = next((pair for pair in zip(payload["turns"], payload["turns"][1:]) if pair[1]["role"] == "assistant"), (None, None))
            if assistant is not None:
                kind = "closed" if assistant["text"].strip(" .").lower() in ("yes", "no") else "open"
                yield {"sample_id": identity, "question": user["text"], "reference": assistant["text"], "answer_type": kind, "attribute": None, "choices": None}


__all__ = ["PARTS", "conversations", "prepare", "questions", "unit"]
