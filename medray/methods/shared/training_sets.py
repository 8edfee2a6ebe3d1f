"""Source -> Parquet shards of conversations, unlabelled images, held-out questions and the quarantine.

Rows travel through Ray Data: a light index of the source is ordered by a hash of the image's id (so that
splits, samples and order depend on ids alone and the same image's rows are neighbours), then images are
loaded, checked and written by the tasks that hold them. The driver sees only counts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from medray import records
from medray.config import DataConfig
from medray.data.attribute_questions import attribute_dialogue, attribute_questions, turns_of
from medray.errors import DataError
from medray.files import remove_folder
from medray.images.decoding import ImageError, decode
from medray.ingest.group_by_image import image_of, place_of, read_groups
from medray.ingest.unread import account_of, unread_line
from medray.ingest.uses import Needs, Uses, uses_of
from medray.stable_draws import unit
from medray.storage.shards import empty_folder

logger = logging.getLogger("medray")

PARTS = {
    "conversations": records.CONVERSATION,
    "eval_conversations": records.CONVERSATION,
    "images": pa.schema([("sample_id", pa.string()), ("image", pa.binary())]),
    "questions": records.QUESTION,
    "quarantine": records.QUARANTINE,
}
ACCOUNT = "account.json"
_WARNING = "warning: "  # before its name, beside the names of the parts
# beside the names of the parts: records whose image was read, those of them set aside
READ, BAD_IMAGES = "read records", "bad images"

NEEDS = Needs(
    "self_train",
    ("turns", "qa", "record"),
    ("turns", "qa", "record"),
    ": jobs/instruction_free.py learns from captions and attributes, jobs/clinician_preference.py writes "
    "dialogues about captioned images (docs/data.md)",
)

# (labelled, unlabelled or eval; GROUP row; its [sample_id, payload] members) -> (part, what its row holds
# beside the image)
Make = Callable[[str, dict[str, Any], list[list[Any]]], Iterator[tuple[str, dict[str, Any]]]]


def prepare(
    config: DataConfig,
    out_dir: str,
    seed: int = 0,
    eval_kinds: Sequence[str] = ("open", "closed", "mcq"),
    eval_seed: int = 0,
    max_eval_images: int | None = None,
    eval_conversations: int = 0,
) -> dict[str, int]:
    """Write the parts under `out_dir` (local or remote) and return the number of rows of each.

    Which images are labelled is decided by a hash of (seed, image id), so another seed labels others; the
    held-out questions depend on eval_seed only. An earlier, unfinished attempt is emptied first.

    Raises DataError where the source has no usable format or nothing to train or evaluate on.
    """
    limits = {
        "labelled": config.max_labelled,
        "unlabelled": config.max_unlabelled,
        "eval": max_eval_images,
        "unused": None,
    }
    make = DialogueRows(config.turns, seed, tuple(eval_kinds), eval_seed)
    counts = write_parts(
        config, out_dir, PARTS, make, limits, seed, {"eval_conversations": eval_conversations}, NEEDS
    )
    if not counts["conversations"]:
        raise DataError(
            f"data.source: no labelled training conversation came out of {config.source} ({counts}); look at "
            f"{out_dir}/quarantine, data.train_split and data.label_fraction"
        )
    return counts


def write_parts(
    config: DataConfig,
    out_dir: str,
    schemas: Mapping[str, pa.Schema],
    make: Make,
    limits: Mapping[str, int | None],
    seed: int = 0,
    most: Mapping[str, int] | None = None,
    needs: Needs | None = None,
) -> dict[str, int]:
    """Write what `make` makes of each image into `out_dir`/<part>, and return the number of rows of each
    part.

    Args:
        schemas: of every part; "quarantine" (records.QUARANTINE) among them.
        make: pickled to the tasks. Rows get their image's image_id, image and modality, as far as the part's
            schema has them.
        limits: what images may serve for (see part_of), each with the largest number of images, None for all;
            others are not read.
        seed: of the drawing of labelled images.
        most: parts of which a shard needs no more rows than these.
        needs: of the method, checked before any image is read; what labels a training image is among them.

    An earlier, unfinished attempt is emptied first.

    Raises DataError if the source has not what the method needs.
    """
    from ray.data.expressions import col

    fs, root = url_to_fs(out_dir)
    for part in schemas:
        if fs.exists(f"{root}/{part}"):
            remove_folder(fs, f"{root}/{part}")
        fs.makedirs(f"{root}/{part}", exist_ok=True)
    notes = f"{out_dir.rstrip('/')}/notes"
    empty_folder(notes)
    config = rendered(config, out_dir)
    groups = (
        read_groups(config, notes)
        .map_batches(
            _with_part,
            fn_kwargs={"config": config.model_dump(), "seed": seed, "labels": needs and needs.labels},
            batch_format="pyarrow",
            num_cpus=config.read_cpus,
        )
        .materialize()
    )
    uses = Uses()
    for batch in groups.map_batches(
        uses_of, batch_format="pyarrow", batch_size=None, num_cpus=config.read_cpus
    ).iter_batches(batch_size=None, batch_format="pyarrow"):
        uses.add(batch.to_pylist())
    if needs is not None:
        uses.check(config, needs)
    rows = Counter()
    for part, images in limits.items():
        # Index rows are small, and materialised once: each pass only picks its own.
        chosen = groups.filter(expr=col("part") == part, num_cpus=config.read_cpus)
        if images is not None:
            chosen = chosen.limit(images)
        settings = {
            "config": config.model_dump(),
            "out_dir": out_dir,
            "part": part,
            "schemas": dict(schemas),
            "make": make,
            "most": dict(most or {}),
        }
        chosen = chosen.repartition(target_num_rows_per_block=config.rows_per_shard)
        written = chosen.map_batches(
            _write_shards,
            fn_kwargs=settings,
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=config.read_cpus,
        )
        for batch in written.iter_batches(batch_size=None, batch_format="pyarrow"):
            for row in batch.to_pylist():
                rows[row["part"]] += row["rows"]
    files = groups.select_columns(["image_file"])
    account = account_of(config, notes, partial(_image_files, files), groups.count())
    if line := unread_line(account["unread"]):
        logger.info("%s", line)
    account["warnings"] = {
        name.removeprefix(_WARNING): number for name, number in rows.items() if name.startswith(_WARNING)
    }
    account["uses"] = uses.table(config, limits, needs and needs.labels)
    account["set_aside"] = {**uses.records, **{name: rows[name] for name in (READ, BAD_IMAGES)}}
    with fs.open(f"{root}/{ACCOUNT}", "wb") as handle:
        handle.write(json.dumps(account, indent=1).encode())
    return {part: rows[part] for part in schemas}


def _image_files(files: Any) -> Iterator[list[str | None]]:
    for batch in files.iter_batches(batch_size=2**14, batch_format="pyarrow"):
        yield batch["image_file"].to_pylist()


def read_account(out_dir: str) -> dict[str, Any]:
    """What `write_parts` saw in the source beside what it read: `unread` and `unused` of
    medray.ingest.unread.account_of, and `warnings`, the number of images by what is to be known of them
    (other frames that were not read); `uses`, a table in text of what the images serve for; `set_aside`,
    numbers of records.
    """
    fs, root = url_to_fs(out_dir)
    return json.loads(fs.cat_file(f"{root}/{ACCOUNT}"))


def rendered(config: DataConfig, out_dir: str) -> DataConfig:
    """testbed:cells is rendered into the stage's folder; rendering is seeded apart from the run's seed."""
    if config.source != "testbed:cells":
        return config
    from medray.testbed.cells import write_cells

    fs, root = url_to_fs(out_dir)
    if fs.protocol not in ("file", ("file", "local")):
        raise DataError(
            "data.source: testbed:cells renders to a local run directory only; render it with python -m "
            "medray.testbed.cells and upload it"
        )
    write_cells(f"{root}/cells", config.testbed_rows, seed=0, val_fraction=config.testbed_val_fraction)
    return config.model_copy(update={"source": f"{root}/cells", "format": "wbcatt"})


def _with_part(
    table: pa.Table, config: dict[str, Any], seed: int, labels: tuple[str, ...] | None = None
) -> pa.Table:
    settings = DataConfig.model_validate(config)
    parts = [
        part_of(row, settings, seed, labels)
        for row in table.select(["image_id", "split", "members"]).to_pylist()
    ]
    return table.append_column("part", pa.array(parts, pa.string()))


def part_of(group: dict[str, Any], config: DataConfig, seed: int, labels: Sequence[str] | None = None) -> str:
    """labelled, unlabelled, eval or unused: what an image serves for.

    Args:
        labels: keys of payloads that are labels to the method; None: any. An image with others only counts as
            unlabelled.
    """
    if group["split"] == config.eval_split:
        return "eval"
    if group["split"] != config.train_split:
        return "unused"
    has_labels = any(
        payload if labels is None else any(payload.get(name) is not None for name in labels)
        for _, payload in json.loads(group["members"])
    )
    return (
        "labelled"
        if has_labels and unit("label", seed, group["image_id"]) < config.label_fraction
        else "unlabelled"
    )


def _write_shards(
    table: pa.Table,
    config: dict[str, Any],
    out_dir: str,
    part: str,
    schemas: dict[str, pa.Schema],
    make: Make,
    most: dict[str, int],
) -> pa.Table:
    """Load and check a block's images and write its shards; returns counts. Names come from the ids, so a
    retried task writes the same files again.
    """
    settings = DataConfig.model_validate(config)
    out: dict[str, list[dict[str, Any]]] = {name: [] for name in schemas}
    seen: Counter[str] = Counter()
    for group in table.to_pylist():
        out["quarantine"] += [{**json.loads(bad), "stage": "data"} for bad in group["bad"]]
        members = json.loads(group["members"])
        if not members or part == "unused":
            continue
        seen[READ] += len(members)
        try:
            image, warnings = image_of(group, settings)
            decode(image, settings)
        except ImageError as error:
            out["quarantine"] += [set_aside(identity, group, str(error)) for identity, _ in members]
            seen[BAD_IMAGES] += len(members)
            continue
        seen.update(f"{_WARNING}{name}" for name in warnings)
        base = {"image_id": group["image_id"], "image": image, "modality": group["modality"]}
        for name, row in make(part, group, members):
            seen[BAD_IMAGES] += name == "quarantine"
            if len(out[name]) < most.get(name, len(out[name]) + 1):
                out[name].append(row if name == "quarantine" else {**base, **row})
    name = hashlib.sha256("|".join(table["sample_id"].to_pylist()).encode()).hexdigest()[:16]
    fs, root = url_to_fs(out_dir)
    counts = [{"part": name, "rows": number} for name, number in seen.items()]
    for kind, rows in out.items():
        if rows:
            for start in range(0, len(rows), settings.rows_per_shard):
                chunk = pa.Table.from_pylist(
                    rows[start : start + settings.rows_per_shard], schema=schemas[kind]
                )
                with fs.open(
                    f"{root}/{kind}/{part}-{name}-{start // settings.rows_per_shard:04d}.parquet", "wb"
                ) as handle:
                    pq.write_table(chunk, handle, row_group_size=64)
            counts.append({"part": kind, "rows": len(rows)})
    return pa.Table.from_pylist(counts, schema=pa.schema([("part", pa.string()), ("rows", pa.int64())]))


def set_aside(identity: str, group: dict[str, Any], reason: str) -> dict[str, str]:
    """The quarantine's row of a record of a GROUP row."""
    return {"sample_id": identity, "file": place_of(group, identity), "stage": "data", "reason": reason}


