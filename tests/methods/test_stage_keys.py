"""Every field of every job's configuration changes the keys of exactly the stages that depend on it.

The jobs' own code asks for their stages; only a run that works nothing off and notes the keys stands in for
the real one.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import shutil
import typing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from medray import records
from medray.config import (
    ClinicianPreferenceConfig,
    EvaluateJobConfig,
    InstructionFreeConfig,
    PrepareDataConfig,
    Section,
    SelfTrainingConfig,
)
from medray.running.run import digest


class Stop(Exception):
    """All stages were asked for."""


class Outputs(dict):
    """What a stage that did nothing returns: counts of one, and its name for everything else."""

    def __init__(self, stage: str, known: dict[str, Any]):
        super().__init__({name: value for name, value in known.items() if value is not None})
        self.stage = stage

    def __missing__(self, name: str) -> Any:
        return (
            Counts()
            if name in ("counts", "quality", "account", "tallies", "digests")
            else f"{self.stage}/{name}"
        )


class Counts(dict):
    def __missing__(self, name: str) -> int:
        return 1


class KeyRun:
    """Notes the key of every stage that a job asks for, and does none.

    Args:
        upstream: whether a stage's key reaches the stages after it; else only what a stage itself reads
            changes its key.
    """

    def __init__(self, known: dict[str, Any], upstream: bool = False):
        self.keys: dict[str, str] = {}
        self.uri, self.timeline, self._known, self._upstream = "run", [], known, upstream

    def stage(
        self, name: str, inputs: dict[str, Any], work: Any, parts: dict[str, str] | None = None
    ) -> dict[str, Any]:
        self.keys[name] = digest({"inputs": inputs, "parts": parts})
        made = self.keys[name] if self._upstream else name
        return {"hash": made, "outputs": Outputs(made, self._known.get(name, {})), "seconds": 0.0}

    def reread(self, read: Any, *_: str) -> Any:
        return read()

    def path(self, *parts: str) -> str:
        return "/".join((self.uri, *parts))

    def write_config(self, config: Section) -> None: ...

    def write_json(self, *_: Any) -> None:
        raise Stop


def stop(*_: Any, **__: Any) -> None:
    raise Stop


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """A folder with one open question: judges are asked about open ones only."""
    folder = tmp_path_factory.mktemp("questions")
    row = {
        "sample_id": "q",
        "image_id": "i",
        "question": "What?",
        "reference": "That.",
        "answer_type": "open",
        "benchmark": "vqa-rad",
        "key": "q",
    }
    pq.write_table(pa.Table.from_pylist([row], schema=records.BENCHMARK_QUESTION), folder / "part.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Other models, templates and folders than the default ones, by the last name of their field."""
    from medray.models.vlm import resolve_model

    folder = tmp_path_factory.mktemp("places")
    shutil.copytree(resolve_model("testbed:encoder"), folder / "encoder")
    config = folder / "encoder/config.json"
    config.write_text(config.read_text().replace("{", '{"another": 1,', 1))
    (folder / "template.jinja").write_text("{{ messages }}")
    return {
        "encoder": str(folder / "encoder"),
        "chat_template": str(folder / "template.jinja"),
        "model": "testbed:base",
        "path": "testbed:expert",
        "source": str(folder),
    }


