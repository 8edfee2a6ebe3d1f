"""Models on benchmarks: questions -> answers -> scores -> comparison -> results.html.

stages/05-answers-<model>/rows       records.ANSWERED of every benchmark, by one start of the model's engines
stages/10-<benchmark>-<model>/rows   records.PREDICTION of one, re-scored without a model by `--rescore`
results.json  results.html  table.md  table.tex
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pyarrow as pa
from fsspec.core import url_to_fs

from medray.config import EvaluateJobConfig
from medray.errors import ConfigError, StageError
from medray.evaluation.benchmark_definitions import BENCHMARKS
from medray.ingest.source_index import manifest_of
from medray.methods.prepare_data.pipeline import (
    LIMITS,
    check_samples,
    images_of,
    index_inputs,
    write_index,
    write_samples,
)
from medray.methods.shared.benchmark_answers import Asked, predict
from medray.methods.shared.judged_models import judge_models
from medray.records import BENCHMARK_QUESTION
from medray.running.ray_session import ray_session
from medray.running.run import Run, Stage, digest
from medray.running.run_hold import held


def evaluate_models(
    config: EvaluateJobConfig,
    models: list[Asked],
    benchmarks: Mapping[str, str],
    run_uri: str,
    splits: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Ask every model every question of the benchmarks, score and compare, or continue.

    Args:
        benchmarks: source of each benchmark, by its name in BENCHMARKS.
        splits: asked instead of the benchmarks' own.

    Returns the summary that the job prints: run, accuracy by benchmark and model, table, report, seconds.

    Raises StageError where a benchmark has no question.
    """
    from medray.methods.shared.results_page import latex_table, markdown_table, write_page

    started = time.time()
    run = Run(run_uri)
    with held(run), ray_session(config.cluster):
        run.write_config(config)
        results: dict[str, Any] = {"schema": 1, "benchmarks": {}}
        asked = {name: splits or BENCHMARKS[name].splits for name in benchmarks}
        questions = {
            name: make_questions(run, config, name, source, asked[name])
            for name, source in benchmarks.items()
        }
        answered = {model.name: predict(run, config, questions, model) for model in models}
        for name, made in questions.items():
            folders = {model: found[name] for model, found in answered.items()}
            results["benchmarks"][name] = {
                "definition": {**asdict(BENCHMARKS[name]), "splits": asked[name]},
                "counts": made["outputs"]["counts"],
                **scored(run, config, name, folders),
            }
            if config.judge is not None:
                results["benchmarks"][name] |= judge_models(run, config, name, made, folders)
        run.write_json(results, "results.json")
        table = markdown_table(results)
        run.write_text(table, "table.md")
        run.write_text(latex_table(results), "table.tex")
        run.write_text(
            write_page(results, {name: gallery(run, name) for name in benchmarks}, run.timeline),
            "results.html",
        )
    return {
        "run": run.uri,
        "accuracy": {
            name: {model: score["overall"]["accuracy"] for model, score in one["models"].items()}
            for name, one in results["benchmarks"].items()
        },
        "report": run.path("results.html"),
        "table": table,
        "seconds": round(sum(stage["seconds"] for stage in run.timeline), 1),
        "wall_seconds": round(time.time() - started, 1),
    }


def make_questions(
    run: Run, config: EvaluateJobConfig, name: str, source: str, splits: tuple[str, ...]
) -> dict[str, Any]:
    """The benchmark's questions as records.BENCHMARK_QUESTION shards."""
    benchmark = BENCHMARKS[name]
    samples_uri, identity = samples_of(run, config, name, source)
    settings = {
        "samples": identity,
        "benchmark": asdict(benchmark),
        "splits": splits,
        "seed": config.evaluate.seed,
        "most": config.evaluate.max_images,
        "columns": BENCHMARK_QUESTION.names,
    }
    made = run.stage(
        f"02-{name}-questions",
        settings,
        lambda stage: explode(stage, config, samples_uri, name, splits, f"{name}-{digest(settings)}/"),
    )
    if not made["outputs"]["counts"]["questions"]:
        raise StageError(
            f"{name}: {source} has no question of the splits {', '.join(splits) or 'any'} and kinds "
            f"{', '.join(benchmark.kinds)}{_there(samples_uri, splits)}"
        )
    return made


def _there(samples_uri: str, splits: tuple[str, ...]) -> str:
    """What the samples of a benchmark hold instead: images by split and questions by kind, and what to
    set.
    """
    from medray.storage.shards import stored_rows

    images: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for row in stored_rows(samples_uri, ["split", "questions", "error"]):
        if row["error"] is None:
            images[row["split"] or "unknown"] += 1
            kinds.update(question["answer_type"] for question in row["questions"] or ())
    said = "; ".join(
        ", ".join(f"{name} ({number:,})" for name, number in found.most_common(20)) or "none"
        for found in (images, kinds)
    )
    other = next((split for split in images if split not in splits), None)
    return f"; its images by split and questions by kind are: {said}" + (
        f"; name others with --split {other}" if other else ""
    )


