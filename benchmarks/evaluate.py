"""Speed of jobs/evaluate.py's answering against bare vLLM on the same questions.

Ours is the whole path: question shards are read by Ray Data, images decoded and squared, asked in an engine
actor, answers written, committed and taken apart by benchmark. Bare vLLM is one `LLM.generate` call on the
rows in memory, decoding and squaring included. Both answer greedily, one picture to two questions; the share
of equal answers is printed. A side's rate is that of the further questions when it is asked ten times as
many, (10 n - n) / (t(10 n) - t(n)), so what starting takes is not counted; the sides take turns, with new
pictures each. Prints one JSON line last.

    python benchmarks/evaluate.py [--questions 1000] [--repeats 3] [--model testbed:base]
    python benchmarks/evaluate.py --random 768x8 --questions 40 --repeats 2    # 60M random weights: too many
    for a cache python benchmarks/evaluate.py --model llava-hf/llava-1.5-7b-hf --gpus 1 --precision bf16
    --side 336
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from generate import QUESTIONS, bare_engine, picture
from ingest import local_ray

from medray.config import EngineConfig, EvaluateConfig, EvaluateJobConfig, ModelConfig
from medray.images.decoding import decode, pad_to_square
from medray.inference.chat import Chat
from medray.methods.shared.benchmark_answers import Asked, predict
from medray.models.cache import localize
from medray.models.vlm import resolve_model
from medray.records import BENCHMARK_QUESTION
from medray.running.run import Run
from medray.storage.shards import stored_rows

ROWS_PER_SHARD = 1024


def write_questions(folder: Path, questions: int, side: int, seed: int) -> dict[str, Any]:
    """Question shards as a benchmark's; returns what its stage would."""
    folder.mkdir()
    for start in range(0, questions, ROWS_PER_SHARD):
        rows = [
            {
                "sample_id": str(i),
                "image_id": str(i // 2),
                "image": picture(seed + i // 2, side),
                "question": QUESTIONS[i % 2],
                "reference": "?",
                "answer_type": "open",
                "benchmark": "synthetic",
                "key": f"{folder.name}/{i}",
            }
            for i in range(start, min(start + ROWS_PER_SHARD, questions))
        ]
        pq.write_table(
            pa.Table.from_pylist(rows, schema=BENCHMARK_QUESTION),
            folder / f"part-{start:07d}.parquet",
            row_group_size=64,
        )
    return {
        "hash": folder.name,
        "outputs": {"rows": str(folder), "prefix": f"{folder.name}/", "counts": {"questions": questions}},
    }


def ours(
    config: EvaluateJobConfig, model: str, questions: dict[str, Any], scratch: str
) -> tuple[float, dict[str, str]]:
    """(seconds, answers)."""
    started = time.perf_counter()
    stage = predict(
        Run(tempfile.mkdtemp(dir=scratch)), config, {"synthetic": questions}, Asked("m", path=model)
    )["synthetic"]
    seconds = time.perf_counter() - started
    return seconds, {
        row["sample_id"]: row["answer"]
        for row in stored_rows(stage["outputs"]["rows"], ["sample_id", "answer"])
    }


def bare(
    llm: Any, chat: Chat, config: EvaluateJobConfig, questions: dict[str, Any]
) -> tuple[float, dict[str, str]]:
    """(seconds, answers)."""
    from vllm import SamplingParams

    rows = list(stored_rows(questions["outputs"]["rows"]))
    started = time.perf_counter()
    requests = [
        {
            "prompt_token_ids": chat.prompt_ids([{"role": "user", "text": row["question"]}]),
            "multi_modal_data": {"image": pad_to_square(decode(row["image"], config.data))},
        }
        for row in rows
    ]
    outputs = llm.generate(
        requests, SamplingParams(temperature=0, max_tokens=config.evaluate.max_tokens), use_tqdm=False
    )
    seconds = time.perf_counter() - started
    return seconds, {
        row["sample_id"]: output.outputs[0].text.strip() for row, output in zip(rows, outputs, strict=True)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="testbed:base")
    parser.add_argument(
        "--random",
        metavar="WIDTHxLAYERS",
        help="instead of --model, a LLaVA with a random language model of this width and depth",
    )
    parser.add_argument("--questions", type=int, default=1000, help="asked first; then ten times as many")
    parser.add_argument("--side", type=int, default=96, help="image side (pixels)")
    parser.add_argument("--tokens", type=int, default=32, help="longest answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--gpus", type=float, default=0)
    args = parser.parse_args()
    cores = os.cpu_count() or 1
    config = EvaluateJobConfig(
        model=ModelConfig(precision=args.precision),
        evaluate=EvaluateConfig(max_tokens=args.tokens),
        option_likelihood=False,
        engine=EngineConfig(
            enforce_eager=args.gpus == 0,
            gpus_per_actor=args.gpus,
            cpus_per_actor=1 if args.gpus else cores,
            max_model_len=1024 if args.gpus == 0 else None,
            memory_utilization=0.35,
        ),
    )
    config.data.read_cpus = 0.25
    rates: dict[str, list[float]] = {"medray": [], "vllm": []}
    with tempfile.TemporaryDirectory() as scratch:
        if args.random:
            from medray.testbed.tiny_vlm import random_llava

            hidden, layers = map(int, args.random.split("x"))
            args.model = f"{scratch}/model"
            random_llava(args.model, hidden=hidden, layers=layers)
        model = localize(resolve_model(args.model))
        llm, chat = bare_engine(model, config.engine, args.precision), Chat(model, config.model)
        with local_ray(cores + 3):  # readers and writers mostly wait
            for turn in range(1, args.repeats + 1):
                sets = [
                    write_questions(Path(scratch, f"{name}-{turn}"), number, args.side, seed)
                    for name, number, seed in (
                        ("few", args.questions, 100_000 * turn),
                        ("many", 10 * args.questions, 100_000 * turn + args.questions),
                    )
                ]
                sides = {
                    "medray": [ours(config, model, one, scratch) for one in sets],
                    "vllm": [bare(llm, chat, config, one) for one in sets],
                }
                for name, ((short, _), (long, _)) in sides.items():
                    rates[name].append(9 * args.questions / (long - short))
                    print(
                        f"turn {turn}: {name} {short:.1f} s and {long:.1f} s, {rates[name][-1]:.1f} "
                        "questions/s",
                        flush=True,
                    )
                (_, mine), (_, theirs) = (found[1] for found in sides.values())
                equal = sum(mine[identity] == answer for identity, answer in theirs.items()) / len(theirs)
    print(
        json.dumps(
            {
                "benchmark": "evaluate",
                "model": f"random {args.random}" if args.random else args.model,
                "questions": args.questions,
                "max_tokens": args.tokens,
                "repeats": args.repeats,
                "cpus": cores,
                "gpus": args.gpus,
                "questions_per_second": {
                    name: round(statistics.median(values), 2) for name, values in rates.items()
                },
                "equal_answers": round(equal, 3),
                "of_vllm": round(
                    statistics.median(a / b for a, b in zip(rates["medray"], rates["vllm"], strict=True)), 3
                ),
                "goals": {"of_vllm": 0.9},
            }
        )
    )


if __name__ == "__main__":
    main()
