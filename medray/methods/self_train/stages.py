"""The stages of self-training that other methods do not have (medray.methods.shared.stages holds what they
share).

They only place work: rows move through Ray Data, training runs in Ray Train. Nothing here holds rows.
"""

from __future__ import annotations

from typing import Any

from medray.config import SelfTrainingConfig
from medray.errors import DataError
from medray.methods.shared.stages import (
    LOCAL_JUDGES,
    PAIR_RULES,
    Model,
    _tally,
    asked_inputs,
    check_answered,
    check_judged,
    check_weights,
    checked_account,
    engine_arguments,
    ledger_of,
)
from medray.running.run import Stage
from medray.running.set_aside import check_set_aside, check_something, set_aside_in


def evaluation_inputs(config: SelfTrainingConfig, before: dict[str, Any] | None) -> dict[str, Any]:
    """What an evaluation depends on beside the model and the questions.

    Args:
        before: the manifest of the evaluation it is compared with; None without one.
    """
    return {
        **asked_inputs(config),
        "config": config.evaluate.outcome("arms"),
        "suffix": "",
        "against": before and before["hash"],
    }


def data_inputs(config: SelfTrainingConfig) -> dict[str, Any]:
    """What the data stage depends on. How rounds share the unlabelled images is decided when they are
    questioned.
    """
    return {
        "data": config.data.outcome("unlabelled_per_round"),
        "kinds": config.evaluate.kinds,
        "eval_seed": config.evaluate.seed,
        "max_eval": config.evaluate.max_images,
        "seed": config.sft.seed,
        "eval_rows": config.sft.eval_rows,
    }


def pair_rules(config: SelfTrainingConfig) -> dict[str, Any]:
    """What makes pairs of verdicts."""
    return config.judge.model_dump(include=PAIR_RULES)


def arm_of(model: str) -> str:
    """The arm a model's name belongs to: dpo-2 is of arm dpo."""
    return model.partition("-")[0]


def prepare_data(stage: Stage, config: SelfTrainingConfig) -> dict[str, Any]:
    """Source -> conversations, unlabelled images, held-out questions, quarantine (Parquet shards)."""
    from medray.methods.shared.training_sets import prepare

    counts = prepare(
        config.data,
        stage.dir,
        seed=config.sft.seed,
        eval_kinds=config.evaluate.kinds,
        eval_seed=config.evaluate.seed,
        max_eval_images=config.evaluate.max_images,
        eval_conversations=config.sft.eval_rows,
    )
    account = checked_account(stage, config)
    if not counts["questions"]:
        raise DataError(
            f"evaluate.kinds: no question of the kinds {', '.join(config.evaluate.kinds)} came out of split "
            f"{config.data.eval_split!r} of {config.data.source}; "
            "name other kinds, or another split in data.eval_split"
        )
    if config.rounds and not counts["images"]:
        raise DataError(
            f"rounds: {config.rounds} round(s) question unlabelled images, and split "
            f"{config.data.train_split!r} of {config.data.source} has none left; lower "
            f"data.label_fraction ({config.data.label_fraction:g}), or set rounds=0 to stop after SQ-SFT"
        )
    return {
        "counts": counts,
        "account": account,
        **{
            part: stage.path(part)
            for part in ("conversations", "eval_conversations", "images", "questions", "quarantine")
        },
    }


