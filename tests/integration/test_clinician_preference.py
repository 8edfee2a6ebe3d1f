"""The whole job on the bundled tiny models: every stage for real, in its own process, as a user runs it,
killed on the way.
"""

import json
import os
from collections import Counter

import pytest
import yaml

from medray.clinicians.simulated import is_right
from medray.rating_model.model import RatingModel
from tests.support.jobs import Job, check_ready_to_serve, manifest, rows, summary_of

pytestmark = [
    pytest.mark.whole_job,
    pytest.mark.ray,
    pytest.mark.vllm,
    pytest.mark.faults,
    pytest.mark.timeout(1800),
]

SMALL = [
    "data.testbed_rows=60",
    "data.max_labelled=30",
    "demonstrations.clusters=4",
    "demonstrations.draw=16",
    "generate.rounds=[2, 3]",
    "pairs.max_pairs=60",
    "rater.epochs=2",
    "rater.micro_batch=16",
    "rater.hidden=[16]",
    "rater.checkpoint_every=1",
    "tune.epochs=1",
    "tune.eval_rows=2",
    "evaluate.arms=[selected]",
    "evaluate.max_images=2",
    "evaluate.bootstrap=50",
    "verify.rows=0",
    "engine.rows_per_task=4",
    "weights=[1, 10]",
    "select.aggregate=mean",
    "judge={kind: vllm, scoring: likelihood, model: testbed:expert, model_settings: {precision: fp32}, "
    "engine: {max_model_len: 512}}",
]
# By stage what is there when it is killed: its beginning, rows, or a checkpoint. A start of the job takes
# half a minute: all are killed where MEDRAY_KILL_ALL is set; else one, when some of its rows are there
# (tests/rating_model/test_training.py kills the rating model's training).
KILLED = {"05-generate": "committed/*"}
if os.environ.get("MEDRAY_KILL_ALL"):
    KILLED = {
        "00-data": "inputs.json",
        "01-embed": "committed/*",
        "02-draw": "inputs.json",
        "03-candidates": "committed/*",
        "04-clinicians": "inputs.json",
        **KILLED,
        "06-rate": "committed/*",
        "07-pairs": "inputs.json",
        "08-rater-w1": "train/training/checkpoint_*/progress.json",
        "09-score": "committed/*",
        "10-select-selected": "inputs.json",
        "11-tune-selected": "train/training/checkpoint_*/progress.json",
        "90-evaluate-selected": "committed/*",
    }


