"""Steps per second of instruction-free tuning, proxy instruction and shuffling included, against plain SFT of
the same parts.

A step is what a training worker does with encoded rows: draw the order of each description's parts and
tokenise it (instruction-free only; plain SFT's ids come from the Data workers), collate, forward, backward,
clip, AdamW, and the proxy's own step. Both sides train the vision tower and the projector on the same
pictures and texts, in this process, alternating. `ratio` is by the clock, `cpu_ratio` by this process's CPU
time, which a busy machine disturbs less. Prints one JSON line last.

    python benchmarks/instruction_free.py [--samples 2] [--repeats 7] [--threads 1]
"""

from __future__ import annotations

import argparse
import io
import json
import random
import statistics
import tempfile
import time
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from medray.config import InstructionFreeTrainConfig, ModelConfig, SftConfig, TrainConfig
from medray.data.attribute_descriptions import WBCATT, describe_attributes
from medray.testbed.tiny_vlm import random_llava
from medray.train.step import TrainStep
from medray.train.worker import Batches

MODEL = ModelConfig(precision="fp32", system_prompt="")
TUNE = InstructionFreeTrainConfig(gradient_checkpointing=False, zero_stage=0)
PLAIN = SftConfig(**{name: getattr(TUNE, name) for name in TrainConfig.model_fields}, self_questioning=0)
INSTRUCTION = "Describe this medical scan."
SIDE = 192  # pixels: 576 image tokens


def rows_of(samples: int) -> pa.Table:
    """Noise pictures with descriptions as of WBCAtt, and the same as dialogues of one turn."""
    draw, noise, rows = random.Random(0), np.random.default_rng(0), []
    for number in range(samples):
        picture = io.BytesIO()
        Image.fromarray(noise.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)).save(picture, "PNG")
        text = describe_attributes(
            {name: draw.choice(options) for name, options in WBCATT.values.items()}, WBCATT
        )
        turns = [{"role": "user", "text": INSTRUCTION}, {"role": "assistant", "text": text}]
        rows.append(
            {"sample_id": f"row-{number}", "image": picture.getvalue(), "description": text, "turns": turns}
        )
    return pa.Table.from_pylist(rows)


class Side:
    """One of the two trainings: its rows encoded as Data workers would, its step."""

    def __init__(self, path: str, config: TrainConfig, objective: Any, table: pa.Table):
        self.batches = Batches(path, MODEL, config.model_copy(update={"micro_batch": len(table)}), objective)
        self.rows = self.batches.encoder(table).to_pylist()
        self.step = TrainStep(path, MODEL, config, objective, 10**6, "cpu", "torch")
        self.epoch = 0

    def prepare(self) -> list[dict[str, Any]]:
        return self.batches.micro_batches(list(self.batches.in_order(self.rows, self.epoch)), self.epoch)

    def seconds(self) -> dict[str, float]:
        """Of one step, by the clock (wall) and of CPU time (cpu), and by the clock before the forward
        pass (prepare).
        """
        started, cpu = time.perf_counter(), time.process_time()
        micro_batches = self.prepare()
        prepared = time.perf_counter()
        self.step.update(micro_batches, 0)
        self.epoch += 1
        return {
            "wall": time.perf_counter() - started,
            "cpu": time.process_time() - cpu,
            "prepare": prepared - started,
        }


def ratio(times: dict[str, list[dict[str, float]]], kind: str) -> float:
    return round(
        statistics.median(
            plain[kind] / ours[kind]
            for plain, ours in zip(times["sft"], times["instruction_free"], strict=True)
        ),
        3,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=2, help="per step")
    parser.add_argument("--hidden", type=int, default=384, help="width of the language model")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = rows_of(options.samples)
    with tempfile.TemporaryDirectory() as path:
        random_llava(
            path,
            texts=[*table["description"].to_pylist(), INSTRUCTION],
            hidden=options.hidden,
            layers=options.layers,
            side=SIDE,
        )
        sides = {
            "instruction_free": Side(path, TUNE, "instruction_free", table),
            "sft": Side(path, PLAIN, "sft", table),
        }
    times: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for repeat in range(options.repeats + 1):
        for name, side in sorted(sides.items(), reverse=bool(repeat % 2)):  # neither is always first
            taken = side.seconds()
            if repeat:  # the first is warm-up
                times[name].append(taken)
            print(name, {kind: round(value, 4) for kind, value in taken.items()}, flush=True)
    median = {
        (name, kind): statistics.median(one[kind] for one in times[name])
        for name in sides
        for kind in ("wall", "prepare")
    }
    print(
        json.dumps(
            {
                "benchmark": "instruction_free",
                "samples": options.samples,
                "tokens": sides["instruction_free"].prepare()[0]["input_ids"].shape[1],
                "proxy_count": TUNE.proxy.count,
                "mode": TUNE.proxy.mode,
                "threads": options.threads,
                "repeats": options.repeats,
                **{f"{name}_steps_per_s": round(1 / median[name, "wall"], 3) for name in sides},
                **{
                    f"{name}_prepare_ms_per_row": round(1000 * median[name, "prepare"] / options.samples, 3)
                    for name in sides
                },
                "ratio": ratio(times, "wall"),
                "cpu_ratio": ratio(times, "cpu"),
                "goal": 0.95,
            }
        )
    )


if __name__ == "__main__":
    main()
