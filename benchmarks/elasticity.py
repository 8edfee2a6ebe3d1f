"""The main job on a cluster that grows and shrinks, with nodes that die: what it costs, and that nothing is
lost or done twice.

Starts Ray's autoscaler with its fake provider on this machine (medray.testbed.fake_cluster): a head, and
groups of nodes for data, training and generation that are empty until work asks for them. Then
jobs/self_train.py runs on it, small, while this script kills

    a training node in 01-sq_sft      and none can be had for a while: the training goes on with one worker,
    from its checkpoint, and grows back later a generation node in 11-self_play the rows it held are generated
    again, elsewhere a generation node in 12-judge     as much for verdicts the job's driver in 15-dpo
    the same command continues

and checks that every image, answer, pair and training row is there exactly once, and that the training grew
back. Prints when nodes came and went, what each interruption cost (steps and rows done again, against the
checkpoint interval; seconds between starts; workers of each start), and one JSON line last.

    python benchmarks/elasticity.py [--folder DIR] [--checkpoint-every STEPS] [--calm]     # --calm: nothing
    is killed, for comparison
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.dataset
import yaml

from medray.testbed.fake_cluster import FakeCluster

ROOT = Path(__file__).resolve().parents[1]
GROUPS = {"data": (2, 1), "train": (1, 2), "generate": (1, 2)}
PLACES = {
    "cluster.data_labels": "data",
    "sft.place.labels": "train",
    "dpo.place.labels": "train",
    "engine.place.labels": "generate",
}
SETTINGS = [
    "data.testbed_rows=240",
    "data.label_fraction=0.3",
    "data.max_unlabelled=48",
    "data.turns=3",
    "data.read_cpus=0.5",
    "sft.epochs=32",
    "sft.micro_batch=2",
    "sft.eval_rows=4",
    "self_play.questions=2",
    "judge.min_margin=0",
    "evaluate.max_images=4",
    "evaluate.bootstrap=100",
    "verify.rows=0",
    "engine.rows_per_task=4",
    "engine.rows_in_flight=4",
    "engine.actors=[1,2]",
    "engine.cpus_per_actor=1",
    "sft.num_workers=[1,2]",
    "dpo.num_workers=[1,2]",
    "sft.threads=1",
    "dpo.threads=1",
    *(f"{field}={{medray-group: {group}}}" for field, group in PLACES.items()),
    "sft.place.resources={train: 1}",
    "dpo.place.resources={train: 1}",
]


TOLD = ("steps", "restarts", "steps done again", "seconds between starts", "workers", "rows done again")


class Watch(threading.Thread):
    """Writes down when the number of a group's nodes changes."""

    def __init__(self, cluster: FakeCluster):
        super().__init__(daemon=True)
        self.cluster, self.began, self.seen, self.over = cluster, time.monotonic(), [], threading.Event()

    def run(self) -> None:
        last: dict[str, int] = {}
        while not self.over.wait(1.0):
            now = {group: len(nodes) for group, nodes in self.cluster.nodes().items()}
            if now != last:
                self.seen.append({"second": round(time.monotonic() - self.began), **now})
                print(json.dumps(self.seen[-1]), flush=True)
                last = now


def start_job(cluster: FakeCluster, run: Path, log: Path, checkpoint_every: int) -> subprocess.Popen:
    settings = [*SETTINGS, *(f"{stage}.checkpoint_every={checkpoint_every}" for stage in ("sft", "dpo"))]
    command = [
        sys.executable,
        "jobs/self_train.py",
        "--run",
        str(run),
        *(part for setting in settings for part in ("--set", setting)),
    ]
    with log.open("a") as handle:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**cluster.environment, "PYTHONUNBUFFERED": "1"},
            stdout=handle,
            stderr=handle,
            start_new_session=True,
        )


# What is killed, and the file of the stage that shows that it has got somewhere; None: the driver.
PLAN = (
    ("01-sq_sft", "train/starts/*.json", "train"),
    ("11-self_play", "committed/*", "generate"),
    ("12-judge", "committed/*", "generate"),
    ("15-dpo", "train/training/checkpoint_*/progress.json", None),
)


def progress(folder: Path, pattern: str) -> list[int]:
    """Of the files that show progress the number of workers: of the notes of a training's starts
    (medray.train.restart_log) those that made steps; of others, which show it by being there, 0.
    """
    found = []
    for path in sorted(folder.glob(pattern)):
        if path.parent.name == "starts":
            with contextlib.suppress(ValueError):  # it is being written
                note = json.loads(path.read_text())
                found += [note["workers"]] if note["step"] > note["from_step"] else []
        else:
            found.append(0)
    return found


def wait_for(shown: Callable[[], Any], job: subprocess.Popen, log: Path) -> None:
    """Raises SystemExit where the job ends before."""
    while not shown():
        if job.poll() is not None:
            raise SystemExit(f"the job ended early:\n{log.read_text()[-3000:]}")
        time.sleep(0.2)


