"""`python -m medray.plan`: memory, time and cost of a run before it is started, and whether a cluster
file can hold it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable
from typing import Any

from medray.config import SelfTrainingConfig, load_config
from medray.config.recipes import recipe_path
from medray.config.reference_page import JOBS
from medray.errors import ConfigError, MedrayError
from medray.plan import memory
from medray.plan.demand import demands, served_demands
from medray.plan.devices import DEVICES, Gains, device_of
from medray.plan.estimate import Plan, Stage, listed_ids_gib, self_training
from medray.plan.groups import misfits, read_groups, read_served
from medray.plan.shapes import Shape, shape_of
from medray.plan.work import Lengths, pair_tokens

# The paper's: 60,000 dialogues are the share of LLaVA-Med's instructions it fine-tunes on, 10,000 images are
# questioned.
SCALES = {"paper": (60_000, 10_000), "internet": (100_000_000, 100_000_000)}
_MAY_BE_ZERO = {"start", "endpoint"}  # seconds; the other assumptions are divided by
EXAMPLES = """examples:
  python -m medray.plan --config self_train/llava-1.5-7b --device a100-80gb --gpus 4
  python -m medray.plan --config self_train/qwen2.5-vl-7b --scale internet --device h100-80gb --gpus 512 \\
      --cpus 4096 --set sft.num_workers=512 --set dpo.num_workers=512 \\
      --set dpo.reference_workers='[1, 512]' --set engine.actors='[1, 512]'
  python -m medray.plan --config self_train/llava-1.5-7b --fits cluster/aws.yaml
  python -m medray.plan --config self_train/llava-1.5-7b --fits cluster/kuberay/rayservice.yaml \\
      --serve cluster/kuberay/rayservice.yaml

Every number rests on assumptions that are printed; --gain NAME=VALUE and --length NAME=VALUE replace them by
what
you measured."""


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        prog="medray plan" if sys.argv[0] == "medray plan" else "python -m medray.plan",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_argument(
        "--config",
        required=True,
        metavar="YAML",
        help="recipe that comes with medray (self_train/llava-1.5-7b), or a YAML file in a folder named "
        "after its job",
    )
    arguments.add_argument("--job", help="the recipe's job, where its folder has another name")
    arguments.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="a.b=c",
        help="change one field; may be repeated",
    )
    arguments.add_argument(
        "--fits",
        metavar="YAML",
        help="only say whether every stage can begin on the nodes of this cluster file",
    )
    arguments.add_argument(
        "--serve",
        metavar="YAML",
        help="with --fits: whether the endpoint of this Serve config (or RayService) can begin there with "
        "runs of the recipe, rather than the job",
    )
    arguments.add_argument(
        "--device", default="a100-80gb", help=f"accelerator: {', '.join(DEVICES)} (default: a100-80gb)"
    )
    arguments.add_argument(
        "--gpus",
        type=_positive(int),
        default=4,
        help="accelerators there are (default: 4); stages use what the recipe's limits allow",
    )
    arguments.add_argument(
        "--cpus", type=_positive(int), default=32, help="CPUs of the data nodes (default: 32)"
    )
    arguments.add_argument(
        "--scale",
        choices=SCALES,
        default="paper",
        help="labelled and unlabelled images: "
        + ", ".join(f"{name} {rows[0]:,} and {rows[1]:,}" for name, rows in SCALES.items()),
    )
    arguments.add_argument(
        "--labelled", type=_positive(float), help="dialogues that are trained on, instead of the scale's"
    )
    arguments.add_argument(
        "--unlabelled", type=_positive(float), help="images questioned per round, instead of the scale's"
    )
    arguments.add_argument(
        "--usd-per-gpu-hour",
        type=float,
        help="price of one accelerator and its share of the machine (default: see medray/plan/devices.py)",
    )
    arguments.add_argument(
        "--gain",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=f"replace an assumption: {_names(Gains)}",
    )
    arguments.add_argument(
        "--length",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=f"replace a mean length in tokens: {_names(Lengths)}",
    )
    arguments.add_argument(
        "--judge-shape",
        metavar="MODEL",
        help="known model or folder whose size a local judge has (default: judge.model)",
    )
    arguments.add_argument("--json", action="store_true", help="print JSON")
    return arguments


def _job(options: argparse.Namespace) -> str:
    """The job that a recipe is of: named, or the folder that it lies in."""
    return options.job or recipe_path(options.config).resolve().parent.name


def _positive(kind: type) -> Callable[[str], float]:
    def number(text: str) -> float:
        if not (value := kind(text)) > 0:
            raise argparse.ArgumentTypeError(f"{text} is not greater than 0")
        return value

    return number


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0; 1 where a stage would wait for ever or does not fit its device; 2 for a bad
    configuration.
    """
    options = parser().parse_args(argv)
    try:
        if options.fits:
            return say_fits(options)
        job = _job(options)
        if job in JOBS and JOBS[job] is not SelfTrainingConfig:
            raise ConfigError(
                f"--config {options.config}: time and cost are estimated of self_train's recipes only; of "
                f"{job}, --fits says whether it can begin"
            )
        config = load_config(SelfTrainingConfig, options.config, options.overrides)
        return say_plan(config, plan_of(options), options)
    except MedrayError as error:
        print(f"configuration error\n{error}", file=sys.stderr)
        return 2


