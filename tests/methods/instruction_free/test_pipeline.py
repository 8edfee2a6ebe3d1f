"""Instruction-free tuning's configuration, what its stages depend on, and its report; the job itself is
in tests/integration.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medray.config import InstructionFreeConfig, InstructionFreeTrainConfig, load_config
from medray.errors import ConfigError
from medray.evaluation.prediction_files import read_predictions
from medray.methods.instruction_free.report import floors, measures, text_table
from medray.methods.instruction_free.stages import data_inputs, split_answers
from medray.methods.shared.stages import shared_stage
from medray.plan.preflight import check_instruction_free
from medray.records import ANSWERED
from medray.running.run import Run, Stage, digest

ROOT = Path(__file__).resolve().parents[3]


def config(*overrides, file="tiny-cpu.yaml"):
    return load_config(InstructionFreeConfig, ROOT / "medray/recipes/instruction_free" / file, overrides)


def test_defaults_are_the_papers():
    plain = InstructionFreeConfig()
    for stage in (plain.warm_up, plain.tune):
        assert (
            stage.micro_batch,
            stage.accumulation,
            stage.proxy.count,
            stage.proxy.lr,
            stage.proxy.weight_decay,
        ) == (2, 1, 8, 2e-5, 0.01)
        assert (
            stage.schedule,
            stage.warmup_ratio,
            stage.weight_decay,
            stage.max_grad_norm,
            stage.shuffling,
        ) == ("constant", 0.0, 0.01, 1.0, "separator")
    assert (plain.warm_up.epochs, plain.tune.epochs, plain.tune.proxy.momentum, plain.warm_up.proxy.mode) == (
        1,
        5,
        0.999,
        "free",
    )
    assert (plain.tune.lr_llm, plain.tune.lr_projector, plain.tune.lr_vision, plain.tune.lora_vision) == (
        None,
        2e-5,
        2e-5,
        None,
    )
    assert not plain.warm_up.trains_model
    assert (plain.model.system_prompt, plain.data.label_fraction, plain.evaluate.describe_prompt) == (
        "",
        1.0,
        "Describe this medical scan.",
    )


def test_the_stages_share_what_they_must():
    one = config(
        "tune.proxy.count=2", "tune.proxy.mode=released", "tune.shuffling=none", "tune.separator=;", "seed=3"
    )
    assert (
        one.warm_up.proxy.count,
        one.warm_up.shuffling,
        one.warm_up.separator,
        one.warm_up.seed,
        one.tune.seed,
    ) == (2, "none", ";", 3, 3)
    assert one.warm_up.proxy.mode == "free"
    assert one.evaluate.seed == 0
    assert InstructionFreeConfig.model_validate(one.model_dump(mode="json")) == one
    with pytest.raises(ConfigError, match=r"warm_up\.proxy\.count 4 differs from tune's 2"):
        config("tune.proxy.count=2", "warm_up.proxy.count=4")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.path=/no/such/model"], "model.path: /no/such/model does not exist"),
        (["data.source=/no/such/data"], "data.source: /no/such/data does not exist"),
        (["data.label_fraction=0"], "data.label_fraction: 0 leaves no image"),
        (["tune.lr_vision=null", "tune.lr_projector=null"], "tune.lr_vision: with every learning rate"),
        (["warm_up.lr_vision=1e-3"], "warm_up.lr_vision: the warm-up leaves the model"),
        (["evaluate.general=/no/such/data"], "evaluate.general: /no/such/data does not exist"),
        (["warm_up.num_workers=4"], "warm_up.num_workers: 4 workers"),
        (["tune.num_workers=4"], "tune.num_workers: 4 workers"),
    ],
)
def test_preflight_names_the_field(overrides, message, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError) as error:
        check_instruction_free(config(*overrides))
    assert message in str(error.value)


def test_preflight_passes_the_demo_and_the_plain_way():
    check_instruction_free(config())
    # no warm-up then
    check_instruction_free(config("tune.instruction=Describe this medical scan.", "warm_up.num_workers=4"))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "medray/recipes/instruction_free").glob("*.yaml")), ids=lambda path: path.name
)
def test_every_recipe_loads(path):
    assert config(file=path.name).warm_up.proxy.mode == "free"


def test_arms_share_their_data_and_warm_up():
    """What the shared stages depend on is the same for every mode and seed (data) and mode (warm-up), and
    no other.
    """
    data = [
        digest(data_inputs(config(*arm)))
        for arm in ([], ["seed=1"], ["tune.proxy.mode=free"], ["tune.instruction=x"], ["tune.shuffling=none"])
    ]
    assert len(set(data)) == 1
    assert digest(data_inputs(config("seed=1", "data.label_fraction=0.5"))) != digest(
        data_inputs(config("seed=2", "data.label_fraction=0.5"))
    )
    warm_up = {
        name: digest(config(*arm).warm_up)
        for name, arm in {
            "default": [],
            "mode": ["tune.proxy.mode=released"],
            "llm": ["tune.lr_llm=1e-3"],
            "k": ["tune.proxy.count=2"],
            "seed": ["seed=1"],
            "order": ["tune.shuffling=none"],
        }.items()
    }
    assert warm_up["default"] == warm_up["mode"] == warm_up["llm"]
    assert len(set(warm_up.values())) == 4


def test_shared_stages_of_different_inputs_stand_side_by_side(tmp_path):
    first, second, shared = Run(tmp_path / "a"), Run(tmp_path / "b"), Run(tmp_path / "shared")
    made = []

    def stage(run, where, k):
        return shared_stage(run, where, "01-warm_up", {"k": k}, lambda stage: made.append(k) or {"k": k})[
            "outputs"
        ]["k"]

    assert [stage(first, shared, 2), stage(second, shared, 8), stage(second, shared, 2)] == [2, 8, 2]
    assert made == [2, 8]
    assert stage(first, first, 8) == 8
    assert (tmp_path / "a/stages/01-warm_up/manifest.json").is_file()


def test_answers_are_split_by_set(tmp_path):
    stage = Stage(Run(tmp_path), "stages/x")
    rows = [
        {"sample_id": f"q{n}", "key": f"k{n}", "benchmark": name, "answer": str(n)}
        for n, name in enumerate(["general", "choices", "general"])
    ]
    for number, part in enumerate((rows[:2], rows[2:])):
        Path(stage.path("answers")).mkdir(parents=True, exist_ok=True)
        pq.write_table(
            pa.Table.from_pylist(part, schema=ANSWERED), stage.path("answers", f"{number}.parquet")
        )
    for _ in range(2):  # a second attempt writes the same
        split_answers(stage, ["choices", "general"])
        assert [row["answer"] for row in read_predictions(stage.path("sets", "general"))] == ["0", "2"]
        assert [row["answer"] for row in read_predictions(stage.path("sets", "choices"))] == ["1"]


def score(value):
    return {"value": value, "low": value, "high": value}


def test_measures_of_a_source_with_questions_and_of_one_without():
    described = {"overall": {"accuracy": score(0.0)}, "by_type": {"open": {"rouge_l": score(0.5)}}}
    choices = {
        "overall": {"accuracy": score(0.4), "chance": 0.3, "majority": 0.6},
        "by_type": {
            "mcq": {"unparsable": 0.2, "likelihood": {"accuracy": score(0.7), "normalised": score(0.8)}}
        },
    }
    overall = {
        name: {"overall": {"accuracy": score(value)}} for name, value in (("general", 0.9), ("plain", 0.75))
    }
    full = {
        "scores": {"described": described, "choices": choices, **overall},
        "balanced": score(0.35),
        "leakage": score(0.1),
        "overlap": {"precision": score(0.3), "recall": score(0.2), "f1": score(0.25)},
        "retention": {"retained": score(0.95)},
    }
    found = measures(full)
    assert {name: value["value"] if isinstance(value, dict) else value for name, value in found.items()} == {
        "strict": 0.4,
        "balanced": 0.35,
        "likelihood": 0.7,
        "likelihood per token": 0.8,
        "format failures": 0.2,
        "leakage": 0.1,
        "plain": 0.75,
        "general": 0.9,
        "retained": 0.95,
        "precision": 0.3,
        "recall": 0.2,
        "F1": 0.25,
        "ROUGE-L": 0.5,
    }
    assert floors(full) == {"chance": 0.3, "majority": 0.6}
    alone = {"scores": {"described": described}}
    assert {name for name, value in measures(alone).items() if value is not None} == {"ROUGE-L"}
    table = text_table({"measures": {"base": measures(alone), "tuned": found}, "floors": floors(full)})
    assert "0.950 [0.950, 0.950]" in table.splitlines()[2]
    assert table.splitlines()[3] == "floors  chance 0.300, majority 0.600"


def test_train_config_is_what_workers_take():
    """Workers read the warm-up's fields as an InstructionFreeTrainConfig."""
    warm_up = config().warm_up
    assert (
        InstructionFreeTrainConfig.model_validate(warm_up.model_dump()).model_dump() == warm_up.model_dump()
    )
