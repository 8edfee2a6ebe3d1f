"""Whole trainings with the real Ray Train, Ray Data and DeepSpeed on the tiny model."""

import json
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from medray.config import DataConfig
from medray.data.collate import Encoder
from medray.errors import ConfigError, StageError
from medray.models.vlm import load_vlm
from medray.train.epoch_progress import done_rows
from medray.train.worker import check_trained, export_merged, run_training
from tests.support.encoded_rows import DPO, MODEL, SFT, conversations, preferences
from tests.support.processes import kill_one
from tests.support.prometheus import told

pytestmark = [pytest.mark.whole_job, pytest.mark.ray]


def dataset(path, kind, rows):
    import ray

    arguments = {
        "model_path": path,
        "model_config": MODEL.model_dump(),
        "data_config": DataConfig().model_dump(),
        "kind": kind,
    }
    return ray.data.from_items(rows, override_num_blocks=3).map_batches(
        Encoder, fn_constructor_kwargs=arguments, batch_size=8, batch_format="pyarrow", num_cpus=0.5
    )


def done_ids(folder):
    return [sample_id for batch in done_rows(folder) for sample_id in batch["sample_id"].to_pylist()]


def metrics_of(result):
    return [json.loads(line) for line in result.metrics.splitlines()]


@pytest.fixture(scope="module")
def one_and_two_workers(ray_cluster, tiny_llava, tmp_path_factory):
    """The same two global batches of pairs, once on one worker and once on two (ZeRO-2)."""
    results = {}
    rows = preferences(7)  # an odd number: the workers' shares differ
    for workers, accumulation in ((1, 4), (2, 2)):
        config = DPO.model_copy(
            update={
                "num_workers": workers,
                "accumulation": accumulation,
                "epochs": 2,
                "micro_batch": 2,
                "checkpoint_every": 1,
            }
        )
        results[workers] = run_training(
            str(tmp_path_factory.mktemp(f"workers{workers}")),
            dataset(tiny_llava, "dpo", rows),
            None,
            len(rows),
            tiny_llava,
            MODEL,
            config,
            "dpo",
        )
    return results


def test_two_workers_train_what_one_does(one_and_two_workers):
    """Same global batches, same parameters: neither sharding nor unequal shares change the result."""
    states = {}
    for workers, result in one_and_two_workers.items():
        assert result.counts == {"steps": 2, "samples": 14, "trained": 7, "quarantined": 0}
        with result.checkpoint.as_directory() as folder:
            states[workers] = load_file(Path(folder, "state.safetensors"))
            assert sorted(done_ids(folder)) == [f"p{i:03d}" for i in range(7)]
    for name, value in states[1].items():
        torch.testing.assert_close(
            states[2][name], value, rtol=2e-3, atol=5e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    for one, two in zip(*map(metrics_of, one_and_two_workers.values()), strict=True):
        for key in ("loss", "grad_norm", "rewards/margin", "logps/chosen", "tokens/rejected"):
            assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-4), key
        assert two["samples"] == one["samples"] == 7


def test_prometheus_is_told_by_the_first_worker(ray_cluster, one_and_two_workers):
    assert told(ray_cluster, "ray_medray_train_samples_total", objective="dpo").count(14.0) >= 2
    seconds, waited = (
        sorted(told(ray_cluster, f"ray_medray_train_{name}_total", objective="dpo"))
        for name in ("seconds", "data_seconds")
    )
    assert all(0 < part < whole for part, whole in zip(waited, seconds, strict=True))


def test_export_is_a_plain_model_with_the_trained_weights(one_and_two_workers, tiny_llava, tmp_path):
    export_merged(one_and_two_workers[1].checkpoint, tiny_llava, tmp_path / "model", MODEL, DPO)
    tuned, base = (load_vlm(str(path), "fp32").state_dict() for path in (tmp_path / "model", tiny_llava))
    assert tuned.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert any("q_proj" in name and "language_model" in name for name in changed)
    assert any("q_proj" in name and "vision_tower" in name for name in changed)
    assert any("multi_modal_projector" in name for name in changed)
    assert not any("embed" in name or "norm" in name or "lm_head" in name for name in changed)


