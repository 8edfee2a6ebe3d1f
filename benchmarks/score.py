"""Scoring's speed: seconds of score(), of compare_models() and of score_models() on synthetic predictions,
and where they go.

Two models' predictions on the same questions, three to an image: 45 % yes/no, 35 % open (sentences, hardly
two alike), 20 % multiple choice, five attributes, three modalities; the default configuration (bootstrap over
images, permutation tests, all groups). score() is split into reading the columns, metrics (what loading takes
beyond that) and the bootstrap (the rest, floors and means included). score_models() is what jobs/evaluate.py
does with two models: scores and comparison from one reading. Each measurement has texts of its own, so that
no cache holds their metrics. Prints one JSON line last.

    python benchmarks/score.py [--rows 100000] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from medray.config import EvaluateConfig
from medray.evaluation.prediction_files import prediction_tables, write_predictions
from medray.evaluation.prediction_table import load
from medray.evaluation.scores import compare_models, score, score_models

WORDS = [
    f"{start}{middle}{end}"
    for start in ("car", "neu", "hep", "ren", "pul", "ost")
    for middle in ("di", "ro", "a", "mo", "la")
    for end in ("ma", "tic", "sis", "nal", "itis", "gram", "um", "al")
]
COMMON = ("the", "a", "of", "in", "left", "right", "lung", "mass", "no", "with", "shows", "is")
SHAPES = ("round", "oval", "lobed", "irregular")


def predictions(rows: int, seed: int, skill: float) -> Iterator[dict[str, Any]]:
    """Rows of records.PREDICTION; the questions are the same for every skill (share of right answers),
    the answers are not.
    """
    asked, said = random.Random(seed), random.Random(f"{seed} {skill}")
    for number in range(rows):
        kind = asked.choices(("closed", "open", "mcq"), (45, 35, 20))[0]
        right = said.random() < skill
        choices = None
        if kind == "closed":
            reference = asked.choice(("Yes", "No"))
            answer = (
                said.choice((reference, f"{reference}, {sentence(said, 4)}."))
                if right
                else said.choice(("yes", "no", "I do not know"))
            )
        elif kind == "mcq":
            choices, reference = list(SHAPES), asked.choice("ABCD")
            answer = (
                reference if right else said.choice(("A", "B", "C", "D", "The correct answer is A.", "round"))
            )
        else:
            reference = sentence(asked, asked.randint(1, 4))
            answer = (
                f"{reference.capitalize()}."
                if right
                else f"{sentence(said, said.randint(3, 15)).capitalize()}."
            )
        yield {
            "sample_id": f"test:{number}",
            "image_id": f"image-{number // 3}",
            "question": f"What is shown in part {number % 3}?",
            "reference": reference,
            "answer": answer,
            "answer_type": kind,
            "attribute": asked.choice(("organ", "size", "shape", "place", "count")),
            "choices": choices,
            "model": f"skill {skill}",
            "finish_reason": "stop",
            "tokens": len(answer.split()),
            "modality": asked.choice(("ct", "mri", "xray")),
            "language": "en",
            "benchmark": "synthetic",
        }


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(COMMON if rng.random() < 0.5 else WORDS) for _ in range(words))


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measured(scratch: Path, seed: int, rows: int, config: EvaluateConfig) -> dict[str, float]:
    """Seconds of each part."""
    sets = [{f"skill {skill}": f"{scratch}/{number}-{skill}" for skill in (0.5, 0.6)} for number in range(3)]
    for number, models in enumerate(sets):
        for skill, folder in zip((0.5, 0.6), models.values(), strict=True):
            write_predictions(predictions(rows, seed + number, skill), folder)
    alone, compared, together = sets
    reading = seconds(lambda: sum(table.num_rows for table in prediction_tables(alone["skill 0.5"])))
    loading = seconds(lambda: load(alone["skill 0.5"]))
    scoring = seconds(lambda: score(alone["skill 0.6"], config))
    return {
        "score": scoring,
        "reading": reading,
        "metrics": loading - reading,
        "bootstrap": scoring - loading,
        "compare_models": seconds(lambda: compare_models(compared, "skill 0.5", config)),
        "score_models": seconds(lambda: score_models(together, config)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000, help="predictions of each model")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    config = EvaluateConfig()
    found: dict[str, list[float]] = {}
    for repeat in range(args.repeats + 1):
        with tempfile.TemporaryDirectory() as scratch:
            turn = measured(Path(scratch), 3 * repeat, args.rows if repeat else 1000, config)
        if repeat == 0:  # imports
            continue
        for name, value in turn.items():
            found.setdefault(name, []).append(value)
        print(
            f"turn {repeat}: " + ", ".join(f"{name} {value:.1f} s" for name, value in turn.items()),
            flush=True,
        )
    print(
        json.dumps(
            {
                "benchmark": "score",
                "rows": args.rows,
                "repeats": args.repeats,
                "cpus": os.cpu_count(),
                "bootstrap": config.bootstrap,
                "seconds": {name: round(statistics.median(values), 2) for name, values in found.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