def say_fits(options: argparse.Namespace) -> int:
    job = _job(options)
    if job not in JOBS:
        raise ConfigError(f"--job: {job} is none of {', '.join(JOBS)}")
    config = load_config(JOBS[job], options.config, options.overrides)
    stages = served_demands(*read_served(options.serve, config.engine)) if options.serve else demands(config)
    found = misfits(stages, read_groups(options.fits))
    for line in found:
        print(line)
    if not found:
        print(f"{options.serve or options.config} fits {options.fits}")
        for stage, wanted in stages.items():
            print(f"  {stage:12} {' + '.join(map(str, wanted))}")
    return 1 if found else 0


def plan_of(options: argparse.Namespace) -> Plan:
    device = device_of(options.device)
    if options.usd_per_gpu_hour is not None:
        device = dataclasses.replace(device, usd_per_hour=options.usd_per_gpu_hour)
    labelled, unlabelled = SCALES[options.scale]
    return Plan(
        labelled if options.labelled is None else options.labelled,
        unlabelled if options.unlabelled is None else options.unlabelled,
        device,
        options.gpus,
        options.cpus,
        gains=_replaced(Gains(), options.gain),
        lengths=_replaced(Lengths(), options.length),
        judge=shape_of(options.judge_shape) if options.judge_shape else None,
    )


def say_plan(config: SelfTrainingConfig, plan: Plan, options: argparse.Namespace) -> int:
    shape = shape_of(config.model.path)
    stages, held = self_training(config, plan), memories(config, shape, plan)
    slowest, dearest = max(stages, key=lambda stage: stage.seconds), max(stages, key=lambda stage: stage.usd)
    total = {
        "days": sum(stage.seconds for stage in stages) / 86400,
        "gpu_hours": sum(stage.gpu_hours for stage in stages),
        "usd": sum(stage.usd for stage in stages),
        "bottleneck": f"{slowest.name}: {slowest.bound}",
        "dearest": dearest.name,
        "listed_ids_gib": listed_ids_gib(plan),
    }
    fits = all(sum(parts.values()) <= plan.device.memory_gib for parts in held.values()) and all(
        math.isfinite(stage.seconds) for stage in stages
    )
    if options.json:
        rows = [{**dataclasses.asdict(stage), "bound": stage.bound} for stage in stages]
        found = {
            "model": config.model.path,
            "parameters": shape.parameters,
            "memory_gib": held,
            "stages": rows,
            "total": total,
            "fits": fits,
        }
        print(json.dumps(_json(found), allow_nan=False))
    else:
        print(text(config, shape, plan, stages, held, total, options))
    return 0 if fits else 1


def _json(value: Any) -> Any:
    """What never ends is null: JSON has no infinity."""
    match value:
        case dict():
            return {name: _json(item) for name, item in value.items()}
        case list():
            return [_json(item) for item in value]
        case float() if not math.isfinite(value):
            return None
    return value


def memories(config: SelfTrainingConfig, shape: Shape, plan: Plan) -> dict[str, dict[str, float]]:
    """GiB of one device by stage and part; an engine takes what it is given, its cache the rest."""
    engine = memory.engine_memory(shape, config.model, config.engine, plan.device.memory_gib)
    training = {
        name: memory.training_memory(
            shape,
            config.model,
            section,
            min(plan.gpus, section.max_workers),
            *row_lengths(name, shape, plan.lengths),
        )
        for name, section in (("sft", config.sft), ("dpo", config.dpo))
    }
    return {
        "loading": memory.loading_memory(shape, config.model),
        **training,
        "engine": {**engine, "cache": max(engine["cache"], 0.0)},
    }


