"""The rating model as judge of self-training."""

import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from medray.config import (
    DataConfig,
    EngineConfig,
    JudgeConfig,
    ModelConfig,
    ScoreConfig,
    SelfTrainingConfig,
    load_config,
)
from medray.errors import ConfigError
from medray.inference.judge import judge_map
from medray.inference.judge_rater import RaterJudge
from medray.inference.pairs import EMPTY, IDENTICAL
from medray.inference.score import Score
from medray.models.rater import Rater
from medray.preflight import check_self_training
from medray.records import SELF_PLAY
from medray.testbed.tiny_clip import random_clip


@pytest.fixture(scope="module")
def rater(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rater")
    random_clip(folder / "clip")
    Rater.from_encoder(str(folder / "clip"), hidden=(8,)).save_pretrained(folder / "rater")
    return str(folder / "rater")


def picture(seed):
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 40, 3), np.uint8)).save(data, "PNG")
    return data.getvalue()


def row(number, *questions, image=None, error=None):
    asked = [
        {"question_id": f"i{number}/q{place}", "question": question, "seed": 0, "answers": [{"text": text, "seed": 0, "finish_reason": "stop", "tokens": 1} for text in answers]}
        for place, (question, *answers) in enumerate(questions)
    ]
    return {"sample_id": f"i{number}", "image": image or picture(number), "questions": asked, "error": error}


def test_verdicts_are_the_rating_models_scores(rater):
    judge = RaterJudge(JudgeConfig(kind="rater", model="runs/a"), rater, ScoreConfig(), DataConfig())
    rows = [
        row(0, ("What is the shape?", "round", "oval", "star"), ("Is it big?", "yes", "yes"), ("What is it?", "a cell", " ")),
        row(1, ("What is the shape?", "round", "oval"), image=b"no picture"),
        {**row(2), "questions": None, "error": "ValueError: no image"},
    ]
    judged = judge(pa.Table.from_pylist(rows, schema=SELF_PLAY)).to_pylist()
    exchanges = [{"image_id": "i0", "image": rows[0]["image"], "context": None, "question": "What is the shape?", "answer": text} for text in ("round", "oval", "star")]
    scores = [one["score"] for one in Score(rater, ScoreConfig(), DataConfig()).ratings(exchanges)]
    assert len(set(scores)) == 3
    verdicts = {(one["question_id"], one["first"], one["second"]): one for one in judged[0]["verdicts"]}
    for first, second in ((0, 1), (0, 2), (1, 2)):
        found = verdicts["i0/q0", first, second]
        assert (found["first_score"], found["second_score"]) == pytest.approx((scores[first], scores[second]), abs=1e-5)
        assert (found["order_agreement"], found["error"]) == (None, None)
    assert [verdicts["i0/q1", 0, 1]["error"], verdicts["i0/q2", 0, 1]["error"]] == [IDENTICAL, EMPTY]
    assert (judged[0]["judge"], judged[0]["requests"]) == ("rater:runs/a", 3)
    (broken,) = judged[1]["verdicts"]
    assert broken["first_score"] is None
    assert broken["error"]
    assert (judged[2]["verdicts"], judged[2]["error"]) == (None, "ValueError: no image")


def test_the_judge_is_chosen_by_its_kind(rater):
    judge, options = judge_map(JudgeConfig(kind="rater", model=rater), rater, ModelConfig(), DataConfig(), EngineConfig(cpus_per_actor=2))
    assert judge is RaterJudge
    assert options["fn_constructor_kwargs"]["score_config"]["cpus_per_actor"] == 2


def test_preflight_wants_a_rating_model(rater):
    check_self_training(load_config(SelfTrainingConfig, "configs/self_train/tiny-cpu.yaml", ["judge.kind=rater", "judge.scoring=scores", f"judge.model={rater}"]))
    with pytest.raises(ConfigError, match=r"judge\.model: testbed:expert holds no rating model"):
        check_self_training(load_config(SelfTrainingConfig, "configs/self_train/tiny-cpu.yaml", ["judge.kind=rater", "judge.scoring=scores"]))
