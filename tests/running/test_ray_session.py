"""How a job starts or joins Ray."""

import json
import os
import subprocess
import sys

import pytest
from ray._private.worker import _merge_runtime_env

from medray.running.ray_session import _not_of_the_job

VARIABLES = {"RAY_TRAIN_V2_ENABLED": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


@pytest.mark.parametrize("given", [{}, {"OPENAI_API_KEY": "sk"}, VARIABLES, {"RAY_TRAIN_V2_ENABLED": "0"}])
def test_variables_that_the_job_was_submitted_with_are_left_to_it(monkeypatch, given):
    """Ray itself refuses to start where both name one."""
    submitted = {"working_dir": ".", "env_vars": given}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": submitted}))
    merged = _merge_runtime_env(submitted, {"env_vars": _not_of_the_job(VARIABLES)})
    assert merged["env_vars"] == VARIABLES | given


@pytest.mark.parametrize(
    "config", [None, "{}", '{"runtime_env": {}}', '{"runtime_env": {"working_dir": "."}}']
)
def test_a_job_without_variables(monkeypatch, config):
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    if config is not None:
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", config)
    assert _not_of_the_job(VARIABLES) == VARIABLES


SESSION = """
import json, os, ray
from medray.config import ClusterConfig
from medray.running.ray_session import ray_session

@ray.remote
def worker():
    import logging
    return {
        "level": logging.getLogger("ray.data._internal").level,
        "train": os.environ["RAY_TRAIN_V2_ENABLED"],
        "watcher": os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"],
        "runtime_env": dict(ray.get_runtime_context().runtime_env),
    }

with ray_session(ClusterConfig(num_cpus=1)):
    found = ray.get(worker.remote())
names = ("TOKENIZERS_PARALLELISM", "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR")
print(json.dumps({**found, "kept": {name: os.environ.get(name) for name in names}}))
"""


def test_workers_of_its_own_ray_are_quiet_and_start_by_one_interpreter():
    """With a runtime environment Ray starts each of them by way of a second one."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RAY_ADDRESS", "TOKENIZERS_PARALLELISM")
    }
    done = subprocess.run(
        [sys.executable, "-c", SESSION], env=environment, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["level"] == 30, "WARNING"
    assert (found["train"], found["watcher"]) == ("1", "0")
    assert found["runtime_env"] == {}
    assert not any(found["kept"].values()), "this process's environment is as it was"


DYING = """
import os, signal, sys, traceback
from pathlib import Path
import ray
from medray.config import ClusterConfig
from medray.commands.command_line import run_job
from medray.running.ray_session import ray_session
from medray.running.run import Run
from medray.running.run_hold import held

RUN, CASE = sys.argv[1:]

class Engine:
    def __call__(self, batch):
        if CASE == "raises":
            raise ValueError("no token")
        died = Path(RUN, "died")
        if not died.exists():
            died.touch()
            try:
                raise ValueError("no token")
            except ValueError:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(1) if CASE == "exits" else os.kill(os.getpid(), signal.SIGKILL)
        return batch

def work():
    run = Run(RUN)
    with held(run), ray_session(ClusterConfig(num_cpus=2)):
        pool = ray.data.ActorPoolStrategy(size=1)
        rows = ray.data.range(40, override_num_blocks=10)
        rows = rows.map_batches(Engine, batch_size=4, compute=pool, max_restarts=2, max_task_retries=2)
        return {"rows": rows.materialize().count()}

sys.exit(run_job(work, f"--run {RUN}"))
"""


@pytest.mark.ray
@pytest.mark.parametrize("case", ["exits", "killed", "raises"])
def test_tracebacks_of_ray_are_in_the_runs_log_alone(tmp_path, case):
    """An actor of Ray Data dies once and the job goes on, or raises and the job fails in one line."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-c", DYING, str(tmp_path / "run"), case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    log = (tmp_path / "run/logs/job-0001.log").read_text()
    assert "Traceback" not in done.stderr and "stack trace" not in done.stderr and 'File "' not in done.stderr
    if case == "raises":
        assert done.returncode == 1 and "failed: ValueError: no token" in done.stderr
        assert "Full stack trace" in log and "Traceback" in log and "no token" in log
    else:
        assert (done.returncode, json.loads(done.stdout.splitlines()[-1])) == (0, {"rows": 40})
        assert "Traceback" in log and "no token" in log