@pytest.fixture(scope="module")
def keys_of(questions):
    """(job, configuration) -> the key of each stage, by its name."""
    from medray.evaluation import chat_score
    from medray.methods.clinician_preference import pipeline as clinician_preference
    from medray.methods.evaluate import pipeline as benchmarking
    from medray.methods.instruction_free import pipeline as instruction_free
    from medray.methods.prepare_data import pipeline as data_preparation
    from medray.methods.self_train import pipeline as self_training
    from medray.methods.shared import benchmark_answers, judged_models
    from medray.models import vlm

    known = {"00-data": {"questions": questions}, "02-vqa-rad-questions": {"rows": questions}}
    patch = pytest.MonkeyPatch()
    patch.setattr(vlm, "model_hash", functools.cache(vlm.model_hash))
    patch.setattr(judged_models, "win_rate", lambda *_: {})
    patch.setattr(chat_score, "chat_score", lambda *_: {})
    methods = {
        "self_training": self_training,
        "instruction_free": instruction_free,
        "clinician_preference": clinician_preference,
    }
    for name, module in methods.items():
        patch.setattr(module, "write_report", stop)
        patch.setattr(module, f"check_{name}", lambda _: None)

    def evaluate(config: EvaluateJobConfig) -> None:
        models = [
            benchmark_answers.Asked("local", path="testbed:base"),
            benchmark_answers.Asked("remote", api="gpt-4o"),
        ]
        benchmarking.evaluate_models(config, models, {"vqa-rad": questions}, "run")

    jobs = {
        "self_train": (self_training, lambda config: self_training.self_train(config, "run")),
        "instruction_free": (
            instruction_free,
            lambda config: instruction_free.instruction_free(config, "run"),
        ),
        "clinician_preference": (
            clinician_preference,
            lambda config: clinician_preference.clinician_preference(config, "run"),
        ),
        "evaluate": (benchmarking, evaluate),
        "prepare_data": (data_preparation, lambda config: data_preparation.prepare_dataset(config, "run")),
    }

    def keys(job: str, config: Section, upstream: bool = False) -> dict[str, str]:
        module, work = jobs[job]
        run = KeyRun(known, upstream)
        patch.setattr(module, "Run", lambda _: run)
        patch.setattr(module, "ray_session", lambda _: contextlib.nullcontext())
        patch.setattr(module, "held", lambda *_: contextlib.nullcontext())
        with contextlib.suppress(Stop):
            work(config)
        return run.keys

    yield keys
    patch.undo()