def self_play(
    stage: Stage, config: SelfTrainingConfig, model: Model, data: dict[str, Any], number: int
) -> dict[str, Any]:
    """Describe, ask and answer: one row per unlabelled image (records.SELF_PLAY)."""
    from medray.methods.self_train.self_play import SelfPlay
    from medray.running.actor_pools import map_options
    from medray.storage.resumable import write_resumable

    check_weights(model)
    arguments = {**engine_arguments(config, model), "config": config.self_play.model_dump(), "round": number}
    images = data["outputs"]["images"]

    def played(rows: Any) -> Any:
        if config.data.unlabelled_per_round == "fresh":
            rows = rows.filter(_FreshShare(number, config.rounds), num_cpus=config.data.read_cpus)
        return rows.map_batches(SelfPlay, fn_constructor_kwargs=arguments, **map_options(config.engine))

    keeps = _FreshShare(number, config.rounds) if config.data.unlabelled_per_round == "fresh" else None
    rows, again = write_resumable(
        images,
        stage.path("rows"),
        stage.path("committed"),
        played,
        config.engine.rows_per_task,
        config.data.read_cpus,
        keeps=keeps,
    )
    tally = _tally(stage.path("rows"), ["sample_id", "error", "questions", "dropped_questions"], _played)
    found = set_aside_in(stage.path("rows"))
    check_something(
        "question",
        tally.get("questions", 0),
        found,
        f"{rows} images were questioned; look at data.max_unlabelled, self_play.ask and self_play.questions",
    )
    check_set_aside("images", rows, found, config.max_quarantined, stage.path("rows"))
    return {"rows": stage.path("rows"), "counts": {"images": rows, **again, **tally}}


class _FreshShare:
    """Keeps the part of the images that belongs to one round, by a hash of the id."""

    def __init__(self, number: int, rounds: int):
        self.number, self.rounds = number, rounds

    def __call__(self, row: dict[str, Any]) -> bool:
        from medray.stable_draws import unit

        return int(unit("round", row["sample_id"]) * self.rounds) == self.number - 1


def _played(row: dict[str, Any]) -> dict[str, int]:
    answers = [answer for question in row["questions"] or [] for answer in question["answers"]]
    counts = {
        "questions": len(row["questions"] or []),
        "answers": len(answers),
        "quarantined": int(row["error"] is not None),
    }
    counts["empty answers"] = sum(not answer["text"] for answer in answers)
    for dropped in row["dropped_questions"] or []:
        counts[f"dropped questions: {dropped['reason']}"] = (
            counts.get(f"dropped questions: {dropped['reason']}", 0) + 1
        )
    return counts


def judge(stage: Stage, config: SelfTrainingConfig, played: dict[str, Any]) -> dict[str, Any]:
    """A stronger judge rates the answers (records.JUDGED)."""
    from medray.inference.judges.judges import judge_map
    from medray.models.vlm import resolve_model
    from medray.storage.resumable import write_resumable

    model = resolve_model(config.judge.model) if config.judge.kind in LOCAL_JUDGES else None
    engine = config.judge.engine.beside(config.engine)
    judge_class, options = judge_map(config.judge, model, config.data, engine)
    rows, again = write_resumable(
        played["outputs"]["rows"],
        stage.path("rows"),
        stage.path("committed"),
        lambda rows: rows.map_batches(judge_class, **options),
        engine.rows_per_task,
        config.data.read_cpus,
    )
    ledger = ledger_of(stage, config.judge)
    tally = _tally(stage.path("rows"), ["sample_id", "error", "verdicts"], _verdicts)
    check_judged(stage, config, differ=True)
    return {
        "rows": stage.path("rows"),
        "ledger": ledger,
        "counts": {"images": rows, **again, **tally, "retried requests": ledger["retries"]},
    }


def _verdicts(row: dict[str, Any]) -> dict[str, int]:
    verdicts = row["verdicts"] or []
    return {
        "verdicts": len(verdicts),
        "without verdict": sum(v["error"] is not None for v in verdicts),
        "quarantined": int(row["error"] is not None),
    }


def make_pairs(stage: Stage, config: SelfTrainingConfig, judged: dict[str, Any]) -> dict[str, Any]:
    """Verdicts to preference pairs (records.PREFERENCE); what is dropped is counted by reason."""
    from collections import Counter

    import ray.data
    from fsspec.core import url_to_fs

    from medray.methods.self_train.preference_pairs import write_pairs
    from medray.storage.shards import parquet_files

    stage.reset("rows")
    fs, root = url_to_fs(stage.path("rows"))
    fs.makedirs(root, exist_ok=True)
    shards = [
        {"number": number, "path": path}
        for number, path in enumerate(parquet_files(judged["outputs"]["rows"]))
    ]
    counts: Counter[str] = Counter({"pairs": 0})
    if shards:
        arguments = {"out_uri": stage.path("rows"), "judge": config.judge.model_dump()}
        counted = ray.data.from_items(shards, override_num_blocks=min(len(shards), 1000)).map_batches(
            write_pairs,
            fn_kwargs=arguments,
            batch_size=8,
            batch_format="pyarrow",
            num_cpus=config.data.read_cpus,
        )
        for row in counted.iter_rows():
            counts[row["name"]] += row["number"]
    made = max(counts["pairs"], 1)
    drift = {
        f"mean words, {side}": round(counts.pop(f"words, {side}", 0) / made, 3)
        for side in ("chosen", "rejected")
    }
    return {"rows": stage.path("rows"), "counts": {**counts, **drift}}