JOB = Job("clinician_preference", SMALL)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run whose driver was killed (SIGKILL) in each stage of KILLED, then run to its end."""
    run = tmp_path_factory.mktemp("job") / "run"
    for stage, begun in KILLED.items():
        JOB.kill_in(run, stage, 0, begun)
    return run, JOB.run(run)


def ids(run, *parts, column="sample_id"):
    found = [row[column] for row in rows(run, *parts, columns=[column])]
    assert len(found) == len(set(found)), Counter(found).most_common(3)
    return set(found)


def test_summary_line_and_resume(finished):
    run, done = finished
    summary = summary_of(done)
    assert {
        "run",
        "base",
        "selected",
        "rater",
        "clinicians",
        "truth",
        "seconds",
        "report",
        "model",
        "rating_model",
    } <= set(summary)
    assert summary["run"] == str(run)
    check_ready_to_serve(run, summary["model"])
    assert summary["clinicians"]["kind"] == "simulated"
    assert "stage 03-candidates: cached" in done.stderr
    assert "simulated clinicians, error rate 0.1" in done.stderr
    continued = manifest(run, "05-generate")["attempts"]
    assert continued >= 2  # killed in it, and gone on


def test_every_image_is_written_about_once(finished):
    run, _ = finished
    images = ids(run, "00-data/captioned")
    assert len(images) == 30
    assert ids(run, "01-embed/rows") == images
    drawn = ids(run, "02-draw/drawn")
    assert len(drawn) == 16
    assert ids(run, "03-candidates/rows") == drawn
    assert ids(run, "05-generate/rows") == images


def test_every_exchange_is_rated_and_scored_once(finished):
    run, _ = finished
    exchanges = ids(run, "05-generate/exchanges")
    assert len(exchanges) >= 2 * 25  # a few images may be left without a dialogue
    assert ids(run, "06-rate/rows") == exchanges
    assert ids(run, "09-score/rows") == exchanges
    assert all(0 <= row["score"] <= 10 for row in rows(run, "06-rate/rows", columns=["score"]))


def test_clinicians_shape_the_dialogues_and_the_rating_model(finished):
    run, _ = finished
    asked = ids(run, "03-candidates/items", column="item_id")
    judged = rows(run, "04-clinicians/judgements")
    assert {row["item_id"] for row in judged} == asked
    assert all(row["simulated"] for row in judged)
    one_tick = {
        row["item_id"] for row in judged if row["status"] == "judged" and row["good_a"] != row["good_b"]
    }
    pairs = rows(run, "04-clinicians/pairs", columns=["sample_id", "origin", "chosen_image_id"])
    assert {row["sample_id"].rpartition("/")[0] for row in pairs} == one_tick
    accepted = {
        row["dialogue_id"] for row in rows(run, "04-clinicians/demonstrations", columns=["dialogue_id"])
    }
    shown = {
        name
        for row in rows(run, "05-generate/rows", columns=["demonstrations"])
        for name in row["demonstrations"] or []
    }
    assert shown
    assert shown <= accepted
    counts = manifest(run, "08-rater-w1")["outputs"]["counts"]
    assert counts["train, clinician"] + counts["held_out, clinician"] == len(pairs)


def test_rating_models_of_two_weights_are_trained_and_the_better_aligned_goes_on(finished):
    run, done = finished
    alignment, logits = {}, {}
    for weight in (1, 10):
        rater = manifest(run, f"08-rater-w{weight}")["outputs"]
        assert rater["weight"] == weight
        assert rater["best_epoch"] in (0, 1)
        assert rater["counts"]["samples"] == 2 * rater["counts"]["trained"]
        alignment[weight] = (rater["quality"]["clinician"] or rater["quality"]["model"])["pair_accuracy"][
            "value"
        ]
        assert (
            "The clinicians were 3 simulated clinicians, error rate 0.1: "
            in (run / f"stages/08-rater-w{weight}/model/README.md").read_text()
        )
        loaded = RatingModel.from_pretrained(rater["model"])
        assert loaded.hidden == (16,)
        logits[weight] = loaded.mlp[0].weight.detach()
    assert not logits[1].equal(logits[10])
    found = json.loads((run / "results.json").read_text())["rater"]
    assert {
        one["weight"]: (one["clinician"] or one["model"])["pair_accuracy"]["value"]
        for one in found["weights"]
    } == alignment
    light, heavy = (one["clinicians_share"] for one in found["weights"])
    assert 0 < light < heavy < 1 and heavy / (1 - heavy) == pytest.approx(10 * light / (1 - light))
    best = max(alignment, key=alignment.get)  # of equal ones the first
    assert found["weight"] == best
    assert summary_of(done)["rating_model"] == str(run / f"stages/08-rater-w{best}/model")


def test_what_is_selected_is_tuned_on_once_per_epoch(finished):
    run, _ = finished
    dialogues = ids(run, "05-generate/conversations")
    kept = ids(run, "10-select-selected/rows")
    assert kept <= dialogues
    assert len(kept) == pytest.approx(0.4 * len(dialogues), abs=1)
    scores = {}
    for row in rows(run, "09-score/rows", columns=["dialogue_id", "score"]):
        scores.setdefault(row["dialogue_id"], []).append(row["score"])
    means = {name: sum(found) / len(found) for name, found in scores.items()}
    assert sum(means[name] for name in kept) / len(kept) > sum(means.values()) / len(means)
    counts = manifest(run, "11-tune-selected")["outputs"]["counts"]
    assert (counts["trained"], counts["samples"], counts["quarantined"]) == (len(kept), len(kept), 0)


def test_all_questions_were_answered_once_by_both_models(finished):
    run, _ = finished
    questions = ids(run, "00-data/questions")
    for model in ("base", "selected"):
        assert ids(run, f"90-evaluate-{model}", "rows") == questions


def test_the_judge_compared_both_models_on_open_questions(finished):
    run, _ = finished
    (found,) = json.loads((run / "results.json").read_text())["win_rates"].items()
    assert found[0] == "selected against base"
    open_questions = [
        row for row in rows(run, "00-data/questions", columns=["answer_type"]) if row["answer_type"] == "open"
    ]
    assert (found[1]["asked"], found[1]["n"]) == (len(open_questions),) * 2
    assert sum(found[1][outcome]["value"] for outcome in ("win", "tie", "loss")) == pytest.approx(1)


def test_the_truth_is_that_of_the_cells(finished):
    """The share of right answers, counted anew from the records the cells were drawn from."""
    run, _ = finished
    results = json.loads((run / "results.json").read_text())
    records = {
        row["img_name"]: row
        for row in map(json.loads, (run / "stages/00-data/cells/records.jsonl").read_text().splitlines())
    }
    exchanges = rows(run, "05-generate/exchanges", columns=["image_id", "question", "answer"])
    checked = [is_right(row["question"], row["answer"], records[row["image_id"]]) for row in exchanges]
    known = [right for right in checked if right is not None]
    assert results["truth"]["right"]["written"] == pytest.approx(sum(known) / len(known))


def test_report_opens_offline_and_shows_what_it_must(finished):
    run, _ = finished
    page = (run / "report.html").read_text()
    for heading in (
        "Before and after",
        "simulated clinicians, error rate 0.1",
        "Images drawn for the clinicians",
        "What the clinicians were shown",
        "The rating model",
        "Against the true attributes",
        "Selection: modalities and variety before and after",
        "Training",
        "Rows: kept",
        "Time",
    ):
        assert heading in page
    assert "data:image/jpeg;base64" in page
    assert page.count("<svg") >= 4
    assert "<script" not in page
    assert yaml.safe_load((run / "config.yaml").read_text())["clinicians"]["error_rate"] == 0.1
    assert (run / "tensorboard").is_dir()
