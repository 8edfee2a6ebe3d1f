"""Items for clinicians to judge."""

import io

import numpy as np
from PIL import Image


def png(number=0):
    buffer = io.BytesIO()
    Image.fromarray(np.random.RandomState(number).randint(0, 255, (16, 16, 3), dtype=np.uint8)).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


def item(number, **changes):
    return {
        "item_id": f"item-{number}",
        "image_id": f"image-{number}",
        "image": png(number),
        "modality": "smear",
        "caption": "A cell.",
        "context": None,
        "dialogue_id": f"image-{number}/d0",
        "turn": 2,
        "question": "Which cell?",
        "answer_a": "A lymphocyte.",
        "answer_b": "A monocyte.",
        **changes,
    }
