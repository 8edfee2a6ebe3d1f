"""Generation speed: our callable against bare vLLM and against transformers at batch 1, on the same requests.

Each request is one question about one image, sampled with its own seed to at most --tokens tokens; four
questions per image, each answered --answers times, with --describe after a description of the image, as in
self-play. All engines are up before anything is timed; the sides take turns, and the medians of the turns are
compared. Prints one JSON line last.

    python benchmarks/generate.py --model testbed:base --images 64 --repeats 3
    python benchmarks/generate.py --random 768x8 --images 24 --slow-requests 4    # 60M random weights: too
    many for a cache python benchmarks/generate.py --random 768x8 --model-side 192 --describe --answers 2
    --tokens 96 --images 8 \\
        --slow-requests 4    # 576 image tokens, as LLaVA-1.5
"""

from __future__ import annotations

import argparse
import asyncio
import io
import itertools
import json
import os
import statistics
import tempfile
import time

import numpy as np

from medray.config import DataConfig, EngineConfig, ModelConfig, SamplingConfig
from medray.inference.row_worker import EngineWorker
from medray.models.cache import localize
from medray.models.vlm import load_processor, load_vlm, resolve_model
from medray.stable_draws import seed_for

QUESTIONS = (
    "What is the cell type?",
    "Describe the image.",
    "What is the nucleus shape?",
    "Is the cell big?",
)


def picture(seed: int, side: int) -> bytes:
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


class Ours(EngineWorker):
    """What self-play does with a row: decode, render, sample every question of a phase at once."""

    sampling: SamplingConfig
    phases: list[list[str]]

    async def row(self, row):
        image, key = await self.image(row)
        tokens = 0
        for number, phase in enumerate(self.phases):
            outputs = await asyncio.gather(
                *(
                    self.engine.generate(
                        self.engine.chat.prompt_ids([{"role": "user", "text": text}]),
                        image,
                        self.sampling,
                        seed_for(0, row["sample_id"], number, index),
                        image_id=key,
                    )
                    for index, text in enumerate(phase)
                )
            )
            tokens += sum(len(output[0].token_ids) for output in outputs)
        return {"tokens": tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="testbed:base")
    parser.add_argument(
        "--random",
        metavar="WIDTHxLAYERS",
        help="instead of --model, a LLaVA with a random language model of this width and depth",
    )
    parser.add_argument(
        "--model-side",
        type=int,
        default=64,
        help="side the --random model sees (pixels): (side / 8)^2 image tokens",
    )
    parser.add_argument("--answers", type=int, default=1, help="answers per question (self-play: 2)")
    parser.add_argument(
        "--describe", action="store_true", help="first a description of each image, as in self-play"
    )
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--side", type=int, default=96, help="image side (pixels)")
    parser.add_argument("--tokens", type=int, default=48, help="longest output per request")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--slow-requests", type=int, default=8, help="requests transformers is timed on per turn"
    )
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--gpus", type=float, default=0)
    args = parser.parse_args()

    if args.random:
        from medray.testbed.tiny_vlm import random_llava

        hidden, layers = map(int, args.random.split("x"))
        scratch = tempfile.TemporaryDirectory()  # goes with the process
        args.model = scratch.name
        random_llava(args.model, hidden=hidden, layers=layers, side=args.model_side)
    model_dir = localize(resolve_model(args.model))
    sampling = SamplingConfig(temperature=1.2, top_k=100, top_p=0.95, max_tokens=args.tokens)
    engine_config = EngineConfig(
        enforce_eager=args.gpus == 0,
        gpus_per_actor=args.gpus,
        max_model_len=1024 if args.gpus == 0 else None,
        memory_utilization=0.35,
        max_num_seqs=256,
    )
    model_config = ModelConfig(precision=args.precision)
    # first: ours sets vLLM variables for its own engine
    bare = bare_engine(model_dir, engine_config, args.precision)
    ours = Ours(model_dir, model_config, DataConfig(), engine_config)
    ours.sampling, ours.phases = (
        sampling,
        [["Describe this image."]] * args.describe + [list(QUESTIONS * args.answers)],
    )
    slow = load_vlm(model_dir, args.precision, device="cuda" if args.gpus else "cpu")
    processor = load_processor(model_dir)

    speeds: dict[str, list[float]] = {"medray": [], "vllm": [], "transformers": []}
    for turn in range(args.repeats + 1):
        # New images each turn: no side may profit from what it cached before.
        rows = [
            {"sample_id": f"t{turn}-{i}", "image": picture(turn * 10_000 + i, args.side)}
            for i in range(args.images)
        ]
        measured = {
            "medray": timed(lambda rows=rows: sum(row["tokens"] for row in ours.run(ours._rows(rows)))),
            "vllm": timed(lambda rows=rows: with_bare(bare, ours, rows, sampling)),
            "transformers": timed(
                lambda rows=rows: with_transformers(slow, processor, ours, rows, sampling, args.slow_requests)
            ),
        }
        if turn:  # the first turn warms up
            for name, speed in measured.items():
                speeds[name].append(speed)
            print(
                f"turn {turn}: "
                + ", ".join(f"{name} {speed:.0f} tokens/s" for name, speed in measured.items()),
                flush=True,
            )
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    ours.close()
    print(
        json.dumps(
            {
                "benchmark": "generate",
                "model": f"random {args.random}, {(args.model_side // 8) ** 2} image tokens"
                if args.random
                else args.model,
                "requests": args.images * sum(map(len, ours.phases)),
                "max_tokens": args.tokens,
                "repeats": args.repeats,
                "cpus": os.cpu_count(),
                "gpus": args.gpus,
                "start_seconds": round(ours.engine.start_seconds, 1),
                "tokens_per_second": {name: round(value, 1) for name, value in medians.items()},
                "of_vllm": round(medians["medray"] / medians["vllm"], 3),
                "of_transformers": round(medians["medray"] / medians["transformers"], 2),
            }
        )
    )


