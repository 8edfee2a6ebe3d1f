"""The whole job on the bundled tiny base model: every stage for real, in its own process, as a user runs
it, killed once.
"""

import json
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from medray.data.attribute_descriptions import WBCATT, leaks_description
from medray.models.bundled import model_path
from medray.models.proxy_instruction import PLACEHOLDER, ProxyInstruction
from medray.models.vlm import part_of
from tests.support.jobs import Job, check_ready_to_serve, manifest, metrics, rows, summary_of

pytestmark = [
    pytest.mark.whole_job,
    pytest.mark.ray,
    pytest.mark.vllm,
    pytest.mark.faults,
    pytest.mark.timeout(1200),
]

SMALL = [
    "data.testbed_rows=120",
    "warm_up.eval_rows=4",
    "tune.eval_rows=4",
    "tune.epochs=2",
    "evaluate.max_images=3",
    "evaluate.max_general=2",
    "evaluate.bootstrap=100",
    "verify.rows=2",
    "verify.max_tokens=6",
    "engine.rows_per_task=8",
]


JOB = Job("instruction_free", SMALL)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run whose driver was killed (SIGKILL) between the warm-up and the tuning, then run to its end."""
    run = tmp_path_factory.mktemp("job") / "run"
    job = JOB.start(run, run.parent / "killed.log")
    while job.poll() is None and not (run / "stages/01-warm_up/manifest.json").exists():
        time.sleep(0.05)
    assert job.poll() is None, (run.parent / "killed.log").read_text()[-6000:]
    job.kill()
    job.wait()
    return run, JOB.run(run)


def test_summary_line_and_resume(finished):
    run, done = finished
    summary = summary_of(done)
    assert {"run", "base", "tuned", "floors", "seconds", "report", "model", "proxy"} <= set(summary)
    assert (
        summary["tuned"]["strict"]["low"]
        <= summary["tuned"]["strict"]["value"]
        <= summary["tuned"]["strict"]["high"]
    )
    assert summary["run"] == str(run)
    check_ready_to_serve(run, summary["model"])
    assert "stage 01-warm_up: cached" in done.stderr
    assert "floors  chance 0." in done.stderr


def test_each_description_was_trained_once_per_epoch(finished):
    run, _ = finished
    ids = [row["sample_id"] for row in rows(run, "00-data/descriptions", columns=["sample_id"])]
    assert len(ids) == len(set(ids)) == 108
    for stage, epochs in (("01-warm_up", 1), ("02-tune", 2)):
        counts = manifest(run, stage)["outputs"]["counts"]
        assert (counts["trained"], counts["samples"], counts["quarantined"]) == (108, 108 * epochs, 0)


def test_the_tuning_begins_at_the_warm_ups_proxy(finished):
    run, _ = finished
    warm, tuned = (
        ProxyInstruction.load(manifest(run, stage)["outputs"]["proxy"]) for stage in ("01-warm_up", "02-tune")
    )
    fresh = ProxyInstruction(8, warm.vectors.shape[1])
    assert not torch.equal(warm.vectors, fresh.vectors)
    assert torch.equal(warm.start, fresh.vectors)  # seed 0
    assert torch.equal(tuned.start, warm.vectors)
    assert (warm.mode, tuned.mode) == ("free", "textbook")
    moved = [line["proxy_moved"] for line in metrics(run, "02-tune") if "proxy_moved" in line]
    assert moved[-1] == pytest.approx(float((tuned.average - tuned.start).norm()), rel=1e-4)
    assert 0 < moved[0] < moved[-1]


def test_the_export_is_the_base_with_another_eye(finished):
    """The language model is bit-equal, tower and projector are not, and nothing of the proxy is left."""
    run, _ = finished
    exported, base = run / "stages/02-tune/model", Path(model_path("generalist"))
    before, after = load_file(base / "model.safetensors"), load_file(exported / "model.safetensors")
    # tied to the embeddings: stored once
    assert before.keys() - after.keys() <= {"language_model.lm_head.weight"}
    assert not after.keys() - before.keys()
    equal = Counter((part_of(name), torch.equal(before[name].float(), after[name].float())) for name in after)
    assert equal[("llm", False)] == 0 and equal[("llm", True)] > 0
    assert equal[("projector", False)] > 0 and equal[("vision", False)] > equal[("vision", True)]
    assert PLACEHOLDER not in (exported / "tokenizer.json").read_text()
    assert [path.name for path in exported.glob("*.safetensors")] == ["model.safetensors"]


def test_all_sets_of_questions_were_answered_once(finished):
    run, _ = finished
    for model in ("base", "tuned"):
        for one in ("choices", "plain", "described", "general"):
            asked = rows(
                run, "00-data", one if one != "general" else "general/questions", columns=["sample_id"]
            )
            answered = rows(run, f"90-evaluate-{model}", "sets", one)
            assert Counter(row["sample_id"] for row in answered) == Counter(row["sample_id"] for row in asked)
            assert {row["model"] for row in answered} == {model}
            assert all(row["error"] is None for row in answered)
            assert all(PLACEHOLDER not in row["question"] for row in answered)
            if one == "choices":
                assert all(len(row["option_logps"]) == len(row["choices"]) for row in answered)
                # of the statements, which differ in a letter
                assert all(len(set(row["option_tokens"])) == 1 for row in answered)
            else:
                assert all(row["option_logps"] is None for row in answered)


def test_results_are_those_of_the_answers(finished):
    run, _ = finished
    results = json.loads((run / "results.json").read_text())
    answered, plain = (rows(run, "90-evaluate-tuned/sets", one) for one in ("choices", "plain"))
    leaked = [leaks_description(row["answer"], WBCATT) for row in (*answered, *plain)]
    assert results["measures"]["tuned"]["leakage"]["value"] == pytest.approx(sum(leaked) / len(leaked))
    assert (
        results["retention"]["questions"]
        == len(rows(run, "00-data/general/questions", columns=["sample_id"]))
        == 54
    )
    chances = [1 / len(row["choices"]) for row in answered]
    assert results["floors"]["chance"] == pytest.approx(sum(chances) / len(chances))
    assert results["form"] == "wbcatt"


def test_report_opens_offline_and_shows_what_it_must(finished):
    run, _ = finished
    page = (run / "report.html").read_text()
    for heading in (
        "Before and after",
        "floor: majority",
        "by attribute",
        "What the model has kept",
        "Training",
        "Descriptions of held-out images",
        "Rows: kept",
        "Time",
    ):
        assert heading in page
    assert "data:image/jpeg;base64" in page
    assert page.count("<svg") >= 8
    assert "<script src" not in page
    assert yaml.safe_load((run / "config.yaml").read_text())["tune"]["proxy"]["mode"] == "textbook"
    assert (run / "tensorboard").is_dir()
