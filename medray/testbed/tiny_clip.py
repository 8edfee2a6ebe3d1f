"""A tiny CLIP in the field's standard format: the testbed's stand-in for a biomedical encoder, with its own
tokenizer.

Image tower and text tower (64 px, patch 8) into 64 shared dimensions, about 1.3M parameters. Everything that
works on it works on any CLIP-family model of transformers. `teach` trains it on pictures with attributes, as
medray.testbed.build does.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from medray.testbed.tiny_vlm import IMAGE_SIDE, PATCH, build_tokenizer

VOCABULARY = 1024
POSITIONS = 160  # tokens of a text at most

# CLIP's text tower takes an end token of number 2 for its oldest checkpoints' mistake and then looks
# elsewhere.
SPECIAL_TOKENS = ("<pad>", "<unk>", "<s>", "<|end|>")


def clip_tokenizer(texts: Iterable[str]) -> Any:
    """Byte-level BPE trained on `texts` that writes <s> before a text and <|end|> after it."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = build_tokenizer(texts, SPECIAL_TOKENS, VOCABULARY, template=None)
    ends = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<s>", "<|end|>")}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A <|end|>", special_tokens=list(ends.items())
    )
    tokenizer.model_max_length = POSITIONS
    return tokenizer


def clip_processor(tokenizer: Any, side: int = IMAGE_SIDE) -> Any:
    """CLIPProcessor: images of any shape become side x side pixels."""
    from transformers import CLIPImageProcessor, CLIPProcessor

    size = {"height": side, "width": side}
    return CLIPProcessor(CLIPImageProcessor(size=size, do_center_crop=False, crop_size=size), tokenizer)


