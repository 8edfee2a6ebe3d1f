"""The arms of docs/results/instruction_free.md: runs the jobs, prints the tables.

Every arm is one `jobs/instruction_free.py` command per seed, printed before it runs, in a run directory of its own under --runs. What
arms have in common (the data, the base model's answers, the warm-up of equal k, seed and shuffling) is made once, in
--runs/shared. The same command of this script continues where it was stopped, and does nothing where all is done.

    nohup python benchmarks/instruction_free_arms.py --data WBCATT --runs runs/arms > runs/arms.log 2>&1 &
    python benchmarks/instruction_free_arms.py --data WBCATT --runs runs/arms --finished     # the tables of what is finished
    python benchmarks/instruction_free_arms.py --runs runs/arms-cells --arms text proxy-textbook+shuffled --seeds 0

Without --data the arms are run on the synthetic cells. Writes table.md and report.html (plots) into --runs, prints the Markdown
tables (mean over seeds, 95 % t-interval over seeds) and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from self_training import T_975, interval

from medray.config import InstructionFreeConfig, load_config
from medray.evaluation import report

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/instruction_free/tiny-cpu.yaml"
TEXT = ["tune.instruction=Describe this medical scan."]
PLAIN, SHUFFLED = ["tune.shuffling=none"], ["tune.shuffling=separator"]
LORA = ["tune.lr_llm=3e-4", "tune.lora_llm={rank: 32, alpha: 64, dropout: 0.0}"]
MODES = ("textbook", "released", "frozen", "free")  # free: the proxy without momentum

ARMS: dict[str, list[str]] = {
    "text": [*TEXT, *PLAIN],
    "text+shuffled": [*TEXT, *SHUFFLED],
    **{f"proxy-{mode}": [f"tune.proxy.mode={mode}", *PLAIN] for mode in MODES},
    **{f"proxy-{mode}+shuffled": [f"tune.proxy.mode={mode}", *SHUFFLED] for mode in MODES},
    "text, LoRA": [*TEXT, *PLAIN, *LORA],
    "text+shuffled, LoRA": [*TEXT, *SHUFFLED, *LORA],
    "proxy-textbook+shuffled, LoRA": [*SHUFFLED, *LORA],
    **{f"proxy-textbook+shuffled, k={k}": [f"tune.proxy.count={k}", *SHUFFLED] for k in (1, 2, 32)},
}
"""Overrides of the configuration by arm. The proxy has 8 vectors and the language model is frozen where the name does not say otherwise."""

PLAIN_ARM = "text"  # what the other arms are compared with
COLUMNS = ("strict", "likelihood", "format failures", "leakage", "plain", "general", "retained", "precision", "recall", "F1", "ROUGE-L")


def folder_of(arm: str, seed: int, options: argparse.Namespace) -> Path:
    return Path(options.runs, f"{arm.replace(', ', '-').replace('+', '-').replace('=', '')}-{seed}")


def is_finished(folder: Path) -> bool:
    """A job writes its configuration first and its results last."""
    config, results = folder / "config.yaml", folder / "results.json"
    return results.is_file() and results.stat().st_mtime >= config.stat().st_mtime


def run(arm: str, seed: int, options: argparse.Namespace) -> None:
    """Run or continue one arm, where it is not finished with the same configuration.

    Raises CalledProcessError where the job fails; its log is beside its folder.
    """
    folder = folder_of(arm, seed, options)
    overrides = [*ARMS[arm], f"seed={seed}", *options.overrides]
    source = [f"data.source={json.dumps(options.data)}"] if options.data else []
    wanted = load_config(InstructionFreeConfig, ROOT / options.config, [*source, *overrides]).model_dump(mode="json")
    if is_finished(folder) and yaml.safe_load((folder / "config.yaml").read_text()) == wanted:
        return
    data = ["--data", options.data] if options.data else []
    command = [
        sys.executable, "jobs/instruction_free.py", "--config", options.config, *data, "--run", str(folder.resolve()),
        "--shared", str(Path(options.runs, "shared").resolve()), *(part for override in overrides for part in ("--set", override)),
    ]
    print("$ " + " ".join(["python", *(f"'{part}'" if " " in part else part for part in command[1:])]), flush=True)
    with folder.with_suffix(".log").open("a") as log:
        subprocess.run(command, cwd=ROOT, check=True, stdout=log, stderr=log)


def finished(arm: str, options: argparse.Namespace) -> dict[int, dict[str, Any]]:
    """results.json by seed of the runs that have come to their end."""
    folders = {seed: folder_of(arm, seed, options) for seed in options.seeds}
    return {seed: json.loads((folder / "results.json").read_text()) for seed, folder in folders.items() if is_finished(folder)}


def measured(found: dict[str, Any]) -> dict[str, float | None]:
    """A model's headline numbers in per cent; None where not measured."""
    plain = {name: value["value"] if isinstance(value, dict) else value for name, value in found.items()}
    return {name: None if plain[name] is None else 100 * plain[name] for name in COLUMNS}


