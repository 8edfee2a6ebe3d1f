"""A local model beside the tuned one is asked as itself: none of the tuned model's settings reach it."""

import logging
from pathlib import Path

import pytest

from medray.config import (
    ClinicianPreferenceConfig,
    DataConfig,
    EngineConfig,
    EvaluateJobConfig,
    JudgeConfig,
    ModelConfig,
    RateConfig,
    SelfTrainingConfig,
    load_config,
)
from medray.config.clinician_preference_sections import GenerateConfig
from medray.errors import ConfigError
from medray.inference.judges.judges import EngineJudge, judge_map
from medray.inference.row_worker import EngineWorker
from medray.methods.clinician_preference.rate_exchanges import EngineRate, rate_map
from medray.methods.clinician_preference.small_model_writer import Asking
from medray.methods.clinician_preference.write_dialogues import EngineGenerate, generate_map
from medray.plan.demand import demands
from medray.plan.preflight import check_self_training

RECIPES = Path(__file__).parents[2] / "medray/recipes"
ENGINE = EngineConfig(
    gpus_per_actor=2,
    tensor_parallel_size=2,
    max_model_len=2048,
    cpus_per_actor=4,
    actors=(1, 3),
    rows_per_task=16,
    enforce_eager=True,
)


@pytest.fixture
def started(monkeypatch):
    """What workers give to EngineWorker, which then would start an engine."""
    given = {}
    monkeypatch.setattr(
        EngineWorker,
        "__init__",
        lambda self, model, model_config, data_config, engine_config: given.update(
            model=model,
            settings=ModelConfig.model_validate(model_config),
            engine=EngineConfig.model_validate(engine_config),
        ),
    )
    return given


def local(kind, **settings):
    """The class and arguments with which each job starts this section's model."""
    config = kind(kind="vllm", model="qwen", **settings)
    engine = config.engine.beside(ENGINE)
    if kind is JudgeConfig:
        return judge_map(config, "/models/qwen", DataConfig(), engine)
    return (rate_map if kind is RateConfig else generate_map)(config, "/models/qwen", DataConfig(), engine)


@pytest.mark.parametrize(
    ("kind", "settings", "worker"),
    [
        (JudgeConfig, {}, EngineJudge),
        (JudgeConfig, {"scoring": "likelihood"}, EngineJudge),
        (RateConfig, {}, EngineRate),
        (RateConfig, {"scoring": "likelihood"}, EngineRate),
        (GenerateConfig, {}, EngineGenerate),
        (GenerateConfig, {"writing": "asking"}, Asking),
    ],
)
def test_a_local_model_is_asked_as_itself(started, caplog, kind, settings, worker):
    caplog.set_level(logging.INFO, "medray")
    cls, options = local(kind, **settings)
    assert cls is worker
    cls(**options["fn_constructor_kwargs"])
    own = started["settings"]
    assert (
        own.chat_template,
        own.system_prompt,
        own.pad_to_square,
        own.precision,
        own.trust_remote_code,
    ) == (None, "", False, "bf16", False)
    engine = started["engine"]
    assert (
        engine.max_model_len,
        engine.tensor_parallel_size,
        engine.gpus_per_actor,
        engine.cpus_per_actor,
        engine.actors,
    ) == (None, 2, 2, 4, (1, 3))
    assert options["batch_size"] == 16 and options["num_gpus"] == 2
    assert (
        "qwen is asked with its own chat template, images as they are, bf16, no system prompt" in caplog.text
    )

    asked = {
        "pad_to_square": True,
        "system_prompt": "Judge.",
        "precision": "fp32",
        "chat_template": "own.jinja",
    }
    cls, options = local(
        kind,
        **settings,
        model_settings=asked,
        engine={"gpus_per_actor": 4, "max_model_len": 9000, "rows_per_task": 8},
    )
    cls(**options["fn_constructor_kwargs"])
    assert {name: getattr(started["settings"], name) for name in asked} == asked
    engine = started["engine"]
    assert (
        engine.max_model_len,
        engine.tensor_parallel_size,
        engine.gpus_per_actor,
        engine.enforce_eager,
    ) == (9000, 4, 4, True)
    assert options["batch_size"] == 8 and options["num_gpus"] == 4


def test_the_tiny_recipes_ask_their_bundled_models_as_they_did():
    """Their numbers were measured so: as the tuned model, whose settings are the bundled models' own."""
    for cls, recipe, sections in (
        (SelfTrainingConfig, "self_train/tiny-cpu.yaml", ("judge",)),
        (SelfTrainingConfig, "self_train/tiny-wbcatt.yaml", ("judge",)),
        (ClinicianPreferenceConfig, "clinician_preference/tiny-cpu.yaml", ("generate", "rate")),
    ):
        config = load_config(cls, RECIPES / recipe)
        for section in sections:
            own = getattr(config, section)
            assert own.own_model().outcome("path", "max_length") == config.model.outcome("path", "max_length")
            assert own.engine.beside(config.engine) == config.engine


def test_where_a_judge_runs_is_counted():
    config = SelfTrainingConfig(judge=JudgeConfig(kind="vllm", model="testbed:expert"))
    assert "judge" not in demands(config)  # in the places of the tuned model's engines
    config = SelfTrainingConfig.model_validate(
        {
            "judge": {
                "kind": "vllm",
                "model": "testbed:expert",
                "engine": {"gpus_per_actor": 4, "cpus_per_actor": 8},
            }
        }
    )
    pool = demands(config)["judge"][0]
    assert (pool.field, pool.gpus, pool.cpus, pool.least) == ("judge.engine.actors", 4, 8, 1)


def test_a_template_that_is_not_there_is_said_before_anything_starts():
    config = SelfTrainingConfig.model_validate(
        {
            "judge": {
                "kind": "vllm",
                "model": "testbed:expert",
                "model_settings": {"chat_template": "nowhere.jinja"},
            }
        }
    )
    with pytest.raises(
        ConfigError, match=r"judge\.model_settings\.chat_template: file nowhere\.jinja does not exist"
    ):
        check_self_training(config)


def test_unknown_fields_of_a_judge_are_named():
    with pytest.raises(ConfigError, match=r"judge\.engine\.tensor_parallel: unknown field"):
        load_config(EvaluateJobConfig, None, ["judge={kind: vllm, engine: {tensor_parallel: 4}}"])
