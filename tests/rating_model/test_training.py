"""Training the rating model: losses, weights, modes, and whole trainings with the real Ray Train, Ray
Data and DeepSpeed.
"""

import json
import math
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from medray.config import DataConfig, ModelConfig, RaterConfig
from medray.errors import ConfigError, DataError
from medray.rating_model.metrics import evaluate_rater
from medray.rating_model.model import RatingModel
from medray.rating_model.pairs import PairEncoder, held_out
from medray.rating_model.train_step import RaterBatches, RaterStep, rating_loss
from medray.rating_model.training import RATER, export_rater, train_rater
from medray.train.engine import full_state
from medray.train.epoch_progress import count_done
from medray.train.worker import run_training
from tests.support.processes import kill_one
from tests.support.rating_pairs import pair, small, stored

pytestmark = pytest.mark.whole_job
torch.set_num_threads(1)
DATA = DataConfig(read_cpus=0.5, encoders=1)


def logits(*values):
    return torch.tensor(values, requires_grad=True)


def test_losses_by_hand():
    chosen, rejected = logits(2.0, 0.3, -1.0), logits(0.5, 0.0, 1.0)
    torch.testing.assert_close(
        rating_loss(chosen, rejected, RaterConfig(loss="hinge")), torch.tensor([0.0, 0.7, 3.0])
    )
    torch.testing.assert_close(
        rating_loss(chosen, rejected, RaterConfig(loss="hinge", margin=2.0)), torch.tensor([0.5, 1.7, 4.0])
    )
    expected = [math.log(1 + math.exp(-gap)) for gap in (1.5, 0.3, -2.0)]
    torch.testing.assert_close(
        rating_loss(chosen, rejected, RaterConfig(loss="bradley_terry")), torch.tensor(expected)
    )


def test_raw_logits_do_not_saturate_where_the_released_sigmoid_does():
    """A pair in the wrong order, far out: raw logits still get the whole gradient, a sigmoid under the
    hinge none to speak of.
    """
    gradients = {}
    for exact in (False, True):
        chosen, rejected = logits(-12.0), logits(12.0)
        rating_loss(chosen, rejected, RaterConfig(paper_exact=exact)).sum().backward()
        gradients[exact] = abs(float(chosen.grad))
    assert gradients[False] == 1.0 and gradients[True] < 1e-4
    # And a pair in the right order by any distance still pays: sigmoids are never a whole margin apart.
    apart = rating_loss(logits(3.0), logits(-3.0), RaterConfig(paper_exact=True))
    assert float(apart.detach()) == pytest.approx(1 - (1 / (1 + math.exp(-3)) - 1 / (1 + math.exp(3))))
    assert float(rating_loss(logits(3.0), logits(-3.0), RaterConfig()).detach()) == 0.0


def encoded(path, rows):
    weights = pa.array([100.0 if row["origin"] == "clinician" else 1.0 for row in rows], pa.float32())
    return PairEncoder(path, 64, False, {})(
        pa.Table.from_pylist(rows).append_column("weight", weights)
    ).to_pylist()


def parts(path, engine="torch", total=100, **changes):
    config = small(path, **changes)
    step = RaterStep(path, ModelConfig(precision="fp32"), config, "rater", total, device="cpu", engine=engine)
    return step, RaterBatches(path, ModelConfig(), config, "rater")


def test_a_clinicians_pair_weighs_w_and_the_mean_is_over_pairs(tiny_clip):
    rows = encoded(tiny_clip, [pair(0), pair(1, "clinician"), pair(2)])
    step, batches = parts(tiny_clip, loss="bradley_terry", lr=0.0)
    with torch.no_grad():
        alone = [
            float(step.objective(step.place(batches.collate([{**row, "weight": 1.0}])))[0]) for row in rows
        ]
    found = step.update(batches.micro_batches(rows, 0), 0, batches.filler)
    assert found["loss"] == pytest.approx((alone[0] + 100 * alone[1] + alone[2]) / 3, rel=1e-5)
    assert (found["samples"], found["weight"], found["lr_head"], found["answer_cut"]) == (3, 3, 0.0, 0.0)


