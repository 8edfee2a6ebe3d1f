"""Ask models the questions of medical benchmarks and compare them: streaming, resumable, with intervals
and floors.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterable

from medray.commands.command_line import job_parser, run_job
from medray.config import EvaluateJobConfig, load_config
from medray.errors import ConfigError
from medray.evaluation.benchmark_definitions import BENCHMARKS
from medray.plan.preflight import check_output

EPILOG = f"""\
benchmarks
  {"  ".join(BENCHMARKS)}
  Each reads the files as published, from DIR/<benchmark> where that exists, else from DIR; a directory of
  jobs/prepare_data.py does too. The split, and the words put after the question, belong to a benchmark
  and are printed.

examples
  python jobs/evaluate.py --model testbed:base --benchmark vqa-rad --data path/to/vqa_rad --config tiny-cpu
  python jobs/evaluate.py --model base=llava-hf/llava-1.5-7b-hf --model tuned=runs/a/stages/15-dpo/model \\
    --benchmark vqa-rad,slake --data data/ --set text_only=true
  python jobs/evaluate.py --model base=... --model tuned=... --benchmark slake --data data/slake \\
    --set judge.model=gpt-4o                                                       (win rate, chat score)
  python jobs/evaluate.py --model api:gpt-4o --benchmark slake --data data/slake        (key: OPENAI_API_KEY)
  python jobs/evaluate.py --rescore runs/e/stages/10-vqa-rad-tuned/rows
    (no model; Parquet, JSON Lines, files of lmms-eval and VLMEvalKit)

The same command resumes a run that was stopped. Models are compared with the first one on the same questions.
The last line on stdout is JSON:
{{"run", "accuracy": {{benchmark: {{model: {{"value", "low", "high"}}}}}}, "report", "seconds"}}.
"""


def parser() -> argparse.ArgumentParser:
    parser = job_parser("evaluate", __doc__, EPILOG)
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="[NAME=]MODEL",
        help="folder, hub id, testbed:base, s3://..., or api:NAME; may be repeated",
    )
    parser.add_argument("--benchmark", metavar="A,B", help="benchmarks by name")
    parser.add_argument("--data", metavar="DIR", help="where their files are: local, s3:// or gs://")
    parser.add_argument("--split", metavar="A,B", help="splits to ask instead of the benchmark's own")
    parser.add_argument(
        "--run",
        metavar="DIR",
        help="run directory: local path, s3:// or gs:// (default: runs/evaluate-<time>)",
    )
    parser.add_argument(
        "--rescore", metavar="FILE", help="score saved predictions and print the result; no model, no Ray"
    )
    parser.add_argument("--config", metavar="YAML", help="a recipe (evaluate/tiny-cpu), or a YAML file")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="a.b=c",
        help="change one field; may be repeated",
    )
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    return parser().parse_args(argv)


def models_of(arguments: argparse.Namespace) -> list:
    """The models asked for. Raises ConfigError for none, equal names or a model that is not there."""
    from medray.methods.shared.benchmark_answers import Asked
    from medray.plan.preflight import model_problems

    models, problems = [], []
    for text in arguments.model:
        name, separator, path = text.partition("=")
        path = path if separator else text
        name = name if separator else path.rstrip("/").rsplit("/", 1)[-1].replace(":", "-")
        if path.startswith("api:"):
            models.append(Asked(name, api=path.removeprefix("api:")))
        else:
            problems += model_problems("--model", path)
            models.append(Asked(name, path=path))
    if not models:
        problems.append("--model: name at least one model")
    problems += [
        f"--model: two models are named {name!r}; write --model NAME=PATH"
        for name in {m.name for m in models if [o.name for o in models].count(m.name) > 1}
    ]
    problems += [
        f"--model: the name {model.name!r} may hold letters, digits, '.', '_' and '-' only"
        for model in models
        if not model.name.replace("-", "").replace("_", "").replace(".", "").isalnum()
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    return models


def sources_of(arguments: argparse.Namespace) -> dict[str, str]:
    """The source of each benchmark asked for. Raises ConfigError for unknown names and data that is not
    there.
    """
    from fsspec.core import url_to_fs

    names = [name for name in (arguments.benchmark or "").split(",") if name]
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown or not names:
        raise ConfigError(
            f"--benchmark: {'unknown ' + ', '.join(unknown) if unknown else 'name at least one'}; known: "
            f"{', '.join(BENCHMARKS)}"
        )
    if not arguments.data:
        raise ConfigError("--data: name the folder that holds the benchmarks' files")
    try:
        fs, root = url_to_fs(arguments.data)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"--data {arguments.data}: {error}") from error
    if not fs.exists(root):
        raise ConfigError(f"--data: {arguments.data} does not exist")
    found = {}
    for name in names:
        own = f"{root.rstrip('/')}/{name}"
        found[name] = f"{arguments.data.rstrip('/')}/{name}" if fs.exists(own) else arguments.data
    if len(names) > 1 and len(set(found.values())) < len(names):
        raise ConfigError(
            f"--data {arguments.data}: with several benchmarks each needs a folder of its own name in it "
            f"({', '.join(names)})"
        )
    return found


def check_folders(benchmarks: Iterable[str], models: list) -> None:
    """Raises ConfigError where two pairs of benchmark and model would share a stage's folder."""
    folders = Counter(f"{benchmark}-{model.name}" for benchmark in benchmarks for model in models)
    if twice := [folder for folder, times in folders.items() if times > 1]:
        raise ConfigError(
            f"--model: names that begin as a benchmark ends give two stages the name {twice[0]!r}; write "
            "--model NAME=PATH with another name"
        )


