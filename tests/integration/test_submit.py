"""`ray start --head`, then `ray job submit`, with token authentication and the run on S3; stopped midway, submitted again."""

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

import pytest

from medray.testbed.fake_cluster import free_port
from tests.integration.conftest import BIN, BUCKET, wait_for
from tests.integration.test_self_train import SMALL
from tests.jobs import ROOT

pytestmark = pytest.mark.timeout(2000)

@pytest.fixture(scope="module")
def cluster(s3):
    """A head node that asks for a token; yields a function that runs `ray job ...` against it."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="mr", dir="/tmp") as home:
        environment = {
            **os.environ, **s3[0], "HOME": home, "RAY_AUTH_MODE": "token", "RAY_TMPDIR": home, "RAY_DISABLE_IMPORT_WARNING": "1",
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }
        environment.pop("RAY_ADDRESS", None)
        subprocess.run([BIN / "ray", "get-auth-token", "--generate"], env=environment, check=True, capture_output=True)
        with open(f"{home}/head.log", "w") as log:
            head = subprocess.Popen(
                [BIN / "ray", "start", "--head", "--block", "--port=0", "--num-cpus=4", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}",
                 f"--dashboard-agent-listen-port={free_port()}",  # the default one is taken by the test session's own Ray
                 f"--temp-dir={home}/ray", "--disable-usage-stats"], env=environment, stdout=log, stderr=log)

        def job(*arguments, check=True, token=True):
            settings = environment if token else {**environment, "HOME": "/nonexistent"}
            done = subprocess.run(
                [BIN / "ray", "job", arguments[0], "--address", f"http://127.0.0.1:{port}", *arguments[1:]], cwd=ROOT, env=settings,
                capture_output=True, text=True, check=False)
            assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            return done

        try:
            wait_for(lambda: head.poll() is not None or job("list", check=False).returncode == 0, "dashboard")
            assert head.poll() is None, Path(home, "head.log").read_text()
            yield job
        finally:
            head.terminate()
            head.wait()


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    from medray.testbed.cells import write_cells

    folder = tmp_path_factory.mktemp("cells")
    write_cells(str(folder), 160, seed=5, val_fraction=0.1)
    return folder


def test_submitted_job_is_stopped_and_submitted_again(cluster, s3, cells):
    _, fs = s3
    run = f"s3://{BUCKET}/runs/first"
    overrides = [*SMALL, "rounds=0", "sft.epochs=2", "sft.checkpoint_every=2", "evaluate.arms=[sft]", "cluster.num_cpus=null"]
    entry = ["python", "jobs/self_train.py", "--data", str(cells), "--run", run, *(part for o in overrides for part in ("--set", o))]

    def state(identity):
        return cluster("status", identity).stdout

    assert cluster("list", check=False, token=False).returncode != 0

    def submitted():
        """The id of the job; None while the head's job agent is not up yet."""
        return re.search(r"'(raysubmit_\w+)'", cluster("submit", "--no-wait", "--working-dir", ".", "--", *entry, check=False).stdout)

    first = wait_for(submitted, "job agent").group(1)
    wait_for(lambda: fs.glob(f"{BUCKET}/runs/first/stages/01-sq_sft/train/**/progress.json") or "FAILED" in state(first), "checkpoint", 900, pause=5)  # each call of the command line takes seconds of a core
    cluster("stop", first)
    assert "was stopped" in wait_for(lambda: "RUNNING" not in state(first) and state(first), "end of the stopped job", pause=5), cluster("logs", first).stdout[-4000:]
    assert not fs.exists(f"{BUCKET}/runs/first/results.json")

    second = cluster("submit", "--working-dir", ".", "--", *entry, check=False)
    assert second.returncode == 0, second.stdout[-6000:]
    assert "stage 00-data: done before" in second.stdout
    assert "stage 01-sq_sft: continues (attempt 2)" in second.stdout
    line = next(line for line in reversed(second.stdout.splitlines()) if line.startswith('{"run"'))
    assert json.loads(line)["run"] == run
    results = json.loads(fs.cat_file(f"{BUCKET}/runs/first/results.json"))
    assert set(results["accuracy"]) == {"sft"}
    assert fs.exists(f"{BUCKET}/runs/first/report.html")