LOCAL = {"kind": "vllm", "model": "testbed:expert"}
CONFIGS: dict[str, Section] = {
    "self_train": SelfTrainingConfig.model_validate(
        {"rounds": 2, "judge": LOCAL, "data": {"unlabelled_per_round": "fresh"}}
    ),
    "instruction_free": InstructionFreeConfig.model_validate({"data": {"label_fraction": 0.5}}),
    "clinician_preference": ClinicianPreferenceConfig.model_validate(
        {
            "data": {"label_fraction": 0.5},
            "generate": LOCAL,
            "rate": LOCAL,
            "judge": LOCAL,
            "weights": [1, 2],
            "rater": {"train_on": "mixture"},
        }
    ),
    "evaluate": EvaluateJobConfig.model_validate({"judge": LOCAL}),
    "prepare_data": PrepareDataConfig(),
}
NONE = ""
LOOP = (
    "num_workers cpus_per_worker gpus_per_worker place.* threads zero_stage gradient_checkpointing "
    "checkpoint_every keep_checkpoints max_failures"
)
ENGINE = (
    "actors cpus_per_actor gpus_per_actor place.* tensor_parallel_size memory_utilization kv_cache_gib "
    "enforce_eager max_num_seqs rows_per_task rows_in_flight"
)
OWN_ENGINE = ENGINE.replace("place.*", "place")
ENDPOINT = "key_env concurrency retries give_up timeout rename usd_per_million_input usd_per_million_output"
# The limits say which images are set aside when the source is read; what trains and answers reads the images
# that are left. For each job: fields (the first pattern that fits counts) -> the stages whose own key changes
# ("among": some of them do). A stage after those gets another key by theirs.
TABLE: dict[str, dict[str, str]] = {
    "self_train": {
        "cluster.* max_quarantined": NONE,
        "data.unlabelled_per_round": "?1-self_play",
        "data.read_cpus data.encoders": NONE,
        "data.*": "00-data",
        "model.path": "01-sq_sft 90-evaluate-base",
        "model.*": "01-sq_sft ?1-verify ?6-verify ?1-self_play ?4-reference ?5-dpo 90-evaluate-*",
        "sft.seed sft.eval_rows": "00-data 01-sq_sft",
        "sft.micro_batch sft.accumulation sft.global_batch sft.num_workers": "01-sq_sft",
        "dpo.micro_batch dpo.accumulation dpo.global_batch dpo.num_workers": "?5-dpo",
        **{" ".join(f"{section}.{name}" for name in LOOP.split()): NONE for section in ("sft", "dpo")},
        "dpo.reference_batch dpo.reference_workers": NONE,
        "sft.*": "01-sq_sft",
        "dpo.*": "?5-dpo",
        "self_play.*": "?1-self_play",
        " ".join(f"engine.{name}" for name in ENGINE.split()): NONE,
        "engine.*": "?1-verify ?6-verify ?1-self_play 90-evaluate-*",
        " ".join(f"judge.engine.{name}" for name in OWN_ENGINE.split()): NONE,
        " ".join(f"judge.{name}" for name in ENDPOINT.split()): NONE,
        "judge.min_margin judge.min_chosen_score": "?3-pairs",
        "judge.*": "?2-judge",
        "verify.*": "?1-verify ?6-verify",
        "evaluate.kinds evaluate.seed evaluate.max_images": "00-data 90-evaluate-*",
        "evaluate.arms": "among 90-evaluate-*",  # some are not made, others compared with another
        "evaluate.*": "90-evaluate-*",
        "rounds": "among *",
        "seed": "00-data 01-sq_sft ?1-self_play ?2-judge ?5-dpo",
    },
    "instruction_free": {
        "cluster.* max_quarantined": NONE,
        # the method reads no unlabelled image and makes no dialogue
        "data.unlabelled_per_round data.max_unlabelled data.turns": NONE,
        "data.read_cpus data.encoders": NONE,
        "data.*": "00-data",
        "model.path": "01-warm_up 02-tune 90-evaluate-base",
        "model.*": "01-warm_up 02-tune 03-verify 90-evaluate-*",
        "tune.seed tune.eval_rows": "00-data 02-tune",
        "warm_up.micro_batch warm_up.accumulation warm_up.global_batch warm_up.num_workers": "01-warm_up",
        "tune.micro_batch tune.accumulation tune.global_batch tune.num_workers": "02-tune",
        **{" ".join(f"{section}.{name}" for name in LOOP.split()): NONE for section in ("warm_up", "tune")},
        "warm_up.*": "01-warm_up",
        "tune.instruction": "01-warm_up 02-tune",
        "tune.*": "02-tune",
        " ".join(f"engine.{name}" for name in ENGINE.split()): NONE,
        "engine.*": "03-verify 90-evaluate-*",
        "verify.*": "03-verify",
        (
            "evaluate.kinds evaluate.seed evaluate.max_images evaluate.describe_prompt evaluate.general "
            "evaluate.general_split evaluate.max_general"
        ): "00-data 90-evaluate-*",
        "evaluate.arms": NONE,  # of self-training; this method always evaluates base and tuned
        "evaluate.*": "90-evaluate-*",
        "seed": "00-data 01-warm_up 02-tune",
    },
    "clinician_preference": {
        "cluster.* max_quarantined": NONE,
        "data.unlabelled_per_round": NONE,  # there are no rounds
        "data.read_cpus data.encoders": NONE,
        "data.* captions.*": "00-data",
        "model.path": "11-tune-* 90-evaluate-base",
        "model.*": "11-tune-* 12-verify-* 90-evaluate-*",
        "demonstrations.encoder": "01-embed",
        "demonstrations.precision": "01-embed",
        (
            "demonstrations.batch demonstrations.actors demonstrations.cpus_per_actor "
            "demonstrations.gpus_per_actor demonstrations.place.*"
        ): NONE,
        "demonstrations.*": "02-draw",
        "clinicians.*": "04-clinicians",
        **{
            " ".join(f"{section}.{name}" for name in ENDPOINT.split()): NONE
            for section in ("generate", "rate", "judge")
        },
        **{
            " ".join(f"{section}.engine.{name}" for name in OWN_ENGINE.split()): NONE
            for section in ("generate", "rate", "judge")
        },
        "generate.answers": "05-generate",
        "generate.seed": "00-data 03-candidates 05-generate",
        "generate.*": "03-candidates 05-generate",
        "rate.*": "06-rate",
        "pairs.*": "07-pairs",
        "rater.micro_batch rater.accumulation rater.global_batch rater.num_workers": "08-rater*",
        " ".join(f"rater.{name}" for name in LOOP.split()): NONE,
        "rater.held_out_fraction rater.split_seed": "07-pairs 08-rater*",
        "rater.clinician_weight": NONE,  # weights takes its place
        "rater.train_on": "among *",  # one rating model instead of one for each weight
        "rater.*": "08-rater*",
        "score.actors score.cpus_per_actor score.gpus_per_actor score.place.*": NONE,
        "score.batch score.rows_per_task": NONE,
        "score.*": "08-rater* 09-score",
        "select.order": NONE,  # each arm says its own
        "select.*": "10-select-*",
        "tune.micro_batch tune.accumulation tune.global_batch tune.num_workers": "11-tune-*",
        " ".join(f"tune.{name}" for name in LOOP.split()): NONE,
        "tune.eval_rows": "00-data 11-tune-*",
        "tune.*": "11-tune-*",
        " ".join(f"engine.{name}" for name in ENGINE.split()): NONE,
        "engine.*": "12-verify-* 90-evaluate-*",
        "verify.*": "12-verify-*",
        "evaluate.kinds evaluate.seed evaluate.max_images": "00-data 90-evaluate-*",
        "evaluate.bootstrap": "08-rater* 90-evaluate-*",
        "evaluate.arms": "among *",
        "evaluate.*": "90-evaluate-*",
        "judge.min_margin judge.min_chosen_score": NONE,  # of pairs; a win rate has none
        "judge.*": "30-*",
        "with_demonstrations": "05-generate",
        "weights": "among *",
        "seed": "00-data 02-draw 03-candidates 04-clinicians 05-generate 06-rate 07-pairs 08-rater* "
        "10-select-* 11-tune-*",
    },
    "evaluate": {
        "cluster.* max_quarantined": NONE,
        "model.path": NONE,  # --model names the models
        "model.*": "05-answers-local 10-vqa-rad-local",
        "data.source data.format data.testbed_val_fraction": NONE,  # --data and --benchmark give them
        (
            "data.read_cpus data.encoders data.label_fraction data.max_labelled data.max_unlabelled "
            "data.unlabelled_per_round data.turns"
        ): NONE,
        "data.max_image_bytes data.max_image_pixels data.max_aspect": "01-vqa-rad-samples",
        "data.min_image_side data.rows_per_shard": "01-vqa-rad-samples",
        "data.*": "00-vqa-rad-index",
        " ".join(f"engine.{name}" for name in ENGINE.split()): NONE,
        "engine.*": "05-answers-local 10-vqa-rad-local",
        " ".join(f"judge.engine.{name}" for name in OWN_ENGINE.split()): NONE,
        # a benchmark's definition has its kinds; --model names the arms
        "evaluate.kinds evaluate.arms": NONE,
        "evaluate.max_images": "02-vqa-rad-questions 20-*",
        "evaluate.max_tokens": "05-answers-* 10-vqa-rad-* 20-*",
        "evaluate.seed": "02-vqa-rad-questions 05-answers-remote 10-vqa-rad-remote 20-*",
        "evaluate.*": "20-*",
        "api.model api.max_tokens": NONE,  # --model names it, evaluate.max_tokens bounds it
        " ".join(f"api.{name}" for name in ENDPOINT.split()): NONE,
        "api.*": "05-answers-remote 10-vqa-rad-remote",
        "option_likelihood": "05-answers-local 10-vqa-rad-local",
        " ".join(f"judge.{name}" for name in ENDPOINT.split()): NONE,
        "judge.min_margin judge.min_chosen_score": NONE,
        "judge.*": "30-*",
        "text_only": "05-answers-* 10-vqa-rad-*",
    },
    "prepare_data": {
        "cluster.* max_quarantined": NONE,
        (
            "data.read_cpus data.encoders data.label_fraction data.max_labelled data.max_unlabelled "
            "data.unlabelled_per_round data.turns"
        ): NONE,
        "data.max_image_bytes data.max_image_pixels data.max_aspect": "02-shards",
        "data.min_image_side data.rows_per_shard": "02-shards",
        "data.*": "01-index",
        "leaks.*": "04-leaks",
    },
}


