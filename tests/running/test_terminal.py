"""What workers write to their standard error reaches the terminal without tracebacks."""

import logging

import pytest

from medray.running import run_log
from medray.running.terminal import WorkerLines

CREATION = """\
Exception raised in creation task: The actor died because of an error raised in its creation task, \
\x1b[36mray::MapWorker(Play).__init__()\x1b[39m (pid=7)
           ^^^^^^^^^^^^
  File "/x/vllm/v1/engine/async_llm.py", line 256, in from_engine_args
    return cls(
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': -9}

The above exception was the direct cause of the following exception:

\x1b[36mray::MapWorker(Play).__init__()\x1b[39m (pid=7, ip=127.0.0.1, actor_id=0c)
  File "/x/ray/data/map_transformer.py", line 9, in init
    self._init_fn()
RuntimeError: Engine core initialization failed."""
VLLM = """\
(EngineCore pid=12) ERROR 12-01 13:00:00 [core.py:1] Traceback (most recent call last):
(EngineCore pid=12) ERROR 12-01 13:00:00 [core.py:1]   File "/x/core.py", line 3, in run
(EngineCore pid=12) ERROR 12-01 13:00:00 [core.py:1]     step()
(EngineCore pid=12) ERROR 12-01 13:00:00 [core.py:1] ValueError: no token"""
RETRY = """\
Task f failed. There are 2 retries remaining, so the task will be retried. \
Error: Traceback (most recent call last):
  File "/x/f.py", line 3, in f
ray.exceptions.ActorDiedError: it died"""
THREAD = """\
Exception in thread Monitor:
Traceback (most recent call last):
  File "/usr/lib/threading.py", line 1, in run
KeyError: 1"""


@pytest.mark.parametrize("trace", [CREATION, VLLM, RETRY, THREAD])
@pytest.mark.parametrize("batch", [1, 3, 100])
def test_tracebacks_go_into_the_runs_log(monkeypatch, trace, batch):
    """However Ray divides the lines; those before and after, and those of other processes meanwhile, are
    shown.
    """
    kept, shown = [], []
    log = logging.Handler()
    log.emit = lambda record: kept.append(record.getMessage())
    monkeypatch.setattr(run_log, "_open", [log])
    lines = WorkerLines(lambda data: shown.extend(data["lines"]))
    written = ["loading", "  2 shards", *trace.split("\n"), "loading again"]
    for start in range(0, len(written), batch):
        lines({"ip": "a", "pid": 7, "is_err": True, "lines": written[start : start + batch]})
        lines({"ip": "a", "pid": 8, "is_err": True, "lines": ["  of another"]})
    assert [line for line in shown if line != "  of another"] == ["loading", "  2 shards", "loading again"]
    assert "\n".join(kept) == trace


def test_tracebacks_are_shown_where_no_run_has_a_log(monkeypatch):
    monkeypatch.setattr(run_log, "_open", [])
    shown = []
    WorkerLines(lambda data: shown.extend(data["lines"]))(
        {"pid": 7, "lines": ["loading", *THREAD.split("\n")]}
    )
    assert shown == ["loading", *THREAD.split("\n")]


@pytest.mark.parametrize(
    "line",
    [
        "Progress bars disabled. To enable, set `ray.data.DataContext...`.",
        "\x1b[36mSetting up process group for: env:// [rank=0, world_size=1]",
        "Started training worker group of size 1: ",
        "- (ip=127.0.0.1, pid=7) world_rank=0, local_rank=0, node_rank=0",
        "WARNING 12-01 13:00:00 [cpu.py:1] NUMA nodes cannot be read",
    ],
)
def test_housekeeping_goes_into_the_runs_log(monkeypatch, line):
    kept, shown = [], []
    log = logging.Handler()
    log.emit = lambda record: kept.append(record.getMessage())
    monkeypatch.setattr(run_log, "_open", [log])
    progress = "step 11, epoch 0, 176 of 1768 samples, loss 0.7376, 7.6 samples/s"
    WorkerLines(lambda data: shown.extend(data["lines"]))({"pid": 7, "lines": [line, progress]})
    assert (shown, kept) == ([progress], [line])
