"""The whole job on the bundled tiny base model: every stage for real, in its own process, as a user runs
it.
"""

import json
import os
import random
import signal
import time
from collections import Counter

import pytest
import yaml

from tests.support.jobs import Job, check_ready_to_serve, manifest, metrics, rows, summary_of

# One fixture does the work of the module: several starts of the whole job.
pytestmark = [pytest.mark.whole_job, pytest.mark.timeout(1800)]

SMALL = [
    "data.testbed_rows=240",
    "data.label_fraction=0.3",
    "data.max_unlabelled=24",
    "data.turns=3",
    "sft.epochs=1",
    "sft.eval_rows=8",
    "self_play.questions=2",
    "judge.min_margin=0",
    "evaluate.max_images=6",
    "evaluate.bootstrap=100",
    "verify.rows=2",
    "verify.max_tokens=6",
    "engine.rows_per_task=8",
    "dpo.sft_weight=0",  # the paper's loss, whose first value is known
]


# Exports are verified, and what only tuning made is evaluated, in test_submit.py.
JOB = Job("self_train", [*SMALL, "verify.rows=0", "evaluate.arms=[base, dpo]"])

# Every kind of stage, in order, each with about how many seconds it takes: a kill falls somewhere in between.
# A start of the job takes half a minute, so they are killed where MEDRAY_KILL_ALL is set; else one, when some
# of its rows are there.
STAGES = {
    "00-data": 8,
    "01-sq_sft": 40,
    "11-self_play": 30,
    "12-judge": 20,
    "13-pairs": 0.2,
    "14-reference": 15,
    "15-dpo": 30,
    "90-evaluate-base": 20,
}
KILLED = list(STAGES) if os.environ.get("MEDRAY_KILL_ALL") else ["11-self_play"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run whose driver was killed (SIGKILL) in each stage of KILLED, then run to its end."""
    run = tmp_path_factory.mktemp("job") / "run"
    rng = random.Random(0)
    if len(KILLED) == 1:
        JOB.kill_in(run, *KILLED, 0, begun="committed/*")
    else:
        for stage in KILLED:
            JOB.kill_in(run, stage, rng.uniform(0, STAGES[stage]))
    return run, JOB.run(run)


def test_summary_line(finished):
    run, done = finished
    summary = summary_of(done)
    assert {"run", "base", "tuned", "pairs", "seconds", "report", "model"} <= set(summary)
    assert summary["run"] == str(run)
    check_ready_to_serve(run, summary["model"])
    assert summary["pairs"] == len(rows(run, "13-pairs", "rows", columns=["sample_id"])) > 0


def test_killed_driver_leaves_each_generated_and_judged_id_exactly_once(finished):
    run, done = finished
    assert "stage 01-sq_sft: cached" in done.stderr
    attempts = {
        path.parent.name: json.loads(path.read_text())["attempts"]
        for path in run.glob("stages/*/manifest.json")
    }
    # the others were over
    assert sum(attempts[stage] > 1 for stage in KILLED) >= (len(KILLED) + 1) // 2, attempts
    images = Counter(row["sample_id"] for row in rows(run, "00-data", "images", columns=["sample_id"]))
    for stage in ("11-self_play", "12-judge"):
        assert Counter(row["sample_id"] for row in rows(run, stage, "rows", columns=["sample_id"])) == images
    pairs = Counter(row["sample_id"] for row in rows(run, "13-pairs", "rows", columns=["sample_id"]))
    assert (
        Counter(row["sample_id"] for row in rows(run, "14-reference", "rows", columns=["sample_id"])) == pairs
    )
    assert set(pairs.values()) == {1}


def test_each_row_was_trained_once_per_epoch(finished):
    run, _ = finished
    config = yaml.safe_load((run / "config.yaml").read_text())
    for stage, section, source in (
        ("01-sq_sft", "sft", ("00-data", "conversations")),
        ("15-dpo", "dpo", ("14-reference", "rows")),
    ):
        counts = manifest(run, stage)["outputs"]["counts"]
        ids = len(rows(run, *source, columns=["sample_id"]))
        assert counts["trained"] == ids
        assert counts["samples"] == ids * config[section]["epochs"]
        assert counts["quarantined"] == 0


def test_reference_columns_are_log_probabilities(finished):
    run, _ = finished
    for row in rows(
        run, "14-reference", "rows", columns=["ref_chosen_logp", "ref_rejected_logp", "chosen", "rejected"]
    ):
        assert row["ref_chosen_logp"] < 0
        assert row["ref_rejected_logp"] < 0
        assert row["chosen"] != row["rejected"]


def test_first_dpo_step_starts_at_the_reference(finished):
    """Before the first update the policy is the reference: rewards are zero and the loss is ln 2, up to
    dropout (none here).
    """
    run, _ = finished
    first = metrics(run, "15-dpo")[0]
    assert first["loss"] == pytest.approx(0.6931, abs=2e-3)
    assert first["rewards/margin"] == pytest.approx(0, abs=5e-3)


def test_report_opens_offline_and_shows_what_it_must(finished):
    run, _ = finished
    page = (run / "report.html").read_text()
    for heading in (
        "Held-out accuracy",
        "By attribute",
        "Training",
        "Preference pairs",
        "Questions the model asked itself",
        "Rows: kept",
        "Time",
    ):
        assert heading in page
    assert "data:image/jpeg;base64" in page
    assert page.count("<svg") >= 5
    assert "<script src" not in page
    assert '<link rel="stylesheet"' not in page
    results = json.loads((run / "results.json").read_text())
    assert set(results["accuracy"]) == {"base", "dpo-1"}
    assert all(score["low"] <= score["value"] <= score["high"] for score in results["accuracy"].values())
    assert (run / "tensorboard").is_dir()


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "job stop"])
def test_interrupted_job_says_how_to_go_on(tmp_path, end):
    job = JOB.start(tmp_path / "run", tmp_path / "log")
    while job.poll() is None and not (tmp_path / "run" / "stages" / "00-data" / "inputs.json").exists():
        time.sleep(0.05)
    job.send_signal(end)
    assert job.wait(timeout=300) == 130
    assert (
        f"interrupted; rerun the same command with --run {tmp_path / 'run'} to resume"
        in (tmp_path / "log").read_text()
    )


def test_same_command_again_does_nothing(finished):
    run, _ = finished
    again = JOB.run(run)
    assert ": started" not in again.stderr
