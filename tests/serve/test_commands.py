"""The commands of docs/clinician_page.md, as they stand there."""

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

from medray.methods.session import SLOW_START, STARTS
from tests.integration.conftest import BIN, answer_of, wait_for
from tests.jobs import ROOT

pytestmark = pytest.mark.ray


def commands(page):
    """Of the page's first block, without remarks, as lists of words."""
    block = re.search(r"```sh\n(.*?)```", (ROOT / page).read_text(), re.S).group(1)
    return [shlex.split(line, comments=True) for line in block.strip().splitlines()]


def test_the_clinician_page_begins_as_documented(tmp_path, write_items):
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 8000)) == 0:
            pytest.skip("something listens on port 8000 already")
    write_items(tmp_path / "DIR", 2)
    # A Ray of its own; from another folder than the repository's only here, to keep that clean.
    environment = os.environ | {"RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT)}
    first, lead, serve_run = commands("docs/clinician_page.md")
    tokens = [
        subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout.split()[-1] for words in (first, lead)]
    log = tmp_path / "log"

    def start():
        with log.open("w") as handle:
            return subprocess.Popen([BIN / serve_run[0], *serve_run[1:]], cwd=tmp_path, env=environment, stdout=handle, stderr=handle, start_new_session=True)

    page, starts = start(), 1

    def served():
        nonlocal page, starts
        if page.poll() is not None:
            said = log.read_text()
            assert starts < STARTS and (SLOW_START in said or "not available after" in said), said[-3000:]  # Ray, or Serve's proxy, on a machine at work
            page, starts = start(), starts + 1
        answer = answer_of("http://127.0.0.1:8000")
        return answer is not None and answer.status_code == 200

    try:
        wait_for(served, "page", 900, pause=1)
        for token in tokens:
            answer = httpx.get("http://127.0.0.1:8000/api/next", headers={"Authorization": f"Bearer {token}"}, timeout=60)
            assert answer.status_code == 200 and "Which cell is this?" in answer.text
        assert Path(tmp_path, "judgements.db").is_file()
    finally:
        page.send_signal(signal.SIGINT)
        page.wait(120)