def leaves(section: Section, at: str = "") -> list[str]:
    """The dotted names of all fields; of an optional section that is there, its own."""
    found = []
    for name in type(section).model_fields:
        value = getattr(section, name)
        found += leaves(value, f"{at}{name}.") if isinstance(value, Section) else [f"{at}{name}"]
    return found


def another(annotation: Any, value: Any, path: str, places: dict[str, str]) -> Any:
    """A value of the field's type that it does not have."""
    name = path.rpartition(".")[2]
    if name in places and places[name] != value and (value is None or isinstance(value, str)):
        return places[name]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return another(arguments[0], value, path, places)
    if origin is typing.Literal:
        return next(choice for choice in arguments if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1 if isinstance(value, int) else value / 2 + 0.01
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, dict):
        return {**value, "another": 1}
    if isinstance(value, tuple):
        return (
            value[:-1]
            if len(value) > 1 and not isinstance(value[0], int)
            else tuple(one + 1 for one in value) or ("another",)
        )
    kinds = [kind for kind in arguments if kind is not type(None)]
    kind = kinds[0] if kinds else annotation
    while typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    if isinstance(kind, type) and issubclass(kind, Section):
        return kind()
    if typing.get_origin(kind) is typing.Literal:
        return typing.get_args(kind)[0]
    return {int: 7, float: 0.7, str: "another", bool: True, dict: {"another": 1}, tuple: (2, 3)}[
        typing.get_origin(kind) or kind
    ]