def check_asked(config: EvaluateJobConfig, models: list) -> None:
    """Raises ConfigError for an endpoint that cannot be asked, a local judge that is not there, or one
    that cannot read a reference.
    """
    from medray.plan.preflight import endpoint_problems, gpu_problems, strong_model_problems

    if config.judge is not None and config.judge.kind == "rater":
        raise ConfigError(
            "judge.kind: a rating model has learned no references, and gives no scores from 1 to 10; take "
            "api or vllm"
        )
    problems = endpoint_problems("api", config.api) if any(model.api is not None for model in models) else []
    if config.judge is not None and config.judge.kind != "random":
        problems += strong_model_problems("judge", config.judge)
    if any(model.api is None for model in models) or (
        config.judge is not None and config.judge.kind == "vllm"
    ):
        problems += gpu_problems(config)
    if problems:
        raise ConfigError("\n".join(problems))


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed, 2 bad configuration, 4 held by another job, 130 interrupted."""
    arguments = parse(argv)
    if not (arguments.rescore or arguments.model or arguments.benchmark or arguments.data):
        parser().print_usage(sys.stderr)
        print("name --model, --benchmark and --data, or --rescore FILE", file=sys.stderr)
        return 2
    run_uri = arguments.run or f"runs/evaluate-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        check_output("--run", run_uri)
        config = load_config(EvaluateJobConfig, arguments.config, arguments.overrides)
        if not arguments.rescore:
            sources, models = sources_of(arguments), models_of(arguments)
            check_folders(sources, models)
            check_asked(config, models)
    except ConfigError as error:
        print(f"configuration error\n{error}", file=sys.stderr)
        return 2

    if (
        not arguments.rescore
        and any(model.api is None for model in models)
        and config.model.system_prompt
        and "system_prompt" not in config.model.model_fields_set
    ):
        print(
            "model.system_prompt: no value given, so every question follows self-training's prompt; --set "
            "model.system_prompt='' asks without one",
            file=sys.stderr,
        )

    def work() -> dict:
        if arguments.rescore:
            from medray.evaluation.scores import rescore

            return rescore(arguments.rescore, config.evaluate)
        from medray.methods.evaluate.pipeline import evaluate_models

        splits = tuple(part for part in (arguments.split or "").split(",") if part)
        return evaluate_models(config, models, sources, run_uri, splits)

    if arguments.rescore:
        return run_job(work, f"--rescore {arguments.rescore}")
    return run_job(
        work, f"--run {run_uri}", lambda summary: f"{summary.pop('table')}\n\nreport  {summary['report']}"
    )
