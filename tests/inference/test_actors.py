"""Engines in Ray Data actors: what survives when processes are killed."""

import os
import signal
import threading
import time

import psutil
import pyarrow
import pyarrow.parquet
import pytest

from medray.config import EngineConfig, SamplingConfig
from medray.inference.orphan_guard import OWNER_ENV
from medray.running.actor_pools import map_options
from medray.storage.resumable import write_resumable
from tests.support.prometheus import told

pytestmark = [
    pytest.mark.whole_job,
    pytest.mark.ray,
    pytest.mark.vllm,
    pytest.mark.faults,
    pytest.mark.timeout(1200),
]


def engines(model, but=()):
    """vLLM engine processes of this model's actors, as {pid: owner's pid}."""
    found = {}
    for process in psutil.process_iter(["name"]):
        try:
            if (
                process.info["name"].startswith("VLLM::")
                and process.environ().get("MEDRAY_TEST_RUN") == model
            ):
                found[process.pid] = int(process.environ()[OWNER_ENV])
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return {pid: owner for pid, owner in found.items() if pid not in but}


def busy_engine(model, marks, but=(), seconds=500):
    """The next engine that works on rows, as (its pid, its actor's pid)."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        working = {int(path.name) for path in marks.iterdir()}
        for pid, owner in engines(model, but).items():
            if owner in working:
                time.sleep(1)  # into the batch
                return pid, owner
        time.sleep(0.1)
    raise AssertionError("no engine got to work")


def gone(pid, seconds=120):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.1)
    return False


def test_rows_are_redone_once_after_the_actor_and_then_the_engine_are_killed(
    ray_cluster, talker, sections, play_config, png, tmp_path
):
    from medray.methods.self_train.self_play import SelfPlay

    marks = tmp_path / "marks"
    marks.mkdir()

    class Marked(SelfPlay):
        async def row(self, row):
            (marks / str(os.getpid())).touch()
            return await super().row(row)

    long = SamplingConfig(max_tokens=100)
    config = play_config.model_copy(
        update={"ask": SamplingConfig(max_tokens=20), "answer": long, "questions": 4}
    )
    engine = EngineConfig.model_validate(
        {**sections["engine_config"].model_dump(), "rows_per_task": 15, "rows_in_flight": 16}
    )
    rows = [{"sample_id": f"s{number}", "image": png(number)} for number in range(60)]
    kwargs = {"model": talker, **sections, "engine_config": engine, "config": config}
    source, out = tmp_path / "rows", tmp_path / "out"
    source.mkdir()
    for part in range(4):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[part::4]), source / f"{part}.parquet")

    def stage(dataset):
        return dataset.map_batches(
            Marked,
            fn_constructor_kwargs=kwargs,
            **map_options(engine),
            runtime_env={"env_vars": {"MEDRAY_TEST_RUN": talker}},
        )

    written, failures = [], []

    def work():
        try:
            written.append(
                write_resumable(
                    str(source), str(out), str(tmp_path / "checkpoint"), stage, engine.rows_per_task
                )
            )
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    engine_pid, actor_pid = busy_engine(talker, marks)
    os.kill(actor_pid, signal.SIGKILL)
    assert gone(engine_pid), "the engine outlived its actor"

    second_pid, second_actor = busy_engine(talker, marks, but={engine_pid})
    assert second_actor != actor_pid
    os.kill(second_pid, signal.SIGKILL)
    thread.join(600)
    assert not thread.is_alive() and not failures

    found = pyarrow.parquet.read_table(out).to_pylist()
    assert sorted(row["sample_id"] for row in found) == sorted(row["sample_id"] for row in rows)
    assert all(row["error"] is None for row in found)
    assert written[0].rows == 60 and 2 <= written[0].again["rows done again"] <= 60, (
        "each of the two had a batch in work, or two"
    )
    assert len(list(marks.iterdir())) == 3
    # The third engine came after both; it ends with the dataset's actors.
    assert all(gone(pid) for pid in engines(talker))
    # It told what it worked on: the two before it may have been killed between two reports.
    assert 0 < max(told(ray_cluster, "ray_medray_rows_total", stage="self_play", outcome="done")) <= 60
    assert max(told(ray_cluster, "ray_medray_generated_tokens_total", stage="self_play")) > 0
