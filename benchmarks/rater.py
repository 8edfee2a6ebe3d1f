"""The rating model's bulk scoring: exchanges per second of the Ray Data job against a plain batched PyTorch
loop.

Both sides score the same shards with the same rating model: read Parquet, decode, resize, tokenise, forward,
write Parquet. Both compute with one thread (or on one GPU); the job (score_exchanges, one actor) also reads
and writes in tasks of its own. The plain loop takes batches in the order stored, pads each to its longest
text and passes an image with every exchange; the job encodes an image once for all of its exchanges within a
task. --turns 1 shows what Ray costs where there is nothing to share.

Starting is counted on both sides: actors and the model's loading. `start_seconds`, the shortest run on a
handful of exchanges, says how much that is; take enough images that it is little. The scores of both sides
are compared. Prints one JSON line last.

    python benchmarks/rater.py [--images 5000] [--turns 4] [--repeats 3] [--encoder testbed:encoder] [--side
    160] [--gpu]
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from medray.config import DataConfig, ScoreConfig
from medray.records import EXCHANGE

DATA = DataConfig()
WORDS = (
    "the",
    "nucleus",
    "is",
    "round",
    "pink",
    "granules",
    "blue",
    "cytoplasm",
    "cell",
    "large",
    "dense",
    "chromatin",
)


def write_exchanges(folder: Path, images: int, turns: int, side: int, prefix: str) -> str:
    """JPEG pictures of noise (side x side pixels) with `turns` exchanges each, in shards of 512 images."""
    from PIL import Image

    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for start in range(0, images, 512):
        rows = []
        for number in range(start, min(images, start + 512)):
            data = io.BytesIO()
            small = Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8))
            small.resize((side, side)).save(data, "JPEG", quality=90)
            for turn in range(turns):
                rows.append(
                    {
                        "sample_id": f"{prefix}{number}#{turn}",
                        "dialogue_id": f"{prefix}{number}",
                        "turn": turn,
                        "image_id": f"{prefix}{number}",
                        "image": data.getvalue(),
                        "modality": "smear",
                        "context": " ".join(rng.choice(WORDS, 10)),
                        "question": " ".join(rng.choice(WORDS, 8)) + "?",
                        "answer": " ".join(rng.choice(WORDS, int(rng.integers(1, 25)))),
                    }
                )
        pq.write_table(
            pa.Table.from_pylist(rows, schema=EXCHANGE), folder / f"{start:06d}.parquet", row_group_size=64
        )
    return str(folder)


def plain_loop(source: str, target: Path, rater: str, config: ScoreConfig) -> None:
    """What one would write without medray.inference: DataLoader-like batches, no Ray, nothing to resume."""
    import torch

    from medray.data.pixels import normalise_pixels
    from medray.rating_model.model import RatingModel
    from medray.storage.shards import parquet_files

    torch.set_num_threads(1)
    device, dtype = (
        ("cuda" if config.gpus_per_actor else "cpu"),
        {"bf16": torch.bfloat16, "fp32": torch.float32}[config.precision],
    )
    model = RatingModel.from_pretrained(rater).to(device, dtype)
    inputs = model.inputs(DATA)
    (target / "rows").mkdir(parents=True)
    for number, path in enumerate(parquet_files(source)):
        tables = []
        for batch in pq.ParquetFile(path).iter_batches(batch_size=config.batch):
            rows = batch.to_pylist()
            texts = [inputs.text(row["question"], row["answer"], row["context"]).ids for row in rows]
            made = {
                name: value.to(device)
                for name, value in inputs.batch(
                    texts, [inputs.pixels(row["image"]) for row in rows], range(len(rows))
                ).items()
            }
            made["pixel_values"] = normalise_pixels(made["pixel_values"], inputs.image_processor, dtype)
            with torch.inference_mode():
                scores = model(**made).double().tolist()
            tables.append(
                pa.Table.from_batches([batch]).append_column("score", pa.array(scores, pa.float64()))
            )
        pq.write_table(pa.concat_tables(tables), target / "rows" / f"{number:06d}.parquet", row_group_size=64)


def ray_job(source: str, target: Path, rater: str, config: ScoreConfig) -> None:
    from medray.rating_model.scoring import score_exchanges

    score_exchanges(source, str(target / "rows"), str(target / "committed"), rater, config, DATA)


def seconds(work: Callable[..., Any], *arguments: Any) -> float:
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started


def same_scores(first: Path, second: Path) -> float:
    """Largest difference of a score between two folders."""
    found = []
    for folder in (first, second):
        table = pa.concat_tables(
            pq.read_table(path, columns=["sample_id", "score"]) for path in sorted(folder.glob("*.parquet"))
        ).sort_by("sample_id")
        found.append(table)
    assert found[0]["sample_id"].equals(found[1]["sample_id"]), "the two sides scored other exchanges"
    return float(np.abs(found[0]["score"].to_numpy() - found[1]["score"].to_numpy()).max())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Both sides alternate; the first turn warms up.",
    )
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--turns", type=int, default=4, help="exchanges of an image")
    parser.add_argument("--side", type=int, default=160, help="width and height of the pictures (pixels)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--encoder", default="testbed:encoder", help="encoder of the rating model, whose MLP is random"
    )
    parser.add_argument(
        "--gpu",
        action="store_true",
        help="both sides on one GPU, in bf16; the job's actor decodes with 8 threads",
    )
    args = parser.parse_args()
    import ray

    from medray.rating_model.model import RatingModel

    config = ScoreConfig(cpus_per_actor=8, gpus_per_actor=1, precision="bf16") if args.gpu else ScoreConfig()
    ray.init(
        num_cpus=16 if args.gpu else 2, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    starts: dict[str, list[float]] = {"job": [], "plain": []}
    found: dict[str, list[float]] = {"job": [], "plain": []}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        rater = str(scratch / "rater")
        RatingModel.from_encoder(args.encoder, max_length=96).save_pretrained(rater)
        source = write_exchanges(scratch / "exchanges", args.images, args.turns, args.side, "i")
        start = write_exchanges(scratch / "start", 2, args.turns, args.side, "s")
        for repeat in range(args.repeats + 1):
            here = scratch / str(repeat)
            whole = {}
            for side, score in {"job": ray_job, "plain": plain_loop}.items():
                starts[side].append(seconds(score, start, here / f"{side}-start", rater, config))
                whole[side] = seconds(score, source, here / side, rater, config)
            gap = same_scores(here / "job" / "rows", here / "plain" / "rows")
            print(
                f"turn {repeat}: job {whole['job']:.1f} s, plain {whole['plain']:.1f} s; scores differ by "
                f"{gap:.1e} at most",
                flush=True,
            )
            if repeat:
                for side, value in whole.items():
                    found[side].append(value)
    ray.shutdown()
    rows = args.images * args.turns
    whole = {side: statistics.median(values) for side, values in found.items()}
    print(
        json.dumps(
            {
                "benchmark": "rater",
                "encoder": args.encoder,
                "exchanges": rows,
                "turns": args.turns,
                "side": args.side,
                "repeats": args.repeats,
                "cpus": os.cpu_count(),
                "gpu": args.gpu,
                "start_seconds": {side: round(min(values), 2) for side, values in starts.items()},
                "rows_per_second": {side: round(rows / value, 1) for side, value in whole.items()},
                "speedup": round(whole["plain"] / whole["job"], 3),
            }
        )
    )


if __name__ == "__main__":
    main()