def reference_logps(
    stage: Stage, config: SelfTrainingConfig, model: Model, pairs: dict[str, Any]
) -> dict[str, Any]:
    """Log-probabilities of both answers under the frozen reference, once, as columns; so DPO holds one
    model.
    """
    import ray.data

    from medray.storage.resumable import write_resumable
    from medray.train.reference_logps import Reference

    check_weights(model)
    arguments = {
        "model_dir": model.path,
        "model_hash": model.hash,
        "model_config": config.model.model_dump(),
        "data_config": config.data.model_dump(),
        "threads": config.dpo.threads or max(1, int(config.dpo.cpus_per_worker)),
    }
    low, high = config.dpo.reference_workers

    def scored(rows: Any) -> Any:
        return rows.map_batches(
            Reference,
            fn_constructor_kwargs=arguments,
            batch_size=config.dpo.reference_batch,
            batch_format="pyarrow",
            num_cpus=config.dpo.cpus_per_worker,
            num_gpus=config.dpo.gpus_per_worker,
            compute=ray.data.ActorPoolStrategy(min_size=low, max_size=high),
            **config.dpo.place.options,
        )

    rows, again = write_resumable(
        pairs["outputs"]["rows"],
        stage.path("rows"),
        stage.path("committed"),
        scored,
        8 * config.dpo.reference_batch,
        config.data.read_cpus,
    )
    found = set_aside_in(stage.path("rows"), lambda row: (row["ref_error"],), ("ref_error",))
    check_something("log-probability", rows - found.total, found)
    check_set_aside("pairs", rows, found, config.max_quarantined, stage.path("rows"))
    return {"rows": stage.path("rows"), "counts": {"pairs": rows, **again}}


def evaluate(
    stage: Stage,
    config: SelfTrainingConfig,
    model: Model,
    name: str,
    data: dict[str, Any],
    before: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Greedy answers to the held-out questions, scored.

    Args:
        before: the manifest of the evaluation of the model one step earlier, to compare with.
    """
    from medray.evaluation.predict import Predict
    from medray.evaluation.scores import compare, not_scored, score
    from medray.running.actor_pools import map_options
    from medray.storage.resumable import write_resumable

    check_weights(model)
    arguments = {**engine_arguments(config, model), "name": name, "max_tokens": config.evaluate.max_tokens}
    rows, again = write_resumable(
        data["outputs"]["questions"],
        stage.path("rows"),
        stage.path("committed"),
        lambda rows: rows.map_batches(Predict, fn_constructor_kwargs=arguments, **map_options(config.engine)),
        8 * config.engine.rows_per_task,
        config.data.read_cpus,
    )
    check_answered(stage.path("rows"), rows, config.max_quarantined)
    scores = score(stage.path("rows"), config.evaluate)
    difference = None
    if before is not None:
        found = compare(before["outputs"]["rows"], stage.path("rows"), config.evaluate)
        difference = {"against": previous_model(name), **found["accuracy"]}
    return {
        "rows": stage.path("rows"),
        "scores": scores,
        "difference": difference,
        "counts": {"questions": rows, **again, **not_scored([scores])},
    }


def previous_model(name: str) -> str | None:
    """The model one step earlier: sft after base, dpo-1 after sft, dpo-2 after dpo-1."""
    if name == "base":
        return None
    if name == "sft":
        return "base"
    number = int(name.partition("-")[2])
    return "sft" if number == 1 else f"dpo-{number - 1}"
