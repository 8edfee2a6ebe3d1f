"""Models asked the questions of benchmarks: one start of the engines per model, whatever the number of
benchmarks.

stages/05-answers-<model>/rows       records.ANSWERED of every benchmark, as they came
stages/10-<benchmark>-<model>/rows   records.PREDICTION of one benchmark
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from medray.config import EvaluateJobConfig
from medray.errors import StageError
from medray.evaluation.benchmark_definitions import BENCHMARKS
from medray.methods.shared.stages import Model, asked_inputs, check_answered, engine_arguments
from medray.records import ANSWERED, PREDICTION, conform
from medray.running.run import Run, Stage


@dataclass(frozen=True)
class Asked:
    """A model to evaluate: `path` of a local one, or `api` name of one behind the endpoint."""

    name: str
    path: str | None = None
    api: str | None = None


def predict(
    run: Run, config: EvaluateJobConfig, questions: Mapping[str, dict[str, Any]], model: Asked
) -> dict[str, dict[str, Any]]:
    """The stage of each benchmark that holds one model's answers to it. They are asked together; what was
    answered before is not.

    Args:
        questions: by benchmark, the stage that holds its questions.

    Raises StageError where the answers are not those of the questions.
    """
    settings, mapped = worker_of(config, model)
    parts = {name: made["hash"] for name, made in questions.items()}
    asked = run.stage(
        f"05-answers-{model.name}", settings, lambda stage: ask(stage, config, questions, mapped), parts
    )["outputs"]
    answers = asked["rows"]
    try:
        outcome = asked["digests"]
    except KeyError:  # of an older version
        outcome = digests_of(answers, questions)

    def own(name: str) -> dict[str, Any]:
        # Not the stage's hash: it changes when another benchmark is added, and the answers to this one stay.
        inputs = {**settings, "questions": parts[name], "answers": outcome[name]}
        return run.stage(
            f"10-{name}-{model.name}", inputs, lambda stage: take(stage, answers, questions[name]["outputs"])
        )

    return {name: own(name) for name in questions}


def worker_of(config: EvaluateJobConfig, model: Asked) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what the model's answers depend on beside the questions, arguments of `map_batches` that ask it)."""
    from medray.evaluation.predict import ApiPredict, Predict
    from medray.models.vlm import model_hash, resolve_model
    from medray.running.actor_pools import client_options, map_options

    common = {
        "name": model.name,
        "suffixes": {name: benchmark.suffixes for name, benchmark in BENCHMARKS.items()},
        "text_only": config.text_only,
    }
    if model.api is None:
        path = resolve_model(model.path)
        identity = model_hash(path)
        answering = {"likelihood": config.option_likelihood, **asked_inputs(config)}
        own = {"max_tokens": config.evaluate.max_tokens, "option_likelihood": config.option_likelihood}
        arguments = {**engine_arguments(config, Model(path, identity)), **common, **own}
        mapped = {"fn": Predict, "fn_constructor_kwargs": arguments, **map_options(config.engine)}
    else:
        api = config.api.model_copy(update={"model": model.api, "max_tokens": config.evaluate.max_tokens})
        identity = f"{api.base_url}:{model.api}"
        answering = {"api": api.outcome(), "seed": config.evaluate.seed}
        arguments = {
            **common,
            "config": api.model_dump(),
            "data_config": config.data.model_dump(),
            "seed": config.evaluate.seed,
        }
        mapped = {"fn": ApiPredict, "fn_constructor_kwargs": arguments, **client_options(config.engine)}
    settings = {
        "model": identity,
        "name": model.name,
        "text_only": config.text_only,
        "max_tokens": config.evaluate.max_tokens,
        **answering,
    }
    return settings, mapped


def ask(
    stage: Stage, config: EvaluateJobConfig, questions: Mapping[str, dict[str, Any]], mapped: dict[str, Any]
) -> dict[str, Any]:
    """The questions of all benchmarks to one model; continues row by row."""
    from medray.storage.resumable import write_resumable

    rows, again = write_resumable(
        [made["outputs"]["rows"] for made in questions.values()],
        stage.path("rows"),
        stage.path("committed"),
        lambda rows: rows.map_batches(**mapped),
        8 * config.engine.rows_per_task,
        config.data.read_cpus,
        id_column="key",
    )
    check_answered(stage.path("rows"), rows, config.max_quarantined, "key")
    return {
        "rows": stage.path("rows"),
        "digests": digests_of(stage.path("rows"), questions),
        "counts": {"answers": rows, **again},
    }


def digests_of(answers: str, questions: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """By benchmark a digest of a model's answers to it, whatever their order."""
    from medray.ids import digests
    from medray.storage.shards import tables

    prefixes = {made["outputs"]["prefix"]: name for name, made in questions.items()}
    rows: dict[str, list[str]] = {name: [] for name in questions}
    for table in tables(answers, rows=2**12):
        for row in conform(table, ANSWERED).to_pylist():
            name = prefixes.get(f"{row['key'].partition('/')[0]}/")
            if name is not None:  # else of a benchmark that is no longer asked for
                rows[name].append(json.dumps(row, sort_keys=True))
    return {name: xxhash.xxh3_64_hexdigest(digests(own).tobytes()) for name, own in rows.items()}


def take(stage: Stage, answers: str, questions: dict[str, Any]) -> dict[str, Any]:
    """The rows of one benchmark among a model's answers."""
    stage.reset("rows")
    found = write_own(stage, answers, pc.starts_with(pc.field("key"), questions["prefix"]), "rows")
    if found != questions["counts"]["questions"]:
        raise StageError(
            f"{answers}: {found} answers to {questions['counts']['questions']} questions; files are missing "
            "or twice: remove the stage's folder to ask again"
        )
    return {"rows": stage.path("rows"), "counts": {"questions": found}}


def write_own(stage: Stage, answers: str, mine: pc.Expression, *folder: str) -> int:
    """Write the answers (records.ANSWERED) that `mine` picks as records.PREDICTION into a folder of the
    stage; returns their number.
    """
    from medray.storage.shards import tables

    stage.run.fs.makedirs(stage.path(*folder), exist_ok=True)
    found = 0
    with (
        stage.run.fs.open(stage.path(*folder, "part-000000.parquet"), "wb") as handle,
        pq.ParquetWriter(handle, PREDICTION) as writer,
    ):
        for table in tables(answers, rows=2**16):
            own = table.filter(mine)
            if own.num_rows:
                writer.write_table(conform(own, PREDICTION))
                found += own.num_rows
    return found
