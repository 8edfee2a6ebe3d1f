"""The commands of docs/clinician_page.md and docs/serving.md, as they stand there."""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml

from medray.running.ray_session import SLOW_START, STARTS
from tests.integration.conftest import BIN, answer_of, wait_for
from tests.serving.test_app import make_run
from tests.support.jobs import ROOT

pytestmark = [pytest.mark.whole_job, pytest.mark.ray, pytest.mark.timeout(1200)]
ADDRESS = "http://127.0.0.1:8000"


def commands(page):
    """Of the page's first block, without remarks, as lists of words."""
    block = re.search(r"```sh\n(.*?)```", (ROOT / page).read_text(), re.S).group(1)
    return [shlex.split(line, comments=True) for line in block.strip().splitlines()]


@contextlib.contextmanager
def served(words, folder, log):
    """What a `serve run` command serves on port 8000, started anew where the machine was too busy; ended
    by Ctrl-C.
    """
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 8000)) == 0:
            pytest.skip("something listens on port 8000 already")

    def start():
        with log.open("w") as handle:
            return subprocess.Popen(
                [BIN / words[0], *words[1:]],
                cwd=folder,
                env=environment(),
                stdout=handle,
                stderr=handle,
                start_new_session=True,
            )

    process, starts = start(), 1

    def answered():
        nonlocal process, starts
        if process.poll() is not None:
            said = log.read_text()
            # Ray, or Serve's proxy, on a machine at work
            assert starts < STARTS and (SLOW_START in said or "not available after" in said), said[-3000:]
            process, starts = start(), starts + 1
        answer = answer_of(ADDRESS)
        return answer is not None and answer.status_code == 200

    try:
        wait_for(answered, "page", pause=1)
        yield
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def environment():
    """A Ray of its own; from another folder than the repository's only here, to keep that clean."""
    return os.environ | {"RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT)}


def token(words, folder):
    return subprocess.run(
        [sys.executable, *words[1:]],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()[-1]


def test_the_clinician_page_begins_as_documented(tmp_path, write_items):
    write_items(tmp_path / "DIR", 2)
    first, lead, serve_run = commands("docs/clinician_page.md")
    tokens = [token(words, tmp_path) for words in (first, lead)]
    with served(serve_run, tmp_path, tmp_path / "log"):
        for one in tokens:
            answer = httpx.get(f"{ADDRESS}/api/next", headers={"Authorization": f"Bearer {one}"}, timeout=60)
            assert answer.status_code == 200 and "Which cell is this?" in answer.text
        assert Path(tmp_path, "judgements.db").is_file()


def demo_run(folder):
    """A finished run with the engine settings of the demo's recipe."""
    make_run(folder, "generalist")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["engine"] |= yaml.safe_load((ROOT / "medray/recipes/self_train/tiny-cpu.yaml").read_text())[
        "engine"
    ]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def test_the_endpoint_begins_as_documented(tmp_path, monkeypatch):
    """The tuned model and its base, on two logical CPUs. An answer is streamed to curl."""
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 2}')
    demo_run(tmp_path / "runs/demo")
    made, serve_run = commands("docs/serving.md")
    key = token(made, tmp_path)
    assert " ".join(serve_run) in (ROOT / "README.md").read_text()
    with served(serve_run, tmp_path, tmp_path / "log"):
        wait_for(lambda: answer_of(f"{ADDRESS}/ready").status_code == 200, "models", pause=1)
        assert answer_of(f"{ADDRESS}/ready").json()["models"] == {"tuned": True, "base": True}
        body = json.dumps(
            {
                "model": "tuned",
                "messages": [{"role": "user", "content": "What is this?"}],
                "max_tokens": 4,
                "stream": True,
            }
        )
        command = [
            "curl",
            "-sN",
            f"{ADDRESS}/v1/chat/completions",
            "-H",
            f"Authorization: Bearer {key}",
            "-H",
            "Content-Type: application/json",
            "-d",
            body,
        ]
        lines = [
            line
            for line in subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout.splitlines()
            if line
        ]
        assert lines[-1] == "data: [DONE]"
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        assert "".join(
            chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"]
        )


def test_what_cannot_be_placed_is_said_before_anything_starts(tmp_path, monkeypatch):
    """The command ends with a sentence that names the field, and a word more than documented asks for too
    much.
    """
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 2}')
    demo_run(tmp_path / "runs/demo")
    made, serve_run = commands("docs/serving.md")
    token(made, tmp_path)
    done = subprocess.run(
        [BIN / serve_run[0], *serve_run[1:], "engine_cpus=2"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 1 and "lower engine_cpus" in said and "this machine (2 CPUs" in said, said
    assert "Traceback" not in said and "Started a local Ray" not in said
