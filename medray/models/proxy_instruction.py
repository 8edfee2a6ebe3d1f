"""The proxy instruction of instruction-free tuning (arXiv 2603.19482, code myeongkyunkang/InstFree): k
learnable vectors in the language model's input space that stand where the instruction would, while a model is
tuned on image-description pairs.

Works on any LLaVA or Qwen-VL class model of transformers, without a change to it: a placeholder token, which
exists in the tokenizer in memory only, is replaced by the vectors where the input embeddings come out. A pass
without placeholders is the model's own, bit for bit; leave them out at inference and nothing of the proxy is
left. In a script of your own, with TRL::

    from datasets import Dataset
    from torch.optim import AdamW
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl import SFTTrainer
    from medray.models.proxy_instruction import ProxyInstruction, add_placeholder
    processor, model = AutoProcessor.from_pretrained(path), AutoModelForImageTextToText.from_pretrained(path)
    model.requires_grad_(False)
    tower = model.model.vision_tower.requires_grad_(True)
    proxy = ProxyInstruction(count=8, width=model.get_input_embeddings().embedding_dim, mode="textbook")
    proxy.attach(model, add_placeholder(processor.tokenizer))
    optimizer = AdamW([*tower.parameters(), *proxy.parameters()], lr=2e-5, weight_decay=0.01)
    optimizer.register_step_post_hook(lambda *_: proxy.after_step())
    rows = [{"images": [image], "prompt": [{"role": "user", "content": proxy.text}],
             "completion": [{"role": "assistant", "content": description}]} for image, description in pairs]
    trainer = SFTTrainer(model, sft_config, train_dataset=Dataset.from_list(rows), processing_class=processor,
                         optimizers=(optimizer, None))
    trainer.train()
    proxy.detach()
    model.save_pretrained(out)
    proxy.save(f"{out}/proxy_instruction.safetensors")

Labels must be IGNORE at the placeholders, whose id may lie beyond the model's vocabulary (TRL: prompt and
completion). Save the model with a freshly loaded processor, which does not know the placeholder. With several
workers the gradient of `vectors` has to be averaged over them, as of any parameter outside the wrapped model;
then all workers' proxies stay equal.

Shapes: B samples, T tokens, K vectors, D the width of the embeddings.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import nn

from medray.errors import ConfigError, DataError

Mode = Literal["released", "textbook", "frozen", "free"]
PLACEHOLDER = "<|proxy_instruction|>"
INIT_BOUND = 768**-0.5
_FORMAT = "medray.proxy_instruction"


def add_placeholder(tokenizer: Any) -> int:
    """The id of PLACEHOLDER, which is added to the tokenizer (in memory) if it lacks it. The model keeps
    its embeddings: the id may lie beyond them. Text that spells the placeholder gets it too, so refuse
    such text.
    """
    from transformers import AddedToken

    tokenizer.add_tokens([AddedToken(PLACEHOLDER, special=True, normalized=False)], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(PLACEHOLDER)


class ProxyInstruction(nn.Module):
    """P (`vectors`, a parameter) and its running average Pbar (`average`), float32 [K, D], whatever the
    model's precision: in bf16, 0.999 * x + 0.001 * x rounds back to x, and an average would stand still.

    Modes, by what a pass uses and what `after_step` does (m is the momentum):

    - released: as the authors' code. Passes use P; then Pbar <- m * Pbar + (1 - m) * P and P <- Pbar. The
      same as a step of lr * (1 - m). (The code resets P before each pass instead; nothing reads it in
      between.)
    - textbook: as the paper's words. Passes use the value of Pbar, and the gradient goes to P, which the
      optimizer moves freely; then Pbar <- m * Pbar + (1 - m) * P.
    - frozen: nothing moves; P asks for no gradient.
    - free: passes use P; then Pbar <- P, that is m = 0. The warm-up stage runs so.

    Args:
        count: K (paper: 8).
        width: D, the model's `get_input_embeddings().embedding_dim`.
        momentum: m (paper: 0.999).
        seed: of the initial values, uniform in +-1/sqrt(768) for every D, as the authors' code draws them.

    Raises ConfigError for a count, momentum or mode that cannot be.
    """

    vectors: nn.Parameter
    average: torch.Tensor
    start: torch.Tensor

    def __init__(
        self, count: int, width: int, mode: Mode = "textbook", momentum: float = 0.999, seed: int = 0
    ):
        super().__init__()
        if count < 1 or width < 1:
            raise ConfigError(f"proxy.count {count} and width {width} must be at least 1")
        drawn_KD = torch.empty(count, width).uniform_(
            -INIT_BOUND, INIT_BOUND, generator=torch.Generator().manual_seed(seed)
        )
        self.vectors = nn.Parameter(drawn_KD)
        self.register_buffer("average", drawn_KD.clone())
        self.register_buffer("start", drawn_KD.clone())  # the average when the stage began
        self._hooks: list[Any] = []
        self._places_BT: torch.Tensor | None = None  # between the two hooks of one pass
        self._passes = 0  # with placeholders and gradients, since the last step
        self.begin_stage(mode, momentum)

    @property
    def count(self) -> int:
        return len(self.vectors)

    @property
    def text(self) -> str:
        """What stands in the user's turn in place of the instruction."""
        return PLACEHOLDER * self.count

    def begin_stage(self, mode: Mode, momentum: float = 0.999) -> None:
        """Set the mode; the average starts anew at the vectors, and `moved` counts from here."""
        if mode not in get_args(Mode):
            raise ConfigError(
                f"proxy.mode: unknown mode {mode!r}; allowed values: {', '.join(get_args(Mode))}"
            )
        if not 0 <= momentum < 1:
            raise ConfigError(
                f"proxy.momentum {momentum} must be in [0, 1); to keep the proxy as it is use mode frozen"
            )
        self.mode: Mode = mode
        self.momentum = {"free": 0.0, "frozen": 1.0}.get(mode, float(momentum))
        self.vectors.requires_grad_(mode != "frozen")
        with torch.no_grad():
            self.average.copy_(self.vectors)
            self.start.copy_(self.average)

    def current(self) -> torch.Tensor:
        """The vectors a pass uses, float32 [K, D], with their gradient."""
        if self.mode == "textbook":
            return self.average + (self.vectors - self.vectors.detach())  # straight through: the term is zero
        return self.vectors

    @torch.no_grad()
    def after_step(self) -> None:
        """Average and, in mode `released`, reset. Call it after every optimizer step, once.

        Raises DataError where the proxy is attached to a model but no pass since the last step held
        placeholders.
        """
        if self._hooks and not self._passes:
            raise DataError(
                "no training pass since the last step held a proxy instruction; put proxy.text "
                f"({self.count} x {PLACEHOLDER}) in the user's turn"
            )
        self._passes = 0
        if self.mode == "frozen":
            return
        self.average.lerp_(self.vectors, 1 - self.momentum)
        if self.mode == "released":
            self.vectors.copy_(self.average)

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """For the log: momentum; norm of Pbar; moved, |Pbar - Pbar at the stage's begin|; gap, |P - Pbar|
        (Frobenius norms).
        """
        norms = torch.stack(
            [part.norm() for part in (self.average, self.average - self.start, self.vectors - self.average)]
        ).tolist()
        return {
            "proxy_momentum": self.momentum,
            **dict(zip(("proxy_norm", "proxy_moved", "proxy_gap"), norms, strict=True)),
        }

    def attach(self, model: Any, placeholder_id: int) -> None:
        """Replace placeholders in the model's passes until `detach`; at most one model at a time.

        Args:
            model: a transformers model with a language model in it, or PEFT's wrapper of one.
            placeholder_id: see add_placeholder.

        In a pass with placeholders every sample must hold K of them, else the pass raises DataError. Input
        embeddings given to the model directly (inputs_embeds) are not looked at.

        Raises ConfigError where the embeddings are not D wide.
        """
        embeddings = model.get_input_embeddings()
        width = self.vectors.shape[1]
        if embeddings.embedding_dim != width:
            raise ConfigError(
                f"the proxy instruction is {width} wide and the model's input embeddings are "
                f"{embeddings.embedding_dim}; a proxy serves one model width"
            )
        self.detach()
        self.placeholder_id = placeholder_id
        self._hooks = [
            embeddings.register_forward_pre_hook(self._hide),
            embeddings.register_forward_hook(self._show),
        ]

    def detach(self) -> None:
        """Take the hooks off; the model is as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _hide(self, embeddings: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        """The embeddings look up some id of theirs in place of the placeholder's."""
        self._places_BT = None
        ids_BT = args[0]
        if ids_BT.dim() != 2:  # transformers looks up the image token alone where it was given no ids
            return None
        places_BT = ids_BT == self.placeholder_id
        counts = places_BT.sum(1).tolist()
        if not any(counts):
            return None
        for sample, found in enumerate(counts):
            if found != self.count:
                raise DataError(
                    f"sample {sample} of the batch holds {found} proxy placeholders, not {self.count}: every "
                    "sample needs proxy.text once, "
                    "uncut, and no other sample may be in the batch"
                )
        self._places_BT = places_BT
        self._passes += torch.is_grad_enabled()
        return (ids_BT.masked_fill(places_BT, 0), *args[1:])

    def _show(
        self, embeddings: nn.Module, args: tuple[torch.Tensor, ...], output_BTD: torch.Tensor
    ) -> torch.Tensor | None:
        places_BT, self._places_BT = self._places_BT, None
        if places_BT is None:
            return None
        # Cast after the repetition, so that the gradients of the samples are summed in fp32.
        vectors_BKD = self.current().expand(len(places_BT), -1, -1).to(output_BTD)
        return output_BTD.masked_scatter(places_BT[..., None], vectors_BKD)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ProxyInstruction:
        # Where the proxy is part of a module that is cast (model.bfloat16()), it moves along but is not
        # rounded.
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), recurse)

    def save(self, path: str | os.PathLike, **metadata: str) -> None:
        """Write P, Pbar and the stage's start as safetensors, with mode, momentum and `metadata` in the
        header.
        """
        from safetensors.torch import save_file

        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(
            tensors,
            path,
            metadata=metadata
            | {
                "format": _FORMAT,
                "mode": self.mode,
                "momentum": repr(self.momentum),
                "placeholder": PLACEHOLDER,
            },
        )

    @classmethod
    def load(cls, path: str | os.PathLike) -> ProxyInstruction:
        """What `save` wrote, not attached. Raises DataError for another kind of file."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as handle:
                metadata = handle.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise DataError(
                        f"{path} holds no proxy instruction (its header's format is "
                        f"{metadata.get('format')!r}, not {_FORMAT!r})"
                    )
                state = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
        except (FileNotFoundError, SafetensorError) as error:
            raise DataError(f"{path} cannot be read as safetensors: {error}") from error
        mode: Any = metadata["mode"]
        proxy = cls(
            *state["vectors"].shape,
            mode=mode,
            momentum=float(metadata["momentum"]) if mode in ("released", "textbook") else 0.0,
        )
        proxy.load_state_dict(state)
        return proxy
