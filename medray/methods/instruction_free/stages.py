"""The stages of instruction-free tuning that self-training does not have (medray.methods.shared.stages
holds what both share).
"""

from __future__ import annotations

from typing import Any

import pyarrow.compute as pc

from medray.config import TESTBED_SCENES, InstructionFreeConfig, InstructionFreeTrainConfig
from medray.methods.shared import stages
from medray.methods.shared.benchmark_answers import write_own
from medray.methods.shared.stages import Model
from medray.running.run import Stage

PROXY_FILE = "proxy_instruction.safetensors"
# Fields of `data` that this method does not read.
_NOT_READ = {"max_unlabelled", "unlabelled_per_round", "turns"}


def data_inputs(config: InstructionFreeConfig) -> dict[str, Any]:
    """What the data stage depends on. The seed draws the images to tune on, so it counts only where some
    are left out.
    """
    evaluate = config.evaluate
    return {
        "data": config.data.outcome(*_NOT_READ),
        "seed": config.tune.seed if config.data.label_fraction < 1 else None,
        "prompt": evaluate.describe_prompt,
        "kinds": evaluate.kinds,
        "eval_seed": evaluate.seed,
        "max_eval": evaluate.max_images,
        "eval_rows": config.tune.eval_rows,
        "general": [evaluate.general, evaluate.general_split, evaluate.max_general],
    }


def prepare_data(stage: Stage, config: InstructionFreeConfig) -> dict[str, Any]:
    """Source -> descriptions to tune on, held-out descriptions, sets of questions, quarantine (Parquet
    shards).
    """
    from medray.methods.instruction_free.training_sets import (
        PARTS,
        form_of,
        write_descriptions,
        write_general,
    )

    asked = config.evaluate
    counts = write_descriptions(
        config.data,
        stage.dir,
        asked.describe_prompt,
        asked.kinds,
        config.tune.seed,
        asked.seed,
        asked.max_images,
        config.tune.eval_rows,
    )
    account = stages.checked_account(stage, config)
    general = 0
    if asked.general is not None:
        general = write_general(
            config.data,
            stage.path("general"),
            asked.general,
            asked.general_split,
            asked.kinds,
            asked.seed,
            asked.max_general,
        )
        if asked.general != TESTBED_SCENES:
            stages.checked_account(stage, config, "general")
    return {
        "counts": {**counts, "general": general},
        "account": account,
        "form": form_of(config.data),
        **{part: stage.path(part) for part in PARTS},
        "general": stage.path("general", "questions"),
        # what an export is verified with
        "questions": stage.path("choices" if counts["choices"] else "described"),
    }


def warm_up(stage: Stage, config: InstructionFreeConfig, base: Model, data: dict[str, Any]) -> dict[str, Any]:
    """Train the proxy instruction alone; the model stays as it is."""
    return _train(stage, config, base, data, config.warm_up, None, with_model=False)


def tune(
    stage: Stage, config: InstructionFreeConfig, base: Model, data: dict[str, Any], proxy: str | None
) -> dict[str, Any]:
    """Train model and proxy together; the exported model has no proxy, which lies beside it.

    Args:
        proxy: address of the warm-up's proxy; None where the instruction is a text.
    """
    return _train(stage, config, base, data, config.tune, proxy, with_model=True)


