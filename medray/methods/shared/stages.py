"""The stages of self-training, each a function of the stage's folder, the config and what came before.

They only place work: rows move through Ray Data, training runs in Ray Train, the rules live in
medray.inference, medray.train and medray.evaluation. Nothing here holds rows.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from medray.config import (
    ClinicianPreferenceConfig,
    EndpointConfig,
    EvaluateJobConfig,
    InstructionFreeConfig,
    ModelConfig,
    SelfTrainingConfig,
    StrongModelConfig,
    TrainConfig,
)
from medray.config.recipes import read_template
from medray.errors import StageError
from medray.running.run import Run, Stage, digest
from medray.running.set_aside import SetAside, check_set_aside, check_something, set_aside_in

logger = logging.getLogger("medray")

PAIR_RULES = {"min_margin", "min_chosen_score"}  # the fields of JudgeConfig that only the pairs stage reads
# the fields of StrongModelConfig that only a local model has: see own_inputs
OWN = ("model_settings", "engine")
# the kinds of judge whose model is a folder of ours, not a name at an endpoint
LOCAL_JUDGES = ("vllm", "rater")
AnyMethodConfig = SelfTrainingConfig | InstructionFreeConfig | ClinicianPreferenceConfig
CHECKED_HERE = 2**30  # bytes of a model that the job's own process reads
BLOCKS_PER_ENCODER = 12  # of rows under way between files and training workers: read ahead, in work, encoded


@dataclass(frozen=True)
class Model:
    """A model of the run: where it lies and the hash of its weights."""

    path: str
    hash: str


def model_inputs(config: ModelConfig) -> dict[str, Any]:
    """What work with a model depends on beside its weights: a template's text, not the name of its file."""
    template = read_template(config.chat_template) if config.chat_template else None
    return {**config.outcome("path"), "chat_template": template}


def asked_inputs(config: AnyMethodConfig | EvaluateJobConfig) -> dict[str, Any]:
    """What answers of a model in an engine depend on beside its weights and the questions."""
    return {"settings": model_inputs(config.model), "engine": config.engine.outcome()}


def own_inputs(config: StrongModelConfig) -> dict[str, Any] | None:
    """What replies of a local model beside the tuned one depend on beside its weights and the rest of its
    section; None of other kinds.
    """
    return (
        {"settings": model_inputs(config.own_model()), "engine": config.engine.outcome()}
        if config.kind == "vllm"
        else None
    )


def judge_inputs(
    config: SelfTrainingConfig | ClinicianPreferenceConfig | EvaluateJobConfig,
) -> dict[str, Any]:
    """What a verdict depends on, with the weights of a local judge: how requests are sent and paid, and
    what is later made of the scores, are left out.
    """
    weights = local_model(config.judge.model).hash if config.judge.kind in LOCAL_JUDGES else None
    return {
        "config": config.judge.outcome(*PAIR_RULES, *OWN),
        "weights": weights,
        "local": own_inputs(config.judge),
    }


def shared_stage(
    run: Run, shared: Run, name: str, inputs: dict[str, Any], work: Callable[[Stage], dict[str, Any]]
) -> dict[str, Any]:
    """A stage in the directory that runs share; there its name holds what it depends on, so that runs of
    other settings keep theirs.
    """
    return shared.stage(name if shared is run else f"{name}-{digest(inputs)}", inputs, work)


def resolve_base(config: AnyMethodConfig) -> Model:
    """The model to tune.

    Raises ConfigError where it cannot be tuned; of a local folder preflight has said so before.
    """
    from medray.data.model_check import check_support

    if not config.model.path.startswith("testbed:"):
        instruction_free = isinstance(config, InstructionFreeConfig)
        check_support(
            config.model.path,
            config.model,
            not instruction_free,
            "description" if instruction_free else "sft",
        )
    return local_model(config.model.path)


def local_model(reference: str) -> Model:
    """A model of ours by its reference (folder, address, hub id or testbed:...)."""
    from medray.models.vlm import model_hash, resolve_model

    path = resolve_model(reference)
    return Model(path, model_hash(path))


def exported(manifest: dict[str, Any]) -> Model:
    return Model(manifest["outputs"]["model"], manifest["outputs"]["model_hash"])


def check_weights(model: Model) -> None:
    """Hold a model that a stage is about to load against its recorded hash, once per stage; large ones in a
    task of the cluster.

    Raises StageError naming the damaged file.
    """
    import os

    import ray

    from medray.models.fingerprint import bytes_of, check_model

    if not ray.is_initialized() or (os.path.isdir(model.path) and bytes_of(model.path) < CHECKED_HERE):
        check_model(model.path, model.hash)
        return
    try:
        ray.get(ray.remote(check_model).options(num_cpus=0.5).remote(model.path, model.hash))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, StageError):
            raise StageError(str(error.cause)) from None
        raise