def disturb(
    cluster: FakeCluster, run: Path, job: subprocess.Popen, log: Path, checkpoint_every: int
) -> tuple[subprocess.Popen, list[dict[str, Any]]]:
    """Kill what the docstring says, each when its stage has got somewhere; returns the job that goes on,
    and what was killed.
    """
    killed = []
    for stage, pattern, group in PLAN:
        so_far = partial(progress, run / "stages" / stage, pattern)
        wait_for(so_far, job, log)
        if group is None:
            job.kill()
            job.wait()
            killed.append({"stage": stage, "killed": "driver"})
            job = start_job(cluster, run, log, checkpoint_every)
        elif group == "train":
            most = GROUPS[group][1]
            wait_for(lambda so_far=so_far, most=most: so_far()[-1] == most, job, log)
            before = len(so_far())
            with cluster.without_capacity(group):
                killed.append({"stage": stage, "killed": "train node", "id": cluster.kill_node(group)[-5:]})
                wait_for(lambda so_far=so_far, before=before: len(so_far()) > before, job, log)
        else:
            killed.append({"stage": stage, "killed": f"{group} node", "id": cluster.kill_node(group)[-5:]})
        print(json.dumps(killed[-1]), flush=True)
    return job, killed


def ids(run: Path, *parts: str) -> Counter[str]:
    return Counter(
        pyarrow.dataset.dataset(str(run.joinpath("stages", *parts)), format="parquet")
        .to_table(columns=["sample_id"])["sample_id"]
        .to_pylist()
    )


def exactly_once(run: Path) -> dict[str, int]:
    """Rows by stage. Raises SystemExit where an id is missing or twice."""
    images = ids(run, "00-data", "images")
    pairs = ids(run, "13-pairs", "rows")
    for stage, wanted in (("11-self_play", images), ("12-judge", images), ("14-reference", pairs)):
        found = ids(run, stage, "rows")
        if found != wanted or set(found.values()) - {1}:
            raise SystemExit(
                f"{stage}: {sum(found.values())} rows of {len(found)} ids, wanted {len(wanted)} once each"
            )
    config = yaml.safe_load((run / "config.yaml").read_text())
    for stage, section, rows in (
        ("01-sq_sft", "sft", ids(run, "00-data", "conversations")),
        ("15-dpo", "dpo", pairs),
    ):
        counts, epochs = counts_of(run, stage), config[section]["epochs"]
        if (counts["trained"], counts["samples"]) != (len(rows), epochs * len(rows)):
            raise SystemExit(f"{stage}: {counts}, wanted {len(rows)} rows in {epochs} epochs")
    return {"images": len(images), "pairs": len(pairs)}


def grew_back(workers: list[int]) -> bool:
    """Whether a training had all its workers, then fewer, then all again."""
    most = max(workers)
    return any(
        fewer < most and most in workers[:place] and most in workers[place:]
        for place, fewer in enumerate(workers)
    )


def counts_of(run: Path, stage: str) -> dict[str, Any]:
    return json.loads((run / "stages" / stage / "manifest.json").read_text())["outputs"]["counts"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", help="of the cluster and the run (default: a temporary one)")
    parser.add_argument(
        "--checkpoint-every",
        type=int,
        default=20,
        help="optimiser steps between checkpoints of both trainings (default: 20; Ray Train takes note of "
        "one every two seconds)",
    )
    parser.add_argument("--calm", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = Path(options.folder or tempfile.mkdtemp(prefix="medray-elastic-")).resolve()
    run, log = folder / "run", folder / "job.log"
    began, killed = time.monotonic(), []
    with FakeCluster(folder / "cluster", GROUPS) as cluster:
        watch = Watch(cluster)
        watch.start()
        job = start_job(cluster, run, log, options.checkpoint_every)
        if not options.calm:
            job, killed = disturb(cluster, run, job, log, options.checkpoint_every)
        if job.wait():
            raise SystemExit(f"the job failed:\n{log.read_text()[-4000:]}")
        seconds = time.monotonic() - began
        time.sleep(30)  # three times what a node may idle
        watch.over.set()
        left = {group: len(nodes) for group, nodes in cluster.nodes().items()}
    cost = {
        stage: {name: count for name, count in counts_of(run, stage).items() if name in TOLD}
        for stage in ("01-sq_sft", "11-self_play", "12-judge", "15-dpo")
    }
    print(
        json.dumps(
            {
                "benchmark": "elasticity",
                "calm": options.calm,
                "seconds": round(seconds),
                "checkpoint_every": options.checkpoint_every,
                "killed": killed,
                "rows": exactly_once(run),
                "cost": cost,
                "nodes": watch.seen,
                "nodes_left": left,
            }
        )
    )
    workers = list(cost["01-sq_sft"].get("workers", {}).values())
    if not options.calm and not (workers and grew_back(workers)):
        raise SystemExit(
            f"01-sq_sft: the training did not shrink and grow back; workers at its starts: {workers}"
        )


if __name__ == "__main__":
    main()
