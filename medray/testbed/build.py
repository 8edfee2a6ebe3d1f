"""Makes the bundled tiny models `base` (about forty minutes on two CPU cores), `expert`, `generalist` and
`encoder` (a quarter of an hour each).

`base`: from random weights on `testbed.corpus` (reports in words, then shapes with questions; no cell
picture). `expert`: base, tuned on many labelled synthetic cells (or a WBCAtt folder's train split with
--data). `generalist`: base, after a lesson in lists of attributes and in stated choices, about reports and
shapes only. `encoder`: a CLIP whose image tower is the expert's (its last layer goes on learning), on
labelled synthetic cells and what is true of them.

Example::

    python -m medray.testbed.build                      # both, into medray/testbed/models
    python -m medray.testbed.build --only expert --data wbcatt --to my-models

Written as bf16 safetensors with build.json beside them: seed, steps, versions, held-out accuracies. Seeds of
the cells used here are disjoint from those `testbed.cells` draws for a data set.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medray.errors import ConfigError

# Steps of the whole model; its vision tower is taught first, for TOWER_STEPS times as many steps (of 64
# pictures).
BASE_STEPS, EXPERT_STEPS, GENERALIST_STEPS, TOWER_STEPS = 3000, 2000, 2000, 0.3
ENCODER_STEPS = 500  # of 64 pictures and texts
# Before it sees a picture, base reads: READING_STEPS times as many steps of READING_BATCH reports, each with
# one question. Yes/no and multiple choice need a comparison, which words teach and pictures alone do not; and
# many rows of one question teach it in a few minutes where few rows of many questions did not (a claim of an
# earlier turn passes for a fact).
READING_STEPS, READING_BATCH = 1.3, 48
SCENES, CELLS, HELD_OUT = 5000, 6000, 150
IMAGE_TOKENS = 64
BATCH = 12  # rows per step: models this small learn from many small steps, not from few large ones


def _cells(count: int, seed: str) -> tuple[list, list]:
    """Records and pictures; `seed` is text that no data set of `testbed.cells` uses."""
    from medray.testbed.cells import render_cell, sample_record

    rng = random.Random(seed)
    records = [sample_record(rng) for _ in range(count)]
    return records, [render_cell(record, rng) for record in records]


def _wbcatt(folder: Path, split: str, limit: int | None = None) -> tuple[list, list]:
    from PIL import Image

    lines = (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()
    records = [row for row in map(json.loads, lines) if row["split"] == split][:limit]
    if not records:
        raise ConfigError(f"{folder}/records.jsonl has no row of split {split!r}")
    return records, [Image.open(folder / row["image"]).convert("RGB").resize((160, 160)) for row in records]


def _save(model: Any, processor: Any, folder: Path, facts: dict) -> None:
    import torch
    import transformers

    from medray.models.export import save_vlm

    save_vlm(model, processor, folder, dtype=torch.bfloat16)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    parameters = sum(p.numel() for p in model.parameters())
    (folder / "build.json").write_text(
        json.dumps({**facts, "parameters": parameters, "versions": versions}, indent=1) + "\n"
    )


def _save_tested(
    folder: Path,
    model: Any,
    processor: Any,
    encoder: Any,
    records: list[dict],
    pixels: Any,
    started: float,
    seed: int,
    steps: int,
) -> None:
    """Save a model that has seen no cell, with its accuracy on held-out scenes, on cells and on reports."""
    from medray.data.attribute_questions import ATTRIBUTES
    from medray.testbed import corpus, training

    shapes = training.accuracies(model, encoder, pixels, records, corpus.SHAPES)
    cells, pictures = _cells(HELD_OUT, f"held-out cells/{seed}")
    zero_shot = training.accuracies(
        model, encoder, training.pixels_of(pictures, processor), cells, ATTRIBUTES
    )
    print(f"{folder.name}: held-out shapes", _means(shapes), "cells, never seen", _means(zero_shot))
    _save(
        model,
        processor,
        folder,
        {
            "command": f"python -m medray.testbed.build --only {folder.name}",
            "seed": seed,
            "steps": steps,
            "seconds": round(time.monotonic() - started),
            "accuracy_shapes": _rounded(shapes),
            "accuracy_cells": _rounded(zero_shot),
            "accuracy_reports": training.report_accuracies(model, encoder, corpus.report_dialogue),
        },
    )


def _bundled(to: Path, name: str = "base") -> tuple[Any, Any, Any]:
    """(model, processor, encoder of its dialogues) of `to`/base (or another name), or of the bundled one."""
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    from medray.models.bundled import model_path
    from medray.testbed import training

    base = to / name if (to / name / "config.json").is_file() else Path(model_path(name))
    processor = AutoProcessor.from_pretrained(base)
    model = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    return model, processor, training.Encoder(processor.tokenizer, IMAGE_TOKENS)


def _scenes(key: str, processor: Any) -> tuple[list[dict], Any]:
    """Records and pixels of SCENES scenes to learn from, then HELD_OUT others."""
    from medray.testbed import corpus, training

    rng = random.Random(key)
    records = [corpus.sample_uniform(corpus.SHAPES, rng) for _ in range(SCENES + HELD_OUT)]
    return records, training.pixels_of([corpus.render_scene(record, rng) for record in records], processor)


def _means(result: dict) -> dict:
    return {kind: round(by_name["mean"], 4) for kind, by_name in result.items()}


def _rounded(result: dict) -> dict:
    return {
        kind: {name: round(share, 4) for name, share in by_name.items()} for kind, by_name in result.items()
    }


class Lessons:
    """Keeps the model after each lesson in `folder`, so that a build that was stopped goes on after the
    last whole one.
    """

    def __init__(self, model: Any, folder: Path):
        self.model, self.folder = model, folder

    def take(self, name: str, lesson: Callable[[], None]) -> None:
        from safetensors.torch import load_model, save_model

        file = self.folder / f"{name}.safetensors"
        if file.is_file():
            load_model(self.model, file)
            print(f"{name}: taken before")
            return
        lesson()
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        save_model(self.model, str(partial))
        partial.rename(file)

    def forget(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def build_base(to: Path, seed: int = 0, steps: int = BASE_STEPS) -> None:
    """Train `base` from random weights and write it to `to`/base."""
    from medray.testbed import corpus, training
    from medray.testbed.tiny_vlm import build_tokenizer, llava_model, llava_processor

    started = time.monotonic()
    tokenizer = build_tokenizer(corpus.tokenizer_texts())
    processor = llava_processor(tokenizer)
    model = llava_model(tokenizer, seed=seed)
    encoder = training.Encoder(tokenizer, IMAGE_TOKENS)
    records, pixels = _scenes(f"scenes/{seed}", processor)
    print(
        f"base: {sum(p.numel() for p in model.parameters()):,} parameters, {SCENES} scenes, "
        f"{time.monotonic() - started:.0f} s"
    )
    lessons = Lessons(model, to / f"base-lessons-{seed}-{steps}")
    lessons.take(
        "reading",
        lambda: training.train(
            model,
            encoder,
            pixels[:0],
            lambda i, r: [],
            steps=int(READING_STEPS * steps),
            seed=seed,
            batch=READING_BATCH,
            text_rows=READING_BATCH,
            text_dialogue=lambda r: corpus.report_dialogue(r, turns=1),
        ),
    )
    print("base: about reports", training.report_accuracies(model, encoder, corpus.report_dialogue))
    lessons.take(
        "tower",
        lambda: training.pretrain_tower(
            model.model.vision_tower,
            pixels[:SCENES],
            records[:SCENES],
            corpus.SHAPES,
            steps=int(TOWER_STEPS * steps),
            seed=seed,
        ),
    )
    lessons.take(
        "pictures",
        lambda: training.train(
            model,
            encoder,
            pixels[:SCENES],
            lambda i, r: corpus.scene_dialogue(records[i], r),
            steps=steps,
            seed=seed,
            batch=BATCH,
            text_rows=2,
            text_dialogue=corpus.report_dialogue,
        ),
    )
    _save_tested(
        to / "base", model, processor, encoder, records[SCENES:], pixels[SCENES:], started, seed, steps
    )
    lessons.forget()


def build_expert(to: Path, seed: int = 0, steps: int = EXPERT_STEPS, data: Path | None = None) -> None:
    """Tune `to`/base on labelled cells and write `to`/expert; `data` is a WBCAtt folder (default:
    synthetic cells).
    """
    from medray.data.attribute_questions import ATTRIBUTES
    from medray.testbed import corpus, training

    started = time.monotonic()
    model, processor, encoder = _bundled(to)
    if data is None:
        records, pictures = _cells(CELLS, f"expert cells/{seed}")
        held_out, held_out_pictures = _cells(2 * HELD_OUT, f"held-out cells/{seed}")
    else:
        records, pictures = _wbcatt(data, "train")
        held_out, held_out_pictures = _wbcatt(data, "val", 2 * HELD_OUT)
    pixels = training.pixels_of(pictures, processor)
    print(f"expert: {len(records)} cells, {time.monotonic() - started:.0f} s")

    training.pretrain_tower(
        model.model.vision_tower,
        pixels,
        records,
        ATTRIBUTES,
        steps=int(TOWER_STEPS * steps),
        seed=seed,
        turn_images=True,
    )
    training.train(
        model,
        encoder,
        pixels,
        lambda i, r: corpus.picture_dialogue(records[i], r),
        batch=BATCH,
        steps=steps,
        seed=seed,
        turn_images=True,
    )
    cells = training.accuracies(
        model, encoder, training.pixels_of(held_out_pictures, processor), held_out, ATTRIBUTES
    )
    print(
        "expert: held-out cells",
        _means(cells),
        {name: round(share, 3) for name, share in cells["open"].items()},
    )
    _save(
        model,
        processor,
        to / "expert",
        {
            "command": "python -m medray.testbed.build --only expert" + (" --data" if data else ""),
            "seed": seed,
            "steps": steps,
            "data": "WBCAtt train" if data else f"{CELLS} synthetic cells",
            "seconds": round(time.monotonic() - started),
            "accuracy_cells": _rounded(cells),
        },
    )


def build_generalist(to: Path, seed: int = 0, steps: int = GENERALIST_STEPS) -> None:
    """Teach `to`/base (default: the bundled one) two more ways of speaking and write `to`/generalist."""
    from medray.testbed import corpus, training

    started = time.monotonic()
    model, processor, encoder = _bundled(to)
    records, pixels = _scenes(f"generalist's scenes/{seed}", processor)
    training.train(
        model,
        encoder,
        pixels[:SCENES],
        lambda i, r: corpus.general_dialogue(records[i], r),
        steps=steps,
        seed=seed,
        batch=2 * BATCH,
        text_rows=BATCH,
        text_dialogue=corpus.general_report,
        lr=5e-4,
    )
    _save_tested(
        to / "generalist", model, processor, encoder, records[SCENES:], pixels[SCENES:], started, seed, steps
    )


def build_encoder(to: Path, seed: int = 0, steps: int = ENCODER_STEPS) -> None:
    """Teach a tiny CLIP which descriptions, and which answers to questions, are true of a cell, and write it
    to `to`/encoder.

    Its image tower is that of `to`/expert (default: the bundled one), whose last layer goes on learning.
    """
    from medray.testbed import corpus, tiny_clip, training

    started = time.monotonic()
    tokenizer = tiny_clip.clip_tokenizer(corpus.tokenizer_texts())
    processor, model = tiny_clip.clip_processor(tokenizer), tiny_clip.clip_model(tokenizer, seed=seed)
    model.vision_model.load_state_dict(_bundled(to, "expert")[0].model.vision_tower.state_dict())
    records, pictures = _cells(CELLS, f"encoder cells/{seed}")
    pixels = training.pixels_of(pictures, processor)
    print(
        f"encoder: {sum(p.numel() for p in model.parameters()):,} parameters, {len(records)} cells, "
        f"{time.monotonic() - started:.0f} s"
    )
    tiny_clip.teach(model, processor, pixels, records, steps=steps, seed=seed)
    held_out, held_out_pictures = _cells(2 * HELD_OUT, f"held-out cells/{seed}")
    found = tiny_clip.zero_shot(model, processor, training.pixels_of(held_out_pictures, processor), held_out)
    print(
        "encoder: held-out cells, true answers found",
        {name: round(share, 3) for name, share in found.items()},
    )
    _save(
        model,
        processor,
        to / "encoder",
        {
            "command": "python -m medray.testbed.build --only encoder",
            "seed": seed,
            "steps": steps,
            "data": f"{CELLS} synthetic cells",
            "seconds": round(time.monotonic() - started),
            "true_answer_found": {name: round(share, 4) for name, share in found.items()},
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the bundled tiny models.")
    parser.add_argument(
        "--to",
        type=Path,
        default=Path(__file__).parent / "models",
        help="folder that gets base/, expert/, generalist/ and encoder/",
    )
    parser.add_argument(
        "--only",
        choices=("base", "expert", "generalist", "encoder"),
        help="build one of them; expert and generalist start from TO/base, encoder from TO/expert, else from "
        "the bundled ones",
    )
    parser.add_argument("--data", type=Path, help="WBCAtt folder for the expert (default: synthetic cells)")
    parser.add_argument(
        "--steps",
        type=int,
        help=f"optimiser steps (default {BASE_STEPS} for base, {EXPERT_STEPS} for expert, {GENERALIST_STEPS} "
        f"for generalist, {ENCODER_STEPS} for encoder)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--threads", type=int, default=2, help="torch threads (on busy cores several wait for each other)"
    )
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    if args.only in (None, "base"):
        build_base(args.to, args.seed, args.steps or BASE_STEPS)
    if args.only in (None, "expert"):
        build_expert(args.to, args.seed, args.steps or EXPERT_STEPS, args.data)
    if args.only in (None, "generalist"):
        build_generalist(args.to, args.seed, args.steps or GENERALIST_STEPS)
    if args.only in (None, "encoder"):
        build_encoder(args.to, args.seed, args.steps or ENCODER_STEPS)


if __name__ == "__main__":
    main()
