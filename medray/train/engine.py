"""What holds parameters, gradients and Adam's state: DeepSpeed's engine, or plain torch on one device.

`TrainStep` sees one interface: call, `backward`, `set_gradient_accumulation_boundary`, `step`,
`get_global_grad_norm`. The functions below read and write the training state as whole fp32 tensors, whatever
shards it.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from medray.config import LoopConfig
from medray.errors import ConfigError
from medray.models.vlm import optimizer_groups, trainable_parameters

MOMENTS = ("exp_avg", "exp_avg_sq")


class TorchEngine:
    """The methods of a DeepSpeed engine that TrainStep uses, on one device without DeepSpeed.

    Parameters of lower precision get fp32 masters: steps of 5e-6 would vanish in bf16.
    """

    def __init__(
        self,
        model: Any,
        config: LoopConfig,
        groups: list[dict[str, Any]],
        betas: tuple[float, float] = (0.9, 0.999),
    ):
        self.module = model
        self.max_grad_norm = config.max_grad_norm or math.inf
        self.parameters = [p for group in groups for p in group["params"]]
        self.master = {p: p if p.dtype == torch.float32 else p.detach().float() for p in self.parameters}
        for group in groups:
            group["params"] = [self.master[p] for p in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, betas=betas, fused=self.parameters[0].is_cuda)
        self._boundary = True
        self._norm: float | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def train(self, mode: bool = True) -> None:
        self.module.train(mode)

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self._boundary = is_boundary

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        if not self._boundary:
            return
        for parameter, master in self.master.items():
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None
        self._norm = float(torch.nn.utils.clip_grad_norm_(list(self.master.values()), self.max_grad_norm))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for parameter, master in self.master.items():
                if master is not parameter:
                    parameter.copy_(master)

    def get_global_grad_norm(self) -> float | None:
        return self._norm


class FrozenEngine(TorchEngine):
    """A model of which nothing trains: passes and gradients for what stands outside it (the proxy
    instruction).

    DeepSpeed has no backward pass without a trained parameter, and there is nothing to average or to shard:
    every worker, of however many, holds the whole model.
    """

    def __init__(self, model: Any):
        self.module = model
        self.optimizer = SimpleNamespace(param_groups=[], state={})

    def step(self) -> None:
        pass

    def get_global_grad_norm(self) -> float:
        return 0.0


def deepspeed_config(config: LoopConfig, precision: str) -> dict[str, Any]:
    """DeepSpeed's configuration. Accumulation is ours (see TrainStep.update), so its own count stays 1.

    bf16 without ZeRO would keep no fp32 masters, so stage 0 becomes 1 there (the same thing on one worker).
    """
    stage = max(config.zero_stage, 1) if precision == "bf16" else config.zero_stage
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": {"stage": stage, "overlap_comm": False},
        "bf16": {"enabled": precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def make_engine(
    model: Any,
    config: LoopConfig,
    precision: str,
    kind: str = "auto",
    groups: list[dict[str, Any]] | None = None,
) -> Any:
    """A DeepSpeed engine where DeepSpeed is installed and torch.distributed runs, else TorchEngine;
    FrozenEngine where nothing in the model trains.

    Args:
        kind: "auto", "deepspeed" or "torch".
        groups: AdamW's parameter groups; default: those of a vision-language model, by `config`, which is
            then a TrainConfig.

    Raises ConfigError for several workers without DeepSpeed.
    """
    if not config.trains_model:
        return FrozenEngine(model)
    groups = optimizer_groups(model, config) if groups is None else groups
    distributed = torch.distributed.is_initialized()
    if kind == "auto":
        kind = "deepspeed" if distributed and importlib.util.find_spec("deepspeed") else "torch"
    if kind == "torch":
        if distributed and torch.distributed.get_world_size() > 1:
            raise ConfigError(
                "num_workers: several training workers need deepspeed; install it or set num_workers to 1"
            )
        engine = TorchEngine(model, config, groups)
    else:
        import deepspeed

        # Its shared-memory all-reduce for CPUs serves inference alone, and would be compiled for most of a
        # minute first.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        optimizer = torch.optim.AdamW(groups)
        engine = deepspeed.initialize(
            model=model, optimizer=optimizer, config=deepspeed_config(config, precision)
        )[0]
    _make_moments(engine)
    return engine


def zero_stage(engine: Any) -> int | None:
    """The ZeRO stage that shards the engine's state; None where every worker holds all of it."""
    if isinstance(engine, TorchEngine):
        return None
    return engine.zero_optimization_stage() or None