def checked_account(stage: Stage, config: AnyMethodConfig, *folder: str) -> dict[str, Any]:
    """What a data stage, or a folder of it, saw (medray.methods.shared.training_sets.read_account). Logs what
    the images serve for.

    Raises StageError if more of the records, or of the images that were read, were set aside than the job
    allows.
    """
    from medray.ingest.uses import BAD_RECORDS, RECORDS, is_duplicate
    from medray.methods.shared.training_sets import BAD_IMAGES, READ, read_account

    account = read_account(stage.path(*folder))
    logger.info(
        "what the images%s serve for:\n%s", "".join(f" of {name}" for name in folder), account["uses"]
    )
    found = set_aside_in(
        stage.path(*folder, "quarantine"),
        lambda row: (None if is_duplicate(row["reason"]) else row["reason"],),
        ("reason",),
    )
    found.files.clear()  # each attempt reads the source anew
    numbers = account["set_aside"]
    for what, rows, bad in (
        ("records of the source", RECORDS, BAD_RECORDS),
        ("records whose image was read", READ, BAD_IMAGES),
    ):
        check_set_aside(
            what,
            numbers[rows],
            found,
            config.max_quarantined,
            stage.path(*folder, "quarantine"),
            number=numbers[bad],
        )
    return account


def tune(
    stage: Stage,
    config: SelfTrainingConfig | ClinicianPreferenceConfig,
    model: Model,
    rows_uri: str,
    objective: str,
    train: TrainConfig,
    held_out: str | None = None,
) -> dict[str, Any]:
    """Train on the rows, merge adapters, export the model; keeps the metrics of every step.

    Args:
        held_out: conversations of an evaluation loss (default: those of the run's data stage).
    """
    from medray.storage.shards import count_rows
    from medray.train.worker import check_trained, run_training

    check_weights(model)
    held_out = held_out or stage.run.path("stages", "00-data", "eval_conversations")
    has_eval = objective == "sft" and train.eval_rows > 0 and count_rows(held_out) > 0
    result = run_training(
        stage.path("train"),
        encoded(rows_uri, model.path, config, objective),
        encoded(held_out, model.path, config, "sft") if has_eval else None,
        rows=count_rows(rows_uri),
        model_dir=model.path,
        model_config=config.model,
        train_config=train,
        objective=objective,
        max_quarantined=config.max_quarantined,
    )
    keep_logs(stage, result)
    check_trained(result, config.max_quarantined, stage.path("quarantine.jsonl"))
    exported = export(stage, config, model, train, result.checkpoint)
    return {**exported, "counts": result.counts, "metrics": stage.path("metrics.jsonl")}


def export(
    stage: Stage, config: AnyMethodConfig, base: Model, train: TrainConfig, checkpoint: Any
) -> dict[str, Any]:
    """Merge a checkpoint's adapters and write the model into the stage, where a training worker has room:
    a 7B model takes 40 GB of host memory for it, and the job's own process may be on a small head.
    Returns `model` and `model_hash`.
    """
    import ray

    options = {**train.place.options, "num_cpus": train.cpus_per_worker}
    task = (
        ray.remote(_export)
        .options(**options)
        .remote(stage.run.uri, stage.folder, base.path, config.model.model_dump(), train, checkpoint)
    )
    return {"model": stage.path("model"), "model_hash": ray.get(task)}


def _export(
    run_uri: str, folder: str, base: str, model_config: dict[str, Any], train: TrainConfig, checkpoint: Any
) -> str:
    from medray.config import ModelConfig
    from medray.models.vlm import model_hash
    from medray.train.worker import export_merged

    def made(scratch: str) -> str:
        export_merged(checkpoint, base, scratch, ModelConfig.model_validate(model_config), train)
        return model_hash(scratch)  # before it is sent anywhere

    return Stage(Run(run_uri), folder).publish("model", made)


def keep_logs(stage: Stage, result: Any) -> None:
    """metrics.jsonl and quarantine.jsonl of a medray.train.worker.TrainResult, in the stage's folder."""
    stage.run.write_text(result.metrics, stage.folder, "metrics.jsonl")
    quarantine = "".join(
        json.dumps({"sample_id": sample, "reason": reason}) + "\n"
        for sample, reason in result.quarantine.items()
    )
    stage.run.write_text(quarantine, stage.folder, "quarantine.jsonl")


