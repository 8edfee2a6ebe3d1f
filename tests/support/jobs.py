"""Whole jobs as a user runs them: their command in a process of its own, killed on the way, gone on with;
and what they leave.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.dataset

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"RAY_ADDRESS": "", "RAY_DEDUP_LOGS": "0", "PYTHONUNBUFFERED": "1"}


class Job:
    """A script of jobs/ with overrides of its configuration."""

    def __init__(self, script, overrides):
        self.script, self.overrides = script, overrides

    def command(self, run, *overrides):
        sets = [part for override in (*self.overrides, *overrides) for part in ("--set", override)]
        return [sys.executable, f"jobs/{self.script}.py", "--run", str(run), *sets]

    def start(self, run, log):
        """The job in a session of its own; what it says goes into the file `log`."""
        with log.open("w") as handle:
            return subprocess.Popen(
                self.command(run),
                cwd=ROOT,
                env={**os.environ, **ENVIRONMENT},
                stdout=handle,
                stderr=handle,
                start_new_session=True,
            )

    def kill_in(self, run, stage, seconds, begun="inputs.json"):
        """Start the job, SIGKILL its driver `seconds` after the stage's folder holds what the pattern
        `begun` says (or when the stage is over).
        """
        log = run.parent / f"{stage}.log"
        job, folder = self.start(run, log), run / "stages" / stage
        # those will be undone
        while job.poll() is None and all(
            path.name.endswith(".pending.parquet") for path in folder.glob(begun)
        ):
            time.sleep(0.05)
        until = time.monotonic() + seconds
        while job.poll() is None and time.monotonic() < until and not (folder / "manifest.json").exists():
            time.sleep(0.05)
        assert job.poll() is None, log.read_text()[-6000:]
        job.kill()
        job.wait()

    def run(self, run, *overrides):
        """The job to its end; the finished process with its output as text."""
        done = subprocess.run(
            self.command(run, *overrides),
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-6000:]
        return done


def summary_of(done):
    """The JSON line that ends a job's stdout."""
    return json.loads(done.stdout.strip().splitlines()[-1])


def manifest(run, stage):
    return json.loads((run / "stages" / stage / "manifest.json").read_text())


def rows(run, *parts, columns=None):
    """Rows of Parquet shards in a stage's folder."""
    return (
        pyarrow.dataset.dataset(str(Path(run, "stages", *parts)), format="parquet")
        .to_table(columns=columns)
        .to_pylist()
    )


def metrics(run, stage):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == stage]


def check_ready_to_serve(run, model):
    """The run's models are found by its models.json, the tuned one with its card."""
    from huggingface_hub import ModelCard

    from medray.config import ServeConfig
    from medray.models.published import NOT_A_DEVICE
    from medray.serving.chat.examples import examples_of
    from medray.serving.chat.served_models import hosted

    config = ServeConfig(run=str(run))
    tuned, base = hosted(config)
    assert (tuned.name, base.name, tuned.path) == ("tuned", "base", model)
    assert Path(base.path, "config.json").is_file()
    card = ModelCard.load(Path(model, "README.md"))
    assert NOT_A_DEVICE in card.text
    assert card.data.eval_results
    assert re.search(r"## Data\n(.*\n)+- 00-data: .*\d", card.text)
    assert re.search(r"\d\.\d+ \[\d\.\d+, \d\.\d+\]", card.text), "an interval"
    assert "## Limits" in card.text and "```yaml\nmodel:" in card.text
    assert all(
        example["image"].startswith("data:image/png") and example["question"]
        for example in examples_of(config)
    )
