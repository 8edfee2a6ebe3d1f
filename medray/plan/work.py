"""Operations and tokens of the stages' units: a training row, a preference pair, a questioned image."""

from __future__ import annotations

from dataclasses import dataclass

from medray.config import SelfPlayConfig, TrainConfig
from medray.plan.shapes import Shape


@dataclass(frozen=True)
class Lengths:
    """Tokens of text, on average. The defaults are what LLaVA-Med-like dialogues and self-play have; a
    run's report shows its own.
    """

    prompt: int = 60
    dialogue: int = 400
    supervised: int = 240
    description: int = 150
    question: int = 25
    answer: int = 120


def passes(trained: bool, below: bool, full: bool, recompute: bool) -> int:
    """Forward-equivalents of one training pass through a part: forward; the gradient of its inputs, where
    the part or something below it trains; the gradient of its weights, where it is trained whole; the
    forward again under checkpointing.
    """
    backward = trained or below
    return 1 + backward + (trained and full) + (recompute and backward)


def training_row(
    shape: Shape, config: TrainConfig, tokens: float, supervised: float, attended: float | None = None
) -> float:
    """Operations of one row's forward and backward pass, its image once.

    Args:
        attended: tokens each attends to on average; None: half of them.
    """
    vision, projector, language = (
        rate is not None for rate in (config.lr_vision, config.lr_projector, config.lr_llm)
    )
    recompute = config.gradient_checkpointing
    tower = passes(vision, False, config.lora_vision is None, recompute) * shape.image_forward
    through = passes(language, vision or projector, config.lora_llm is None, recompute)
    head = 2 + (language and config.lora_llm is None)
    adapters = 6 * tokens * shape.language.lora(config.lora_llm.rank) if language and config.lora_llm else 0
    return (
        tower
        + through * shape.language.forward(tokens, attended)
        + head * shape.language.head(supervised)
        + adapters
    )


def pair_tokens(shape: Shape, prompt: float, answer: float) -> float:
    """Tokens of [image, prompt | chosen | rejected] in one sequence (medray.train.pair_packing)."""
    return shape.vision.image_tokens + prompt + 2 * answer


def training_pair(shape: Shape, config: TrainConfig, prompt: float, answer: float) -> float:
    """Operations of one preference pair in DPO. Its mask is no causal one, so attention works through all
    of it.
    """
    tokens = pair_tokens(shape, prompt, answer)
    return training_row(shape, config, tokens, 2 * answer, tokens)


def reference_pair(shape: Shape, prompt: float, answer: float) -> float:
    """Operations of one pair's reference log-probabilities."""
    tokens = pair_tokens(shape, prompt, answer)
    return shape.image_forward + shape.language.forward(tokens, tokens) + shape.language.head(2 * answer)


@dataclass(frozen=True)
class Generation:
    """What one image costs an engine: operations of prompts, sampled tokens, and the mean context of
    those.
    """

    prefill: float
    sampled: float
    context: float


def questioned_image(shape: Shape, play: SelfPlayConfig, lengths: Lengths) -> Generation:
    """Self-play on one image: a description, questions after it, answers to each. What requests begin
    with alike (the image first of all) passes once, as vLLM's prefix cache has it; an answer's prompt is
    the image and its question.
    """
    asked, answers = play.questions, play.questions * play.answers
    image = shape.vision.image_tokens
    prompts = [
        (lengths.prompt, 1),
        (lengths.description + lengths.prompt, 1),
        (lengths.question + lengths.prompt, asked),
    ]
    parts = [
        (lengths.description, 1, lengths.prompt),
        (lengths.question, asked, lengths.prompt + lengths.description),
        (lengths.answer, answers, lengths.prompt + lengths.question),
    ]
    prefill = (
        shape.image_forward
        + shape.language.forward(image)
        + sum(number * shape.language.forward(tokens, image) for tokens, number in prompts)
    )
    sampled = sum(tokens * number for tokens, number, _ in parts)
    context = (
        image + sum(tokens * number * (before + tokens / 2) for tokens, number, before in parts) / sampled
    )
    return Generation(prefill, sampled, context)


def asked_image(shape: Shape, requests: int, prompt: int, sampled: int) -> Generation:
    """Several requests about one image, `sampled` tokens each."""
    image = shape.vision.image_tokens
    prefill = (
        shape.image_forward + shape.language.forward(image) + requests * shape.language.forward(prompt, image)
    )
    return Generation(prefill, requests * sampled, image + prompt + sampled / 2)


def decoding(shape: Shape, work: Generation) -> float:
    """Operations of the sampled tokens."""
    return work.sampled * (shape.language.forward(1, work.context) + shape.language.head(1))