@pytest.mark.faults
def test_killed_worker_costs_no_sample_and_repeats_none(ray_cluster, tiny_llava, tmp_path):
    """kill -9 of a training worker mid-epoch: in the history that survives, each id is trained exactly once
    per epoch.

    The pool is elastic, and a bad row is set aside and counted.
    """
    rows = conversations(41, bad=(3,))
    config = SFT.model_copy(
        update={
            "num_workers": (1, 2),
            "micro_batch": 1,
            "accumulation": 1,
            "epochs": 2,
            "checkpoint_every": 3,
            "keep_checkpoints": None,
            "max_failures": 2,
            "shuffle_buffer": 8,
        }
    )  # smaller than the data: streamed anew each epoch
    killed = []

    def kill():
        # After the first checkpoint, well before the first epoch's end (20 steps).
        while not list(Path(tmp_path, "training").glob("checkpoint_*/progress.json")):
            time.sleep(0.05)
        killed.append(kill_one("RayTrainWorker"))

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    result = run_training(
        str(tmp_path),
        dataset(tiny_llava, "sft", rows),
        dataset(tiny_llava, "sft", conversations(3)),
        len(rows),
        tiny_llava,
        MODEL,
        config,
    )
    assert killed
    cost = {
        name: result.counts[name]
        for name in (
            "restarts",
            "steps done again",
            "samples done again",
            "seconds between starts",
            "workers",
        )
    }
    assert {name: count for name, count in result.counts.items() if name not in cost} == {
        "steps": 40,
        "samples": 80,
        "trained": 40,
        "quarantined": 1,
    }
    assert (
        cost["restarts"] >= 1
        and cost["seconds between starts"] > 0
        and cost["samples done again"] == 2 * cost["steps done again"]
    )
    assert list(result.quarantine) == ["s003"]
    ends = {}
    for file in Path(tmp_path, "training").glob("checkpoint_*/progress.json"):
        progress = json.loads(file.read_text())
        if progress["finished"]:
            ends[progress["epoch"]] = Counter(done_ids(file.parent))
    assert ends == {epoch: Counter(row["sample_id"] for row in rows) for epoch in (0, 1)}
    lines = metrics_of(result)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 41))
    assert all(line["samples"] == 2 for line in lines if "loss" in line)
    assert [line["epoch"] for line in lines if "eval_loss" in line] == [0, 1]


def test_a_training_resumes_after_a_full_disk(ray_cluster, tiny_llava, tmp_path, caplog):
    """Ray Train's list is empty, the newest checkpoint is cut, an upload died and a killed worker left
    its scratch: the training resumes from the checkpoint before, and every id of the epoch is trained
    once.
    """
    rows = conversations(12)
    config = SFT.model_copy(
        update={
            "num_workers": 1,
            "micro_batch": 1,
            "accumulation": 2,
            "epochs": 1,
            "checkpoint_every": 2,
            "keep_checkpoints": 2,
        }
    )

    def train():
        return run_training(
            str(tmp_path), dataset(tiny_llava, "sft", rows), None, len(rows), tiny_llava, MODEL, config
        )

    first = train()
    assert first.counts["steps"] == 6 and not (tmp_path / "scratch").exists()
    before, last = sorted(path for path in Path(tmp_path, "training").glob("checkpoint_*") if path.is_dir())[
        -2:
    ]
    (tmp_path / "training/checkpoint_manager_snapshot.json").write_bytes(b"")
    state = last / "state.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    died = tmp_path / "training/checkpoint_2999-01-01_00-00-00.000000"
    died.mkdir()
    (died / "state.safetensors").write_bytes(b"half")
    (tmp_path / "scratch/checkpoint-killed").mkdir(parents=True)
    steps = json.loads((before / "progress.json").read_text())["steps"]
    with caplog.at_level("WARNING"):
        again = train()
    assert (
        f"{last.name}: state.safetensors has 1000 bytes" in caplog.text
        and f"resuming from step {steps}" in caplog.text
    )
    assert again.counts["trained"] == 12 and again.counts["steps"] == 6
    assert again.counts["steps done again"] == 6 - steps
    with again.checkpoint.as_directory() as folder:
        assert sorted(done_ids(folder)) == sorted(row["sample_id"] for row in rows)
    assert not died.exists() and not (tmp_path / "scratch").exists()
    assert not list(Path(tempfile.gettempdir()).glob("medray-checkpoint-*"))


def test_wrong_config_for_the_objective(tmp_path):
    with pytest.raises(ConfigError, match="DpoConfig"):
        run_training(str(tmp_path), None, None, 1, "nowhere", MODEL, SFT, "dpo")


def test_too_many_rows_set_aside_end_a_training_early_and_a_higher_limit_resumes_it(
    ray_cluster, tiny_llava, tmp_path
):
    """Two of ten rows: after one of two epochs the training ends; with a limit that allows them it goes
    on from there.
    """
    rows = conversations(10, bad=(3, 4))
    config = SFT.model_copy(update={"micro_batch": 4, "accumulation": 1, "epochs": 2})

    def train(limit):
        return run_training(
            str(tmp_path),
            dataset(tiny_llava, "sft", rows),
            None,
            len(rows),
            tiny_llava,
            MODEL,
            config,
            max_quarantined=limit,
        )

    stopped = train(0.05)
    assert (stopped.counts["steps"], stopped.counts["trained"], stopped.counts["quarantined"]) == (2, 8, 2)
    with pytest.raises(StageError, match=r"2 of 10 rows were set aside \(20 %\)"):
        check_trained(stopped, 0.05)
    resumed = train(0.2)
    check_trained(resumed, 0.2)
    assert (resumed.counts["steps"], resumed.counts["samples"]) == (4, 16)
    assert [line["step"] for line in metrics_of(resumed)] == [1, 2, 3, 4]
