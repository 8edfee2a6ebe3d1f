"""The plain torch loop that trains the bundled tiny models, and their held-out accuracy."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from PIL import Image

from medray.data.attribute_questions import KINDS, LETTERS, Attribute, attribute_questions, turns_of
from medray.testbed.corpus import QUESTIONER

IGNORED = -100

# A description is a hundred tokens of mostly fixed text, an answer two tokens of content: without weights the
# loss would be about the fixed text. Questions are weighed down for the same reason.
SHORT_ANSWER = 8  # tokens
LONG_WEIGHT, QUESTION_WEIGHT = 0.25, 0.15


def pixels_of(images: Sequence[Image.Image], processor: Any) -> torch.Tensor:
    """Preprocessed pictures, float16 (N, 3, 64, 64), by the processor that the model is saved with."""
    parts = [
        processor.image_processor(list(images[i : i + 256]), return_tensors="pt")["pixel_values"].half()
        for i in range(0, len(images), 256)
    ]
    return torch.cat(parts)


class Encoder:
    """Turns dialogues into ids exactly as the chat template and tokenizer do, with a weight per
    supervised token.
    """

    def __init__(self, tokenizer: Any, image_tokens: int):
        self.tokenizer = tokenizer
        self.role = {
            name: tokenizer.convert_tokens_to_ids(f"<|{name}|>")
            for name in ("system", "user", "assistant", QUESTIONER)
        }
        self.image = [tokenizer.convert_tokens_to_ids("<image>")] * image_tokens
        self.ids_of = lru_cache(maxsize=100_000)(
            lambda text: tuple(tokenizer(text, add_special_tokens=False).input_ids)
        )

    def encode(self, dialogue: Sequence[Mapping], image: bool) -> tuple[list[int], list[float]]:
        """ids and weights (0 where a token is not supervised); the image is put before the first turn's text
        that is not the system's."""
        ids, weights = [self.tokenizer.bos_token_id], [0.0]
        for turn in dialogue:
            prefix = [self.role[turn["role"]]]
            if image and turn["role"] != "system":
                prefix, image = prefix + self.image, False
            text = [*self.ids_of(turn["text"]), self.tokenizer.eos_token_id]
            weight = {
                "assistant": 1.0 if len(text) <= SHORT_ANSWER else LONG_WEIGHT,
                QUESTIONER: QUESTION_WEIGHT,
            }.get(turn["role"], 0.0)
            ids += prefix + text
            weights += [0.0] * len(prefix) + [weight] * len(text)
        return ids, weights

    def batch(
        self, dialogues: Sequence[Sequence[Mapping]], images: Sequence[bool]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Right-padded ids (B, T) and weights (B, T)."""
        rows = [self.encode(dialogue, image) for dialogue, image in zip(dialogues, images, strict=True)]
        longest = max(len(ids) for ids, _ in rows)
        ids_BT = torch.full((len(rows), longest), self.tokenizer.pad_token_id)
        weights_BT = torch.zeros(len(rows), longest)
        for i, (ids, weights) in enumerate(rows):
            ids_BT[i, : len(ids)] = torch.tensor(ids)
            weights_BT[i, : len(ids)] = torch.tensor(weights)
        return ids_BT, weights_BT


def supervised_logits(
    model: Any, ids_BT: torch.Tensor, weights_BT: torch.Tensor, pixels: torch.Tensor | None
):
    """Logits (S, V), targets (S,) and weights (S,) of the S supervised tokens only: the vocabulary
    projection is a large part of a tiny model's cost. No attention mask: padding is on the right of a
    causal model.
    """
    hidden_BTD = model.model(input_ids=ids_BT, pixel_values=pixels, use_cache=False).last_hidden_state
    mask_BT = weights_BT[:, 1:] > 0
    return model.lm_head(hidden_BTD[:, :-1][mask_BT]), ids_BT[:, 1:][mask_BT], weights_BT[:, 1:][mask_BT]


def dihedral(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A random quarter turn and flip of each picture (N, 3, H, W): a cell has no up."""
    turned = [
        torch.rot90(p, int(k), (1, 2))
        for p, k in zip(pixels, torch.randint(4, (len(pixels),), generator=generator))
    ]
    return torch.stack(
        [
            p.flip(2) if flip else p
            for p, flip in zip(turned, torch.rand(len(pixels), generator=generator) < 0.5)
        ]
    )


def pretrain_tower(
    tower: Any,
    pixels: torch.Tensor,
    records: Sequence[Mapping],
    schema: Mapping[str, Attribute],
    *,
    steps: int,
    seed: int,
    batch: int = 64,
    lr: float = 1e-3,
    turn_images: bool = False,
    log: Callable[[str], None] = print,
) -> None:
    """Teach the vision tower the attributes with linear heads on its mean patch feature; the heads are then
    dropped.

    A step costs a tenth of one through the language model, and without it most of the training time goes by
    before the language model looks at the picture at all.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    width = tower.config.hidden_size
    targets_NA = torch.tensor(
        [[a.values.index(record[name]) for name, a in schema.items()] for record in records]
    )
    sizes = [len(attribute.values) for attribute in schema.values()]
    heads = torch.nn.Sequential(torch.nn.LayerNorm(width), torch.nn.Linear(width, sum(sizes)))
    step_of = optimizer_steps([*tower.parameters(), *heads.parameters()], steps, lr)
    tower.train()
    started, running = time.monotonic(), None
    for step in range(steps):
        chosen = torch.randint(len(pixels), (batch,), generator=generator)
        picked = pixels[chosen].float()
        with torch.autocast("cpu", torch.bfloat16):
            patches_NPD = tower(
                pixel_values=dihedral(picked, generator) if turn_images else picked
            ).last_hidden_state[:, 1:]
        logits = heads(patches_NPD.float().mean(1)).split(sizes, 1)
        losses = [
            torch.nn.functional.cross_entropy(part, targets_NA[chosen, i]) for i, part in enumerate(logits)
        ]
        loss = torch.stack(losses).mean()
        loss.backward()
        step_of()
        running = loss.item() if running is None else 0.95 * running + 0.05 * loss.item()
        if step % 50 == 49:
            right = torch.stack(
                [(part.argmax(1) == targets_NA[chosen, i]).float().mean() for i, part in enumerate(logits)]
            )
            log(
                f"tower {step + 1}/{steps}  loss {running:.3f}  batch accuracy {right.mean():.3f}  "
                f"{time.monotonic() - started:.0f} s"
            )


def optimizer_steps(parameters: Sequence[torch.nn.Parameter], steps: int, lr: float) -> Callable[[], None]:
    """AdamW (betas 0.9, 0.98; weight decay 0.05 on matrices), 5 % warm-up, cosine to zero, gradient norm
    1.
    """
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, 0.5 * (1 + math.cos(math.pi * s / steps)))
    )

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()

    return step


def train(
    model: Any,
    encoder: Encoder,
    pixels: torch.Tensor,
    dialogue_of: Callable[[int, random.Random], list[dict]],
    *,
    steps: int,
    seed: int,
    batch: int = 48,
    text_rows: int = 0,
    text_dialogue: Callable[[random.Random], list[dict]] | None = None,
    lr: float = 1e-3,
    turn_images: bool = False,
    log: Callable[[str], None] = print,
) -> None:
    """Next-token training on the weighted tokens of new dialogues; optimiser as in `optimizer_steps`.

    Args:
        pixels: (N, 3, 64, 64) pictures; `dialogue_of(i, rng)` makes a new dialogue about picture i each time.
        batch, text_rows: rows per step and how many of them are text-only, from `text_dialogue(rng)`.
        turn_images: augment with quarter turns and flips.
    """
    rng, generator = random.Random(f"train/{seed}"), torch.Generator().manual_seed(seed)
    step_of = optimizer_steps(list(model.parameters()), steps, lr)
    model.train()
    order: list[int] = []
    pictured = batch - text_rows
    pool: list[tuple[list[dict], int | None]] = []
    started, running = time.monotonic(), None
    for step in range(steps):
        if not pool:
            # Eight batches are drawn at once and cut by length: half of a random batch would be padding.
            while len(order) < 8 * pictured:
                order += torch.randperm(len(pixels), generator=generator).tolist()
            chosen, order = order[: 8 * pictured], order[8 * pictured :]
            rows = [(dialogue_of(i, rng), i) for i in chosen] + [
                (text_dialogue(rng), None) for _ in range(8 * text_rows)
            ]
            rows.sort(key=lambda row: len(encoder.encode(row[0], row[1] is not None)[0]))
            pool = [rows[i : i + batch] for i in range(0, len(rows), batch)]
            rng.shuffle(pool)
        rows = pool.pop()
        pictures = [i for _, i in rows if i is not None]
        picked = pixels[pictures].float() if pictures else None
        if turn_images and pictures:
            picked = dihedral(picked, generator)
        ids, weights = encoder.batch([dialogue for dialogue, _ in rows], [i is not None for _, i in rows])
        # Weights and optimiser stay fp32; bf16 products take half the time where the CPU has them.
        with torch.autocast("cpu", torch.bfloat16):
            logits, targets, weight = supervised_logits(model, ids, weights, picked)
        logits = logits.float()
        loss = (
            torch.nn.functional.cross_entropy(logits, targets, reduction="none") * weight
        ).sum() / weight.sum()
        loss.backward()
        step_of()
        running = loss.item() if running is None else 0.95 * running + 0.05 * loss.item()
        if step % 50 == 49:
            log(f"step {step + 1}/{steps}  loss {running:.3f}  {time.monotonic() - started:.0f} s")
    model.eval()


@torch.no_grad()
def _right(
    model: Any, encoder: Encoder, dialogues: Sequence[Sequence[Mapping]], pixels: torch.Tensor | None
) -> list[bool]:
    """Whether the greedy answer is exactly the reference, per dialogue of one question (about its picture, or
    all without).

    It is exactly when the most likely token is right at each of the reference's positions, its end included,
    so one forward pass decides it.
    """
    ids, weights = encoder.batch(dialogues, [pixels is not None] * len(dialogues))
    logits, targets, _ = supervised_logits(model, ids, weights, pixels)
    return [
        bool(hit.all()) for hit in (logits.argmax(-1) == targets).split((weights[:, 1:] > 0).sum(1).tolist())
    ]


def accuracies(
    model: Any,
    encoder: Encoder,
    pixels: torch.Tensor,
    records: Sequence[Mapping],
    schema: Mapping[str, Attribute],
    kinds: Sequence[str] = KINDS,
) -> dict[str, dict[str, float]]:
    """Share of questions whose greedy answer is exactly the reference, {kind: {attribute: share, "mean":
    ...}}.

    Every question is asked in a dialogue of its own.
    """
    model.eval()
    right: dict[str, dict[str, int]] = {kind: dict.fromkeys(schema, 0) for kind in kinds}
    asked = [
        (i, row)
        for i, record in enumerate(records)
        for row in attribute_questions(record, kinds, random.Random(f"eval/{i}"), schema)
    ]
    asked.sort(key=lambda pair: len(pair[1]["question"]))
    for start in range(0, len(asked), 96):
        part = asked[start : start + 96]
        hits = _right(
            model, encoder, [turns_of([row]) for _, row in part], pixels[[i for i, _ in part]].float()
        )
        for (_, row), hit in zip(part, hits, strict=True):
            right[row["answer_type"]][row["attribute"]] += hit
    shares = {
        kind: {name: count / len(records) for name, count in by_name.items()}
        for kind, by_name in right.items()
    }
    return {
        kind: {**by_name, "mean": sum(by_name.values()) / len(by_name)} for kind, by_name in shares.items()
    }


def report_accuracies(
    model: Any, encoder: Encoder, dialogue: Callable[[random.Random], list[dict]], count: int = 300
) -> dict[str, float]:
    """Share of first questions about `count` new text-only reports whose greedy answer is exactly right,
    by form.
    """
    model.eval()
    rng = random.Random("held-out reports")
    asked = [dialogue(rng)[:2] for _ in range(count)]
    shares: dict[str, list[bool]] = {}
    for start in range(0, count, 50):
        part = asked[start : start + 50]
        for (_, answer), hit in zip(part, _right(model, encoder, part, None), strict=True):
            kind = {"yes": "closed", "no": "closed"}.get(
                answer["text"], "mcq" if answer["text"] in LETTERS else "open"
            )
            shares.setdefault(kind, []).append(hit)
    return {kind: round(sum(hits) / len(hits), 4) for kind, hits in sorted(shares.items())}
