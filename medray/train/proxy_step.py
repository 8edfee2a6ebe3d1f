"""The proxy instruction's part of an optimiser step, beside the engine: its own AdamW, one gradient over all
workers, its state.

P stays outside the engine: a few thousand fp32 numbers that every worker holds whole, so that neither ZeRO's
shards nor bf16 touch it, and every worker's is the same. Its gradient is not clipped with the model's; AdamW
hardly knows the scale.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import fsspec
import torch
import torch.distributed as dist

from medray.config import InstructionFreeTrainConfig
from medray.errors import ConfigError, DataError
from medray.models.proxy_instruction import ProxyInstruction

MOMENTS = {"proxy_exp_avg": "exp_avg", "proxy_exp_avg_sq": "exp_avg_sq"}


class ProxyStep:
    """P attached to the model of a training engine.

    Args:
        config: mode, momentum, rate and seed; they hold after a restart too.
        model: the engine's.
        placeholder_id: of the tokenizer that made the batches.
        start: address of a file of ProxyInstruction.save; its `vectors` are where this stage begins, average
            included.

    Raises ConfigError where the start has another number of vectors or is of another width.
    """

    def __init__(
        self,
        config: InstructionFreeTrainConfig,
        model: Any,
        placeholder_id: int,
        device: Any,
        start: str | None = None,
    ):
        if start is None:
            self.instruction = ProxyInstruction(
                config.proxy.count, model.get_input_embeddings().embedding_dim, seed=config.seed
            )
        else:
            self.instruction = read_proxy(start, config.proxy.count)
        self.config = config.proxy
        self.instruction.begin_stage(config.proxy.mode, config.proxy.momentum)
        self.instruction.to(device)
        self.instruction.attach(model, placeholder_id)
        self.vectors = self.instruction.vectors
        self.optimizer = torch.optim.AdamW(
            [self.vectors], lr=config.proxy.lr, weight_decay=config.proxy.weight_decay
        )
        # torch makes them in the first step; a mode that takes none is saved and restored like the others.
        self.optimizer.state[self.vectors] = {
            "step": torch.zeros(()),
            **{name: torch.zeros_like(self.vectors) for name in MOMENTS.values()},
        }

    def step(self, factor: float) -> dict[str, float]:
        """One AdamW step at the rate lr * factor, then the average. Collective; the passes' gradients are as
        engines take them, world size times this worker's part of the global batch's.

        Returns metrics: lr_proxy, proxy_grad_norm, and those of ProxyInstruction.metrics.
        """
        gradient = self.vectors.grad
        if gradient is not None and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
        rate = self.config.lr * factor if gradient is not None else 0.0  # mode frozen asks for no gradient
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.instruction.after_step()
        norm = 0.0 if gradient is None else float(gradient.norm())
        return {"lr_proxy": rate, "proxy_grad_norm": norm, **self.instruction.metrics()}

    def state(self) -> dict[str, torch.Tensor]:
        """Whole, on the CPU: "proxy/vectors", "proxy/average", "proxy/start", "proxy_exp_avg",
        "proxy_exp_avg_sq".
        """
        moments = {name: self.optimizer.state[self.vectors][moment] for name, moment in MOMENTS.items()}
        tensors = {
            f"proxy/{name}": tensor for name, tensor in self.instruction.state_dict().items()
        } | moments
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}

    def metadata(self) -> dict[str, str]:
        """What `stored_proxy` needs beside the tensors."""
        return {"proxy_mode": self.instruction.mode, "proxy_momentum": repr(self.config.momentum)}

    @torch.no_grad()
    def load(self, state: dict[str, torch.Tensor], steps: int) -> None:
        """Restore what `state` gave after `steps` steps; mode, momentum and rates are the config's."""
        self.instruction.load_state_dict(
            {name: state[f"proxy/{name}"] for name in self.instruction.state_dict()}
        )
        entry = self.optimizer.state[self.vectors]
        entry["step"].fill_(steps)
        for name, moment in MOMENTS.items():
            entry[moment].copy_(state[name])


def read_proxy(address: str, count: int) -> ProxyInstruction:
    """The proxy instruction at a path or address (s3://, gs://, ...).

    Raises DataError where there is none, ConfigError where it has not `count` vectors.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "proxy.safetensors")
        try:
            with fsspec.open(address, "rb") as handle:
                path.write_bytes(handle.read())
        except FileNotFoundError as error:
            raise DataError(f"{address}: there is no proxy instruction at this address") from error
        proxy = ProxyInstruction.load(path)
    if proxy.count != count:
        raise ConfigError(
            f"proxy.count is {count}, but {address} holds {proxy.count} vectors; set proxy.count to that"
        )
    return proxy


def stored_proxy(path: Path) -> ProxyInstruction:
    """The proxy instruction of a training state (TrainStep.save). Raises DataError where that has none."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as handle:
        metadata = handle.metadata()
        if "proxy_mode" not in metadata:
            raise DataError(
                "the checkpoint holds no proxy instruction; its stage was trained with an instruction in "
                "words"
            )
        state = {name: handle.get_tensor(f"proxy/{name}") for name in ("vectors", "average", "start")}
    proxy = ProxyInstruction(
        *state["vectors"].shape, mode=metadata["proxy_mode"], momentum=float(metadata["proxy_momentum"])
    )
    proxy.load_state_dict(state)
    return proxy
