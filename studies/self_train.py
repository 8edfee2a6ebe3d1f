"""The arms of docs/results/self_training.md: runs the jobs, measures the judge, prints the table.

Per seed, on a WBCAtt folder: SFT without questioning, SQ-SFT + DPO for --rounds rounds (base and SQ-SFT are
evaluated in the same run), and SFT on all labels. Every job is one `jobs/self_train.py` command, printed
before it runs, in a run directory of its own under --runs; the same command of this script continues where it
was stopped.

    python -m medray.testbed.build --only expert --data WBCATT --to runs/results/models   # the judge, tuned
    on all training labels python -m studies.self_train --data WBCATT --judge runs/results/models/expert
    --runs runs/results [--seeds 0 1 2]

Prints Markdown tables of the arms and of their gains over SQ-SFT (mean over seeds, 95 % t-interval over
seeds), and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.dataset

from medray.data.attribute_questions import right_answer

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "self_train/tiny-wbcatt"
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571}  # Student's t by degrees of freedom


def commands(options: argparse.Namespace, seed: int) -> dict[str, list[str]]:
    """Arguments of jobs/self_train.py by run name."""
    common = [
        "--config",
        options.config,
        "--data",
        options.data,
        "--set",
        f"seed={seed}",
        *(part for o in options.overrides for part in ("--set", o)),
    ]
    sft_only = ["--set", "rounds=0", "--set", "evaluate.arms=[sft]"]
    return {
        f"sft-{seed}": [*common, *sft_only, "--set", "sft.self_questioning=0"],
        f"self-training-{seed}": [
            *common,
            "--set",
            f"rounds={options.rounds}",
            "--set",
            f"judge.model={options.judge}",
        ],
        f"all-labels-{seed}": [
            *common,
            *sft_only,
            "--set",
            "data.label_fraction=1.0",
            "--set",
            "data.max_labelled=null",
            *(part for o in options.all_labels for part in ("--set", o)),
        ],
    }


def run(name: str, arguments: list[str], options: argparse.Namespace) -> dict[str, Any]:
    folder = Path(options.runs, name)
    command = [sys.executable, "jobs/self_train.py", *arguments, "--run", str(folder.resolve())]
    print("$ " + " ".join(["python", *command[1:]]), flush=True)
    with Path(options.runs, f"{name}.log").open("a") as log:
        subprocess.run(command, cwd=ROOT, check=True, stdout=log, stderr=log)
    return json.loads((folder / "results.json").read_text())


def arms(results: dict[str, dict[str, Any]], seed: int) -> dict[str, dict[str, Any]]:
    """Scores by arm, in the order of the table."""
    rounds = results[f"self-training-{seed}"]["scores"]
    return {
        "base": rounds["base"],
        "SFT (9 %)": results[f"sft-{seed}"]["scores"]["sft"],
        "SQ-SFT (9 %)": rounds["sft"],
        **{
            f"SQ-SFT + DPO, {name.partition('-')[2]} rounds": score
            for name, score in rounds.items()
            if name.startswith("dpo")
        },
        "SQ-SFT (100 %)": results[f"all-labels-{seed}"]["scores"]["sft"],
    }


def measures(score: dict[str, Any]) -> dict[str, float]:
    """Share of right answers, in per cent; `attributes` is the mean over the 11 attributes of open
    questions.
    """
    by_attribute = [
        g["by_type"]["open"]
        for name, g in score["by_attribute"].items()
        if name != "label" and "open" in g["by_type"]
    ]
    return {
        "attributes": 100 * statistics.mean(by_attribute),
        "cell type": 100 * score["by_attribute"]["label"]["by_type"]["open"],
        **{kind: 100 * score["by_type"][kind]["accuracy"]["value"] for kind in sorted(score["by_type"])},
        "all": 100 * score["overall"]["accuracy"]["value"],
    }


def judge_accuracy(run_folder: Path, number: int, labels: dict[str, dict]) -> dict[str, float]:
    """What the judge preferred, against the labels of the images it judged on (which the run itself never
    reads).
    """
    judged = pyarrow.dataset.dataset(
        str(run_folder / "stages" / f"{number}2-judge" / "rows"), format="parquet"
    )
    asked = known = decidable = agreed = both_right = both_wrong = 0
    for batch in judged.to_batches(columns=["sample_id", "questions", "verdicts"], batch_size=64):
        for row in batch.to_pylist():
            verdicts = {v["question_id"]: v for v in row["verdicts"] or []}
            for question in row["questions"] or []:
                asked += 1
                truth = right_answer(question["question"], labels[row["sample_id"]])
                verdict = verdicts.get(question["question_id"])
                if truth is None:
                    continue
                known += 1
                right = [
                    answer["text"].strip().rstrip(".").lower() == truth.lower()
                    for answer in question["answers"][:2]
                ]
                both_right += all(right)
                both_wrong += not any(right)
                if verdict is None or verdict["first_score"] is None or right[0] == right[1]:
                    continue
                decidable += 1
                agreed += (verdict["first_score"] > verdict["second_score"]) == right[0]
    return {
        "questions": asked,
        "in a known form": known,
        "both right": both_right / max(known, 1),
        "both wrong": both_wrong / max(known, 1),
        "one right": decidable,
        "judge prefers the right one": agreed / max(decidable, 1),
    }


def interval(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.1f}"
    return (
        f"{statistics.mean(values):.1f} ± "
        f"{T_975[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5:.1f}"
    )


def table(by_arm: dict[str, list[dict[str, float]]]) -> str:
    names = list(next(iter(by_arm.values()))[0])
    lines = ["| arm | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    lines += [
        f"| {arm} | " + " | ".join(interval([one[name] for one in seeds]) for name in names) + " |"
        for arm, seeds in by_arm.items()
    ]
    return "\n".join(lines)


def gains(by_arm: dict[str, list[dict[str, float]]]) -> dict[str, list[dict[str, float]]]:
    """What each arm adds to the SQ-SFT model of its own seed; the spread between seeds cancels."""
    start = by_arm["SQ-SFT (9 %)"]
    return {
        f"{arm}, minus SQ-SFT (9 %)": [
            {name: value - before[name] for name, value in one.items()}
            for one, before in zip(seeds, start, strict=True)
        ]
        for arm, seeds in by_arm.items()
        if arm not in ("base", "SQ-SFT (9 %)")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="WBCAtt folder")
    parser.add_argument("--judge", required=True, help="model that judges")
    parser.add_argument("--runs", required=True, help="folder of the run directories")
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="a.b=c", help="for every job"
    )
    parser.add_argument(
        "--all-labels",
        action="append",
        default=["sft.epochs=2"],
        metavar="a.b=c",
        help="for the job on all labels",
    )
    options = parser.parse_args()
    options.data, options.judge = str(Path(options.data).resolve()), str(Path(options.judge).resolve())
    Path(options.runs).mkdir(parents=True, exist_ok=True)
    with Path(options.data, "records.jsonl").open(encoding="utf-8") as lines:
        labels = {record["img_name"]: record for record in map(json.loads, lines)}
    by_arm: dict[str, list[dict[str, float]]] = {}
    judges: list[dict[str, Any]] = []
    for seed in options.seeds:
        results = {name: run(name, arguments, options) for name, arguments in commands(options, seed).items()}
        for arm, score in arms(results, seed).items():
            by_arm.setdefault(arm, []).append(measures(score))
        folder = Path(options.runs, f"self-training-{seed}")
        judges += [
            {"seed": seed, "round": number, **judge_accuracy(folder, number, labels)}
            for number in range(1, options.rounds + 1)
        ]
        print(table(by_arm) + "\n\n" + table(gains(by_arm)), flush=True)
    for judge in judges:
        print(judge)
    print(json.dumps({"benchmark": "self_training", "seeds": options.seeds, "arms": by_arm, "judge": judges}))


if __name__ == "__main__":
    main()
