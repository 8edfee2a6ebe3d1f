"""The endpoint against vLLM's own OpenAI server: throughput, time to first token; then a load that is held,
and replicas that come and go.

Both servers have the same model, engine settings and requests (an image of its own in each) on one machine,
and are asked in turns by the same client, A B A B ..., `--repeats` times. What is compared: requests per
second with `--concurrency` under way (goal: >= 0.9 of vLLM's own server), and, one at a time, the median
seconds to the first token and to the whole answer (what the endpoint adds).

`--hold MINUTES` then keeps `--concurrency` requests under way at the endpoint alone and counts errors;
replicas may grow to two meanwhile and must be back at one afterwards. Prints one JSON line last.

    python benchmarks/serving.py [--requests 64] [--concurrency 8] [--repeats 3] [--hold 0] [--model
    testbed:generalist] [--gpu] python benchmarks/serving.py --random 768x8 --requests 24     # 60M random
    weights: an answer takes longer than what surrounds it
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")

import httpx
import numpy as np
from PIL import Image

from medray.config import EngineConfig
from medray.config.serving import ServeConfig
from medray.images.decoding import png_url
from medray.inference.vllm_engine import vllm_arguments, vllm_environment
from medray.models.vlm import resolve_model
from medray.testbed.fake_cluster import free_port

NAME = "model"


def bodies(number: int, tokens: int, stream: bool, seed: int = 0) -> list[bytes]:
    """Chat requests with a picture of noise each, so that neither side can reuse anything."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(number):
        uri = png_url(Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)))
        content = [
            {"type": "image_url", "image_url": {"url": uri}},
            {"type": "text", "text": "List the attributes."},
        ]
        made.append(
            json.dumps(
                {
                    "model": NAME,
                    "messages": [{"role": "user", "content": content}],
                    "temperature": 0,
                    "max_tokens": tokens,
                    "stream": stream,
                }
            ).encode()
        )
    return made


async def throughput(client: httpx.AsyncClient, requests: list[bytes], concurrency: int) -> float:
    """Requests per second; every answer must be a 200."""
    waiting = iter(requests)

    async def one_by_one() -> None:
        for body in waiting:
            (
                await client.post(
                    "/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}
                )
            ).raise_for_status()

    began = time.perf_counter()
    await asyncio.gather(*(one_by_one() for _ in range(concurrency)))
    return len(requests) / (time.perf_counter() - began)


async def latencies(client: httpx.AsyncClient, requests: list[bytes]) -> dict[str, float]:
    """Median seconds to the first token and to the end of streamed answers, asked one at a time."""
    first, whole = [], []
    for body in requests:
        began, seen = time.perf_counter(), None
        async with client.stream(
            "POST", "/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}
        ) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if (
                    seen is None
                    and line.startswith("data: {")
                    and json.loads(line[6:])["choices"][0]["delta"].get("content")
                ):
                    seen = time.perf_counter() - began
        first.append(seen if seen is not None else time.perf_counter() - began)
        whole.append(time.perf_counter() - began)
    return {"first_token": statistics.median(first), "whole": statistics.median(whole)}


async def hold(
    client: httpx.AsyncClient, minutes: float, concurrency: int, tokens: int, replicas: Any
) -> dict[str, Any]:
    """`concurrency` requests under way for so long: statuses, requests per second, and the running
    replicas over time.
    """
    statuses: Counter[str] = Counter()
    until, seen = time.monotonic() + 60 * minutes, []
    stock = bodies(200, tokens, stream=False, seed=1)

    async def keep_asking(number: int) -> None:
        while time.monotonic() < until:
            number += concurrency
            try:
                answer = await client.post(
                    "/v1/chat/completions",
                    content=stock[number % len(stock)],
                    headers={"Content-Type": "application/json"},
                )
                statuses[str(answer.status_code)] += 1
            except httpx.HTTPError as error:
                statuses[type(error).__name__] += 1

    async def watch() -> None:
        while time.monotonic() < until:
            seen.append(await asyncio.to_thread(replicas))
            await asyncio.sleep(2)

    await asyncio.gather(watch(), *(keep_asking(number) for number in range(concurrency)))
    answered = sum(statuses.values())
    return {
        "minutes": minutes,
        "statuses": dict(statuses),
        "errors": answered - statuses["200"],
        "requests_per_second": answered / (60 * minutes),
        "most_replicas": max(seen),
    }


def start_vllm(model: str, engine: EngineConfig, port: int) -> subprocess.Popen:
    """vLLM's own server with the endpoint's engine settings."""
    settings = vllm_arguments(model, "bf16" if engine.gpus_per_actor else "fp32", False, engine)
    settings.pop("worker_extension_cls")
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        model,
        "--served-model-name",
        NAME,
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
    ]
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            command.append(flag if value else "--no-" + flag[2:])
        elif value is not None:
            command += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return subprocess.Popen(command, env={**os.environ, **vllm_environment(engine)}, stdout=sys.stderr)


