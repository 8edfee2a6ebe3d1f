"""Rows to training batches. `Encoder` runs on Ray Data workers (decode, resize, tokenise); the functions
below it run in the training worker on encoded rows (self-questioning, shuffling, padding). No Ray in here.

Shapes: B samples, T tokens, S spans. Pixels stay uint8 until the model's device, where `normalise_pixels`
does what the processor's rescale and normalise would have done.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from medray.config import DataConfig, InstructionFreeTrainConfig, ModelConfig
from medray.data.chat_spans import (
    ANSWER,
    QUESTION,
    QUESTION_PREFIX,
    Descriptions,
    Dialogues,
    EncodeError,
    TokenInfo,
)
from medray.data.description_shuffling import shuffled
from medray.data.encoding_check import check_alike, check_family, own_inputs
from medray.errors import ConfigError
from medray.images.decoding import ImageError, decode, pad_to_square
from medray.records import check_turns

IGNORE = -100
ROWS_CHECKED = 6  # by each encoder, against the model's own processor

_PIXELS = [
    ("pixels", pa.binary()),
    ("pixel_shape", pa.list_(pa.int32())),
    ("image_grid_thw", pa.list_(pa.int32())),
]
ENCODED_SFT = pa.schema(
    [
        ("sample_id", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("spans", pa.list_(pa.int32())),
        *_PIXELS,
        ("error", pa.string()),
    ]
)
ENCODED_DPO = pa.schema(
    [
        ("sample_id", pa.string()),
        ("chosen_ids", pa.list_(pa.int32())),
        ("rejected_ids", pa.list_(pa.int32())),
        ("answer_start", pa.int32()),
        ("ref_chosen_logp", pa.float64()),
        ("ref_rejected_logp", pa.float64()),
        *_PIXELS,
        ("error", pa.string()),
    ]
)
# Text, not ids: rows are encoded once for all epochs, and the order of a description's parts, and with it its
# tokens, is drawn for each.
ENCODED_DESCRIPTION = pa.schema(
    [
        ("sample_id", pa.string()),
        ("description", pa.string()),
        ("image_tokens", pa.int32()),
        *_PIXELS,
        ("error", pa.string()),
    ]
)
ENCODED = {"sft": ENCODED_SFT, "dpo": ENCODED_DPO, "description": ENCODED_DESCRIPTION}


class Encoder:
    """Callable for Dataset.map_batches(batch_format="pyarrow"): rows of records.CONVERSATION ("sft"),
    PREFERENCE ("dpo") or DESCRIPTION ("description") to encoded rows, one for one. A row that cannot be
    encoded carries its reason in `error`. The first rows are held against the model's own processor.

    Args:
        model_path: the model, whose processor is used.
        model_config, data_config: as dicts, so that the constructor arguments travel as plain data.
        train_config: of "description" only, the stage's InstructionFreeTrainConfig as a dict (default: its
            defaults). Its instruction counts for a row's length; the encoded rows are the same for every
            instruction and shuffling.

    Raises ConfigError, also later for one of the first rows, where the model's own processor gives the model
    something else.
    """

    def __init__(
        self,
        model_path: str,
        model_config: dict[str, Any],
        data_config: dict[str, Any],
        kind: str,
        train_config: dict[str, Any] | None = None,
    ):
        from medray.models.support import family_and_stops
        from medray.models.vlm import load_processor

        self.config = ModelConfig.model_validate(model_config)
        self.limits = DataConfig.model_validate(data_config)
        self.processor = load_processor(model_path, self.config.trust_remote_code)
        self.dialogues = Dialogues(self.processor, self.config)
        self.schema = ENCODED[kind]
        self.encode = {"sft": self._sft, "dpo": self._dpo, "description": self._description}[kind]
        if kind == "description":
            self.train = InstructionFreeTrainConfig.model_validate(train_config or {})
            self.descriptions = Descriptions(self.dialogues, self.train.instruction, self.train.proxy.count)
        self.family, stops = family_and_stops(model_path, self.processor, self.config.trust_remote_code)
        check_family(self.family, self.dialogues, self._pixels, stops, rounds=kind == "sft")
        self._rows_to_check = ROWS_CHECKED

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = []
        for row in table.to_pylist():
            try:
                rows.append({"sample_id": row["sample_id"], **self._checked(row, self.encode(row))})
            except (EncodeError, ImageError) as error:
                rows.append({"sample_id": row["sample_id"], "error": str(error)})
            except ConfigError:
                raise
            except Exception as error:
                # the row boundary: a processor may raise anything for one odd image or text
                rows.append({"sample_id": row["sample_id"], "error": f"{type(error).__name__}: {error}"})
        return pa.Table.from_pylist(rows, schema=self.schema)

    def _checked(self, row: dict[str, Any], encoded: dict[str, Any]) -> dict[str, Any]:
        """An encoded row as it is; one of the first is compared with what the processor makes of it."""
        if self._rows_to_check:
            self._rows_to_check -= 1
            image = self._decoded(row["image"])
            for turns, ids, whole in self._texts(row, encoded):
                check_alike(
                    self.family, self.dialogues, own_inputs(self.dialogues, turns, image), ids, encoded, whole
                )
        return encoded

    def check_row(self, turns: list[dict[str, str]], image: Any) -> None:
        """Compare one dialogue about a decoded (and padded, where the model wants it) image with what the
        processor makes of it.

        Raises ConfigError naming the family and the first difference, EncodeError for a dialogue that cannot
        be encoded.
        """
        pixels, image_tokens = self._pixels(image)
        ids, _ = self.dialogues.expand(*self.dialogues.encode(turns), image_tokens)
        check_alike(self.family, self.dialogues, own_inputs(self.dialogues, turns, image), ids, pixels)

    def _texts(
        self, row: dict[str, Any], encoded: dict[str, Any]
    ) -> list[tuple[list[dict[str, str]], np.ndarray, bool]]:
        """(turns, ids, whether they are the whole text's) of a row."""
        if self.schema is ENCODED_SFT:
            return [(row["turns"], encoded["input_ids"], True)]
        if self.schema is ENCODED_DPO:
            asked = {"role": "user", "text": row["prompt"]}
            return [
                ([asked, {"role": "assistant", "text": row[name]}], encoded[f"{name}_ids"], False)
                for name in ("chosen", "rejected")
            ]
        return [
            (
                self.descriptions.turns(encoded["description"]),
                self._described(encoded, encoded["description"])[0],
                True,
            )
        ]

    def _sft(self, row: dict[str, Any]) -> dict[str, Any]:
        problem = check_turns(row["turns"])
        if problem:
            raise EncodeError(problem)
        ids, spans = self.dialogues.encode(row["turns"])
        pixels, image_tokens = self._image(row["image"])
        ids, spans = self.dialogues.expand(ids, spans, image_tokens)
        self._check_length(ids)
        return {"input_ids": ids, "spans": spans.ravel(), **pixels}

    def _dpo(self, row: dict[str, Any]) -> dict[str, Any]:
        encoded = {}
        start = 0
        pixels, image_tokens = self._image(row["image"])
        for name in ("chosen", "rejected"):
            if not (row[name] or "").strip():
                raise EncodeError(f"empty {name} answer")
            ids, start = self.dialogues.encode_answer(row["prompt"], row[name])
            ids, _ = self.dialogues.expand(ids, np.empty((0, 3), np.int32), image_tokens)
            self._check_length(ids)
            encoded[f"{name}_ids"] = ids
        return {
            **encoded,
            "answer_start": start + image_tokens - 1,
            **pixels,
            "ref_chosen_logp": row.get("ref_chosen_logp"),
            "ref_rejected_logp": row.get("ref_rejected_logp"),
        }

    def _description(self, row: dict[str, Any]) -> dict[str, Any]:
        text = (row["description"] or "").strip()
        if not text:
            raise EncodeError("empty description")
        self.descriptions.check(text)
        pixels, image_tokens = self._image(row["image"])
        encoded = {"description": text, "image_tokens": image_tokens, **pixels}
        self._check_length(self._described(encoded, text)[0])
        return encoded

    def _described(self, row: dict[str, Any], text: str) -> tuple[np.ndarray, np.ndarray]:
        return self.dialogues.expand(*self.descriptions.encode(text), row["image_tokens"])

    def in_order(self, row: dict[str, Any], epoch: int | None) -> dict[str, Any]:
        """An encoded description (ENCODED_DESCRIPTION) as an encoded dialogue (ENCODED_SFT), its parts in the
        order of this epoch, which (seed, epoch, sample_id) fix; epoch None (evaluation) and rows with an
        error: as they are.

        Byte pairs meet anew in another order, so that it can be some tokens longer. One that is thereby over
        model.max_length gives way to the original order, which is not: so every epoch, and every way of
        shuffling, trains on the same rows. Nothing is cut.
        """
        if row["error"] is not None:
            return row
        text = row["description"]
        if epoch is not None and self.train.shuffling != "none":
            text = shuffled(
                text, row["sample_id"], epoch, self.train.seed, self.train.shuffling, self.train.separator
            )
        try:
            ids, spans = self._described(row, text)
            if len(ids) > self.config.max_length:
                ids, spans = self._described(row, row["description"])
                self._check_length(ids)
        except EncodeError as error:
            return {**row, "error": str(error)}
        return {**row, "input_ids": ids, "spans": spans.ravel()}

    def _check_length(self, ids: np.ndarray) -> None:
        if len(ids) > self.config.max_length:
            raise EncodeError(f"{len(ids)} tokens are over model.max_length {self.config.max_length}")

    def _image(self, data: bytes | None) -> tuple[dict[str, Any], int]:
        """The processor's uint8 pixels of one image, and how many tokens stand for it."""
        return self._pixels(self._decoded(data))

    def _decoded(self, data: bytes | None) -> Any:
        image = decode(data, self.limits)
        return pad_to_square(image) if self.config.pad_to_square else image

    def _pixels(self, image: Any) -> tuple[dict[str, Any], int]:
        out = self.processor(
            text=[self.dialogues.image_token],
            images=[image],
            do_rescale=False,
            do_normalize=False,
            return_tensors="np",
        )
        values = np.asarray(out["pixel_values"])
        # LLaVA: [1, 3, H, W] -> [3, H, W]; Qwen-VL: [patches, 3 * time * side * side] as it is.
        values = values[0] if "image_grid_thw" not in out else values
        pixels = np.clip(np.rint(values), 0, 255).astype(np.uint8)
        tokens = int((np.asarray(out["input_ids"]) == self.dialogues.image_token_id).sum())
        grid = np.asarray(out["image_grid_thw"])[0].tolist() if "image_grid_thw" in out else None
        return {"pixels": pixels.tobytes(), "pixel_shape": list(pixels.shape), "image_grid_thw": grid}, tokens


def draw_flips(sample_id: str, turns: int, rho: float, seed: int, epoch: int) -> np.ndarray:
    """Which of `turns` user turns (those after the first) become the questioner's this epoch: bool [turns].

    Each with probability rho, independently, re-drawn every epoch (STLLaVA-Med / SQ-LLaVA code), and fixed by
    (seed, epoch, sample_id), so a restarted epoch draws the same.
    """
    key = hashlib.sha256(f"{seed}|{epoch}|{sample_id}".encode()).digest()
    return np.random.default_rng(int.from_bytes(key[:8], "little")).random(turns) < rho


def apply_self_questioning(
    ids: np.ndarray,
    spans: np.ndarray,
    flips: Sequence[bool],
    questioner_prefix_ids: Sequence[int],
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels after the drawn user turns were given to the questioner.

    A flipped turn's role prefix is replaced by the questioner's and not supervised; its text and end token
    are. Answers always are; unflipped questions are context only. Labels are IGNORE elsewhere. int64 [T'],
    int64 [T'].

    Args:
        spans: [S, 3] of (kind, start, end); QUESTION_PREFIX and QUESTION come in pairs, in order.
        flips: one per pair.
    """
    pieces, labels, at, pair = [], [], 0, -1

    def take(until: int, supervised: bool) -> None:
        nonlocal at
        piece = ids[at:until]
        pieces.append(piece)
        labels.append(piece if supervised else np.full(len(piece), IGNORE, ids.dtype))
        at = until

    for kind, start, end in spans.tolist():
        take(start, supervised=False)
        if kind == QUESTION_PREFIX:
            pair += 1
            if flips[pair]:
                prefix = np.asarray(questioner_prefix_ids, ids.dtype)
                pieces.append(prefix)
                labels.append(np.full(len(prefix), IGNORE, ids.dtype))
                at = end
                continue
            take(end, supervised=False)
        elif kind == QUESTION:
            take(end, supervised=bool(flips[pair]))
        elif kind == ANSWER:
            take(end, supervised=True)
    take(len(ids), supervised=False)
    return np.concatenate(pieces).astype(np.int64), np.concatenate(labels).astype(np.int64)


def collate_sft(
    rows: Sequence[dict[str, Any]], info: TokenInfo, rho: float, seed: int, epoch: int
) -> dict[str, Any]:
    """Encoded rows to torch tensors: input_ids, attention_mask, labels [B, T]; pixel_values uint8; model
    extras.
    """
    sequences = []
    for row in rows:
        ids = np.asarray(row["input_ids"], np.int32)
        spans = np.asarray(row["spans"], np.int32).reshape(-1, 3)
        flips = draw_flips(row["sample_id"], int((spans[:, 0] == QUESTION_PREFIX).sum()), rho, seed, epoch)
        sequences.append(apply_self_questioning(ids, spans, flips, info.questioner_prefix_ids))
    return {**_pad(sequences, info), **_images(rows, copies=1)}


def collate_dpo(rows: Sequence[dict[str, Any]], info: TokenInfo) -> dict[str, Any]:
    """Encoded pairs to torch tensors of 2B sequences (B chosen, then B rejected) over B images.

    image_grid_thw, where the model has one, is given for all 2B sequences; pixel_values only once per image.
    ref_chosen_logps and ref_rejected_logps are float32 [B] where the rows carry them.
    """
    import torch

    sequences = []
    for name in ("chosen_ids", "rejected_ids"):
        for row in rows:
            ids = np.asarray(row[name], np.int64)
            labels = np.full(len(ids), IGNORE, np.int64)
            labels[row["answer_start"] :] = ids[row["answer_start"] :]
            sequences.append((ids, labels))
    batch = {**_pad(sequences, info), **_images(rows, copies=2)}
    if rows[0].get("ref_chosen_logp") is not None:
        for name in ("chosen", "rejected"):
            batch[f"ref_{name}_logps"] = torch.tensor(
                [row[f"ref_{name}_logp"] for row in rows], dtype=torch.float32
            )
    return batch


def _pad(sequences: Sequence[tuple[np.ndarray, np.ndarray]], info: TokenInfo) -> dict[str, Any]:
    import torch

    longest = max(len(ids) for ids, _ in sequences)
    ids_BT = np.full((len(sequences), longest), info.pad_id, np.int64)
    labels_BT = np.full_like(ids_BT, IGNORE)
    mask_BT = np.zeros_like(ids_BT)
    for row, (ids, labels) in enumerate(sequences):
        ids_BT[row, : len(ids)] = ids
        labels_BT[row, : len(ids)] = labels
        mask_BT[row, : len(ids)] = 1
    batch = {"input_ids": ids_BT, "labels": labels_BT, "attention_mask": mask_BT}
    if info.wants_token_types:
        batch["mm_token_type_ids"] = (ids_BT == info.image_token_id).astype(np.int64)
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def _images(rows: Sequence[dict[str, Any]], copies: int) -> dict[str, Any]:
    import torch

    arrays = [np.frombuffer(row["pixels"], np.uint8).reshape(row["pixel_shape"]) for row in rows]
    if rows[0]["image_grid_thw"] is None:
        return {"pixel_values": torch.from_numpy(np.stack(arrays))}
    grid = torch.tensor([row["image_grid_thw"] for row in rows])
    return {
        "pixel_values": torch.from_numpy(np.concatenate(arrays)),
        "image_grid_thw": grid.repeat(copies, 1),
    }