def row_lengths(stage: str, shape: Shape, lengths: Lengths) -> tuple[int, int]:
    """Tokens of a training row, and those with a loss: a dialogue, or a pair behind one prompt."""
    if stage == "sft":
        return shape.vision.image_tokens + lengths.prompt + lengths.dialogue, lengths.supervised
    return round(pair_tokens(shape, lengths.prompt + lengths.question, lengths.answer)), 2 * lengths.answer


def text(
    config: SelfTrainingConfig,
    shape: Shape,
    plan: Plan,
    stages: list[Stage],
    held: dict,
    total: dict,
    options: argparse.Namespace,
) -> str:
    device = plan.device
    lines = [
        f"{config.model.path}: {shape.parameters / 1e9:.2f}B parameters, {shape.vision.image_tokens} tokens "
        f"per image, {shape.image_forward / 1e9:.0f} GFLOP per image, "
        f"{shape.language.cache_bytes() / 1024:.0f} KiB of cache per token",
        f"{plan.labelled:,.0f} labelled x {config.sft.epochs} epochs, {plan.unlabelled:,.0f} unlabelled x "
        f"{config.rounds} rounds, on {plan.gpus} x {options.device} and {plan.cpus} CPUs",
        *(f"{name}: {section.batch_line}" for name, section in (("sft", config.sft), ("dpo", config.dpo))),
        "",
        f"{'memory, GiB of ' + format(device.memory_gib, 'g'):28}" + "total  parts",
    ]
    for name, parts in held.items():
        over = "  DOES NOT FIT" if sum(parts.values()) > device.memory_gib else ""
        if over and name in ("sft", "dpo"):
            least = memory.least_workers(
                shape,
                config.model,
                getattr(config, name),
                device.memory_gib,
                *row_lengths(name, shape, plan.lengths),
            )
            over += f"; {least} workers do" if least else "; nor does any number of workers"
        lines.append(
            f"  {name:26}{sum(parts.values()):5.1f}  "
            + ", ".join(f"{part} {value:.1f}" for part, value in parts.items())
            + over
        )
    lines += ["", f"{'stage':16}{'hours':>10}{'GPU-hours':>12}{'USD':>12}  bound by"]
    lines += [
        f"{stage.name:16}{stage.seconds / 3600:10.2f}{stage.gpu_hours:12.1f}{stage.usd:12,.0f}  {stage.bound}"
        for stage in stages
    ]
    lines += [
        f"{'together':16}{total['days'] * 24:10.2f}{total['gpu_hours']:12.1f}{total['usd']:12,.0f}",
        "",
        f"bottleneck: {total['bottleneck']}; dearest: {total['dearest']}; ids that a training worker holds "
        f"after a restart: {total['listed_ids_gib']:.2f} GiB",
        "",
        f"assumed: {_values(plan.gains)}; lengths in tokens: {_values(plan.lengths)}; {plan.kept:g} of the "
        "questions become pairs; "
        f"{device.usd_per_hour:g} USD per GPU-hour, {plan.usd_per_cpu_hour:g} per CPU-hour",
        "An arithmetic estimate: only its form is tested against measurements (docs/how-to/cost.md), and no "
        "accelerator was among them.",
    ]
    return "\n".join(lines)


def _names(cls: type) -> str:
    return ", ".join(field.name for field in dataclasses.fields(cls))


def _values(section: Gains | Lengths) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in dataclasses.asdict(section).items())


def _replaced(section, settings: list[str]):
    known = {field.name: type(getattr(section, field.name)) for field in dataclasses.fields(section)}
    values = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        try:
            values[name] = known[name](value)
        except (KeyError, ValueError) as error:
            raise ConfigError(
                f"{setting!r}: write it as name=number; names are {', '.join(known)}"
            ) from error
        if not (values[name] > 0 or (values[name] == 0 and name in _MAY_BE_ZERO)):
            raise ConfigError(f"{setting!r}: must be greater than 0")
    return dataclasses.replace(section, **values)


if __name__ == "__main__":
    sys.exit(main())