@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_accumulation_changes_nothing_and_everything_learns(tiny_clip, engine, process_group):
    rows = encoded(tiny_clip, [pair(0), pair(1, "clinician"), pair(2, other=3), pair(4, context=None)])
    states = []
    for micro in (4, 1):
        step, batches = parts(tiny_clip, engine, micro_batch=micro, accumulation=4 // micro, zero_stage=1)
        step.update(batches.micro_batches(rows, 0), 0, batches.filler)
        # Gradients, not weights: where they cancel (a bias of all logits), Adam makes whole steps of
        # rounding.
        states.append({name: value for name, value in full_state(step.engine) if name.startswith("exp_avg/")})
    for name, value in states[0].items():
        torch.testing.assert_close(
            states[1][name], value, rtol=2e-3, atol=3e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    still = {name for name, value in states[0].items() if not value.any()}
    assert not {name for name in still if not name.endswith(("k_proj.bias", "mlp.4.bias"))}


def test_paper_exact_and_head_rate_reach_the_step(tiny_clip):
    rows = encoded(tiny_clip, [pair(0)])
    exact, batches = parts(tiny_clip, paper_exact=True, lr_head=5e-3)
    found = exact.update(batches.micro_batches(rows, 0), 0, batches.filler)
    raw, _ = parts(tiny_clip)
    assert 0 < found["loss"] - raw.update(batches.micro_batches(rows, 0), 0, batches.filler)["loss"] + 1 < 2
    assert (found["lr_encoder"], found["lr_head"]) == (1e-3, 5e-3)
    assert found["loss"] != pytest.approx(raw.update(batches.micro_batches(rows, 0), 0)["loss"], abs=1e-6)


def test_the_model_is_in_train_mode_again_after_measuring(tiny_clip):
    """The released code measures once and then goes on in eval mode for good."""
    step, batches = parts(tiny_clip)
    seen = []
    step.model.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    rows = encoded(tiny_clip, [pair(0), pair(1, "clinician")])
    for _ in range(2):
        step.update(batches.micro_batches(rows, 0), 0, batches.filler)
        step.measure(batches.micro_batches(rows, None), batches.filler)
    assert seen == [True, False, True, False]


def test_what_chooses_the_best_epoch(tiny_clip):
    """Alignment with the clinicians first; where none is held out, accuracy on the model's pairs; ties by
    accuracy on all.
    """
    step, batches = parts(tiny_clip, lr=0.0)
    rows = encoded(tiny_clip, [pair(number, "clinician" if number < 2 else "model") for number in range(6)])
    rated = {}
    for row in rows:
        with torch.no_grad():
            chosen, rejected = step.model(
                **{
                    k: v
                    for k, v in step.place(batches.collate([row])).items()
                    if k in ("pixel_values", "input_ids", "attention_mask", "image_of")
                }
            )
        rated[row["sample_id"]] = float(chosen > rejected)
    found = step.measure(batches.micro_batches(rows, None), batches.filler)
    alignment = sum(rated[f"clinician-{number:04d}"] for number in range(2)) / 2
    accuracy = sum(rated[f"model-{number:04d}"] for number in range(2, 6)) / 4
    assert (found["eval_alignment"], found["eval_accuracy"], found["eval_clinician_pairs"]) == (
        alignment,
        accuracy,
        2,
    )
    assert found["rating"] == pytest.approx((alignment + 1e-3 * sum(rated.values()) / 6) / 1.001)
    assert found["eval_loss"] < 10, "every pair counts 1, whatever its weight in training"
    alone, _ = parts(tiny_clip, lr=0.0, train_on="model")
    assert alone.measure(batches.micro_batches(rows, None), batches.filler)["rating"] == pytest.approx(
        accuracy
    ), "no clinician chooses what learns from the model"
    assert "rating" not in alone.measure(batches.micro_batches(rows[:2], None), batches.filler)
    without = step.measure(batches.micro_batches(rows[2:], None), batches.filler)
    assert "eval_alignment" not in without and without["rating"] == pytest.approx(accuracy)
    assert step.measure([], batches.filler) == {}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """48 model pairs and 24 of clinicians, and an image that cannot be read."""
    root = tmp_path_factory.mktemp("pairs")
    model = [pair(number) for number in range(48)]
    broken = next(row for row in model if row["sample_id"] == "model-0000")
    broken |= {"chosen_image": b"no image", "rejected_image": b"no image"}
    return [
        stored(model, root / "model"),
        stored([pair(number, "clinician") for number in range(24, 48)], root / "clinician"),
    ]


def lines_of(result):
    return [json.loads(line) for line in result.metrics.splitlines()]


@pytest.mark.ray
@pytest.mark.faults
def test_it_learns_survives_a_kill_and_keeps_the_best_epoch(ray_cluster, tiny_clip, folders, tmp_path):
    """kill -9 of the training worker in an epoch: each pair is trained exactly once per epoch, the best
    epoch's weights are exported (not the last ones), and they order held-out pairs rightly.
    """
    config = small(
        tiny_clip,
        epochs=6,
        micro_batch=4,
        checkpoint_every=3,
        lr=2e-3,
        held_out_fraction=0.3,
        keep_checkpoints=None,
    )
    killed = []

    def kill():
        while not list(Path(tmp_path, "stage", "training").glob("checkpoint_*/progress.json")):
            time.sleep(0.05)
        killed.append(kill_one("RayTrainWorker"))

    threading.Thread(target=kill, daemon=True).start()
    result = train_rater(str(tmp_path / "stage"), folders, config, DATA)
    assert killed
    counts = result.counts
    trained = counts["train, clinician"] + counts["train, model"]
    assert (counts["trained"] + counts["quarantined"], counts["samples"], counts["answer cut"]) == (
        trained,
        6 * counts["trained"],
        0,
    )
    assert set(result.quarantine) <= {"model-0000"} and counts["held_out, clinician"] > 0
    measured = [line for line in lines_of(result) if "rating" in line]
    assert [line["epoch"] for line in measured] == list(range(6))
    assert result.selected_by == "clinician alignment"
    assert measured[result.best_epoch]["rating"] == max(line["rating"] for line in measured)
    assert measured[result.best_epoch]["eval_alignment"] > 0.9
    with result.best.as_directory() as folder:
        state = load_file(Path(folder, "state.safetensors"))
        assert json.loads(Path(folder, "progress.json").read_text())["epoch"] == result.best_epoch
        assert count_done(folder)[0] == trained
    export_rater(result.best, tmp_path / "rater", config)
    model = RatingModel.from_pretrained(str(tmp_path / "rater"))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, state[f"weight/{name}"]), name
    from medray.config import ScoreConfig

    found = evaluate_rater(
        folders,
        str(tmp_path / "rows"),
        str(tmp_path / "committed"),
        str(tmp_path / "rater"),
        config,
        ScoreConfig(batch=8),
        DATA,
        100,
    )
    assert found["clinician"]["pairs"] == counts["held_out, clinician"]
    assert found["clinician"]["pair_accuracy"]["value"] == pytest.approx(
        measured[result.best_epoch]["eval_alignment"]
    )
    assert found["pairs"] - found["without rating"] == found["clinician"]["pairs"] + found["model"]["pairs"]


@pytest.mark.ray
def test_the_best_epoch_is_kept_where_the_last_is_worse(ray_cluster, tiny_clip, tmp_path):
    """Training pairs that are labelled wrongly make each epoch worse on the held-out ones; an early one
    is kept, beside the last, which a restart needs. On two workers, whose shares of the pairs differ.
    Clinicians' pairs are measured, and have no say where none is trained on.
    """
    config = small(
        tiny_clip,
        epochs=4,
        num_workers=2,
        micro_batch=2,
        lr=1e-3,
        lr_head=1e-2,
        held_out_fraction=0.4,
        train_on="model",
    )
    model = [pair(number, wrong=not held_out(f"cell-{number:04d}", config)) for number in range(48)]
    pairs = [
        stored(model, tmp_path / "model"),
        stored([pair(number, "clinician", wrong=True) for number in range(24)], tmp_path / "clinician"),
    ]
    result = train_rater(str(tmp_path / "stage"), pairs, config, DATA)
    measured = [line for line in lines_of(result) if "rating" in line]
    ratings, alignments = ([line[name] for line in measured] for name in ("rating", "eval_alignment"))
    assert result.selected_by == "pair accuracy"
    assert ratings[-1] < max(ratings) == ratings[result.best_epoch]
    assert alignments[result.best_epoch] < max(alignments)
    with result.best.as_directory() as best, result.checkpoint.as_directory() as last:
        assert [
            json.loads(Path(folder, "progress.json").read_text())["epoch"] for folder in (best, last)
        ] == [result.best_epoch, 3]
    kept = list(Path(tmp_path, "stage", "training").glob("checkpoint_*/progress.json"))
    assert len(kept) == 2
    # The same call again finds it all done.
    again = train_rater(str(tmp_path / "stage"), pairs, config, DATA)
    assert (again.best_epoch, again.counts) == (result.best_epoch, result.counts)


@pytest.mark.ray
def test_nothing_to_train_on_is_said(ray_cluster, tiny_clip, tmp_path):
    with pytest.raises(DataError, match=r"train_on is clinician.*'train, clinician': 0"):
        train_rater(
            str(tmp_path / "stage"),
            stored([pair(number) for number in range(8)], tmp_path / "pairs"),
            small(tiny_clip, train_on="clinician"),
            DATA,
        )


def test_another_stages_config_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="RaterConfig"):
        run_training(str(tmp_path), None, None, 1, "nowhere", ModelConfig(), DATA, RATER)


def test_only_what_the_weights_depend_on_is_in_its_way():
    with pytest.raises(ValueError, match="clinician_weight"):
        RaterConfig(clinician_weight=0)
    assert RaterConfig().samples_per_step == 64 and RaterConfig().epochs == 6 and RaterConfig().lr == 1e-5
