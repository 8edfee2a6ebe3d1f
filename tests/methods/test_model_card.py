"""models.json and the cards beside exports."""

import re
import typing

import pytest
import yaml
from huggingface_hub import ModelCard

from medray.config import (
    ClinicianPreferenceConfig,
    InstructionFreeConfig,
    RaterConfig,
    SelfTrainingConfig,
    fields_of,
)
from medray.methods.shared.model_card import (
    _LOCAL,
    _PLACES,
    _WHERE,
    CLINICIAN_PREFERENCE,
    INSTRUCTION_FREE,
    SELF_TRAINING,
    card,
    publish_models,
    rater_card,
)
from medray.methods.shared.stages import Model
from medray.models.published import NOT_A_DEVICE
from medray.running.run import Run

S = {"value": 0.71234, "low": 0.7, "high": 0.72}
RESULTS = {
    "accuracy": {"base": {**S, "value": 0.4}, "sft": S},
    "table": "model  all\nsft  0.712 [0.700, 0.720]",
    "counts": {"00-data": {"images": 5, "by": {"x": 1}}, "01": {}},
}


def parts(text):
    """(metadata, text) of a card, as Hugging Face reads it."""
    found = ModelCard(text)
    return found.data, found.text


def test_a_card_says_what_how_how_well_and_where_it_ends():
    config = SelfTrainingConfig(
        data={"source": "/home/someone/private/wbc"}, model={"path": "llava-hf/llava-1.5-7b-hf"}
    )
    metadata, text = parts(card(config, SELF_TRAINING, "sft", RESULTS, ("One more.",)))
    assert (
        metadata.base_model == "llava-hf/llava-1.5-7b-hf"
        and metadata.pipeline_tag == "image-text-to-text"
        and "self-training" in metadata.tags
    )
    (result,) = metadata.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == (
        "accuracy",
        0.7123,
        "wbc, held-out images",
    )
    for piece in (
        NOT_A_DEVICE,
        "2406.19973",
        "0.712 [0.700, 0.720]",
        "images 5",
        "One more.",
        "What the judge gets wrong",
        config.model.system_prompt,
        "jobs/self_train.py",
        "padded to a square",
    ):
        assert piece in text, piece
    settings = SelfTrainingConfig.model_validate(
        yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    )
    assert settings.data.source == "wbc" and settings.sft == config.sft and settings.model == config.model


def test_measures_of_a_method_with_many():
    results = {
        "measures": {"tuned": {"strict": S, "format failures": 0.25, "retained": None}},
        "table": "t",
        "counts": {},
    }
    metadata, _ = parts(card(InstructionFreeConfig(), INSTRUCTION_FREE, "tuned", results))
    assert {one.metric_type: one.metric_value for one in metadata.eval_results} == {
        "strict": 0.7123,
        "format_failures": 0.25,
    }
    assert metadata.base_model is None  # bundled: no id that a hub knows


def test_models_are_named_by_their_place_in_the_run(tmp_path):
    run = Run(tmp_path / "run")
    folder = run.path("stages/01-sq_sft/model")
    models = {"base": Model("/elsewhere/base", "h0"), "sft": Model(folder, "h1")}
    publish_models(
        run, SelfTrainingConfig(model={"path": "testbed:base"}), SELF_TRAINING, models, "sft", RESULTS
    )
    assert run.read_json("models.json") == {
        "method": "self_train",
        "tuned": "sft",
        "base": "base",
        "models": {
            "base": {"path": "testbed:base", "hash": "h0"},
            "sft": {"path": "stages/01-sq_sft/model", "hash": "h1"},
        },
    }
    written = tmp_path / "run/stages/01-sq_sft/model/README.md"
    before = written.stat().st_mtime_ns
    publish_models(
        run, SelfTrainingConfig(model={"path": "testbed:base"}), SELF_TRAINING, models, "sft", RESULTS
    )
    assert written.stat().st_mtime_ns == before  # a copy of the model elsewhere stays good
    publish_models(
        run, SelfTrainingConfig(model={"path": "some/base"}), SELF_TRAINING, models, "sft", RESULTS
    )
    assert (
        run.read_json("models.json")["models"]["base"]["path"] == "/elsewhere/base"
        and written.stat().st_mtime_ns > before
    )