def changed(config: Section, path: str, places: dict[str, str]) -> Section:
    """The configuration with one field changed; where other fields then contradict it, as it is,
    unchecked.
    """
    copy = config.model_copy(deep=True)
    section, *names = copy, *path.split(".")
    for name in names[:-1]:
        section = getattr(section, name)
    field = type(section).model_fields[names[-1]]
    annotation = typing.Annotated[field.annotation, 0] if field.annotation is not None else Any
    section.__dict__[names[-1]] = another(annotation, getattr(section, names[-1]), path, places)
    if "accumulation" in names or "global_batch" in names:
        return copy
    try:
        return type(config).model_validate(copy.model_dump())
    except ValidationError:
        return copy


def stages_of(job: str, path: str, names: set[str]) -> tuple[set[str], bool]:
    """The stages whose own key a field changes, by the table, and whether it may be some of them only."""
    for patterns, stages in TABLE[job].items():
        if any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns.split()):
            return {
                name
                for name in names
                for stage in stages.removeprefix("").split()
                if fnmatch.fnmatchcase(name, stage)
            }, stages.startswith("among")
    raise AssertionError(
        f"{job}: the field {path} is in no line of TABLE. Does it change what a stage makes? Then name those "
        "stages there. If it only says how, where or at what price "
        "work is done, add it to `execution_only` of its section (medray/config) and give it a line with "
        "NONE."
    )


@pytest.mark.parametrize("job", list(CONFIGS))
def test_every_field_changes_the_keys_of_the_stages_that_depend_on_it(job, keys_of, places):
    config = CONFIGS[job]
    before = keys_of(job, config)
    wrong = []
    for path in leaves(config):
        after = keys_of(job, changed(config, path, places))
        names = before.keys() | after.keys()
        found = {name for name in names if before.get(name) != after.get(name)}
        expected, some = stages_of(job, path, names)
        if found != expected and not (some and found and found < expected):
            wrong.append(f"{path}: changes {sorted(found)}, not {sorted(expected)}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("job", list(CONFIGS))
def test_no_line_of_the_table_is_left_over(job):
    paths = leaves(CONFIGS[job])
    unused = [
        pattern
        for patterns in TABLE[job]
        for pattern in patterns.split()
        if not any(fnmatch.fnmatchcase(path, pattern) for path in paths)
    ]
    assert unused == []


@pytest.mark.parametrize(
    ("job", "path", "same"),
    [
        ("self_train", "data.source", ()),
        ("self_train", "model.path", ("00-data",)),
        (
            "self_train",
            "dpo.beta",
            (
                "00-data",
                "01-sq_sft",
                "01-verify",
                "11-self_play",
                "12-judge",
                "13-pairs",
                "14-reference",
                "90-evaluate-base",
                "90-evaluate-sft",
            ),
        ),
        ("instruction_free", "data.source", ()),
        ("clinician_preference", "data.source", ()),
        (
            "clinician_preference",
            "select.seed",
            (
                "00-data",
                "01-embed",
                "02-draw",
                "03-candidates",
                "04-clinicians",
                "05-generate",
                "06-rate",
                "07-pairs",
                "08-rater-w1",
                "08-rater-w2",
                "09-score",
                "90-evaluate-base",
            ),
        ),
        ("evaluate", "data.images", ()),
        ("prepare_data", "data.source", ()),
    ],
)
def test_a_stage_that_changes_changes_all_that_come_of_it(job, path, same, keys_of, places):
    """With the hashes of models as the real stages return them: those of what they were made of."""
    config = CONFIGS[job]
    before, after = (
        keys_of(job, config, upstream=True),
        keys_of(job, changed(config, path, places), upstream=True),
    )
    assert {name for name in before if before[name] == after[name]} == set(same)


def test_a_template_counts_by_its_text(keys_of, tmp_path):
    template = tmp_path / "template.jinja"
    config = CONFIGS["self_train"].model_copy(deep=True)
    config.model.chat_template = config.judge.model_settings.chat_template = str(template)
    template.write_text("one")
    before = keys_of("self_train", config)
    template.write_text("another")
    after = keys_of("self_train", config)
    assert {name for name in before if before[name] == after[name]} == {"00-data", "13-pairs", "23-pairs"}


def test_the_files_of_the_jobs_have_no_other_configuration():
    """A new job's configuration is walked here too."""
    jobs = {path.stem for path in Path(__file__).parents[2].joinpath("jobs").glob("*.py")}
    assert jobs == set(CONFIGS)