def by_arm(options: argparse.Namespace) -> dict[str, dict[int, dict[str, float | None]]]:
    """Measures by arm and seed, of finished runs; the base model is the arm zero-shot, without a seed of its own."""
    arms: dict[str, dict[int, dict[str, float | None]]] = {}
    for arm in options.arms:
        results = finished(arm, options)
        for seed, found in results.items():
            arms.setdefault("zero-shot", {0: measured(found["measures"]["base"])})
            arms.setdefault(arm, {})[seed] = measured(found["measures"]["tuned"])
    return arms


def floors(options: argparse.Namespace) -> dict[str, float]:
    """Per cent of the held-out questions that chance and each attribute's commonest answer get right."""
    found = next((result["floors"] for arm in options.arms for result in finished(arm, options).values()), {})
    return {name: 100 * value for name, value in found.items() if value is not None}


def differences(arms: dict[str, dict[int, dict[str, float | None]]]) -> dict[str, dict[int, dict[str, float | None]]]:
    """Each arm minus the plain one, on the same seeds: the spread between seeds cancels."""
    plain = arms.get(PLAIN_ARM, {})
    return {
        arm: {seed: {name: None if value is None or plain[seed][name] is None else value - plain[seed][name] for name, value in found.items()} for seed, found in seeds.items() if seed in plain}
        for arm, seeds in arms.items() if arm not in (PLAIN_ARM, "zero-shot") and set(seeds) & set(plain)
    }


def table(head: str, arms: dict[str, dict[int, dict[str, float | None]]]) -> str:
    """Markdown: a line per arm, mean over seeds with its interval."""
    lines = [f"| {head} | seeds | " + " | ".join(COLUMNS) + " |", "|---|---:|" + "---:|" * len(COLUMNS)]
    for arm, seeds in arms.items():
        cells = [[found[name] for found in seeds.values() if found[name] is not None] for name in COLUMNS]
        lines.append(f"| {arm} | {'' if arm == 'zero-shot' else len(seeds)} | " + " | ".join(interval(values) if values else "" for values in cells) + " |")
    return "\n".join(lines)


def spread(values: list[float]) -> dict[str, float]:
    mean = statistics.mean(values)
    half = T_975[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return {"value": mean, "low": mean - half, "high": mean + half}


def page(arms: dict[str, dict[int, dict[str, float | None]]], text: str) -> str:
    """The plots of all arms, one for each measure, and the tables."""
    plots = []
    for name in COLUMNS:
        scores = {arm: spread(values) for arm, seeds in arms.items() if (values := [found[name] for found in seeds.values() if found[name] is not None])}
        plots.append(report.arms_plot(scores, f"{name}, per cent, mean and 95 % interval over seeds"))
    return report.page("Instruction-free tuning: the arms", [("Arms", f'<div class="plots">{"".join(plots)}</div>'), ("Tables", f"<pre>{text}</pre>")])


def write(options: argparse.Namespace) -> str:
    """table.md and report.html of what is finished; returns the tables."""
    arms = by_arm(options)
    if not arms:
        return "no run is finished"
    shown = "\n".join([
        table("arm", arms), "", "Floors: " + ", ".join(f"{name} {value:.1f}" for name, value in floors(options).items()) + ".", "",
        table(f"minus {PLAIN_ARM}", differences(arms)),
    ])
    Path(options.runs, "table.md").write_text(shown + "\n", encoding="utf-8")
    Path(options.runs, "report.html").write_text(page(arms, shown), encoding="utf-8")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="WBCAtt folder, or any source of attribute tables (default: synthetic cells)")
    parser.add_argument("--runs", required=True, help="folder of the run directories")
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM", help=f"of: {'; '.join(ARMS)}")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="a.b=c", help="for every job")
    parser.add_argument("--finished", action="store_true", help="run nothing, only make the tables")
    options = parser.parse_args()
    options.data = options.data and str(Path(options.data).resolve())
    Path(options.runs).mkdir(parents=True, exist_ok=True)
    for seed in options.seeds if not options.finished else ():
        for arm in options.arms:
            run(arm, seed, options)
            write(options)
    print(write(options))
    print(json.dumps({"benchmark": "instruction_free_arms", "seeds": options.seeds, "arms": by_arm(options), "floors": floors(options)}))


if __name__ == "__main__":
    main()
