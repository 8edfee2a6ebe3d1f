"""Ingest speed and memory: shards to collated batches through Ray Data, against torch's DataLoader on the
same files.

Both sides decode, square, resize, tokenise and mask each row, and collate batches of the same size in the
same order of files; both have the same number of encoding processes. A side's rate is that of the further
rows when it goes through ten times as many, (10 n - n) / (t(10 n) - t(n)), so what starting processes takes
is not counted. The sides take turns. Memory is the peak of the proportional set size of the whole process
tree (Ray's object store included), at --rows and at ten times as many rows, each under a Ray of its own.
Prints one JSON line last.

    python benchmarks/ingest.py [--rows 600] [--workers 1] [--repeats 3] [--model testbed:base]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch.utils.data

from medray.config import SelfTrainingConfig
from medray.data.collate import Encoder, collate_sft
from medray.models.vlm import resolve_model
from medray.records import CONVERSATION
from medray.storage.shards import parquet_files

PICTURES = 256  # rendered once; rows repeat them under ids of their own
ROWS_PER_SHARD = 512


def jpeg(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_shards(folder: Path, rows: int) -> str:
    """Conversation shards of synthetic cells, as the data stage writes them."""
    from medray.data.attribute_questions import attribute_dialogue
    from medray.testbed.cells import render_cell, sample_record

    rng = random.Random(0)
    records = [sample_record(rng) for _ in range(PICTURES)]
    pictures = [jpeg(render_cell(record, rng).resize((360, 363))) for record in records]  # WBCAtt's size
    folder.mkdir()
    for start in range(0, rows, ROWS_PER_SHARD):
        part = [
            {
                "sample_id": f"row-{i:07d}",
                "image_id": f"row-{i:07d}",
                "image": pictures[i % PICTURES],
                "turns": attribute_dialogue(records[i % PICTURES], random.Random(i), 5),
            }
            for i in range(start, min(start + ROWS_PER_SHARD, rows))
        ]
        pq.write_table(
            pa.Table.from_pylist(part, schema=CONVERSATION),
            folder / f"part-{start:07d}.parquet",
            row_group_size=64,
        )
    return str(folder)


def through_ray(folder: str, model: str, config: SelfTrainingConfig, batch: int) -> Iterator[int]:
    """Rows of each collated batch, the way a training worker takes them."""
    from medray.methods.shared.stages import encoded

    info = Encoder(model, config.model.model_dump(), {}, "sft").dialogues.info()
    for table in encoded(folder, model, config, "sft").iter_batches(batch_size=batch, batch_format="pyarrow"):
        rows = table.to_pylist()
        collate_sft(rows, info, 0.5, 0, 0)
        yield len(rows)


class Shards(torch.utils.data.IterableDataset):
    """Collated batches; each loader process takes every n-th file."""

    def __init__(self, folder: str, model: str, model_config: dict[str, Any], batch: int):
        self.folder, self.model, self.model_config, self.batch = folder, model, model_config, batch

    def __iter__(self):
        torch.set_num_threads(1)
        encoder = Encoder(self.model, self.model_config, {}, "sft")
        info = encoder.dialogues.info()
        mine = torch.utils.data.get_worker_info()
        for path in parquet_files(self.folder)[mine.id :: mine.num_workers]:
            for piece in pq.ParquetFile(path).iter_batches(batch_size=self.batch):
                yield collate_sft(encoder(pa.Table.from_batches([piece])).to_pylist(), info, 0.5, 0, 0)


def through_dataloader(
    folder: str, model: str, config: SelfTrainingConfig, batch: int, workers: int
) -> Iterator[int]:
    loader = torch.utils.data.DataLoader(
        Shards(folder, model, config.model.model_dump(), batch),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4,
        multiprocessing_context="spawn",
    )
    for collated in loader:
        yield len(collated["input_ids"])


def seconds(batches: Iterator[int], rows: int) -> float:
    """Time to go through all batches."""
    started = time.perf_counter()
    found = sum(batches)
    assert found == rows, (found, rows)
    return time.perf_counter() - started


@contextlib.contextmanager
def local_ray(cpus: int) -> Iterator[None]:
    import ray

    ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    yield
    ray.shutdown()


class PeakMemory:
    """Sampled peaks in MiB: the proportional set size of this process and everything under it; what this
    process has for itself (unique set size: pages of the object store that it maps are not its own).
    """

    def __enter__(self):
        self.tree = self.driver = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any):
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(0.5):
            total = 0.0
            for process in [me, *me.children(recursive=True)]:
                try:
                    memory = process.memory_full_info()
                    total += memory.pss / 2**20
                    if process is me:
                        self.driver = max(self.driver, memory.uss / 2**20)
                except psutil.Error:
                    continue
            self.tree = max(self.tree, total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="testbed:base")
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, default=1, help="encoding processes on either side")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    model = resolve_model(args.model)
    config = SelfTrainingConfig()
    config.model.max_length, config.data.read_cpus, config.data.encoders = 1024, 0.25, args.workers
    speeds: dict[str, list[float]] = {"medray": [], "dataloader": []}
    with tempfile.TemporaryDirectory() as scratch:
        few, many = (
            write_shards(Path(scratch, "few"), args.rows),
            write_shards(Path(scratch, "many"), 10 * args.rows),
        )
        sides = {
            "medray": lambda folder: through_ray(folder, model, config, args.batch),
            "dataloader": lambda folder: through_dataloader(folder, model, config, args.batch, args.workers),
        }
        memory = []
        for folder, rows in ((few, args.rows), (many, 10 * args.rows)):
            with local_ray(args.workers + 3), PeakMemory() as peak:
                seconds(sides["medray"](folder), rows)
            memory.append(peak)
            print(
                f"memory at {rows} rows: tree {peak.tree:.0f} MiB, driver {peak.driver:.0f} MiB", flush=True
            )
        with local_ray(args.workers + 3):
            for repeat in range(args.repeats):
                for name, batches in sides.items():
                    short, long = seconds(batches(few), args.rows), seconds(batches(many), 10 * args.rows)
                    speeds[name].append(9 * args.rows / (long - short))
                    print(
                        f"turn {repeat + 1}: {name} {short:.1f} s and {long:.1f} s, {speeds[name][-1]:.0f} "
                        "rows/s",
                        flush=True,
                    )
    median = {name: statistics.median(values) for name, values in speeds.items()}
    print(
        json.dumps(
            {
                "benchmark": "ingest",
                "rows": args.rows,
                "workers": args.workers,
                "repeats": args.repeats,
                "cpus": os.cpu_count(),
                "rows_per_second": {name: round(value, 1) for name, value in median.items()},
                "of_dataloader": round(
                    statistics.median(
                        a / b for a, b in zip(speeds["medray"], speeds["dataloader"], strict=True)
                    ),
                    3,
                ),
                "peak_mib": {"rows": round(memory[0].tree), "ten_times_rows": round(memory[1].tree)},
                "peak_memory_ratio": round(memory[1].tree / memory[0].tree, 3),
                "driver_mib": {"rows": round(memory[0].driver), "ten_times_rows": round(memory[1].driver)},
                "goals": {"of_dataloader": 1.0, "peak_memory_ratio": 1.2},
            }
        )
    )


if __name__ == "__main__":
    main()