def start_endpoint(model: str, engine: EngineConfig, port: int, most: int) -> None:
    from ray import serve

    from medray.running.ray_session import start_ray
    from medray.serving.chat.app import build

    start_ray(num_cpus=4 if not engine.gpus_per_actor else None, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    config = ServeConfig.model_validate(
        {
            "open": True,
            "models": [
                {"name": NAME, "path": model, "precision": "bf16" if engine.gpus_per_actor else "fp32"}
            ],
            "engine": engine.model_dump(),
            "replicas": [1, most],
            "target_ongoing_requests": 4,
            "upscale_delay_s": 5,
            "downscale_delay_s": 20,
            "limits": {"requests_per_minute": 10**6},
        }
    )
    serve.run(build(config), name="endpoint")


def replicas() -> int:
    """Running replicas of the model."""
    from ray import serve

    return (
        serve.status()
        .applications["endpoint"]
        .deployments[f"ModelServer:{NAME}"]
        .replica_states.get("RUNNING", 0)
    )


async def until_up(client: httpx.AsyncClient) -> None:
    for _ in range(600):
        try:
            if (await client.get("/health")).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        await asyncio.sleep(1)
    raise SystemExit("a server did not start within ten minutes")


async def compare(sides: dict[str, httpx.AsyncClient], options: argparse.Namespace) -> dict[str, Any]:
    rates: dict[str, list[float]] = {name: [] for name in sides}
    waits: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for client in sides.values():
        await until_up(client)
        # warm
        await throughput(
            client, bodies(2 * options.concurrency, options.tokens, False, seed=99), options.concurrency
        )
    for turn in range(options.repeats):
        for name, client in sides.items():
            rates[name].append(
                await throughput(
                    client,
                    bodies(options.requests, options.tokens, False, seed=turn + 10),
                    options.concurrency,
                )
            )
            waits[name].append(
                await latencies(client, bodies(options.requests // 4, options.tokens, True, seed=turn + 20))
            )
    medians = {
        name: {what: statistics.median(one[what] for one in found) for what in ("first_token", "whole")}
        for name, found in waits.items()
    }
    return {
        "ratio": statistics.median(
            ours / theirs for ours, theirs in zip(rates["endpoint"], rates["vllm"], strict=True)
        ),
        "requests_per_second": rates,
        "seconds": medians,
        "added_seconds": {
            what: medians["endpoint"][what] - medians["vllm"][what] for what in ("first_token", "whole")
        },
    }


async def measure(options: argparse.Namespace, ports: dict[str, int]) -> dict[str, Any]:
    sides = {
        name: httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=300)
        for name, port in ports.items()
    }
    found = await compare(sides, options)
    if options.hold:
        found["held"] = await hold(
            sides["endpoint"], options.hold, options.concurrency, options.tokens, replicas
        )
        until = time.monotonic() + 300
        while replicas() > 1 and time.monotonic() < until:
            await asyncio.sleep(2)
        found["held"]["replicas_afterwards"] = replicas()
    for client in sides.values():
        await client.aclose()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="testbed:generalist")
    parser.add_argument(
        "--random",
        metavar="WIDTHxLAYERS",
        help="instead of --model, a LLaVA with a random language model of this width and depth",
    )
    parser.add_argument("--requests", type=int, default=64, help="in one turn")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16, help="of one answer, at most")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hold", type=float, default=0.0, help="minutes of a held load, at the end")
    parser.add_argument("--gpu", action="store_true", help="one GPU for each side, bf16")
    options = parser.parse_args()
    if options.random:
        from medray.testbed.tiny_vlm import random_llava

        hidden, layers = map(int, options.random.split("x"))
        options.model = tempfile.mkdtemp(prefix="medray-random-")
        random_llava(options.model, hidden=hidden, layers=layers)
    path = resolve_model(options.model)
    engine = (
        EngineConfig(gpus_per_actor=1)
        if options.gpu
        else EngineConfig(
            cpus_per_actor=1, memory_utilization=0.15, max_model_len=512, enforce_eager=True, max_num_seqs=64
        )
    )
    ports = {"vllm": free_port(), "endpoint": free_port()}
    server = start_vllm(path, engine, ports["vllm"])
    try:
        start_endpoint(path, engine, ports["endpoint"], most=2 if options.hold else 1)
        found = asyncio.run(measure(options, ports))
    finally:
        server.terminate()
        server.wait()
    model = f"random {options.random}" if options.random else options.model
    print(
        json.dumps(
            {
                "benchmark": "serving",
                "model": model,
                "concurrency": options.concurrency,
                "tokens": options.tokens,
                **found,
            }
        )
    )


if __name__ == "__main__":
    main()
