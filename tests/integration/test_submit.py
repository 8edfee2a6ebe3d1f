"""On an autoscaling cluster, with token authentication and the run on S3: `ray job submit`; a training
machine dies, the job is stopped, submitted again; `serve deploy` of what it made, from no replica; and
the machines go when nobody needs them.
"""

import json
import os
import re
import subprocess
import tempfile
import threading
from pathlib import Path

import httpx
import pytest
import yaml

from medray.serving.tokens import add_holder
from medray.testbed.fake_cluster import FakeCluster, free_port
from tests.integration.conftest import BIN, BUCKET, answer_of, wait_for
from tests.integration.test_self_train import SMALL
from tests.support.jobs import ROOT

pytestmark = [pytest.mark.whole_job, pytest.mark.timeout(2400)]
GROUPS = {"data": (2, 1), "train": (1, 2), "generate": (1, 1)}


class Cluster(FakeCluster):
    """Runs `ray job ...` against itself, and knows the most nodes each group has had."""

    def __init__(self, home, variables):
        super().__init__(
            Path(home, "cluster"),
            GROUPS,
            environment={
                **variables,
                "HOME": home,
                "RAY_AUTH_MODE": "token",
                "PATH": f"{BIN}:{os.environ['PATH']}",
            },
        )
        subprocess.run(
            [BIN / "ray", "get-auth-token", "--generate"],
            env=self.environment,
            check=True,
            capture_output=True,
        )
        self.most, self.over = dict.fromkeys(GROUPS, 0), threading.Event()

    def command(self, *words, check=True, **variables):
        done = subprocess.run(
            [BIN / words[0], *words[1:]],
            cwd=ROOT,
            env=self.environment | variables,
            capture_output=True,
            text=True,
            check=False,
        )
        assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done

    def job(self, verb, *arguments, **options):
        return self.command("ray", "job", verb, "--address", self.dashboard, *arguments, **options)

    def lose_trainer(self):
        """Kill a machine that trains; None where none does at this moment (another worker joins)."""
        try:
            return self.kill_node("train", runs="RayTrainWorker")
        except LookupError:
            return None

    def watch(self):
        while not self.over.wait(1):
            self.most = {group: max(self.most[group], len(nodes)) for group, nodes in self.nodes().items()}


@pytest.fixture(scope="module")
def cluster(s3):
    with (
        tempfile.TemporaryDirectory(prefix="mr", dir="/tmp", ignore_cleanup_errors=True) as home,
        Cluster(home, s3[0]) as made,
    ):
        watcher = threading.Thread(target=made.watch)
        watcher.start()
        try:
            wait_for(lambda: made.job("list", check=False).returncode == 0, "dashboard")
            yield made
        finally:
            made.over.set()
            watcher.join()


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    from medray.testbed.cells import write_cells

    folder = tmp_path_factory.mktemp("cells")
    write_cells(str(folder), 160, seed=5, val_fraction=0.1)
    return folder


