"""The api judge against vLLM's own OpenAI server, with a model that cannot write scores."""

import os
import subprocess
import sys

import httpx
import pyarrow as pa
import pytest

from medray.config import DataConfig, JudgeConfig
from medray.records import SELF_PLAY
from medray.testbed.fake_cluster import free_port
from tests.integration.conftest import wait_until_served

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def server(talker, tmp_path_factory):
    port = free_port()
    log_path = tmp_path_factory.mktemp("server") / "log"
    log = log_path.open("w")
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            talker,
            "--served-model-name",
            "tiny",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--dtype",
            "float32",
            "--enforce-eager",
            "--max-model-len",
            "1024",
            "--kv-cache-memory-bytes",
            str(2**28),
            "--no-enable-chunked-prefill",
            "--max-num-batched-tokens",
            "4096",
            "--distributed-executor-backend",
            "uni",
        ],
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"},
    )
    base = f"http://127.0.0.1:{port}"
    try:
        wait_until_served(process, f"{base}/health", log=log_path)
        yield base
    finally:
        process.terminate()
        try:
            process.wait(300)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()


def counted(base):
    values = {}
    for line in httpx.get(f"{base}/metrics", timeout=60).text.splitlines():
        for name in ("vllm:prompt_tokens_total", "vllm:generation_tokens_total"):
            if line.startswith(name + "{"):
                values[name] = values.get(name, 0) + float(line.rsplit(" ", 1)[1])
    return values["vllm:prompt_tokens_total"], values["vllm:generation_tokens_total"]


def test_requests_and_usage_are_the_servers_own_numbers(server, png):
    from medray.inference.judges.api import ApiJudge

    answers = [
        {"text": text, "seed": 1, "finish_reason": "stop", "tokens": 2} for text in ("one cell", "two cells")
    ]
    rows = [
        {
            "sample_id": f"i{number}",
            "image": png(number),
            "description": "",
            "dropped_questions": [],
            "error": None,
            "questions": [
                {"question_id": f"i{number}/r1/q{q}", "question": "What?", "seed": 1, "answers": answers}
                for q in range(2)
            ],
        }
        for number in range(3)
    ]
    judge = ApiJudge(
        JudgeConfig(kind="api", model="tiny", base_url=f"{server}/v1", key_env="MEDRAY_NO_KEY", max_tokens=8),
        DataConfig(),
    )
    before = counted(server)
    judged = judge(pa.Table.from_pylist(rows, schema=SELF_PLAY)).to_pylist()
    after = counted(server)
    assert sum(row["requests"] for row in judged) == 3 * 2 * 2
    assert sum(row["retries"] for row in judged) == 0
    assert sum(row["prompt_tokens"] for row in judged) == after[0] - before[0] > 12 * 64
    assert sum(row["completion_tokens"] for row in judged) == after[1] - before[1] > 0
    verdicts = [verdict for row in judged for verdict in row["verdicts"]]
    assert len(verdicts) == 6
    assert all(
        "first line" in verdict["error"] and verdict["first_score"] is None and len(verdict["raw"]) == 2
        for verdict in verdicts
    )
