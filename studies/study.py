"""What the studies of a method's arms share: one run of the method per arm and seed, continued where it was
stopped, and the tables.

A study says which overrides of a job's configuration its arms are and which numbers of a run's results.json
it shows; instruction_free_arms.py and clinician_preference_arms.py are the commands. All runs of a study are
made by one process in one Ray, so that nothing is started and imported anew for each.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medray.config import Section, load_config
from medray.reporting import html_report
from medray.running.ray_session import ray_session
from medray.running.run import digest
from studies.self_train import T_975, interval

ROOT = Path(__file__).resolve().parent.parent
BASE = "zero-shot"  # the arm that is the base model: it is in every run and has no seed
Measures = dict[str, float | None]
ByArm = dict[str, dict[int, Measures]]


@dataclass(frozen=True)
class Study:
    """A method's arms and what is shown of them.

    Attributes:
        job: name of the script in jobs/ and of its recipes' folder.
        method: what that script calls: (configuration, run directory, shared directory).
        config_type: of the job's configuration.
        title: of the page.
        arms: overrides of the configuration, by arm.
        against: arm -> the arm it is compared with, None for none.
        columns: the measures in the tables, in per cent.
        base: results.json -> measures of the base model, None where it has none.
        tuned: results.json -> measures of the arm.
        floors: results.json -> what can be had without a look at the image, as shares.
        contrasts: arms whose mean is compared with the mean of others on the same seeds, by name: one
            question, more runs.
    """

    job: str
    method: Callable[[Any, str, str], Any]
    config_type: type[Section]
    title: str
    arms: Mapping[str, Sequence[str]]
    against: Callable[[str], str | None]
    columns: Sequence[str]
    base: Callable[[dict[str, Any]], Measures | None]
    tuned: Callable[[dict[str, Any]], Measures]
    floors: Callable[[dict[str, Any]], Mapping[str, float | None]]
    contrasts: Mapping[str, tuple[Sequence[str], Sequence[str]]] = field(default_factory=dict)

    @property
    def config(self) -> str:
        return f"{self.job}/tiny-cpu"


def per_cent(values: Mapping[str, Any], columns: Sequence[str]) -> Measures:
    """Scores ({"value", ...}) and shares as per cent; None where not measured."""
    plain = {name: value["value"] if isinstance(value, dict) else value for name, value in values.items()}
    return {name: None if plain[name] is None else 100 * plain[name] for name in columns}


def folder_of(arm: str, seed: int, options: argparse.Namespace) -> Path:
    return Path(
        options.runs, f"{arm.replace(', ', '-').replace('+', '-').replace('=', '').replace(' ', '-')}-{seed}"
    )


def run(study: Study, arm: str, seed: int, options: argparse.Namespace) -> None:
    """Run or continue one arm and add it to the record, where it is not there with the same
    configuration. Raises what the method raises.
    """
    folder = folder_of(arm, seed, options)
    overrides = [*study.arms[arm], f"seed={seed}", *options.overrides]
    wanted = fingerprint(load_config(study.config_type, options.config, overrides), options)
    if any((line["arm"], line["seed"], line["config"]) == (arm, seed, wanted) for line in recorded(options)):
        return
    source = [f"data.source={json.dumps(options.data)}"] if options.data else []
    config = load_config(study.config_type, options.config, [*source, *overrides])
    shared = Path(options.runs, "shared")
    data = ["--data", options.data] if options.data else []
    command = [
        "python",
        f"jobs/{study.job}.py",
        "--config",
        options.config,
        *data,
        "--run",
        str(folder),
        "--shared",
        str(shared),
    ]
    print(
        "$ " + shlex.join([*command, *(part for override in overrides for part in ("--set", override))]),
        flush=True,
    )
    study.method(config, str(folder.resolve()), str(shared.resolve()))
    results = json.loads((folder / "results.json").read_text())
    line = {
        "arm": arm,
        "seed": seed,
        "config": wanted,
        "base": study.base(results),
        "tuned": study.tuned(results),
        "floors": study.floors(results),
    }
    with record_of(options).open("a") as record:
        record.write(json.dumps(line) + "\n")


def fingerprint(config: Section, options: argparse.Namespace) -> str:
    """Of what is not as medray has it by default, wherever it runs: fields that come later, and are left
    alone, change nothing.
    """
    return digest(
        {
            "config": _without_places(config.model_dump(mode="json", exclude_defaults=True)),
            "data": options.data and Path(options.data).name,
        }
    )


def _without_places(value: Any) -> Any:
    return (
        {name: _without_places(item) for name, item in value.items() if name != "place"}
        if isinstance(value, dict)
        else value
    )


def record_of(options: argparse.Namespace) -> Path:
    return Path(options.record or Path(options.runs, "record.jsonl"))


def recorded(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The lines of the record: arm, seed, a hash of the configuration, and the measures as Study has
    them; of a run done again the last one.
    """
    path = record_of(options)
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return list({(line["arm"], line["seed"]): line for line in lines}.values())


