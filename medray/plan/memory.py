"""What fits into an accelerator's memory: a training worker, an engine."""

from __future__ import annotations

import math

from medray.config import EngineConfig, LoraConfig, ModelConfig, TrainConfig
from medray.plan.shapes import Shape

GIB = 2**30
CONTEXT_GIB = 2.0  # CUDA's context, NCCL, cuBLAS workspaces
# parameters that ZeRO-3 keeps whole at once, at most (DeepSpeed's stage3_max_live_parameters)
GATHERED = 10**9
# activations of one layer per token and unit of width, attention scores not stored (Korthikanti et al., arXiv
# 2205.05198, eq. 1)
LAYER_BYTES = 34
LOGIT_CHUNK = 1024  # tokens whose logits are in fp32 at once: medray.train.objectives.CHUNK


def trained_parameters(shape: Shape, config: TrainConfig) -> int:
    """How many parameters have a gradient: adapters, or whole parts."""
    tower, projector = shape.vision.parameters(shape.language.width)
    parts = (
        (config.lr_llm, config.lora_llm, shape.language.lora, shape.language.parameters),
        (config.lr_vision, config.lora_vision, shape.vision.lora, tower),
        (config.lr_projector, None, None, projector),
    )
    return sum(_trained(lora, adapters, whole) for rate, lora, adapters, whole in parts if rate is not None)


def _trained(lora: LoraConfig | None, adapters, whole: int) -> int:
    return whole if lora is None else adapters(lora.rank)


def training_memory(
    shape: Shape, model: ModelConfig, config: TrainConfig, workers: int, tokens: int, supervised: int
) -> dict[str, float]:
    """GiB of one worker's device at its peak, by part.

    Args:
        tokens: of one row in the language model, image tokens included.
        supervised: those a loss is taken at.

    Weights in the model's precision, gradients alike, and 12 bytes of optimiser state per trained parameter
    (fp32 master and two moments); ZeRO stage 1 divides the state by the workers, 2 the gradients too, 3 the
    weights too (Rajbhandari et al., arXiv 1910.02054). Activations: with checkpointing each layer's input,
    and one layer's own.
    """
    element = 2 if model.precision == "bf16" else 4
    trained = trained_parameters(shape, config)
    stage = max(config.zero_stage, 1) if model.precision == "bf16" else config.zero_stage
    share = [1 / workers if stage >= least else 1.0 for least in (1, 2, 3)]
    return {
        name: value / GIB
        for name, value in {
            "weights": shape.parameters * element * share[2]
            + (min(GATHERED, shape.parameters) * element if stage == 3 and workers > 1 else 0),
            "gradients": trained * element * share[1],
            "optimiser": trained * 12 * share[0],
            "activations": config.micro_batch
            * (
                _activations(
                    tokens,
                    shape.language.width,
                    shape.language.layers,
                    config.gradient_checkpointing,
                    element,
                )
                + _activations(
                    shape.vision.patches,
                    shape.vision.width,
                    shape.vision.layers,
                    config.gradient_checkpointing,
                    element,
                )
            ),
            "logits": (
                2 * element * config.micro_batch * supervised
                + 8 * min(LOGIT_CHUNK, config.micro_batch * supervised)
            )
            * shape.language.vocabulary,
            "context": CONTEXT_GIB * GIB,
        }.items()
    }


def loading_memory(shape: Shape, model: ModelConfig) -> dict[str, float]:
    """GiB of a training worker's device before DeepSpeed divides the weights, and of a reference actor's:
    all of the model.
    """
    return {
        "weights": shape.parameters * (2 if model.precision == "bf16" else 4) / GIB,
        "context": CONTEXT_GIB,
    }


def _activations(tokens: int, width: int, layers: int, checkpointing: bool, element: int) -> float:
    kept = LAYER_BYTES * element / 2
    return tokens * width * (layers * element + kept if checkpointing else layers * kept)


def engine_memory(
    shape: Shape, model: ModelConfig, config: EngineConfig, memory_gib: float
) -> dict[str, float]:
    """GiB of one device of an engine, by part; "cache" is what is left for keys and values, negative
    where the weights do not fit.
    """
    weights = shape.parameters * (2 if model.precision == "bf16" else 4) / GIB / config.tensor_parallel_size
    working = CONTEXT_GIB + 1.0  # an image batch through the tower, sampling
    return {
        "weights": weights,
        "working": working,
        "cache": memory_gib * config.memory_utilization - weights - working,
    }


def concurrent_sequences(
    shape: Shape, config: EngineConfig, cache_gib: float, context: float, element: int = 2
) -> float:
    """Sequences of `context` tokens an engine decodes at once: what the cache of all its devices holds, at
    most max_num_seqs.

    Args:
        element: bytes of a number in the cache.
    """
    held = cache_gib * config.tensor_parallel_size * GIB / (shape.language.cache_bytes(element) * context)
    return max(0.0, min(held, config.max_num_seqs))


def least_workers(
    shape: Shape,
    model: ModelConfig,
    config: TrainConfig,
    memory_gib: float,
    tokens: int,
    supervised: int,
    most: int = 512,
) -> int | None:
    """The fewest training workers, a power of two, whose devices hold the stage; None where no number up
    to `most` does, as where one device cannot load the model.
    """
    if sum(loading_memory(shape, model).values()) > memory_gib:
        return None
    for power in range(int(math.log2(most)) + 1):
        if sum(training_memory(shape, model, config, 2**power, tokens, supervised).values()) <= memory_gib:
            return 2**power
    return None
