"""DPO steps per second: medray against TRL's DPOTrainer, on the same model, adapters, batch and precision.

A step is forward, backward, clipping and AdamW over pre-collated pairs. TRL's step holds its reference pass
(it offers no precomputed reference for vision models); medray's reference log-probabilities are columns
computed once before training, and are timed too: `speedup` leaves them out, `speedup_with_reference_stage`
adds one such pass per step, which is their whole cost in the paper's single epoch. Both sides run in this
process, alternating. Prints one JSON line last.

    python benchmarks/dpo.py [--pairs 4] [--answer 64] [--repeats 5] [--threads 1]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from medray.config import DpoConfig, LoraConfig, ModelConfig
from medray.models.vlm import load_processor, optimizer_groups, prepare_trainable
from medray.testbed.tiny_vlm import random_llava
from medray.train.objectives import answer_logps
from medray.train.step import TrainStep

CONFIG = DpoConfig(
    lora_llm=LoraConfig(rank=16, alpha=32, dropout=0.0),
    lora_vision=LoraConfig(rank=8, alpha=16, dropout=0.0),
    gradient_checkpointing=False,
    zero_stage=0,
    warmup_ratio=0.0,
)
PROMPT_TOKENS = 40


def model_of() -> Any:
    """A LLaVA of 34M parameters whose proportions follow LLaVA-1.5's: 576 image tokens, a tower of a
    twentieth of the work.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=128,
                intermediate_size=512,
                num_hidden_layers=4,
                num_attention_heads=4,
                image_size=336,
                patch_size=14,
            ),
            text_config=LlamaConfig(
                vocab_size=8000,
                hidden_size=512,
                intermediate_size=1376,
                num_hidden_layers=8,
                num_attention_heads=8,
                num_key_value_heads=8,
            ),
            image_token_id=7999,
            vision_feature_layer=-2,
            image_seq_length=576,
        )
    )


def batch_of(pairs: int, answer: int) -> dict[str, torch.Tensor]:
    """Collated pairs: 2 x pairs sequences (chosen, rejected) on `pairs` images."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(7000, (pairs, PROMPT_TOKENS), generator=generator)
    image = torch.full((pairs, 576), 7999)
    answers = torch.randint(7000, (2 * pairs, answer), generator=generator)
    ids = torch.cat([torch.cat([image, prompt], 1).repeat(2, 1), answers], 1)
    labels = ids.clone()
    labels[:, : 576 + PROMPT_TOKENS] = -100
    pixels = torch.randn(pairs, 3, 336, 336, generator=generator)
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
    }


def trl_step(model: Any, batch: dict[str, torch.Tensor], scratch: str) -> Callable[[], None]:
    """One optimiser step of TRL's DPOTrainer, its reference a frozen copy."""
    import datasets
    from PIL import Image
    from trl import DPOConfig, DPOTrainer

    # any processor: batches are ready, it is only asked for at construction
    random_llava(f"{scratch}/processor")
    rows = datasets.Dataset.from_list(
        [
            {
                "images": [Image.new("RGB", (64, 64))],
                "prompt": [{"role": "user", "content": "a"}],
                "chosen": [{"role": "assistant", "content": "b"}],
                "rejected": [{"role": "assistant", "content": "c"}],
            }
        ]
    )
    arguments = DPOConfig(
        scratch,
        beta=CONFIG.beta,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
    )
    reference = copy.deepcopy(model)
    policy = prepare_trainable(model, CONFIG)
    trainer = DPOTrainer(
        policy,
        ref_model=reference,
        args=arguments,
        train_dataset=rows,
        processing_class=load_processor(f"{scratch}/processor"),
    )
    optimizer = torch.optim.AdamW(optimizer_groups(policy, CONFIG))
    inputs = {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "completion_mask": (batch["labels"] != -100).long(),
        "pixel_values": batch["pixel_values"].repeat(2, 1, 1, 1),
    }

    def step() -> None:
        policy.train()
        trainer.compute_loss(policy, inputs).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), CONFIG.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--answer", type=int, default=64, help="tokens per answer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    batch = batch_of(options.pairs, options.answer)
    ours = TrainStep("", ModelConfig(precision="fp32"), CONFIG, "dpo", 1000, "cpu", "torch", model=model_of())

    def reference_pass() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            return answer_logps(ours.model, batch)[0].chunk(2)

    batch["ref_chosen_logps"], batch["ref_rejected_logps"] = reference_pass()
    times: dict[str, list[float]] = {"medray": [], "reference": [], "trl": []}
    with tempfile.TemporaryDirectory() as scratch:
        theirs = trl_step(model_of(), batch, scratch)
        for repeat in range(options.repeats + 1):
            taken = {
                "medray": seconds(lambda: ours.update([batch], 0)),
                "reference": seconds(reference_pass),
                "trl": seconds(theirs),
            }
            for name, value in taken.items():
                if repeat:  # the first is warm-up
                    times[name].append(value)
            print({name: round(value, 3) for name, value in taken.items()}, flush=True)
    median = {name: statistics.median(values) for name, values in times.items()}
    print(
        json.dumps(
            {
                "benchmark": "dpo",
                "pairs": options.pairs,
                "answer_tokens": options.answer,
                "prompt_tokens": 576 + PROMPT_TOKENS,
                "threads": options.threads,
                "repeats": options.repeats,
                "medray_pairs_per_s": round(options.pairs / median["medray"], 3),
                "trl_pairs_per_s": round(options.pairs / median["trl"], 3),
                "speedup": round(
                    statistics.median(t / m for t, m in zip(times["trl"], times["medray"], strict=True)), 3
                ),
                "speedup_with_reference_stage": round(
                    statistics.median(
                        t / (m + r)
                        for t, m, r in zip(times["trl"], times["medray"], times["reference"], strict=True)
                    ),
                    3,
                ),
                "goal": 1.5,
            }
        )
    )


if __name__ == "__main__":
    main()