def finished(options: argparse.Namespace) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(arm, seed, line) of the record, in the order of --arms and --seeds."""
    found = {(line["arm"], line["seed"]): line for line in recorded(options)}
    for arm in options.arms:
        for seed in options.seeds:
            if (arm, seed) in found:
                yield arm, seed, found[arm, seed]


def by_arm(options: argparse.Namespace) -> ByArm:
    """Measures by arm and seed, of finished runs."""
    arms: ByArm = {}
    for arm, seed, line in finished(options):
        if line["base"] is not None:
            arms.setdefault(BASE, {0: line["base"]})
        arms.setdefault(arm, {})[seed] = line["tuned"]
    return arms


def floors(options: argparse.Namespace) -> dict[str, float]:
    """Per cent of the held-out questions that are had without a look at the image."""
    found = next((line["floors"] for _, _, line in finished(options)), {})
    return {name: 100 * value for name, value in found.items() if value is not None}


def differences(study: Study, arms: ByArm) -> ByArm:
    """Each arm minus the one it is compared with, on the same seeds: the spread between seeds cancels."""
    found: ByArm = {}
    for arm in arms:
        other = None if arm == BASE else study.against(arm)
        if other and other != arm and (by_seed := _minus(study, arms, [arm], [other])):
            found[f"{arm} minus {other}"] = by_seed
    return found


def contrasted(study: Study, arms: ByArm) -> ByArm:
    """The study's contrasts, of the seeds for which all of their arms are there."""
    return {
        name: by_seed
        for name, (ones, others) in study.contrasts.items()
        if (by_seed := _minus(study, arms, ones, others))
    }


def _minus(study: Study, arms: ByArm, ones: Sequence[str], others: Sequence[str]) -> dict[int, Measures]:
    """By seed the mean of `ones` minus the mean of `others`; a measure that one of them lacks is None."""
    seeds = set.intersection(*(set(arms.get(arm, ())) for arm in (*ones, *others)))

    def mean(of: Sequence[str], seed: int, name: str) -> float | None:
        values = [arms[arm][seed].get(name) for arm in of]
        return None if None in values else statistics.mean(values)

    pairs = {
        seed: {name: (mean(ones, seed, name), mean(others, seed, name)) for name in study.columns}
        for seed in sorted(seeds)
    }
    return {
        seed: {name: None if None in pair else pair[0] - pair[1] for name, pair in by_name.items()}
        for seed, by_name in pairs.items()
    }


def table(study: Study, head: str, arms: ByArm) -> str:
    """Markdown: a line per arm, mean over seeds with its interval."""
    lines = [
        f"| {head} | seeds | " + " | ".join(study.columns) + " |",
        "|---|---:|" + "---:|" * len(study.columns),
    ]
    for arm, seeds in arms.items():
        cells = [
            [found[name] for found in seeds.values() if found.get(name) is not None] for name in study.columns
        ]
        lines.append(
            f"| {arm} | {'' if arm == BASE else len(seeds)} | "
            + " | ".join(interval(values) if values else "" for values in cells)
            + " |"
        )
    return "\n".join(lines)


def spread(values: list[float]) -> dict[str, float]:
    """Mean over seeds with its 95 % t-interval."""
    mean = statistics.mean(values)
    half = T_975[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return {"value": mean, "low": mean - half, "high": mean + half}


def page(study: Study, arms: ByArm, text: str) -> str:
    """The plots of all arms, one for each measure, and the tables."""
    plots = []
    for name in study.columns:
        scores = {
            arm: spread(values)
            for arm, seeds in arms.items()
            if (values := [found[name] for found in seeds.values() if found.get(name) is not None])
        }
        plots.append(html_report.arms_plot(scores, f"{name}, per cent, mean and 95 % interval over seeds"))
    return html_report.page(
        f"{study.title}: the arms",
        [("Arms", f'<div class="plots">{"".join(plots)}</div>'), ("Tables", f"<pre>{text}</pre>")],
    )


def write(study: Study, options: argparse.Namespace) -> str:
    """table.md and report.html of what is finished; returns the tables."""
    arms = by_arm(options)
    if not arms:
        return "no run is finished"
    shown = "\n".join(
        [
            table(study, "arm", arms),
            "",
            "Floors: " + ", ".join(f"{name} {value:.1f}" for name, value in floors(options).items()) + ".",
            "",
            table(study, "difference", differences(study, arms)),
            *(["", table(study, "question", contrasted(study, arms))] if study.contrasts else []),
        ]
    )
    Path(options.runs, "table.md").write_text(shown + "\n", encoding="utf-8")
    Path(options.runs, "report.html").write_text(page(study, arms, shown), encoding="utf-8")
    return shown


def main(study: Study, name: str, description: str | None) -> None:
    """The command of a study. Its arguments: --data, --runs, --record, --config, --seeds, --arms, --set,
    --finished.

    Args:
        name: in the JSON line, which is printed last.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", help="WBCAtt folder, or any source of attribute tables (default: synthetic cells)"
    )
    parser.add_argument("--runs", required=True, help="folder of the run directories")
    parser.add_argument(
        "--record",
        help="file of one JSON line for each finished run; a run that is there is not made again, whatever "
        "--runs holds (default: record.jsonl in --runs)",
    )
    parser.add_argument("--config", default=study.config)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--arms",
        nargs="+",
        default=list(study.arms),
        choices=list(study.arms),
        metavar="ARM",
        help=f"of: {'; '.join(study.arms)}".replace("%", "%%"),
    )
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="a.b=c", help="for every job"
    )
    parser.add_argument("--finished", action="store_true", help="run nothing, only make the tables")
    options = parser.parse_args()
    options.data = options.data and str(Path(options.data).resolve())
    Path(options.runs).mkdir(parents=True, exist_ok=True)
    if not options.finished:
        logging.basicConfig(
            level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
        )
        with ray_session(load_config(study.config_type, options.config, options.overrides).cluster):
            for seed in options.seeds:
                for arm in options.arms:
                    run(study, arm, seed, options)
    print(write(study, options))
    print(
        json.dumps(
            {"benchmark": name, "seeds": options.seeds, "arms": by_arm(options), "floors": floors(options)}
        )
    )
