"""Pairs and exchanges about small pictures whose right answers a tiny rating model can learn."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from medray.config import RaterConfig
from medray.records import EXCHANGE, RATING_PAIR

COLOURS = {"red": (210, 40, 40), "blue": (40, 60, 210)}
QUESTION = "Which colour does the cell have?"


def cell(number: int, size: tuple[int, int] = (64, 64)) -> tuple[bytes, str]:
    """A picture of one colour with noise, and the colour's name."""
    name = list(COLOURS)[number % 2]
    noise = np.random.RandomState(number).randint(-30, 30, (*size, 3))
    data = io.BytesIO()
    Image.fromarray(np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8)).save(data, "PNG")
    return data.getvalue(), name


def pair(
    number: int,
    origin: str = "model",
    other: int | None = None,
    wrong: bool = False,
    context: str | None = "A smear.",
) -> dict:
    """The right colour against the wrong one, of one picture or (`other`) of two."""
    better, worse = cell(number), cell(number if other is None else other)
    row = {
        "sample_id": f"{origin}-{number:04d}",
        "origin": origin,
        "judge": "dr-a" if origin == "clinician" else "rater",
    }
    for side, place, (image, name), right in (
        ("chosen", number, better, True),
        ("rejected", number if other is None else other, worse, False),
    ):
        said = name if right != wrong else next(colour for colour in COLOURS if colour != name)
        row |= {
            f"{side}_image_id": f"cell-{place:04d}",
            f"{side}_image": image,
            f"{side}_context": context,
            f"{side}_question": QUESTION,
            f"{side}_answer": said,
            f"{side}_score": None if origin == "clinician" else 8.0 if right else 3.0,
        }
    return row


def exchange(number: int, turn: int = 0, answer: str = "red", **fields) -> dict:
    image, _ = cell(number)
    return {
        "sample_id": f"cell-{number:04d}/d0#{turn}",
        "dialogue_id": f"cell-{number:04d}/d0",
        "turn": turn,
        "image_id": f"cell-{number:04d}",
        "image": image,
        "modality": "smear",
        "context": "A smear.",
        "question": QUESTION,
        "answer": answer,
        **fields,
    }


def stored(rows: list[dict], folder, schema: pa.Schema = RATING_PAIR, files: int = 2) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        pq.write_table(
            pa.Table.from_pylist(rows[number::files], schema=schema),
            folder / f"{number:03d}.parquet",
            row_group_size=8,
        )
    return str(folder)


def exchanges(rows: list[dict], folder) -> str:
    return stored(rows, folder, EXCHANGE)


def small(encoder: str, **changes) -> RaterConfig:
    return RaterConfig.model_validate(
        {
            "encoder": encoder,
            "hidden": (32, 32),
            "max_length": 64,
            "micro_batch": 8,
            "accumulation": 1,
            "epochs": 2,
            "lr": 1e-3,
            **changes,
        }
    )