@dataclass(frozen=True)
class DialogueRows:
    """What self-training takes of an image: dialogues where it is labelled, the image alone where not,
    questions where held out.
    """

    turns: int
    seed: int
    eval_kinds: tuple[str, ...]
    eval_seed: int

    def __call__(
        self, part: str, group: dict[str, Any], members: list[list[Any]]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        image_id = group["image_id"]
        if part == "unlabelled":
            yield "images", {"sample_id": image_id}
        elif part == "labelled":
            yield from (
                ("conversations", row) for row in conversations(members, image_id, self.turns, self.seed)
            )
        else:
            yield from (("questions", row) for row in questions(members, self.eval_kinds, self.eval_seed))
            yield from (
                ("eval_conversations", row)
                for row in conversations(members, image_id, self.turns, self.eval_seed)
            )


def conversations(members: list[list[Any]], image_id: str, turns: int, seed: int) -> Iterator[dict[str, Any]]:
    """Dialogues of one image: as given, made from its attributes, or all its questions and answers as one
    dialogue.
    """
    pairs = []
    for identity, payload in members:
        if "turns" in payload:
            yield {"sample_id": identity, "turns": payload["turns"]}
        elif "record" in payload:
            yield {
                "sample_id": identity,
                "turns": attribute_dialogue(payload["record"], random.Random(f"{seed}|{identity}"), turns),
            }
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
            user, assistant = next(
                (
                    pair
                    for pair in zip(payload["turns"], payload["turns"][1:])
                    if pair[1]["role"] == "assistant"
                ),
                (None, None),
            )
            if assistant is not None:
                kind = "closed" if assistant["text"].strip(" .").lower() in ("yes", "no") else "open"
                yield {
                    "sample_id": identity,
                    "question": user["text"],
                    "reference": assistant["text"],
                    "answer_type": kind,
                    "attribute": None,
                    "choices": None,
                }
