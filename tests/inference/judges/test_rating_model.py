"""The rating model as judge of self-training."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medray.config import (
    DataConfig,
    EngineConfig,
    JudgeConfig,
    ScoreConfig,
    SelfTrainingConfig,
    load_config,
)
from medray.errors import ConfigError
from medray.inference.judges.base import EMPTY, IDENTICAL
from medray.inference.judges.judges import judge_map
from medray.inference.judges.rating_model import RaterJudge
from medray.methods.self_train import stages as steps
from medray.methods.shared import stages
from medray.plan.preflight import check_self_training
from medray.rating_model.model import RatingModel
from medray.rating_model.scoring import Score
from medray.records import SELF_PLAY
from medray.running.run import Run
from medray.testbed.tiny_clip import random_clip


@pytest.fixture(scope="module")
def rater(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rater")
    random_clip(folder / "clip")
    RatingModel.from_encoder(str(folder / "clip"), hidden=(8,)).save_pretrained(folder / "rater")
    return str(folder / "rater")


def picture(seed):
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 40, 3), np.uint8)).save(data, "PNG")
    return data.getvalue()


def row(number, *questions, image=None, error=None):
    asked = [
        {
            "question_id": f"i{number}/q{place}",
            "question": question,
            "seed": 0,
            "answers": [{"text": text, "seed": 0, "finish_reason": "stop", "tokens": 1} for text in answers],
        }
        for place, (question, *answers) in enumerate(questions)
    ]
    return {"sample_id": f"i{number}", "image": image or picture(number), "questions": asked, "error": error}


def test_verdicts_are_the_rating_models_scores(rater):
    judge = RaterJudge(JudgeConfig(kind="rater", model="runs/a"), rater, ScoreConfig(), DataConfig())
    rows = [
        row(
            0,
            ("What is the shape?", "round", "oval", "star"),
            ("Is it big?", "yes", "yes"),
            ("What is it?", "a cell", " "),
        ),
        row(1, ("What is the shape?", "round", "oval"), image=b"no picture"),
        {**row(2), "questions": None, "error": "ValueError: no image"},
    ]
    judged = judge(pa.Table.from_pylist(rows, schema=SELF_PLAY)).to_pylist()
    exchanges = [
        {
            "image_id": "i0",
            "image": rows[0]["image"],
            "context": None,
            "question": "What is the shape?",
            "answer": text,
        }
        for text in ("round", "oval", "star")
    ]
    scores = [one["score"] for one in Score(rater, ScoreConfig(), DataConfig()).ratings(exchanges)]
    assert len(set(scores)) == 3
    verdicts = {(one["question_id"], one["first"], one["second"]): one for one in judged[0]["verdicts"]}
    for first, second in ((0, 1), (0, 2), (1, 2)):
        found = verdicts["i0/q0", first, second]
        assert (found["first_score"], found["second_score"]) == pytest.approx(
            (scores[first], scores[second]), abs=1e-5
        )
        assert (found["order_agreement"], found["error"]) == (None, None)
    assert [verdicts["i0/q1", 0, 1]["error"], verdicts["i0/q2", 0, 1]["error"]] == [IDENTICAL, EMPTY]
    assert (judged[0]["judge"], judged[0]["requests"]) == ("rater:runs/a", 3)
    (broken,) = judged[1]["verdicts"]
    assert broken["first_score"] is None
    assert broken["error"]
    assert (judged[2]["verdicts"], judged[2]["error"]) == (None, "ValueError: no image")


def test_the_judge_is_chosen_by_its_kind(rater):
    judge, options = judge_map(
        JudgeConfig(kind="rater", model=rater), rater, DataConfig(), EngineConfig(cpus_per_actor=2)
    )
    assert judge is RaterJudge
    assert options["fn_constructor_kwargs"]["score_config"]["cpus_per_actor"] == 2


def test_preflight_wants_a_rating_model(rater):
    check_self_training(
        load_config(
            SelfTrainingConfig,
            "medray/recipes/self_train/tiny-cpu.yaml",
            ["judge.kind=rater", "judge.scoring=scores", f"judge.model={rater}"],
        )
    )
    with pytest.raises(ConfigError, match=r"judge\.model: testbed:expert holds no rating model"):
        check_self_training(
            load_config(
                SelfTrainingConfig,
                "medray/recipes/self_train/tiny-cpu.yaml",
                ["judge.kind=rater", "judge.scoring=scores"],
            )
        )


def judged_by(rater, *more):
    return load_config(
        SelfTrainingConfig,
        "medray/recipes/self_train/tiny-cpu.yaml",
        [
            "judge.kind=rater",
            "judge.scoring=scores",
            f"judge.model={rater}",
            "judge.min_margin=0",
            "judge.min_chosen_score=null",
            "engine.cpus_per_actor=1",
            *more,
        ],
    )


@pytest.mark.ray
def test_its_verdicts_become_pairs(ray_cluster, rater, tmp_path):
    """The two stages of self-training that it has to do with, on Ray."""
    config = judged_by(rater)
    rows = [
        row(number, ("What is the shape?", "round", "oval"), ("What is it?", "a cell", "a cell"))
        for number in range(6)
    ]
    (tmp_path / "played").mkdir()
    pq.write_table(
        pa.Table.from_pylist([*rows, row(6, ("What?", "a", "b"), image=b"no picture")], schema=SELF_PLAY),
        tmp_path / "played/a.parquet",
    )
    run = Run(tmp_path / "run")
    judged = run.stage(
        "12-judge",
        stages.judge_inputs(config),
        lambda stage: steps.judge(stage, config, {"outputs": {"rows": str(tmp_path / "played")}}),
    )
    assert judged["outputs"]["ledger"]["usd"] == 0
    assert judged["outputs"]["counts"] == {
        "images": 7,
        "verdicts": 13,
        "without verdict": 7,
        "quarantined": 0,
        "retried requests": 0,
    }
    pairs = run.stage("13-pairs", {}, lambda stage: steps.make_pairs(stage, config, judged))
    made = pq.read_table(run.path("stages", "13-pairs", "rows")).to_pylist()
    assert {one["sample_id"].partition("/")[0] for one in made} == {f"i{number}" for number in range(6)}
    assert len(made) == pairs["outputs"]["counts"]["pairs"] == 6
    scorer = Score(rater, ScoreConfig(), DataConfig())
    for one in made:
        better, worse = (
            found["score"]
            for found in scorer.ratings(
                [
                    {
                        "image_id": "i",
                        "image": one["image"],
                        "context": None,
                        "question": one["prompt"],
                        "answer": one[side],
                    }
                    for side in ("chosen", "rejected")
                ]
            )
        )
        assert better > worse
        assert (one["chosen_score"], one["rejected_score"], one["judge"]) == (
            pytest.approx(better, abs=1e-5),
            pytest.approx(worse, abs=1e-5),
            f"rater:{rater}",
        )


def test_a_rating_model_trained_anew_judges_anew(rater, tmp_path):
    folder = tmp_path / "rater"
    RatingModel.from_pretrained(rater).save_pretrained(folder)
    before = stages.judge_inputs(judged_by(folder))
    assert (
        stages.judge_inputs(
            judged_by(
                folder,
                "judge.concurrency=3",
                "judge.retries=1",
                "judge.usd_per_million_input=9",
                "judge.min_margin=2",
            )
        )
        == before
    )
    assert stages.judge_inputs(judged_by(folder, "judge.seed=1")) != before
    other = RatingModel.from_pretrained(rater)
    other.mlp[0].bias.data += 1
    other.save_pretrained(folder)
    assert stages.judge_inputs(judged_by(folder)) != before
