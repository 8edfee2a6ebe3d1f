"""Self-training's stages in seconds, device-hours and money, each with what bounds it.

A stage takes as long as its slowest resource where resources work side by side (reading beside training,
sending beside answering), and their sum where they wait for each other (computing and ZeRO-3's gathering:
medray does not overlap them).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from medray.config import DpoConfig, SelfTrainingConfig, TrainConfig
from medray.plan import memory, work
from medray.plan.devices import Device, Gains
from medray.plan.shapes import Shape, shape_of


@dataclass(frozen=True)
class Plan:
    """What the run is to be done with, and on how much.

    labelled: dialogues SQ-SFT trains on; unlabelled: images questioned per round; kept: share of questions
        that become a pair.
    cpus: of the data nodes. image_bytes: of a stored image, mean. judge: shape of a local judge, where its
        kind is vllm. judge_prompt, judge_answer: tokens of text of
    one request; an endpoint counts judge_image tokens for an image.
    """

    labelled: float
    unlabelled: float
    device: Device
    gpus: int
    cpus: int = 32
    usd_per_cpu_hour: float = 0.05
    image_bytes: float = 100e3
    kept: float = 0.6
    lengths: work.Lengths = field(default_factory=work.Lengths)
    gains: Gains = field(default_factory=Gains)
    judge: Shape | None = None
    judge_prompt: int = 250
    judge_image: int = 800
    judge_answer: int = 120


@dataclass(frozen=True)
class Stage:
    """One stage: `seconds` with its start, the seconds each resource would take alone, devices and CPUs
    held, money to others.
    """

    name: str
    seconds: float
    resources: dict[str, float]
    gpus: float
    usd: float

    @property
    def bound(self) -> str:
        """The resource that takes longest; "starting" where that is most of the stage."""
        return max(self.resources, key=self.resources.__getitem__)

    @property
    def gpu_hours(self) -> float:
        return self.seconds * self.gpus / 3600


def self_training(config: SelfTrainingConfig, plan: Plan) -> list[Stage]:
    """The stages of `jobs/self_train.py` in their order.

    Raises ConfigError where the model's shape is not known. Evaluation is left out: a few thousand short
    answers.
    """
    shape = shape_of(config.model.path)
    images, pairs = plan.unlabelled, plan.unlabelled * config.self_play.questions * plan.kept
    stages = [preparing(plan), tuning("sq_sft", shape, config.sft, plan, plan.labelled, False)]
    for number in range(1, config.rounds + 1):
        stages += [
            generating(
                f"self_play {number}",
                shape,
                config,
                work.questioned_image(shape, config.self_play, plan.lengths),
                images,
                plan,
            ),
            judging(f"judge {number}", config, images, plan),
            _stage(
                f"pairs {number}", plan, {"CPUs that make pairs": images / (plan.cpus * plan.gains.pairs)}, 0
            ),
            referring(f"reference {number}", shape, config.dpo, pairs, plan),
            tuning(f"dpo {number}", shape, config.dpo, plan, pairs, True),
        ]
    return stages


def preparing(plan: Plan) -> Stage:
    """Reading, checking and writing every image once, on CPUs."""
    images = plan.labelled + plan.unlabelled
    return _stage(
        "data",
        plan,
        {
            "CPUs that prepare images": images / (plan.cpus * plan.gains.prepare),
            "the bucket": images * plan.image_bytes / plan.gains.bucket,
        },
        0,
    )


def tuning(name: str, shape: Shape, config: TrainConfig, plan: Plan, rows: float, paired: bool) -> Stage:
    """A training stage: computing and gathering, beside CPUs that encode."""
    lengths, gains = plan.lengths, plan.gains
    if paired:
        each = work.training_pair(shape, config, lengths.prompt + lengths.question, lengths.answer)
    else:
        tokens = shape.vision.image_tokens + lengths.prompt + lengths.dialogue
        each = work.training_row(shape, config, tokens, lengths.supervised)
    workers = min(plan.gpus, config.max_workers)
    samples = rows * config.epochs
    computing = samples * each / (workers * plan.device.peak * gains.training)
    gathering = 0.0
    if config.zero_stage == 3 and workers > 1:
        # Weights are gathered for the forward and the backward pass, gradients of trained parts scattered: 4
        # bytes and a little each.
        passes = samples / (workers * config.micro_batch)
        moved = 2 * 2 * shape.parameters + 2 * memory.trained_parameters(shape, config)
        gathering = passes * moved * (1 - 1 / workers) / (plan.device.link * gains.link)
    encoding = samples / (plan.cpus * gains.encode)
    slower = "accelerators that train" if computing >= gathering else "links that gather ZeRO-3's weights"
    return _stage(
        name,
        plan,
        {
            slower: computing + gathering,
            "CPUs that encode": encoding,
            "the bucket": samples * plan.image_bytes / gains.bucket,
        },
        workers,
    )


def generating(
    name: str, shape: Shape, config: SelfTrainingConfig, each: work.Generation, images: float, plan: Plan
) -> Stage:
    """An engine stage: the time of prompts, and of decoding, where each step reads all weights and every
    sequence's cache.
    """
    engine, device, gains = config.engine, plan.device, plan.gains
    engines = max(1, min(plan.gpus // engine.tensor_parallel_size, engine.actors[1]))
    cache = memory.engine_memory(shape, config.model, engine, device.memory_gib)["cache"]
    element = 2 if config.model.precision == "bf16" else 4
    batch = memory.concurrent_sequences(shape, engine, cache, each.context, element)
    prompts = images * each.prefill / (engines * engine.tensor_parallel_size * device.peak * gains.prefill)
    if batch < 1:
        return _stage(
            name,
            plan,
            {"accelerator memory: the engine does not fit": math.inf},
            engines * engine.tensor_parallel_size,
        )
    steps = images * each.sampled / (engines * batch)
    one = replace(each, sampled=1.0)
    computing = (
        batch * work.decoding(shape, one) / (engine.tensor_parallel_size * device.peak * gains.prefill)
    )
    read = shape.language.parameters * element + batch * each.context * shape.language.cache_bytes(element)
    reading = read / (engine.tensor_parallel_size * device.bandwidth * gains.decoding)
    parts = {
        "accelerators that read prompts": prompts,
        "memory bandwidth of decoding" if reading >= computing else "accelerators that decode": steps
        * max(reading, computing),
    }
    # Both are the same devices' time, one after the other.
    bound = max(parts, key=parts.__getitem__)
    return _stage(name, plan, {bound: sum(parts.values())}, engines * engine.tensor_parallel_size)


def judging(name: str, config: SelfTrainingConfig, images: float, plan: Plan) -> Stage:
    """Rating every question's answers: at an endpoint, whose price the configuration has, or by a local
    engine. Coin flips cost nothing, a rating model's small forward passes are left out.
    """
    judge = config.judge
    requests = images * config.self_play.questions * (2 if judge.both_orders else 1)
    if judge.kind in ("random", "rater"):
        return _stage(name, plan, {}, 0)
    if judge.kind == "vllm":
        shape = plan.judge or shape_of(judge.model)
        each = work.asked_image(
            shape, round(requests / images), plan.judge_prompt + 2 * plan.lengths.answer, plan.judge_answer
        )
        own = config.model_copy(
            update={"engine": judge.engine.beside(config.engine), "model": judge.own_model()}
        )
        return generating(name, shape, own, each, images, plan)
    read = requests * (plan.judge_image + plan.judge_prompt + 2 * plan.lengths.answer)
    usd = (
        read * judge.usd_per_million_input + requests * plan.judge_answer * judge.usd_per_million_output
    ) / 1e6
    stage = _stage(
        name, plan, {"the judge's endpoint": requests * plan.gains.endpoint / judge.concurrency}, 0
    )
    return replace(stage, usd=stage.usd + usd)


def referring(name: str, shape: Shape, config: DpoConfig, pairs: float, plan: Plan) -> Stage:
    """Forward passes of the reference model, whose actors encode their rows themselves."""
    actors = max(1, min(plan.gpus, config.reference_workers[1]))
    each = work.reference_pair(shape, plan.lengths.prompt + plan.lengths.question, plan.lengths.answer)
    computing = pairs * each / (actors * plan.device.peak * plan.gains.prefill)
    return _stage(
        name,
        plan,
        {
            "accelerators that compute references": computing,
            "CPUs that encode": pairs / (actors * plan.gains.encode),
        },
        actors,
    )


def listed_ids_gib(plan: Plan) -> float:
    """Host memory (GiB) of one training worker for the ids of the samples that are done, after a restart
    at an epoch's end: 16 bytes each (medray.train.epoch_progress). The largest epoch is SQ-SFT's.
    """
    return plan.labelled * 16 / 2**30


def _stage(name: str, plan: Plan, resources: dict[str, float], gpus: float) -> Stage:
    start = plan.gains.start if gpus else 0.0
    seconds = start + max(resources.values(), default=0.0)
    usd = seconds / 3600 * (gpus * plan.device.usd_per_hour + plan.cpus * plan.usd_per_cpu_hour)
    return Stage(name, seconds, {"starting": start, **resources}, gpus, usd)
