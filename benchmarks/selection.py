"""Memory and speed of what chooses: k-means with its draw over embeddings, and selection over scored
exchanges, at --rows and a tenth.

Both stream over Parquet shards and keep what they cannot hold in temporary files, so their memory should not
grow with the rows. Each measurement runs in a process of its own and reports that process's peak resident
set, and what it had when everything was imported. Embeddings are drawn around --clusters centres; exchanges
come in dialogues of five about images of a kilobyte, two dialogues an image, in three modalities of 90, 9 and
1 per cent. Prints one JSON line last.

    python benchmarks/selection.py [--rows 1000000] [--dimensions 128] [--clusters 60] [--repeats 1]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

PIECE = 5000  # rows of a shard
ROUNDS = 5  # of a dialogue
IMAGE_BYTES = 1024
MODALITIES = ("ct", "mri", "histology")


def write_embeddings(folder: str, rows: int, dimensions: int, clusters: int) -> None:
    from medray.records import EMBEDDED
    from medray.storage.shards import write_shard

    rng = np.random.default_rng(0)
    centres = rng.normal(size=(clusters, dimensions)).astype(np.float32)
    os.makedirs(folder)
    for start in range(0, rows, PIECE):
        count = min(PIECE, rows - start)
        of = rng.integers(0, clusters, count)
        vectors = centres[of] + rng.normal(scale=0.5, size=(count, dimensions)).astype(np.float32)
        columns = {
            "sample_id": [f"image-{number:08d}" for number in range(start, start + count)],
            "modality": _modalities(rng, count),
            "embedding": list(vectors),
            "error": [None] * count,
        }
        write_shard([pa.table(columns, schema=EMBEDDED)], folder, f"part-{start // PIECE:05d}")


def write_scored(folder: str, rows: int) -> None:
    from medray.records import SCORED
    from medray.storage.shards import write_shard

    rng = np.random.default_rng(0)
    os.makedirs(folder)
    for start in range(0, rows, PIECE):
        write_shard(
            [pa.Table.from_pylist(list(_exchanges(rng, start, min(PIECE, rows - start))), schema=SCORED)],
            folder,
            f"part-{start // PIECE:05d}",
        )


def _exchanges(rng: np.random.Generator, start: int, count: int) -> Iterator[dict[str, Any]]:
    per_image = 2 * ROUNDS
    modalities = _modalities(rng, count // per_image + 1)
    image = b""
    for number in range(start, start + count):
        if number % per_image == 0 or not image:
            image = rng.bytes(IMAGE_BYTES)
        name = f"image-{number // per_image:08d}"
        dialogue, turn = f"{name}/d{number % per_image // ROUNDS}", number % ROUNDS
        yield {
            "sample_id": f"{dialogue}#{turn}",
            "dialogue_id": dialogue,
            "turn": turn,
            "image_id": name,
            "image": image,
            "modality": modalities[(number - start) // per_image],
            "context": None,
            "question": f"What is seen in part {turn} of the image?",
            "answer": f"Finding {rng.integers(1000)} of moderate size.",
            "score": float(rng.normal()),
        }


def _modalities(rng: np.random.Generator, count: int) -> list[str]:
    return [MODALITIES[one] for one in rng.choice(3, count, p=(0.9, 0.09, 0.01))]


def cluster(folder: str, scratch: str, clusters: int) -> dict[str, Any]:
    from sklearn.cluster import MiniBatchKMeans  # noqa: F401 - imported before the measurement

    from medray.config.clinician_preference_sections import DemonstrationsConfig
    from medray.methods.clinician_preference.draw_images import assign, draw, fit_clusters

    def work() -> int:
        config = DemonstrationsConfig(clusters=clusters)
        assign(folder, fit_clusters(folder, config), f"{scratch}/assigned")
        return len(draw(f"{scratch}/assigned", config))

    return _measured(work)


def choose(folder: str, scratch: str, _: int) -> dict[str, Any]:
    from medray.config.clinician_preference_sections import SelectConfig
    from medray.methods.clinician_preference.select_dialogues import select

    return _measured(
        lambda: select(folder, f"{scratch}/kept", SelectConfig(fraction=0.4))["counts"]["dialogues kept"]
    )


def _measured(work: Callable[[], int]) -> dict[str, Any]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    started = time.perf_counter()
    made = work()
    return {
        "made": made,
        "seconds": time.perf_counter() - started,
        "imported": before,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of `work` in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="embeddings, and exchanges")
    parser.add_argument("--dimensions", type=int, default=128, help="numbers of an embedding")
    parser.add_argument("--clusters", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for rows in (args.rows // 10, args.rows):
            alone(write_embeddings, f"{scratch}/embedded-{rows}", rows, args.dimensions, args.clusters)
            alone(write_scored, f"{scratch}/scored-{rows}", rows)
        for _ in range(args.repeats):
            for name, work, source in (("kmeans", cluster, "embedded"), ("selection", choose, "scored")):
                for rows in (args.rows // 10, args.rows):
                    with tempfile.TemporaryDirectory(dir=scratch) as out:
                        one = alone(work, f"{scratch}/{source}-{rows}", str(Path(out)), args.clusters)
                    found.setdefault(f"{name} {rows}", []).append(one)
                    print(
                        f"{name} at {rows} rows: {one['seconds']:.1f} s, peak {one['peak']:.0f} MiB, "
                        f"{one['imported']:.0f} MiB of it imports; {one['made']} drawn or kept",
                        flush=True,
                    )
    middle = {
        key: {
            name: statistics.median(one[name] for one in values) for name in ("seconds", "imported", "peak")
        }
        for key, values in found.items()
    }

    def sides(name: str) -> tuple[dict[str, float], dict[str, float]]:
        return middle[f"{name} {args.rows // 10}"], middle[f"{name} {args.rows}"]

    print(
        json.dumps(
            {
                "benchmark": "selection",
                "rows": args.rows,
                "dimensions": args.dimensions,
                "clusters": args.clusters,
                "repeats": args.repeats,
                "cpus": os.cpu_count(),
                **{
                    name: {
                        "rows_per_second": round(args.rows / many["seconds"]),
                        "peak_mib": {"tenth": round(few["peak"]), "rows": round(many["peak"])},
                        "imported_mib": round(many["imported"]),
                        "peak_memory_ratio": round(many["peak"] / few["peak"], 3),
                    }
                    for name in ("kmeans", "selection")
                    for few, many in [sides(name)]
                },
                "goals": {"peak_memory_ratio": 1.1},
            }
        )
    )


if __name__ == "__main__":
    main()
