"""Holds medray's encoding against the model's own processor: the same ids, the same pixels, and no input that
is left out.

medray writes the image's tokens in place of the one that the chat template gives, and passes on pixels and
grids. A family whose processor writes markers between those tokens, cuts images into tiles or returns further
inputs would train on something it never saw; it is refused by name here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from medray.data.chat_spans import ANSWER, Dialogues, EncodeError
from medray.errors import ConfigError
from medray.images.decoding import pad_to_square

PASSED_ON = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
# Small, wide, and larger than most tiles: what a processor does may depend on an image's size and shape
# (height, width).
_SIZES = ((48, 48), (90, 300), (700, 500))
_TURNS = [
    {"role": "user", "text": "What is the shape of the nucleus?"},
    {"role": "assistant", "text": "It is round."},
    {"role": "user", "text": "Is the cell big?"},
    {"role": "assistant", "text": "yes"},
]
_PIXEL_TOLERANCE = 0.03  # of normalised values; a step of one in 255 is 0.015 after normalising


def own_inputs(dialogues: Dialogues, turns: list[dict[str, str]], image: Any) -> dict[str, np.ndarray]:
    """What the model's own processor makes of a dialogue and its (padded, where the model wants it)
    image, as arrays.
    """
    messages = dialogues.messages(dialogues.with_system(turns))
    for message in messages:
        for part in message["content"]:
            if part["type"] == "image":
                part["image"] = image
    own = dialogues.processor.apply_chat_template(
        messages, chat_template=dialogues.template, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return {name: np.asarray(value) for name, value in own.items()}


def check_inputs(family: str, dialogues: Dialogues, own: dict[str, np.ndarray]) -> None:
    """Raises ConfigError where the processor returns an input of the model that medray does not pass on."""
    known = [
        *PASSED_ON,
        *(["mm_token_type_ids"] if dialogues.info(questioner=False).wants_token_types else []),
    ]
    left_out = [
        name
        for name, value in own.items()
        if name not in known and not (name == "token_type_ids" and not value.any())
    ]
    if left_out:
        raise ConfigError(
            f"model.path: {family}: the model's processor gives it {', '.join(left_out)}, which medray does "
            "not pass on; "
            "this family is not supported yet"
        )


def check_alike(
    family: str,
    dialogues: Dialogues,
    own: dict[str, np.ndarray],
    ids: np.ndarray,
    pixels: dict[str, Any],
    whole: bool = True,
) -> None:
    """Compare one encoded row with what the processor gives.

    Args:
        ids: [T], image tokens expanded.
        pixels: the row's pixels, pixel_shape and image_grid_thw.
        whole: False where `ids` end before the text does.

    Raises ConfigError naming the family, and the first difference.
    """
    from medray.data.pixels import normalise_pixels

    start = f"model.path: {family}: "
    check_inputs(family, dialogues, own)
    theirs = own["input_ids"][0]
    shared = min(len(theirs), len(ids))
    differing = np.flatnonzero(theirs[:shared] != ids[:shared])
    if len(differing) or len(theirs) < len(ids) or (whole and len(theirs) != len(ids)):
        place = int(differing[0]) if len(differing) else shared
        theirs_said, ours_said = (
            repr(dialogues.tokenizer.decode([int(one[place])])) if place < len(one) else "nothing"
            for one in (theirs, ids)
        )
        raise ConfigError(
            f"{start}token {place} is {theirs_said} by the model's own processor and {ours_said} as medray "
            f"encodes it ({len(theirs)} tokens against {len(ids)}): "
            "tokens that this family or its chat template puts around images or texts would be lost; this "
            "family is not supported yet, or needs another model.chat_template"
        )
    if (
        "mm_token_type_ids" in own
        and (own["mm_token_type_ids"][0][: len(ids)] != (ids == dialogues.image_token_id)).any()
    ):
        raise ConfigError(
            f"{start}mm_token_type_ids of the model's own processor mark more than image tokens; this family "
            "is not supported yet"
        )
    if "pixel_values" not in own:
        raise ConfigError(
            f"{start}the model's processor gives no pixel_values; this family is not supported yet"
        )
    grid = own["image_grid_thw"][0].tolist() if "image_grid_thw" in own else None
    if grid != pixels["image_grid_thw"]:
        raise ConfigError(
            f"{start}image_grid_thw is {grid} by the model's own processor and {pixels['image_grid_thw']} as "
            "medray encodes it; this family is not supported yet"
        )
    theirs = own["pixel_values"]
    theirs = theirs[0] if grid is None and len(theirs) == 1 else theirs
    if list(theirs.shape) != list(pixels["pixel_shape"]):
        raise ConfigError(
            f"{start}pixel_values are of shape {list(own['pixel_values'].shape)} by the model's own "
            f"processor and {list(pixels['pixel_shape'])} as medray encodes them: "
            "it cuts images into tiles or lays pixels out in a way that medray does not know; this family is "
            "not supported yet"
        )
    import torch

    ours = torch.from_numpy(np.frombuffer(pixels["pixels"], np.uint8).reshape(pixels["pixel_shape"]).copy())
    ours = normalise_pixels(ours[None] if ours.dim() == 3 else ours, dialogues.processor.image_processor)
    gap = float((ours.reshape(theirs.shape) - torch.from_numpy(theirs)).abs().max())
    if not gap <= _PIXEL_TOLERANCE:
        raise ConfigError(
            f"{start}pixel_values differ by up to {gap:.3f} from those of the model's own processor (allowed "
            f"{_PIXEL_TOLERANCE}); this family is not supported yet"
        )


def check_family(family: str, dialogues: Dialogues, image_of: Any, stops: set[int], rounds: bool) -> None:
    """Hold some made-up dialogues and pictures of several shapes against the processor, before any row is
    read.

    Args:
        image_of: a decoded image to (pixels as of an encoded row, image tokens).
        stops: ids at which the model stops.
        rounds: dialogues of several rounds are trained on.

    Raises ConfigError naming the family.
    """
    turns = _TURNS if rounds else _TURNS[:2]
    try:
        for number, size in enumerate(_SIZES):
            image = Image.fromarray(
                np.random.default_rng(number).integers(0, 255, (*size, 3), dtype=np.uint8)
            )
            if dialogues.config.pad_to_square:
                image = pad_to_square(image)
            own = own_inputs(dialogues, turns, image)
            check_inputs(family, dialogues, own)
            ids, spans = dialogues.encode(turns)
            _check_stop(
                dialogues, int(ids[next(end for kind, _, end in spans.tolist() if kind == ANSWER) - 1]), stops
            )
            pixels, image_tokens = image_of(image)
            ids, _ = dialogues.expand(ids, spans, image_tokens)
            check_alike(family, dialogues, own, ids, pixels)
    except EncodeError as error:
        raise ConfigError(f"model.path: {family}: a plain dialogue cannot be encoded: {error}") from error
    except ConfigError:
        raise
    except Exception as error:  # a processor may raise anything for a way of calling it that it does not know
        raise ConfigError(
            f"model.path: {family}: the model's processor fails on a plain dialogue ({type(error).__name__}: "
            f"{error}); this family is not supported yet"
        ) from error


def _check_stop(dialogues: Dialogues, last: int, stops: set[int]) -> None:
    if last not in stops:
        raise ConfigError(
            f"model.chat_template: an answer ends with {dialogues.tokenizer.decode([last])!r}, at which the "
            "model does not stop when it generates; "
            "give a template that ends answers with the end token, or name that token in eos_token_id of the "
            "model's generation_config.json"
        )
