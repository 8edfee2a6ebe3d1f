"""Speed of real training steps on one GPU: SQ-SFT and DPO of LLaVA-1.5-7B and Qwen2.5-VL-7B shapes, random
weights, bf16.

Needs torch, transformers and peft only (no Ray, no vLLM, no DeepSpeed, no downloads). For each model,
objective and kind of training it prints samples/s, LLM tokens/s, MFU and peak memory, for medray's step and
for the plain one (`trl-style`: every image encoded per sequence, both sequences of a pair whole, reference
pass in the step). One JSON line per case, the summary last. Without CUDA it says so and exits 0.

MFU = FLOPs / seconds / peak, FLOPs = sum over tower, projector and LLM of k x parameters x tokens that really
passed, with k = 6 where the weights train and 4 where only adapters do (no weight gradients of the frozen
matrices), + 2 for the trl-style reference pass; attention scores and recomputation under gradient
checkpointing are not counted.

    python benchmarks/gpu_step.py [--models llava qwen] [--modes lora full] [--micro-batch 4] [--steps 5]
    [--peak-tflops 989]
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import sys
import time
from typing import Any

import torch

from medray.config import DpoConfig, ModelConfig, SftConfig
from medray.models.vlm import part_of
from medray.train.objectives import dpo_loss, model_inputs, sft_loss, sum_rows, supervised_logits, token_logps
from medray.train.step import TrainStep

# tokens: a question with its system prompt, an answer, all answers of an SFT dialogue
PROMPT, ANSWER, SFT_ANSWERS = 60, 120, 240
GRID = (1, 24, 24)  # Qwen: patches of an image of 336 x 336; 144 tokens reach the LLM


def llava() -> Any:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    # defaults are LLaVA-1.5's
    config = LlavaConfig(
        image_token_id=32000, vision_feature_layer=-2, image_seq_length=576, tie_word_embeddings=False
    )
    config.vision_config.image_size, config.vision_config.patch_size = 336, 14
    config.text_config.vocab_size = 32064
    return LlavaForConditionalGeneration(config)


def qwen() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": 152064,
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "max_position_embeddings": 32768,
                "rope_theta": 1e6,
                "tie_word_embeddings": False,
                "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [16, 24, 24]},
            },
            vision_config={
                "depth": 32,
                "hidden_size": 1280,
                "intermediate_size": 3420,
                "num_heads": 16,
                "out_hidden_size": 3584,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "window_size": 112,
                "fullatt_block_indexes": [7, 15, 23, 31],
            },
            image_token_id=151655,
            video_token_id=151656,
            vision_start_token_id=151652,
            vision_end_token_id=151653,
            tie_word_embeddings=False,
        )
    )


# builder, image token, tokens per image in LLM and tower
MODELS = {"llava": (llava, 32000, 576, 577), "qwen": (qwen, 151655, 144, 576)}


def batch_of(name: str, objective: str, samples: int) -> dict[str, torch.Tensor]:
    """A collated batch of random tokens and pixels; [2 x samples] sequences for dpo."""
    _, image_token, image_tokens, _ = MODELS[name]
    copies, answer = (2, ANSWER) if objective == "dpo" else (1, SFT_ANSWERS)
    prompt = torch.cat(
        [torch.full((samples, image_tokens), image_token), torch.randint(31000, (samples, PROMPT))], 1
    )
    ids = torch.cat([prompt.repeat(copies, 1), torch.randint(31000, (copies * samples, answer))], 1)
    labels = ids.clone()
    labels[:, : prompt.shape[1]] = -100
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    if name == "llava":
        batch["pixel_values"] = torch.randn(samples, 3, 336, 336, dtype=torch.bfloat16)
    else:
        batch["pixel_values"] = torch.randn(
            samples * GRID[1] * GRID[2], 3 * 2 * 14 * 14, dtype=torch.bfloat16
        )
        batch["image_grid_thw"] = torch.tensor([GRID]).repeat(copies * samples, 1)
        batch["mm_token_type_ids"] = (ids == image_token).long()
    if objective == "dpo":
        batch |= {
            "ref_chosen_logps": torch.full((samples,), -100.0),
            "ref_rejected_logps": torch.full((samples,), -100.0),
        }
    return batch


class PlainStep(TrainStep):
    """The same engine and optimiser with a plain forward: what a trainer does that knows nothing of pairs."""

    def objective(self, batch: dict[str, Any]) -> tuple:
        if self.kind == "sft":
            logits = self.engine(**model_inputs(batch), use_cache=False).logits
            weight = (batch["labels"][:, 1:] != -100).sum()
            return sft_loss(logits, batch["labels"], 1.0), weight, {}
        batch = batch | {"pixel_values": torch.cat([batch["pixel_values"]] * 2)}
        no_adapters = getattr(self.model, "disable_adapter", contextlib.nullcontext)
        with torch.no_grad(), no_adapters():
            reference = self._logps(batch)
        chosen, rejected = self._logps(batch).chunk(2)
        loss, metrics = dpo_loss(chosen, rejected, *reference.chunk(2), self.config.beta)
        extra = {
            "logps/chosen": chosen,
            "logps/rejected": rejected,
            "tokens/chosen": chosen * 0,
            "tokens/rejected": chosen * 0,
        }
        return (
            loss.sum(),
            torch.tensor(len(loss)),
            {name: value.detach().sum() for name, value in (metrics | extra).items()},
        )

    def _logps(self, batch: dict[str, Any]) -> torch.Tensor:
        logits, labels, rows = supervised_logits(self.engine, batch)
        return sum_rows(token_logps(logits, labels), rows, len(batch["labels"]))[0]


def flops(model: Any, name: str, objective: str, mode: str, samples: int, plain: bool) -> tuple[float, int]:
    """FLOPs of one step (see the module's formula) and the LLM tokens that pass."""
    _, _, image_tokens, tower_tokens = MODELS[name]
    parameters = {"vision": 0, "projector": 0, "llm": 0}
    head = 0
    for key, parameter in model.named_parameters():
        part = part_of(key)
        if "lm_head" in key:
            head += parameter.numel()
        elif part and ".lora_" not in key and "embed_tokens" not in key:
            parameters[part] += parameter.numel()
    if objective == "sft":
        llm, heads, images = (
            image_tokens + PROMPT + SFT_ANSWERS,
            image_tokens + PROMPT + SFT_ANSWERS if plain else SFT_ANSWERS,
            1,
        )
    elif plain:
        llm, heads, images = 2 * (image_tokens + PROMPT + ANSWER), 2 * ANSWER, 2
    else:
        llm, heads, images = image_tokens + PROMPT + 2 * ANSWER, 2 * ANSWER, 1
    factor = (6 if mode == "full" else 4) + (2 if plain and objective == "dpo" else 0)
    projected = tower_tokens // 4 if name == "qwen" else tower_tokens
    per_sample = parameters["llm"] * llm + head * heads + parameters["vision"] * tower_tokens * images
    total = (
        factor * per_sample
        + (factor + (2 if mode == "lora" else 0)) * parameters["projector"] * projected * images
    )
    return float(total * samples), llm * samples


def measure(name: str, objective: str, mode: str, plain: bool, options: argparse.Namespace) -> dict[str, Any]:
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = MODELS[name][0]()
    torch.set_default_dtype(torch.float32)
    changes: dict[str, Any] = {"micro_batch": options.micro_batch, "gradient_checkpointing": True}
    if mode == "full":
        changes |= {"lora_llm": None, "lora_vision": None}
    config = (DpoConfig if objective == "dpo" else SftConfig)().model_copy(update=changes)
    step = (PlainStep if plain else TrainStep)(
        "", ModelConfig(), config, objective, 10**6, "cuda", "torch", model=model
    )
    batch = batch_of(name, objective, options.micro_batch)
    for _ in range(2):
        step.update([batch], 0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for _ in range(options.steps):
        step.update([batch], 0)
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / options.steps
    work, tokens = flops(step.model, name, objective, mode, options.micro_batch, plain)
    return {
        "model": name,
        "objective": objective,
        "mode": mode,
        "step": "trl-style" if plain else "medray",
        "micro_batch": options.micro_batch,
        "seconds": round(seconds, 4),
        "samples_per_s": round(options.micro_batch / seconds, 3),
        "llm_tokens_per_s": round(tokens / seconds),
        "mfu": round(work / seconds / (options.peak_tflops * 1e12), 4),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--objectives", nargs="+", choices=["sft", "dpo"], default=["sft", "dpo"])
    parser.add_argument("--modes", nargs="+", choices=["lora", "full"], default=["lora", "full"])
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument(
        "--peak-tflops",
        type=float,
        default=989.0,
        help="dense bf16 peak of the GPU (H100/H200 SXM: 989, A100: 312)",
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_step: no CUDA device here; nothing measured")
        return 0
    cases = []
    for name in options.models:
        for mode in options.modes:
            for objective in options.objectives:
                for plain in (False, True):
                    try:
                        case = measure(name, objective, mode, plain, options)
                    except torch.cuda.OutOfMemoryError:
                        case = {
                            "model": name,
                            "objective": objective,
                            "mode": mode,
                            "step": "trl-style" if plain else "medray",
                            "error": "out of memory",
                        }
                    cases.append(case)
                    print(json.dumps(case), flush=True)
                    gc.collect()
                    torch.cuda.empty_cache()
    print(
        json.dumps(
            {
                "benchmark": "gpu_step",
                "device": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "cases": cases,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