def samples_of(run: Run, config: EvaluateJobConfig, name: str, source: str) -> tuple[str, str]:
    """(records.SAMPLE shards, hash of what they hold) of a benchmark's source; a prepared directory is
    used as it is.
    """
    benchmark = BENCHMARKS[name]
    prepared = manifest_of(source)
    if prepared is not None:
        return f"{source.rstrip('/')}/shards", digest(prepared)
    data = config.data.model_copy(
        update={"source": source, "format": benchmark.format, "testbed_val_fraction": 0.0}
    )
    if benchmark.files:
        data = data.model_copy(
            update={"source": _beside(source, benchmark.files), "images": config.data.images or source}
        )

    def read() -> dict[str, Any]:
        index = run.stage(f"00-{name}-index", index_inputs(data), lambda stage: write_index(stage, data))
        return run.stage(
            f"01-{name}-samples",
            {"index": index["hash"], "limits": data.model_dump(include=LIMITS)},
            lambda stage: checked_samples(
                stage,
                config,
                write_samples(stage, data, index["outputs"]["rows"], benchmark.format, stage.path("rows")),
            ),
        )

    samples = run.reread(read, f"00-{name}-index", f"01-{name}-samples")
    return samples["outputs"]["rows"], samples["hash"]


def checked_samples(stage: Stage, config: EvaluateJobConfig, written: dict[str, Any]) -> dict[str, Any]:
    check_samples(stage.path("rows"), config.max_quarantined)
    return written


def _beside(source: str, part: str) -> str:
    fs, root = url_to_fs(source)
    found = sorted(path for path in fs.find(root, maxdepth=2) if part in path)
    if not found:
        raise ConfigError(f"--data {source}: no file named *{part}*")
    return fs.unstrip_protocol(found[0]) if "://" in source else found[0]


def explode(
    stage: Stage, config: EvaluateJobConfig, samples_uri: str, name: str, splits: tuple[str, ...], prefix: str
) -> dict[str, Any]:
    """SAMPLE rows to one row per question, its `key` the prefix and its id."""
    from ray.data.expressions import col

    from medray.storage.shards import count_rows, read_rows, write_in_order

    stage.reset("rows")
    cpus = config.data.read_cpus
    usable = col("error").is_null() & col("split").is_in(list(splits)) if splits else col("error").is_null()
    rows = read_rows(samples_uri, num_cpus=cpus).filter(expr=usable, num_cpus=cpus)
    if config.evaluate.max_images is not None:
        rows = rows.limit(config.evaluate.max_images)
    arguments = {"name": name, "prefix": prefix, "seed": config.evaluate.seed}
    rows = rows.map_batches(
        _questions, fn_kwargs=arguments, batch_size=32, batch_format="pyarrow", num_cpus=cpus
    )
    write_in_order(rows, stage.path("rows"), cpus)
    return {
        "rows": stage.path("rows"),
        "prefix": prefix,
        "counts": {"questions": count_rows(stage.path("rows"))},
    }


def _questions(table: pa.Table, name: str, prefix: str, seed: int) -> pa.Table:
    from medray.ingest.readers.canonical import members_of
    from medray.methods.shared.training_sets import questions

    kinds, languages = BENCHMARKS[name].kinds, BENCHMARKS[name].languages
    made = []
    for sample in table.to_pylist():
        base = {
            "image_id": sample["image_id"],
            "image": sample["image"],
            "modality": sample["modality"],
            "benchmark": name,
        }
        for row in questions([list(member) for member in members_of(sample)], kinds, seed):
            if row["answer_type"] in kinds and (
                not languages or (row.get("language") or languages[0]) in languages
            ):
                made.append({**base, **row, "key": f"{prefix}{row['sample_id']}"})
    return pa.Table.from_pylist(made, schema=BENCHMARK_QUESTION)


def scored(run: Run, config: EvaluateJobConfig, name: str, folders: Mapping[str, dict]) -> dict[str, Any]:
    """Scores of every model, and each against the first on the same questions."""
    from medray.evaluation.scores import score_models

    inputs = {
        "rows": {model: one["hash"] for model, one in folders.items()},
        "config": config.evaluate.outcome("arms", "kinds"),
    }

    def work(_: Stage) -> dict[str, Any]:
        uris = {model: one["outputs"]["rows"] for model, one in folders.items()}
        return {**score_models(uris, config.evaluate), "predictions": uris}

    return run.stage(f"20-{name}-scores", inputs, work)["outputs"]


def gallery(run: Run, name: str, most: int = 24) -> list[tuple[dict[str, Any], dict[str, str]]]:
    """A few questions with their image and every model's answer, for the page."""
    from medray.evaluation.prediction_files import read_predictions

    stage = run.read_json("stages", f"20-{name}-scores", "manifest.json")["outputs"]
    uris = stage["predictions"]
    first = list(itertools.islice(read_predictions(next(iter(uris.values()))), 400))
    wanted = {row["sample_id"] for row in first}
    answers: dict[str, dict[str, str]] = {identity: {} for identity in wanted}
    for model, uri in uris.items():
        for row in read_predictions(uri):
            if row["sample_id"] in wanted and row["answer"] is not None:
                answers[row["sample_id"]][model] = row["answer"]
    order = sorted(first, key=lambda row: -len(set(answers[row["sample_id"]].values())))[:most]
    images = dict(
        images_of(run.path("stages", f"02-{name}-questions", "rows"), {row["sample_id"] for row in order})
    )
    return [
        ({**row, "image": images[row["sample_id"]]}, answers[row["sample_id"]])
        for row in order
        if row["sample_id"] in images
    ]
