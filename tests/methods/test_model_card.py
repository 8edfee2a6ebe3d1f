"""models.json and the cards beside exports."""

import pytest
import yaml
from huggingface_hub import ModelCard

from medray.config import InstructionFreeConfig, SelfTrainingConfig
from medray.methods.model_card import INSTRUCTION_FREE, NOT_A_DEVICE, SELF_TRAINING, card, publish_models
from medray.methods.stages import Model
from medray.run import Run

S = {"value": 0.71234, "low": 0.7, "high": 0.72}
RESULTS = {"accuracy": {"base": {**S, "value": 0.4}, "sft": S}, "table": "model  all\nsft  0.712 [0.700, 0.720]", "counts": {"00-data": {"images": 5, "by": {"x": 1}}, "01": {}}}


def parts(text):
    """(metadata, text) of a card, as Hugging Face reads it."""
    found = ModelCard(text)
    return found.data, found.text


def test_a_card_says_what_how_how_well_and_where_it_ends():
    config = SelfTrainingConfig(data={"source": "/home/someone/private/wbc"}, model={"path": "llava-hf/llava-1.5-7b-hf"})
    metadata, text = parts(card(config, SELF_TRAINING, "sft", RESULTS, ("One more.",)))
    assert metadata.base_model == "llava-hf/llava-1.5-7b-hf" and metadata.pipeline_tag == "image-text-to-text" and "self-training" in metadata.tags
    (result,) = metadata.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("accuracy", 0.7123, "wbc, held-out images")
    for piece in (NOT_A_DEVICE, "2406.19973", "0.712 [0.700, 0.720]", "images 5", "One more.", "What the judge gets wrong", config.model.system_prompt, "jobs/self_train.py", "padded to a square"):
        assert piece in text, piece
    settings = SelfTrainingConfig.model_validate(yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0]))
    assert settings.data.source == "wbc" and settings.sft == config.sft and settings.model == config.model


def test_measures_of_a_method_with_many():
    results = {"measures": {"tuned": {"strict": S, "format failures": 0.25, "retained": None}}, "table": "t", "counts": {}}
    metadata, _ = parts(card(InstructionFreeConfig(), INSTRUCTION_FREE, "tuned", results))
    assert {one.metric_type: one.metric_value for one in metadata.eval_results} == {"strict": 0.7123, "format_failures": 0.25}
    assert metadata.base_model is None  # bundled: no id that a hub knows


def test_models_are_named_by_their_place_in_the_run(tmp_path):
    run = Run(tmp_path / "run")
    folder = run.path("stages/01-sq_sft/model")
    models = {"base": Model("/elsewhere/base", "h0"), "sft": Model(folder, "h1")}
    publish_models(run, SelfTrainingConfig(model={"path": "testbed:base"}), SELF_TRAINING, models, "sft", RESULTS)
    assert run.read_json("models.json") == {
        "method": "self_train", "tuned": "sft", "base": "base",
        "models": {"base": {"path": "testbed:base", "hash": "h0"}, "sft": {"path": "stages/01-sq_sft/model", "hash": "h1"}},
    }
    written = tmp_path / "run/stages/01-sq_sft/model/README.md"
    before = written.stat().st_mtime_ns
    publish_models(run, SelfTrainingConfig(model={"path": "testbed:base"}), SELF_TRAINING, models, "sft", RESULTS)
    assert written.stat().st_mtime_ns == before  # a copy of the model elsewhere stays good
    publish_models(run, SelfTrainingConfig(model={"path": "some/base"}), SELF_TRAINING, models, "sft", RESULTS)
    assert run.read_json("models.json")["models"]["base"]["path"] == "/elsewhere/base" and written.stat().st_mtime_ns > before


def test_no_number_no_metadata():
    assert parts(card(SelfTrainingConfig(), SELF_TRAINING, "dpo-1", RESULTS))[0].eval_results is None


@pytest.mark.parametrize("place", ["s3://bucket/secret/base", "/secret/base", "./secret/base"])
def test_places_are_not_told(place):
    text = card(SelfTrainingConfig(model={"path": place}), SELF_TRAINING, "sft", RESULTS)
    assert "secret" not in text and "# base, self-training (sft)" in text