def timed(work) -> float:
    started = time.perf_counter()
    tokens = work()
    return tokens / (time.perf_counter() - started)


def bare_engine(model_dir: str, config: EngineConfig, precision: str):
    """vllm.LLM as a user would write it, with the same limits."""
    from vllm import LLM

    on_cpu = config.gpus_per_actor == 0
    limits = (
        {
            "kv_cache_memory_bytes": config.kv_cache_gib * 2**30,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": 4096,
        }
        if on_cpu
        else {}
    )
    return LLM(
        model_dir,
        dtype="float32" if precision == "fp32" else "bfloat16",
        enforce_eager=config.enforce_eager,
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len,
        gpu_memory_utilization=config.memory_utilization,
        limit_mm_per_prompt={"image": 1, "video": 0},
        **limits,
    )


def with_bare(llm, ours: Ours, rows, sampling: SamplingConfig) -> int:
    from vllm import SamplingParams

    tokens = 0
    images = [ours._decode(row["image"]) for row in rows]
    for number, phase in enumerate(ours.phases):
        requests, params = [], []
        for row, image in zip(rows, images, strict=True):
            for index, text in enumerate(phase):
                requests.append(
                    {
                        "prompt_token_ids": ours.engine.chat.prompt_ids([{"role": "user", "text": text}]),
                        "multi_modal_data": {"image": image},
                    }
                )
                params.append(
                    SamplingParams(**sampling.model_dump(), seed=seed_for(0, row["sample_id"], number, index))
                )
        tokens += sum(
            len(output.outputs[0].token_ids) for output in llm.generate(requests, params, use_tqdm=False)
        )
    return tokens


def with_transformers(model, processor, ours: Ours, rows, sampling: SamplingConfig, requests: int) -> int:
    """Batch 1, as the authors' code generates; on the first `requests` of the same requests."""
    import torch

    tokens = 0
    texts = [text for phase in ours.phases for text in phase]
    for row, text in itertools.islice(itertools.product(rows, texts), requests):
        prompt = ours.engine.chat.prompt_text([{"role": "user", "text": text}])
        inputs = processor(
            text=prompt, images=ours._decode(row["image"]), add_special_tokens=False, return_tensors="pt"
        ).to(model.device)
        with torch.inference_mode():
            output = model.generate(
                **inputs,
                do_sample=True,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                max_new_tokens=sampling.max_tokens,
            )
        tokens += output.shape[1] - inputs["input_ids"].shape[1]
    return tokens


if __name__ == "__main__":
    main()
