"""What the rating model reads: one text template, and images as its encoder's processor cuts them. No Ray in
here.

The template is the same for training, clinicians' pairs and scoring. The released code (BioMed-VITAL,
filter/) puts caption and in-text mention first and cuts at 256 tokens, so that long contexts push out the
answer, and leaves the context out of clinicians' pairs alone; here question and answer come first and the
context is what gets cut.

Shapes: B pairs or exchanges, U images, T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from medray.config import DataConfig
from medray.errors import DataError
from medray.images.decoding import decode, pad_to_square


class InputError(DataError):
    """An exchange that cannot be rated; its row is set aside with this reason."""


@dataclass(frozen=True)
class RatingText:
    """Token ids of an exchange, with the tokenizer's special ones, and which of "question", "answer",
    "context" were cut.
    """

    ids: list[int]
    cut: tuple[str, ...]


def rating_text(
    question: str, answer: str, context: str | None, tokenizer: Any, max_length: int
) -> RatingText:
    """The exchange as the rating model reads it: question, answer, then as much of the context as there is
    room for.

    Where question and answer alone are too long, the longer of them is cut, to no less than half of the room.
    No text becomes a special token, whatever it spells.

    Raises InputError for an empty question or answer.
    """
    before, after = special_ids(tokenizer)
    room = max_length - len(before) - len(after)
    parts = {}
    for name, text in (("question", question), ("answer", answer), ("context", context)):
        words = _spelled_out(" ".join((text or "").split()), tokenizer)
        if not words and name != "context":
            raise InputError(f"empty {name}")
        prefix = "" if name == "question" else "\n"
        parts[name] = (
            tokenizer(
                f"{prefix}{name.capitalize()}: {words}", add_special_tokens=False, verbose=False
            ).input_ids
            if words
            else []
        )
    answer_room = max(room - len(parts["question"]), room // 2)
    kept = {"answer": parts["answer"][:answer_room]}
    kept["question"] = parts["question"][: room - len(kept["answer"])]
    kept["context"] = parts["context"][: room - len(kept["answer"]) - len(kept["question"])]
    cut = tuple(name for name in parts if len(kept[name]) < len(parts[name]))
    return RatingText([*before, *kept["question"], *kept["answer"], *kept["context"], *after], cut)


@lru_cache(maxsize=8)  # it is asked for every text, and takes as long as the rest of it
def special_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids a tokenizer puts before and after a text."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    raise DataError(
        f"the encoder's tokenizer reads 'a' as {plain} alone and as {whole} in a text; its special tokens "
        "cannot be told"
    )


def _spelled_out(text: str, tokenizer: Any) -> str:
    """The text with a blank after the first character of whatever spells a special token: read as that
    token, an end token would hide all that follows it. (split_special_tokens=True does not help where the
    vocabulary itself has the token, as SentencePiece's do.)
    """
    for token in tokenizer.all_special_tokens:
        if len(token) > 1:
            # tokenizers may read lower case
            text = re.sub(
                rf"({re.escape(token[0])})({re.escape(token[1:])})", r"\1 \2", text, flags=re.IGNORECASE
            )
    return text


class RaterInputs:
    """Exchanges to the rating model's inputs.

    Args:
        tokenizer, image_processor: the encoder's (its image_processor resizes and crops; values stay uint8).
        max_length: tokens of a text at most.
        square: pad images to a square first.
        limits: of images.
        pad_to: tokens every text is padded to; None: to the longest of a batch.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_processor: Any,
        max_length: int,
        square: bool,
        limits: DataConfig,
        pad_to: int | None = None,
    ):
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.max_length, self.square, self.limits, self.pad_to = max_length, square, limits, pad_to

    def text(self, question: str, answer: str, context: str | None) -> RatingText:
        return rating_text(question, answer, context, self.tokenizer, self.max_length)

    def pixels(self, image: bytes | None) -> np.ndarray:
        """uint8 [3, H, W] of encoded image bytes. Raises ImageError."""
        picture = decode(image, self.limits)
        if self.square:
            picture = pad_to_square(picture)
        values = self.image_processor(
            images=[picture], do_rescale=False, do_normalize=False, return_tensors="np"
        )["pixel_values"]
        return np.clip(np.rint(np.asarray(values)[0]), 0, 255).astype(np.uint8)

    def padded(self, texts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """input_ids and attention_mask, int64 [B, T], padded on the right."""
        import torch

        length = self.pad_to or max(map(len, texts))
        ids_BT = np.full((len(texts), length), self.tokenizer.pad_token_id, np.int64)
        mask_BT = np.zeros_like(ids_BT)
        for row, ids in enumerate(texts):
            ids_BT[row, : len(ids)] = ids
            mask_BT[row, : len(ids)] = 1
        return {"input_ids": torch.from_numpy(ids_BT), "attention_mask": torch.from_numpy(mask_BT)}

    def batch(
        self, texts: Sequence[Sequence[int]], images: Sequence[np.ndarray], image_of: Sequence[int]
    ) -> dict[str, Any]:
        """Inputs of RatingModel.forward: texts [B], images uint8 [U] and, for each text, the place of its
        image.
        """
        import torch

        return {
            **self.padded(texts),
            "pixel_values": torch.from_numpy(np.stack(images)),
            "image_of": torch.tensor(image_of),
        }

    def collate_pairs(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Encoded pairs to RatingModel.forward's inputs of 2B exchanges (B chosen, then B rejected) over
        their images, each once; with `weights` float32 [B] and `clinician` bool [B].
        """
        import torch

        images: list[np.ndarray] = []
        places: dict[str, list[int]] = {"chosen": [], "rejected": []}
        for row in rows:
            for side, of_side in places.items():
                if row[f"{side}_pixels"] is not None:
                    images.append(
                        np.frombuffer(row[f"{side}_pixels"], np.uint8).reshape(row["pixel_shape"]).copy()
                    )
                of_side.append(len(images) - 1)
        texts = [row[f"{side}_ids"] for side in places for row in rows]
        return {
            **self.batch(texts, images, places["chosen"] + places["rejected"]),
            "weights": torch.tensor([row["weight"] for row in rows], dtype=torch.float32),
            "clinician": torch.tensor([row["origin"] == "clinician" for row in rows]),
        }