@pytest.fixture(scope="module")
def run(cluster, s3, cells, tmp_path_factory):
    """The run's directory on S3 after its job lost a machine, was stopped and was submitted again."""
    _, fs = s3
    place = f"{BUCKET}/runs/first"
    run = f"s3://{place}"
    places = {"cluster.data_labels": "data", "sft.place.labels": "train", "engine.place.labels": "generate"}
    overrides = [
        *SMALL,
        "rounds=0",
        "sft.epochs=6",
        "sft.micro_batch=2",
        "sft.accumulation=1",
        "sft.checkpoint_every=6",
        "sft.num_workers=[1,2]",
        "sft.threads=1",
        "engine.cpus_per_actor=1",
        "data.read_cpus=0.5",
        "evaluate.arms=[sft]",
        "cluster.num_cpus=null",
        *(f"{field}={{medray-group: {group}}}" for field, group in places.items()),
    ]
    entry = [
        "python",
        "jobs/self_train.py",
        "--data",
        str(cells),
        "--run",
        run,
        *(part for override in overrides for part in ("--set", override)),
    ]

    # A key, and two variables that the job would set by itself.
    variables = tmp_path_factory.mktemp("environment") / "env.yaml"
    variables.write_text(
        yaml.safe_dump(
            {
                "env_vars": {
                    "OPENAI_API_KEY": "sk-none",
                    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                    "RAY_TRAIN_V2_ENABLED": "1",
                }
            }
        )
    )
    submission = ["--working-dir", ".", "--runtime-env", str(variables), "--", *entry]

    def state(identity):
        found = cluster.job("status", identity).stdout
        assert "failed" not in found, found[-6000:]
        return found

    def submitted():
        """The id of the job; None while the head's job agent is not up yet."""
        return re.search(
            r"'(raysubmit_\w+)'", cluster.job("submit", "--no-wait", *submission, check=False).stdout
        )

    def written(what):
        return set(fs.glob(f"{place}/stages/01-sq_sft/{what}"))

    def checkpoints():
        return written("train/**/progress.json")

    assert cluster.job("list", check=False, HOME="/nonexistent").returncode != 0, "without the token"
    assert not any(cluster.nodes().values())

    first = wait_for(submitted, "job agent").group(1)
    # The command line is not asked meanwhile: each call takes seconds, in which a stage ends.
    wait_for(checkpoints, "checkpoint", 900)
    wait_for(cluster.lose_trainer, "training worker")
    starts, before = written("train/starts/*.json"), checkpoints()
    wait_for(
        lambda: written("train/starts/*.json") - starts and checkpoints() - before,
        "checkpoint after the loss of a machine",
        900,
    )
    cluster.job("stop", first)
    assert "was stopped" in wait_for(
        lambda: "RUNNING" not in state(first) and state(first), "end of the stopped job", pause=5
    ), cluster.job("logs", first).stdout[-4000:]
    assert not fs.exists(f"{place}/results.json")

    second = cluster.job("submit", *submission, check=False)
    assert second.returncode == 0, second.stdout[-6000:]
    assert "stage 00-data: cached" in second.stdout
    assert "stage 01-sq_sft: resuming (attempt 2)" in second.stdout
    line = next(line for line in reversed(second.stdout.splitlines()) if line.startswith('{"run"'))
    assert json.loads(line)["run"] == run
    results = json.loads(fs.cat_file(f"{place}/results.json"))
    assert set(results["accuracy"]) == {"sft"}
    assert fs.exists(f"{place}/report.html")
    return run


def test_nothing_is_lost_with_a_machine(run, s3, cluster):
    counts = json.loads(s3[1].cat_file(f"{run}/stages/01-sq_sft/manifest.json"))["outputs"]["counts"]
    assert counts["restarts"] >= 2, "a lost machine and a stop"
    assert counts["samples"] == 6 * counts["trained"]
    assert cluster.most["generate"] == cluster.most["data"] == 1 <= cluster.most["train"]


def test_the_run_is_served_from_no_replica(run, cluster, tmp_path):
    """`serve deploy` of a file like serve/config.yaml. The first request brings a machine, which fetches
    the model from S3.
    """
    wait_for(lambda: not cluster.nodes()["generate"], "end of a machine nobody needs")
    port, key = free_port(), add_holder(str(tmp_path / "keys.txt"), "tests")
    config = yaml.safe_load((ROOT / "serve/config.yaml").read_text()) | {
        "http_options": {"host": "127.0.0.1", "port": port},
        "proxy_location": "HeadOnly",
    }
    config["applications"][0]["args"] = {
        "run": run,
        "base": False,
        "keys": str(tmp_path / "keys.txt"),
        "replicas": [0, 1],
        "place": {"labels": {"medray-group": "generate"}},
        "upscale_delay_s": 0,
        "downscale_delay_s": 5,
        "limits": {"seconds": 1150},
    }
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    cluster.command("serve", "deploy", str(tmp_path / "serve.yaml"), "--address", cluster.dashboard)

    wait_for(
        lambda: (
            (answer := answer_of(f"http://127.0.0.1:{port}/ready")) is not None
            and answer.status_code in (200, 503)
        ),
        "endpoint",
        900,
        pause=2,
    )
    assert not cluster.nodes()["generate"]
    body = {"model": "tuned", "messages": [{"role": "user", "content": "What is this?"}], "max_tokens": 4}
    answer = httpx.post(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json=body,
        headers={"Authorization": f"Bearer {key}"},
        timeout=1200,
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] <= 4
    assert cluster.nodes()["generate"]
    wait_for(lambda: not cluster.nodes()["generate"], "end of a replica nobody asks", 900)


def test_machines_go_when_nobody_needs_them(run, cluster):
    wait_for(lambda: not any(cluster.nodes().values()), "end of the machines")