def encoded(
    rows_uri: str, model_dir: str, config: AnyMethodConfig, kind: str, train: TrainConfig | None = None
) -> Any:
    """Rows of conversations ("sft"), pairs ("dpo") or descriptions ("description", with their stage's
    `train`) as encoded rows, by tasks on Data workers.
    """
    import ray.data
    from ray.data import ExecutionResources

    from medray.data.collate import Encoder
    from medray.storage.shards import BLOCK_BYTES, read_rows, small_blocks

    arguments = {
        "model_path": model_dir,
        "model_config": config.model.model_dump(),
        "data_config": config.data.model_dump(),
        "kind": kind,
    }
    if train is not None:
        arguments["train_config"] = train.model_dump()
    # Reading is much faster than encoding: readers without bounds of their own fill half of every object
    # store first.
    with small_blocks():
        dataset = read_rows(
            rows_uri, num_cpus=config.data.read_cpus, readers=config.data.encoders
        ).map_batches(
            Encoder,
            fn_constructor_kwargs=arguments,
            batch_size=64,
            batch_format="pyarrow",
            num_cpus=config.data.read_cpus,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=config.data.encoders),
        )
    limits = ExecutionResources.for_limits(
        object_store_memory=config.data.encoders * BLOCKS_PER_ENCODER * BLOCK_BYTES
    )
    dataset.context.execution_options.resource_limits = limits
    # Ray Data's second brake compares an encoder's output with what the consumer has fetched: near the limit
    # the two wait for each other, half a minute at a time (seen in Ray 2.60). The limit alone is enough.
    dataset.context.downstream_capacity_backpressure_ratio = None
    return dataset


def verify(run: Run, name: str, config: AnyMethodConfig, model: Model, data: dict[str, Any]) -> None:
    """vLLM and transformers give the same greedy tokens for the exported model, or the run stops here."""
    if not config.verify.rows:
        return
    from medray.inference.verify import verify_on_cluster
    from medray.storage.shards import read_rows

    def work(_: Stage) -> dict[str, Any]:
        check_weights(model)
        rows = read_rows(
            data["outputs"]["questions"], ["sample_id", "image", "question"], config.data.read_cpus
        ).take(2 * config.verify.rows)
        report = verify_on_cluster(model.path, rows, config.verify, config.model, config.data, config.engine)
        return {"counts": report}

    run.stage(
        name,
        {"model": model.hash, "config": config.verify, "data": data["hash"], **asked_inputs(config)},
        work,
    )


def ledger_of(stage: Stage, config: EndpointConfig) -> dict[str, Any]:
    """What the requests behind the stage's rows took, in tokens and USD."""
    from medray.inference.judges.judges import cost_ledger
    from medray.storage.shards import stored_rows

    return cost_ledger(
        stored_rows(stage.path("rows"), ["requests", "retries", "prompt_tokens", "completion_tokens"]), config
    )


def check_judged(
    stage: Stage,
    config: SelfTrainingConfig | ClinicianPreferenceConfig | EvaluateJobConfig,
    differ: bool = False,
) -> None:
    """Raise StageError if a judge gave no verdict on any of the stage's rows (records.JUDGED), or failed on
    too many.

    Answers that are empty or equal to each other are not judged, and are no rows set aside.

    Args:
        differ: whether some answers must differ.
    """
    from medray.inference.judges.base import EMPTY, IDENTICAL
    from medray.storage.shards import rows_with_files

    found, asked, given = SetAside(), 0, 0
    for file, row in rows_with_files(stage.path("rows"), ["sample_id", "error", "verdicts"]):
        reasons = (
            [row["error"]] if row["error"] is not None else [one["error"] for one in row["verdicts"] or ()]
        )
        for reason in reasons:
            given += reason is None
            if reason is not None and reason not in (EMPTY, IDENTICAL):
                found.add(reason, row["sample_id"])
                found.files.add(file)
            asked += reason not in (EMPTY, IDENTICAL)
    if asked or differ:
        check_something(
            "verdict",
            given,
            found,
            "no two answers to a question differ; raise self_play.answer.temperature or question more images",
        )
    # of a row's several verdicts
    check_set_aside("verdicts", asked, found, config.max_quarantined, stage.path("rows"), few=1)


def check_answered(uri: str, rows: int, limit: float, id_column: str = "sample_id") -> None:
    """Raise StageError if no question of a folder of answers (records.ANSWERED) has one, or too many have
    none.
    """
    found = set_aside_in(uri, id_column=id_column)
    check_something("answer", rows - found.total, found, "there is no question to answer")
    check_set_aside("questions", rows, found, limit, uri)


def engine_arguments(config: AnyMethodConfig | EvaluateJobConfig, model: Model) -> dict[str, Any]:
    """Constructor arguments every engine actor takes, as plain data."""
    return {
        "model": model.path,
        "model_config": config.model.model_dump(),
        "data_config": config.data.model_dump(),
        "engine_config": config.engine.model_dump(),
    }


def _tally(uri: str, columns: list[str], count: Callable[[dict[str, Any]], dict[str, int]]) -> dict[str, int]:
    from collections import Counter

    from medray.storage.shards import stored_rows

    total: Counter[str] = Counter()
    for row in stored_rows(uri, columns):
        total.update(count(row))
    return dict(total)
