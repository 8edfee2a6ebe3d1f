"""The rating model (BioMed-VITAL, arXiv 2406.13173): how it is trained and how it scores."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from medray.config.section import NonNegative, PositiveInt, Section
from medray.config.shared import LoopConfig, Placement


class RaterConfig(LoopConfig):
    """The rating model f(image, text): a CLIP-family encoder, tuned whole, and an MLP on [text embedding
    ; image embedding].
    """

    encoder: str = Field(
        "testbed:encoder",
        description="CLIP-family encoder in Hugging Face format (CLIP, SigLIP, ...): folder, hub id, or "
        "testbed:encoder (bundled, tiny). The paper's BiomedCLIP must be converted to that format first.",
    )
    hidden: tuple[PositiveInt, ...] = Field(
        (512, 512, 512),
        description="Widths of the MLP's hidden layers (paper: 512, 512, 512 on embeddings of 512 each).",
    )
    max_length: PositiveInt = Field(
        256,
        description="Longest text in tokens, or what the encoder's text tower takes where that is less; the "
        "context is cut first (paper: 256).",
    )
    pad_to_square: bool = Field(
        False,
        description="Pad images to a square before the encoder's processor, which else may crop what lies "
        "outside the middle.",
    )
    precision: Literal["bf16", "fp32"] = Field("fp32", description="Precision of training.")
    loss: Literal["hinge", "bradley_terry"] = Field(
        "hinge",
        description="hinge: max(0, margin - (f_i - f_j)), the released code's; bradley_terry: -log "
        "sigmoid(f_i - f_j), RankNet's. Both on raw logits.",
    )
    margin: Annotated[float, Field(gt=0)] = Field(1.0, description="Margin of the hinge, in logits.")
    paper_exact: bool = Field(
        False,
        description="Put a sigmoid on f before the loss, as the released code does: under a margin of 1 it "
        "saturates.",
    )
    train_on: Literal["mixture", "model", "clinician"] = Field(
        "mixture",
        description="Pairs trained on: those of the rating VLM and of clinicians, or only one of them "
        "(ablations). All held-out pairs are measured either way.",
    )
    clinician_weight: Annotated[float, Field(gt=0)] = Field(
        100.0,
        description="w: what a clinician's pair counts in the loss, where a model's counts 1 (paper: a grid "
        "of 1, 10, 100, 200, 300, 400).",
    )
    held_out_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2,
        description="Share of the images whose pairs are held out; a pair of two images on different sides "
        "is dropped (the released code holds out a fifth).",
    )
    split_seed: int = Field(
        0,
        description="Seed of that split; not changed by the job's seed, so that runs of other seeds are "
        "measured on the same images.",
    )
    lr: NonNegative = Field(1e-5, description="Adam learning rate of the encoder.")
    lr_head: NonNegative | None = Field(
        None, description="Adam learning rate of the MLP; null: the encoder's, as in the paper."
    )
    micro_batch: PositiveInt = Field(16, description="Pairs per forward pass of one worker.")
    epochs: PositiveInt = Field(6, description="Passes over the pairs.")
    schedule: Literal["cosine", "constant"] = Field(
        "constant", description="Learning rate after the warm-up: cosine falls to zero, constant stays."
    )
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="Share of the pairs over which the learning rate rises; 0 for no warm-up."
    )
    max_grad_norm: NonNegative = Field(
        0.0, description="Gradient norm is clipped to this; 0 for no clipping."
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="DeepSpeed ZeRO stage.")
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass to save memory."
    )
    keep_checkpoints: PositiveInt | None = Field(
        1, description="Checkpoints kept: the best ones and the last; null keeps all."
    )
    eval_rows: Annotated[int, Field(ge=1)] = Field(
        512, description="Held-out pairs, clinicians' first, that choose the best epoch."
    )


class ScoreConfig(Section):
    """Scoring exchanges with the rating model, in Ray Data actors."""

    execution_only: ClassVar[frozenset[str]] = frozenset(
        {"actors", "cpus_per_actor", "gpus_per_actor", "batch", "rows_per_task"}
    )

    actors: tuple[PositiveInt, PositiveInt] = Field(
        (1, 1), description="[min, max] actors; Ray Data grows and shrinks the pool."
    )
    cpus_per_actor: NonNegative = Field(
        1.0, description="CPUs each actor reserves; as many threads decode images."
    )
    gpus_per_actor: NonNegative = Field(0.0, description="GPUs each actor reserves.")
    place: Placement = Field(default_factory=Placement, description="Where the actors run.")
    precision: Literal["bf16", "fp32"] = Field("fp32", description="Precision of the forward passes.")
    batch: PositiveInt = Field(64, description="Exchanges per forward pass.")
    rows_per_task: PositiveInt = Field(
        512,
        description="Exchanges handed to an actor at once: the unit of retry after a lost actor, within "
        "which an image of several exchanges is encoded once.",
    )