def clip_model(
    tokenizer: Any,
    vision: int = 128,
    text: int = 96,
    layers: tuple[int, int] = (4, 3),
    shared: int = 64,
    seed: int = 0,
    std: float = 0.02,
) -> Any:
    """A CLIPModel with fresh weights; widths of the towers, layers of the image and the text tower, width
    of the embeddings.
    """
    import torch
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(
        projection_dim=shared,
        vision_config={
            "hidden_size": vision,
            "intermediate_size": 4 * vision,
            "num_hidden_layers": layers[0],
            "num_attention_heads": 4,
            "image_size": IMAGE_SIDE,
            "patch_size": PATCH,
            "projection_dim": shared,
            "initializer_range": std,
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": text,
            "intermediate_size": 4 * text,
            "num_hidden_layers": layers[1],
            "num_attention_heads": 4,
            "max_position_embeddings": POSITIONS,
            "projection_dim": shared,
            "initializer_range": std,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
    )
    torch.manual_seed(seed)
    return CLIPModel(config)


def random_clip(directory: str | os.PathLike, seed: int = 0) -> None:
    """Write a CLIP with random weights (about 0.2M parameters) as a complete folder."""
    from medray.models.export import save_vlm

    tokenizer = clip_tokenizer(
        ["Question: What is the shape of the nucleus?\nAnswer: round\nContext: a big cell"]
    )
    save_vlm(
        clip_model(tokenizer, vision=32, text=32, layers=(2, 2), shared=16, seed=seed),
        clip_processor(tokenizer),
        directory,
    )


class Statements:
    """Texts about records, and which record each is true of.

    A text is a description, or a question with an answer that is right for its own record, in the rating
    model's template.
    """

    def __init__(self, records: Sequence[Mapping], tokenizer: Any):
        from medray.data.attribute_questions import ATTRIBUTES

        self.records, self.tokenizer, self.schema = records, tokenizer, ATTRIBUTES
        self.values_NA = [
            [attribute.values.index(record[name]) for name, attribute in ATTRIBUTES.items()]
            for record in records
        ]

    def draw(self, places: Sequence[int], rng: random.Random) -> tuple[list[list[int]], Any]:
        """Ids of one text per record at `places`, and bool [texts, records] of whether the text is true
        of the record.
        """
        import torch

        ids, truths = [], []
        values_BA = torch.tensor([self.values_NA[place] for place in places])
        for row, place in enumerate(places):
            text, true_B = (
                self._description(row, place, values_BA, rng)
                if rng.random() < 0.25
                else self._exchange(place, values_BA, rng)
            )
            ids.append(text)
            truths.append(true_B)
        return ids, torch.stack(truths)

    def _description(self, row: int, place: int, values_BA: Any, rng: random.Random) -> tuple[list[int], Any]:
        from medray.data.attribute_questions import describe

        text = self.tokenizer(
            describe(self.records[place], rng), truncation=True, max_length=POSITIONS
        ).input_ids
        return text, (values_BA == values_BA[row]).all(1)

    def _exchange(self, place: int, values_BA: Any, rng: random.Random) -> tuple[list[int], Any]:
        import torch

        from medray.data.attribute_questions import question, right_answer
        from medray.rating_model.inputs import rating_text

        record = self.records[place]
        column, name = rng.choice(list(enumerate(self.schema)))
        asked = question(
            record,
            name,
            rng.choices(("open", "closed", "mcq"), (2, 1, 1))[0],
            rng,
            canonical=rng.random() < 0.4,
        )
        text = rating_text(asked["question"], asked["reference"], None, self.tokenizer, POSITIONS).ids
        true_of_value = torch.tensor(
            [
                right_answer(asked["question"], {**record, name: value}) == asked["reference"]
                for value in self.schema[name].values
            ]
        )
        return text, true_of_value[values_BA[:, column]]


def teach(
    model: Any,
    processor: Any,
    pixels: Any,
    records: Sequence[Mapping],
    *,
    steps: int,
    seed: int,
    batch: int = 64,
    lr: float = 1e-3,
    log: Callable[[str], None] = print,
) -> None:
    """Sigmoid loss over all pairs of texts and pictures of a batch (SigLIP, arXiv 2303.15343, eq. 1), where
    every picture that a text is true of counts as its own, and true and untrue pairs count alike. A linear
    head that names every attribute from the picture's embedding, dropped at the end, teaches the image tower
    much faster than one text a picture does.

    Of the image tower only the last layer learns: the others' outputs are computed once.

    Args:
        pixels: float16 (N, 3, 64, 64), preprocessed.
    """
    import torch
    from torch.nn import functional

    from medray.testbed.training import optimizer_steps

    rng, generator = random.Random(f"statements/{seed}"), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    statements = Statements(records, processor.tokenizer)
    targets_NA, sizes = (
        torch.tensor(statements.values_NA),
        [len(attribute.values) for attribute in statements.schema.values()],
    )
    head, bias = (
        torch.nn.Linear(model.config.projection_dim, sum(sizes)),
        torch.nn.Parameter(torch.tensor(0.0)),
    )
    vision = model.vision_model
    learning = [
        vision.encoder.layers[-1],
        vision.post_layernorm,
        model.visual_projection,
        model.text_model,
        model.text_projection,
        head,
    ]
    step_of = optimizer_steps(
        [*(p for module in learning for p in module.parameters()), model.logit_scale, bias], steps, lr
    )
    early_NPD = torch.cat([_early_layers(vision, part.float()).half() for part in pixels.split(128)])
    model.train()
    started, running = time.monotonic(), [0.0, 0.0]
    for step in range(steps):
        places = torch.randint(len(pixels), (batch,), generator=generator).tolist()
        texts, true_BB = statements.draw(places, rng)
        padded = processor.tokenizer.pad({"input_ids": texts}, return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16):
            last_BPD = vision.encoder.layers[-1](early_NPD[places].float(), None)
            image_BD = model.visual_projection(vision.post_layernorm(last_BPD[:, 0]))
            text_BD = model.get_text_features(**padded).pooler_output
        image_BD = image_BD.float()
        cosine_BB = functional.normalize(text_BD.float(), dim=1) @ functional.normalize(image_BD, dim=1).T
        pair_BB = functional.binary_cross_entropy_with_logits(
            model.logit_scale.exp() * cosine_BB + bias, true_BB.float(), reduction="none"
        )
        named = [
            functional.cross_entropy(part, targets_NA[places, i])
            for i, part in enumerate(head(image_BD).split(sizes, 1))
        ]
        losses = ((pair_BB[true_BB].mean() + pair_BB[~true_BB].mean()) / 2, torch.stack(named).mean())
        sum(losses).backward()
        step_of()
        running = [
            0.95 * mean + 0.05 * loss.item() if step else loss.item()
            for mean, loss in zip(running, losses, strict=True)
        ]
        if step % 50 == 49:
            log(
                f"step {step + 1}/{steps}  loss of statements {running[0]:.3f}, of attributes "
                f"{running[1]:.3f}  {time.monotonic() - started:.0f} s"
            )
    model.eval()


def _early_layers(vision: Any, pixels: Any) -> Any:
    """What the image tower's last layer reads, (N, patches + 1, width)."""
    import torch

    with torch.no_grad():
        hidden = vision.pre_layrnorm(vision.embeddings(pixels))
        for layer in vision.encoder.layers[:-1]:
            hidden = layer(hidden, None)
    return hidden


def zero_shot(model: Any, processor: Any, pixels: Any, records: Sequence[Mapping]) -> dict[str, float]:
    """Share of pictures whose true value of an attribute, as the answer to its question, has the highest
    cosine; by attribute, and "mean".
    """
    import torch
    from torch.nn import functional

    from medray.data.attribute_questions import ATTRIBUTES
    from medray.rating_model.inputs import rating_text

    model.eval()
    shares = {}
    with torch.no_grad():
        images_ND = functional.normalize(
            torch.cat(
                [
                    model.get_image_features(pixel_values=part.float()).pooler_output
                    for part in pixels.split(128)
                ]
            ),
            dim=1,
        )
        for name, attribute in ATTRIBUTES.items():
            texts = [
                rating_text(
                    attribute.open[0], attribute.word(value), None, processor.tokenizer, POSITIONS
                ).ids
                for value in attribute.values
            ]
            padded = processor.tokenizer.pad({"input_ids": texts}, return_tensors="pt")
            values_VD = functional.normalize(model.get_text_features(**padded).pooler_output, dim=1)
            found_N = (images_ND @ values_VD.T).argmax(1)
            shares[name] = sum(
                attribute.values[place] == record[name]
                for place, record in zip(found_N.tolist(), records, strict=True)
            ) / len(records)
    return shares | {"mean": sum(shares.values()) / len(shares)}