def full_state(engine: Any, keep: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    """Per trained parameter its fp32 master and Adam moments, whole and on the CPU.

    Names are "weight/...", "exp_avg/...", "exp_avg_sq/..." and the parameter's own. Collective: every rank
    iterates, only those with `keep` get tensors.
    """
    for name, parameter in trainable_parameters(engine.module).items():
        for kind in ("weight", *MOMENTS):
            value = _read(engine, parameter, kind)
            if keep:
                yield f"{kind}/{name}", value.detach().to("cpu", torch.float32, copy=True)


def load_full_state(engine: Any, state: dict[str, torch.Tensor], steps: int) -> None:
    """Write what `full_state` gave into an engine of any kind, stage and world size. Collective.

    Args:
        steps: optimiser steps taken, for Adam's bias correction.

    Raises KeyError where a trained parameter is missing in `state`.
    """
    for name, parameter in trainable_parameters(engine.module).items():
        for kind in ("weight", *MOMENTS):
            _write(engine, parameter, kind, state[f"{kind}/{name}"])
    for entry in _adam(engine).state.values():
        entry["step"] = torch.full_like(entry["step"], float(steps))


def _adam(engine: Any) -> torch.optim.Optimizer:
    return engine.optimizer.optimizer if zero_stage(engine) else engine.optimizer


def _make_moments(engine: Any) -> None:
    """Adam's moments, zero. torch makes them in the first step; restoring needs them before, and
    DeepSpeed's ZeRO-1/2 would link those of the first parameter group only.
    """
    stage = zero_stage(engine)
    zero = engine.optimizer
    if stage is None:
        flats = [p for group in zero.param_groups for p in group["params"]]
    else:
        flats = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    adam = _adam(engine)
    for flat in flats:
        step = torch.zeros((), device=flat.device if adam.defaults["fused"] else "cpu")
        adam.state[flat] = {"step": step, **{moment: torch.zeros_like(flat) for moment in MOMENTS}}
    if stage in (1, 2):
        zero._lazy_init_hp_params_optimizer_state()


def _read(engine: Any, parameter: torch.nn.Parameter, kind: str) -> torch.Tensor:
    if zero_stage(engine) is None:
        master = engine.master[parameter] if isinstance(engine, TorchEngine) else parameter
        return master if kind == "weight" else engine.optimizer.state[master][kind]
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    return (
        safe_get_full_fp32_param(parameter)
        if kind == "weight"
        else safe_get_full_optimizer_state(parameter, kind)
    )


def _write(engine: Any, parameter: torch.nn.Parameter, kind: str, value: torch.Tensor) -> None:
    stage = zero_stage(engine)
    value = value.to(parameter.device)
    if stage is None:
        master = engine.master[parameter] if isinstance(engine, TorchEngine) else parameter
        if kind == "weight":
            master.data.copy_(value)
            parameter.data.copy_(value)
        else:
            engine.optimizer.state[master][kind].copy_(value)
        return
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if kind != "weight":
        safe_set_full_optimizer_state(parameter, value, kind)
        return
    # The master and the copy that the forward pass uses are set separately.
    safe_set_full_fp32_param(parameter, value)
    if stage == 3:
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)
    else:
        parameter.data.copy_(value)
