"""The bundled CLIP: small, and its embeddings know a cell's attributes."""

import json
import random
from pathlib import Path

import pytest
import torch

from medray.data.attribute_questions import ATTRIBUTES
from medray.errors import ConfigError
from medray.models.bundled import ENCODERS, model_path
from medray.models.vlm import resolve_model
from medray.rating_model.model import RatingModel
from medray.testbed.cells import render_cell, sample_record
from medray.testbed.tiny_clip import Statements, zero_shot
from medray.testbed.training import pixels_of


@pytest.fixture(scope="module")
def encoder():
    from transformers import AutoModel, AutoProcessor

    path = resolve_model("testbed:encoder")
    return AutoModel.from_pretrained(path, dtype=torch.float32).eval(), AutoProcessor.from_pretrained(path)


@pytest.fixture(scope="module")
def cells(encoder):
    """Records and pixels of cells that it has not seen."""
    rng = random.Random("test cells of the encoder")
    records = [sample_record(rng) for _ in range(80)]
    return records, pixels_of([render_cell(record, rng) for record in records], encoder[1])


def test_it_is_small_and_says_how_it_was_made():
    folder = Path(model_path("encoder"))
    assert sum(file.stat().st_size for file in folder.iterdir()) < 3e6
    facts = json.loads((folder / "build.json").read_text())
    assert {"command", "seed", "steps", "parameters", "versions", "true_answer_found"} <= set(facts)
    with pytest.raises(ConfigError, match="generalist, encoder"):
        model_path("clip")
    assert ENCODERS == ("encoder",)


def test_true_answers_lie_nearest(encoder, cells):
    records, pixels = cells
    found = zero_shot(*encoder, pixels, records)
    floor = {
        name: max(sum(r[name] == value for r in records) for value in a.values) / len(records)
        for name, a in ATTRIBUTES.items()
    }
    assert found["mean"] > 0.75, found
    assert found["label"] > 0.75 > floor["label"] and found["nucleus_shape"] > floor["nucleus_shape"] + 0.1, (
        found
    )


def test_like_cells_lie_together(encoder, cells):
    """What choosing demonstrations by clusters rests on."""
    records, pixels = cells
    with torch.no_grad():
        images = torch.nn.functional.normalize(
            encoder[0].get_image_features(pixel_values=pixels.float()).pooler_output, dim=1
        )
    nearest = (images @ images.T - 2 * torch.eye(len(images))).argmax(1).tolist()
    same = sum(
        records[place]["label"] == records[other]["label"] for place, other in enumerate(nearest)
    ) / len(records)
    by_chance = (
        sum(sum(r["label"] == s["label"] for s in records) - 1 for r in records)
        / len(records)
        / (len(records) - 1)
    )
    assert same > by_chance + 0.3, (same, by_chance)


def test_statements_are_true_of_the_records_they_say(encoder):
    """A text counts for every picture it is true of, whatever its form of question."""
    rng = random.Random(0)
    records = [sample_record(rng) for _ in range(12)]
    ids, truth = Statements(records, encoder[1].tokenizer).draw(list(range(12)), rng)
    assert truth.shape == (12, 12) and truth.diagonal().all() and not truth.all()
    assert all(
        encoder[1].tokenizer.decode(text).startswith(("<s>Question: ", "<s>This is", "<s>The image"))
        for text in ids
    )


def test_it_carries_a_rating_model():
    model = RatingModel.from_encoder("testbed:encoder", hidden=(8,))
    assert model.mlp[0].in_features == 128
