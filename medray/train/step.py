"""One optimiser step over a global batch: model, objective, engine, learning rate. Importable without Ray and
vLLM.

Where DeepSpeed is not installed (or `engine="torch"`), the same interface runs on plain torch on one device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from medray.config import DpoConfig, ModelConfig, TrainConfig
from medray.data.pixels import normalise_pixels
from medray.models.proxy_instruction import add_placeholder
from medray.models.vlm import load_processor, load_vlm, prepare_trainable
from medray.train.engine import full_state, load_full_state, make_engine, zero_stage
from medray.train.objectives import DPO_METRICS, IGNORE, dpo_objective, sft_objective
from medray.train.pair_pass import PairPass
from medray.train.pair_probe import choose_pair_pass
from medray.train.proxy_step import ProxyStep

Objective = Literal["sft", "dpo", "instruction_free"]


def learning_rate_factor(
    progress: float, warmup_ratio: float, schedule: Literal["cosine", "constant"] = "cosine"
) -> float:
    """Linear warm-up over the first share of the samples, then cosine to zero or constant; progress in
    [0, 1] is samples consumed / all.
    """
    if progress < warmup_ratio:
        return progress / warmup_ratio
    if schedule == "constant":
        return 1.0
    rest = (progress - warmup_ratio) / max(1 - warmup_ratio, 1e-9)
    return 0.5 * (1 + math.cos(math.pi * min(rest, 1.0)))


class TrainStep:
    """Everything one training worker holds.

    Args:
        model_dir: model in Hugging Face format.
        objective: "sft", "dpo" (`config` is then a DpoConfig) or "instruction_free" (an
            InstructionFreeTrainConfig).
        total_samples: samples of the whole training (rows x epochs), for the learning rate.
        device: default CUDA's current device, else the CPU.
        engine: "deepspeed", "torch", or "auto" (DeepSpeed where it is installed and torch.distributed runs).
        model, image_processor: use these instead of loading `model_dir` (random weights in benchmarks).
        proxy: address of the proxy instruction's file to begin from (default: drawn from the seed).
        placeholder_id: of the proxy instruction, needed with `model`.
    """

    def __init__(
        self,
        model_dir: str,
        model_config: ModelConfig,
        config: TrainConfig,
        objective: Objective,
        total_samples: int,
        device: Any = None,
        engine: str = "auto",
        model: Any = None,
        image_processor: Any = None,
        proxy: str | None = None,
        placeholder_id: int | None = None,
    ):
        torch.manual_seed(config.seed)  # the same adapters' initial weights on every worker
        self.config = config
        self.kind = objective
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.total_samples = max(total_samples, 1)
        self.dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[model_config.precision]
        if model is None:
            model, image_processor, placeholder_id = self._load(model_dir, model_config)
        self.image_processor = image_processor
        self.engine = self._engine(model, model_config.precision, engine)
        self.model = self.engine.module
        self.proxy: ProxyStep | None = None
        if objective == "instruction_free" and config.instruction is None:
            self.proxy = ProxyStep(config, self.model, placeholder_id, self.device, proxy)
        self.pair_pass: PairPass | None = None  # until it is measured, as the model's modules say
        self.steps = 0
        self._grad_norm: float | None = None
        self.engine.train()

    def _load(self, model_dir: str, model_config: ModelConfig) -> tuple[Any, Any, int | None]:
        """(model, image processor, id of the proxy instruction's placeholder)."""
        processor = load_processor(model_dir, model_config.trust_remote_code)
        model = load_vlm(model_dir, model_config.precision, model_config.trust_remote_code, self.device)
        return model, processor.image_processor, add_placeholder(processor.tokenizer)

    def _engine(self, model: Any, precision: str, kind: str) -> Any:
        return make_engine(prepare_trainable(model, self.config), self.config, precision, kind)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The objective's own metrics: sums over what `weight_of` counts."""
        return DPO_METRICS if self.kind == "dpo" else ()

    @property
    def world_size(self) -> int:
        return dist.get_world_size() if dist.is_initialized() else 1

    @property
    def rank(self) -> int:
        return dist.get_rank() if dist.is_initialized() else 0

    def objective(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        if self.kind != "dpo":
            return sft_objective(self.engine, batch)
        config: DpoConfig = self.config
        return dpo_objective(
            self.engine,
            batch,
            config.beta,
            config.label_smoothing,
            config.length_normalised,
            config.sft_weight,
            self.pair_pass,
        )

    @torch.no_grad()
    def measure_pair_pass(self, batch: dict[str, Any]) -> None:
        """Choose how pairs pass the model by a batch of probe rows (medray.train.pair_pass). Collective."""
        self.engine.train(False)
        self.pair_pass = choose_pair_pass(self.engine, self.place(batch))
        self.engine.train(True)

    def samples_of(self, batch: dict[str, Any]) -> int:
        return len(batch["labels"]) // (2 if self.kind == "dpo" else 1)

    def weight_of(self, batch: dict[str, Any]) -> int:
        """What a batch counts in the mean over the global batch: supervised tokens, or pairs (dpo)."""
        return self.samples_of(batch) if self.kind == "dpo" else int((batch["labels"][:, 1:] != IGNORE).sum())

    def place(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch on the device, uint8 pixels normalised there."""
        batch = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        if batch["pixel_values"].dtype == torch.uint8:
            batch["pixel_values"] = normalise_pixels(batch["pixel_values"], self.image_processor, self.dtype)
        return batch

    def update(
        self, micro_batches: Sequence[dict[str, Any]], consumed: int, filler: dict[str, Any] | None = None
    ) -> dict[str, float]:
        """One optimiser step over this rank's micro-batches of a global batch (collated, on the CPU).

        Every rank calls it equally often, but may hold another number of micro-batches than the others, even
        none: it then runs `filler` with weight zero, as every rank must take part in each pass's collectives.

        Args:
            consumed: samples of the whole training consumed before this step, over all ranks.
            filler: any batch; needed where this rank may have fewer micro-batches than another.

        Returns metrics of the whole global batch: loss (mean over supervised tokens or pairs), the
        objective's own (means over pairs), samples, tokens (padding not counted), weight, grad_norm (before
        clipping), lr_<part>; with a proxy instruction also what ProxyStep.step returns.
        """
        counts = [
            [self.weight_of(b), self.samples_of(b), int(b["attention_mask"].sum())] for b in micro_batches
        ]
        weight, samples, tokens = self.reduce(
            torch.tensor(counts or [[0, 0, 0]], dtype=torch.float64).sum(0)
        ).tolist()
        passes = int(self.reduce(torch.tensor(len(micro_batches)), dist.ReduceOp.MAX))
        # The middle of the step: neither the first nor the last step is wasted on a rate of zero.
        factor = learning_rate_factor(
            (consumed + samples / 2) / self.total_samples, self.config.warmup_ratio, self.config.schedule
        )
        for group in self.engine.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        # dropout: the same after a restart
        torch.manual_seed((self.config.seed * 1_000_003 + self.steps) * 1009 + self.rank)
        loss_sum, sums = self._accumulate(micro_batches, passes, max(weight, 1.0), filler)
        proxy_metrics = self.proxy.step(factor) if self.proxy else {}
        self.steps += 1
        names = self.metric_names
        means = self.reduce(
            torch.stack([loss_sum, *(sums[name] for name in names)])
            if names and sums
            else torch.cat([loss_sum[None], torch.zeros(len(names))])
        )
        means = (means / max(weight, 1.0)).tolist()
        metrics = {
            "loss": means[0],
            **dict(zip(names, means[1:], strict=True)),
            "samples": samples,
            "tokens": tokens,
            "weight": weight,
        }
        metrics["grad_norm"] = self._grad_norm
        return (
            metrics
            | {f"lr_{group['name']}": group["lr"] for group in self.engine.optimizer.param_groups}
            | proxy_metrics
        )

    def _accumulate(
        self,
        micro_batches: Sequence[dict[str, Any]],
        passes: int,
        weight: float,
        filler: dict[str, Any] | None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Forward and backward of `passes` micro-batches, then the optimiser step; this rank's sums (CPU,
        double).
        """
        loss_sum = torch.zeros((), device=self.device)
        sums: dict[str, torch.Tensor] = {}
        for index in range(passes):
            real = index < len(micro_batches)
            batch = self.place(micro_batches[index] if real else filler)
            self.engine.set_gradient_accumulation_boundary(is_boundary=index == passes - 1)
            loss, _, metrics = self.objective(batch)
            # Engines average gradients over ranks; the sum over the global batch is wanted.
            self.engine.backward(loss * (self.world_size / weight if real else 0.0))
            if index == passes - 1:
                self._grad_norm = self._unsharded_norm()
            self.engine.step()
            if real:
                loss_sum += loss.detach()
                for name, value in metrics.items():
                    sums[name] = sums.get(name, 0) + value
        if self._grad_norm is None:
            self._grad_norm = float(self.engine.get_global_grad_norm())
        return loss_sum.double().cpu(), {name: value.double().cpu() for name, value in sums.items()}

    def _unsharded_norm(self) -> float | None:
        """DeepSpeed keeps no gradient norm without ZeRO."""
        if zero_stage(self.engine) is not None or not hasattr(self.engine, "zero_optimization_stage"):
            return None
        gradients = [
            p.grad
            for group in self.engine.optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        return float(torch.nn.utils.get_total_norm(gradients))

    def evaluate(self, batches: Sequence[dict[str, Any]], filler: dict[str, Any]) -> float | None:
        """Mean loss over all ranks' batches, without dropout; None where there are none. Collective."""

        def loss_and_weight(batch: dict[str, Any]) -> torch.Tensor:
            loss, weight, _ = self.objective(batch)
            return torch.stack([loss.double(), weight.double()])

        loss, weight = self.totals(batches, filler, loss_and_weight) or (0.0, 0.0)
        return loss / weight if weight else None

    def measure(self, batches: Sequence[dict[str, Any]], filler: dict[str, Any]) -> dict[str, float]:
        """What an epoch's end records of the held-out rows; {} where there are none. Collective."""
        loss = self.evaluate(batches, filler)
        return {} if loss is None else {"eval_loss": loss}

    @torch.no_grad()
    def totals(
        self,
        batches: Sequence[dict[str, Any]],
        filler: dict[str, Any],
        of: Callable[[dict[str, Any]], torch.Tensor],
    ) -> list[float]:
        """Sums of `of(batch)` over all ranks' batches, without dropout; [] where no rank has any.
        Collective.
        """
        passes = int(self.reduce(torch.tensor(len(batches)), dist.ReduceOp.MAX))
        if not passes:
            return []
        self.engine.train(False)
        parts = []
        for index in range(passes):
            found = of(self.place(batches[index] if index < len(batches) else filler)).double().cpu()
            parts.append(found if index < len(batches) else torch.zeros_like(found))
        self.engine.train(True)
        return self.reduce(torch.stack(parts).sum(0)).tolist()

    def reduce(self, value: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
        """All-reduced over the workers, on the CPU."""
        if self.world_size > 1:
            value = value.to(self.device)
            dist.all_reduce(value, op=op)
        return value.cpu()

    def gather(self, value: torch.Tensor) -> torch.Tensor:
        """The values of all ranks, stacked in rank order [world, ...], on the CPU."""
        if self.world_size == 1:
            return value[None].cpu()
        parts = [torch.empty_like(value, device=self.device) for _ in range(self.world_size)]
        dist.all_gather(parts, value.to(self.device))
        return torch.stack(parts).cpu()

    def save(self, path: Path) -> None:
        """Write the training state (trained weights in fp32, Adam moments, step, the proxy instruction's) as
        one safetensors file, from rank 0.

        It can be restored at any world size and ZeRO stage. Collective.
        """
        from safetensors.torch import save_file

        state = dict(full_state(self.engine, keep=self.rank == 0))
        if self.rank == 0:
            metadata = {"steps": str(self.steps)}
            if self.proxy:
                state |= self.proxy.state()
                metadata |= self.proxy.metadata()
            save_file(state, path, metadata=metadata)

    def load(self, path: Path) -> None:
        """Restore what `save` wrote. Collective."""
        from safetensors import safe_open

        with safe_open(path, framework="pt") as handle:
            self.steps = int(handle.metadata()["steps"])
            state = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
        load_full_state(self.engine, state, self.steps)
        if self.proxy:
            self.proxy.load(state, self.steps)
