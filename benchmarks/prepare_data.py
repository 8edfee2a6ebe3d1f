"""prepare_data's speed against plain loops on the same files, with one worker and with all, and its memory
from --rows to ten times as many.

Two loops, each run by as many processes at once as there are cores: `pillow` reads each JPEG, opens it and
decodes it to RGB, nothing else; `loop` does prepare_data's own work for an image (limits, decoding, both
hashes) and writes the same shards, without Ray. prepare_data also indexes, orders and groups. A side's rate
is that of the further rows when it goes through ten times as many, (10 n - n) / (t(10 n) - t(n)), so what
starting processes takes is not counted; all rates are per core. Memory is the peak of the proportional set
size of the whole process tree. Prints one JSON line last.

    python benchmarks/prepare_data.py [--rows 10000] [--repeats 3] [--side 360]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pyarrow as pa
from ingest import PICTURES, PeakMemory, jpeg, local_ray
from PIL import Image

from medray.config import DataConfig, PrepareDataConfig
from medray.ingest.canonical_rows import ToSamples
from medray.ingest.group_by_image import GROUP
from medray.methods.prepare_data.pipeline import prepare_dataset
from medray.storage.shards import READ_ROWS, write_shard

TURNS = [{"role": "user", "text": "What is it?"}, {"role": "assistant", "text": "A cell."}]


def write_source(folder: Path, rows: int, side: int) -> str:
    """LLaVA JSON Lines and an image file per row; files repeat a few hundred pictures."""
    from medray.testbed.cells import render_cell, sample_record

    rng = random.Random(0)
    pictures = [jpeg(render_cell(sample_record(rng), rng).resize((side, side))) for _ in range(PICTURES)]
    (folder / "images").mkdir(parents=True)
    with (folder / "data.jsonl").open("w") as lines:
        for i in range(rows):
            name = f"images/{i:07d}.jpg"
            (folder / name).write_bytes(pictures[i % PICTURES])
            turns = [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": f"Cell {i}."},
            ]
            lines.write(json.dumps({"id": f"row-{i:07d}", "image": name, "conversations": turns}) + "\n")
    return str(folder)


def pillow(files: list[str]) -> None:
    for path in files:
        with Image.open(path) as image:
            image.convert("RGB").load()


def loop(files: list[str]) -> None:
    """The same shards without Ray, by a plain loop."""
    to_samples = ToSamples(DataConfig().model_dump(), "llava")
    rows = [
        {
            "sample_id": path,
            "image_id": path,
            "image_file": path,
            "members": json.dumps([[path, {"turns": TURNS}]]),
            "bad": [],
        }
        for path in files
    ]
    parts = (
        pa.Table.from_pylist(rows[at : at + READ_ROWS], schema=GROUP) for at in range(0, len(rows), READ_ROWS)
    )
    with tempfile.TemporaryDirectory(dir=Path(files[0]).parent.parent) as out:
        write_shard(map(to_samples, parts), out, "part")


def at_once(work: Callable[[list[str]], None], folder: str, cores: int) -> float:
    """Seconds until `cores` processes, each with its share of the files, are done."""
    files = sorted(map(str, Path(folder, "images").iterdir()))
    started = time.perf_counter()
    with ProcessPoolExecutor(cores) as processes:
        list(processes.map(work, [files[core::cores] for core in range(cores)]))
    return time.perf_counter() - started


def ours(folder: str, rows: int, scratch: str) -> float:
    """Seconds of prepare_data's stages; the report is not counted."""
    config = PrepareDataConfig(data=DataConfig(source=folder, read_cpus=1))
    with tempfile.TemporaryDirectory(dir=scratch) as out:
        summary = prepare_dataset(config, out)
    assert summary["images"] == rows, summary
    return summary["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10000)
    parser.add_argument("--side", type=int, default=360, help="pixels of an image's side")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    cores = os.cpu_count() or 1
    rates: dict[str, list[float]] = {name: [] for name in ("medray", "medray_one_worker", "loop", "pillow")}
    memory, sizes = [], (args.rows, 10 * args.rows)
    with tempfile.TemporaryDirectory() as scratch:
        folders = [write_source(Path(scratch, str(rows)), rows, args.side) for rows in sizes]
        for folder, rows in zip(folders, sizes, strict=True):
            with local_ray(cores), PeakMemory() as peak:
                ours(folder, rows, scratch)
            memory.append(peak)
            print(
                f"memory at {rows} rows: tree {peak.tree:.0f} MiB, driver {peak.driver:.0f} MiB", flush=True
            )
        for turn in range(args.repeats):
            for name, workers in (("medray", cores), ("medray_one_worker", 1)):
                with local_ray(workers):
                    few, many = (
                        ours(folder, rows, scratch) for folder, rows in zip(folders, sizes, strict=True)
                    )
                rates[name].append(9 * args.rows / (many - few) / workers)
            for work in (loop, pillow):
                few, many = (at_once(work, folder, cores) for folder in folders)
                rates[work.__name__].append(9 * args.rows / (many - few) / cores)
            print(
                f"turn {turn + 1}, images/s and core: "
                f"{ ({name: round(values[-1]) for name, values in rates.items()}) }",
                flush=True,
            )
    ratio = {
        name: round(statistics.median(a / b for a, b in zip(rates["medray"], rates[name], strict=True)), 3)
        for name in rates
    }
    print(
        json.dumps(
            {
                "benchmark": "prepare_data",
                "rows": args.rows,
                "side": args.side,
                "repeats": args.repeats,
                "cpus": cores,
                "images_per_second_and_core": {
                    name: round(statistics.median(values), 1) for name, values in rates.items()
                },
                "of_pillow": ratio["pillow"],
                "of_loop": ratio["loop"],
                "per_core_of_one_worker": ratio["medray_one_worker"],
                "peak_mib": {"rows": round(memory[0].tree), "ten_times_rows": round(memory[1].tree)},
                "peak_memory_ratio": round(memory[1].tree / memory[0].tree, 3),
                "driver_mib": {"rows": round(memory[0].driver), "ten_times_rows": round(memory[1].driver)},
                "goals": {"of_pillow": 0.8, "peak_memory_ratio": 1.1},
            }
        )
    )


if __name__ == "__main__":
    main()