def _train(
    stage: Stage,
    config: InstructionFreeConfig,
    base: Model,
    data: dict[str, Any],
    train: InstructionFreeTrainConfig,
    proxy: str | None,
    with_model: bool,
) -> dict[str, Any]:
    from medray.storage.shards import count_rows
    from medray.train.worker import check_trained, export_proxy, run_training

    rows, held_out = data["outputs"]["descriptions"], data["outputs"]["eval_descriptions"]
    train_ds, eval_ds = (
        stages.encoded(uri, base.path, config, "description", train) if count_rows(uri) else None
        for uri in (rows, held_out)
    )
    result = run_training(
        stage.path("train"),
        train_ds,
        eval_ds if train.eval_rows else None,
        rows=count_rows(rows),
        model_dir=base.path,
        model_config=config.model,
        train_config=train,
        objective="instruction_free",
        proxy=proxy,
        max_quarantined=config.max_quarantined,
    )
    stages.keep_logs(stage, result)
    check_trained(result, config.max_quarantined, stage.path("quarantine.jsonl"))
    outputs = {"counts": result.counts, "metrics": stage.path("metrics.jsonl")}
    if with_model:
        outputs |= stages.export(stage, config, base, train, result.checkpoint)
    if train.instruction is None:
        # Not among the model's own files: what loads the model would take it for weights.
        stage.publish("proxy", lambda folder: export_proxy(result.checkpoint, f"{folder}/{PROXY_FILE}"))
        outputs["proxy"] = stage.path("proxy", PROXY_FILE)
    return outputs


def evaluate(
    stage: Stage,
    config: InstructionFreeConfig,
    model: Model,
    name: str,
    data: dict[str, Any],
    base: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Greedy answers to all sets of questions by one start of the engines, scored.

    Args:
        base: the manifest of the base model's evaluation, to compare with.
    """
    from medray.data.attribute_descriptions import FORMS
    from medray.evaluation.predict import Predict
    from medray.evaluation.scores import compare, not_scored, score
    from medray.methods.instruction_free.metrics import (
        balanced_accuracy,
        description_overlap,
        leakage,
        retention,
        stated_options,
    )
    from medray.methods.instruction_free.training_sets import QUESTION_SETS
    from medray.running.actor_pools import map_options
    from medray.storage.resumable import write_resumable

    stages.check_weights(model)
    found = data["outputs"]
    sets = [one for one in QUESTION_SETS if found["counts"][one]]
    arguments = {
        **stages.engine_arguments(config, model),
        "name": name,
        "max_tokens": config.evaluate.max_tokens,
        "option_likelihood": True,
        "options": stated_options,
    }
    rows, again = write_resumable(
        [found[one] for one in sets],
        stage.path("answers"),
        stage.path("committed"),
        lambda rows: rows.map_batches(Predict, fn_constructor_kwargs=arguments, **map_options(config.engine)),
        8 * config.engine.rows_per_task,
        config.data.read_cpus,
        id_column="key",
    )
    stages.check_answered(stage.path("answers"), rows, config.max_quarantined, "key")
    split_answers(stage, sets)
    scores = {one: score(stage.path("sets", one), config.evaluate) for one in sets}
    outputs: dict[str, Any] = {"sets": {one: stage.path("sets", one) for one in sets}, "scores": scores}
    if "choices" in sets:
        outputs["balanced"] = balanced_accuracy(stage.path("sets", "choices"), config.evaluate)
    if found["form"]:
        form = FORMS[found["form"]]
        outputs["leakage"] = leakage(
            [stage.path("sets", one) for one in sets if one in ("choices", "plain")], form, config.evaluate
        )
        outputs["overlap"] = description_overlap(stage.path("sets", "described"), config.evaluate)
    if base is not None:
        before = base["outputs"]["sets"]
        outputs["differences"] = {
            one: compare(before[one], stage.path("sets", one), config.evaluate)["accuracy"]
            for one in sets
            if one != "described"
        }
        outputs["retention"] = (
            retention(before["general"], stage.path("sets", "general"), config.evaluate)
            if "general" in sets
            else None
        )
    return {**outputs, "counts": {"questions": rows, **again, **not_scored(scores.values())}}


def split_answers(stage: Stage, sets: list[str]) -> None:
    """The answers (records.ANSWERED, as they came) as one folder of records.PREDICTION per set."""
    stage.reset("sets")
    for one in sets:
        write_own(stage, stage.path("answers"), pc.field("benchmark") == one, "sets", one)