def test_a_rating_models_card():
    config = ClinicianPreferenceConfig(data={"source": "/secret/wbc"})
    text = rater_card(
        config,
        config.rater,
        {"train, clinician": 61, "train, model": 1579},
        {"clinician": {"pair_accuracy": S}, "model": None, "pairs": 9, "without rating": 1},
        "The clinicians were simulated.",
    )
    metadata, body = parts(text)
    assert {one.metric_type: one.metric_value for one in metadata.eval_results} == {
        "clinician_pairs_ordered_as_judged": 0.7123
    }
    for piece in (
        NOT_A_DEVICE,
        "2406.13173",
        "0.712 [0.700, 0.720]",
        "- train, clinician: 61",
        "The clinicians were simulated.",
        "RatingModel.from_pretrained",
        "their mistakes included",
    ):
        assert piece in body, piece
    assert "secret" not in text
    assert (
        RaterConfig.model_validate(yaml.safe_load(body.partition("```yaml\n")[2].partition("```")[0]))
        == config.rater
    )
    assert (
        parts(
            rater_card(
                config,
                config.rater,
                {},
                {"clinician": None, "model": None, "pairs": 0, "without rating": 0},
                "",
            )
        )[0].eval_results
        is None
    )


def test_no_number_no_metadata():
    assert parts(card(SelfTrainingConfig(), SELF_TRAINING, "dpo-1", RESULTS))[0].eval_results is None


@pytest.mark.parametrize("place", ["s3://bucket/secret/base", "/secret/base", "./secret/base"])
def test_places_are_not_told(place):
    text = card(SelfTrainingConfig(model={"path": place}), SELF_TRAINING, "sft", RESULTS)
    assert "secret" not in text and "# base, self-training (sft)" in text


def settings_in(text):
    return yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (
            "postgresql+psycopg://clinic:s3cret@db.secret.example:5432/judgements?sslmode=require",
            "judgements",
        ),
        ("postgresql+psycopg://clinic:s3/cret@secret/judgements", "judgements"),
        ("postgresql+psycopg://clinic@secret/judgements?password=s3cret", "judgements"),
        ("postgresql+psycopg://clinic:s3cret@secret", "postgresql+psycopg"),
        ("sqlite:////secret/judgements.db", "judgements.db"),
    ],
)
def test_of_a_database_only_its_name_is_told(source, told):
    text = card(
        ClinicianPreferenceConfig(clinicians={"kind": "database", "source": source}),
        CLINICIAN_PREFERENCE,
        "selected",
        RESULTS,
    )
    assert settings_in(text)["clinicians"]["source"] == told
    assert not re.search(r"s3/?cret|secret", text)


def test_no_other_field_tells_a_place():
    config = SelfTrainingConfig(
        model={"path": "org/base", "chat_template": "secret/llava.jinja"},
        data={"source": "secret/wbc", "images": "/secret/scans/"},
        judge={"base_url": "http://me:secret@judge.secret.example:8000/v1", "model": "s3://secret/judges/7b"},
        cluster={"address": "ray://10.0.0.5:10001", "data_labels": {"zone": "secret"}},
        sft={"place": {"labels": {"zone": "secret"}}},
        self_play={"describe_prompt": "As in https://me:secret@x.example/how, describe it."},
    )
    text = card(config, SELF_TRAINING, "sft", RESULTS)
    told = settings_in(text)
    assert "secret" not in text and "10.0.0.5" not in text
    assert (told["model"]["path"], told["model"]["chat_template"], told["data"]["images"]) == (
        "org/base",
        "llava.jinja",
        "scans",
    ), "a hub id is public"
    assert (told["judge"]["base_url"], told["judge"]["model"], told["self_play"]["describe_prompt"]) == (
        "v1",
        "7b",
        "As in https://me@x.example/how, describe it.",
    )
    assert SelfTrainingConfig.model_validate(told).data.source == "wbc"


def test_what_is_everybodys_is_told():
    told = settings_in(card(ClinicianPreferenceConfig(judge={}), CLINICIAN_PREFERENCE, "selected", RESULTS))
    assert (told["judge"]["base_url"], told["judge"]["model"], told["demonstrations"]["encoder"]) == (
        "https://api.openai.com/v1",
        "gpt-4o",
        "testbed:encoder",
    )


@pytest.mark.parametrize("cls", [SelfTrainingConfig, InstructionFreeConfig, ClinicianPreferenceConfig])
def test_every_field_that_names_a_place_is_known(cls):
    """By its description: a new one must not stand in cards as it is."""

    def unknown(section):
        for name, inner in fields_of(section).items():
            field = section.model_fields[name]
            if name not in _WHERE and inner:
                yield from unknown(inner)
            elif (
                name not in _WHERE | _PLACES
                and str in (field.annotation, *typing.get_args(field.annotation))
                and re.search(
                    r"\b(folder|file|path|address|URL|hub id|s3)\b", field.description, re.IGNORECASE
                )
            ):
                yield f"{section.__name__}.{name}"

    assert not list(unknown(cls)) and _LOCAL <= _PLACES
