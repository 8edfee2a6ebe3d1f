"""Instruction-free tuning (arXiv 2603.19482): the sections of `jobs/instruction_free.py`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from medray.config.section import NonNegative, PositiveInt, Probability, Section, adopt, set_seed
from medray.config.shared import (
    ACCUMULATION,
    MAX_QUARANTINED,
    TESTBED_SCENES,
    ClusterConfig,
    DescriptionDataConfig,
    EngineConfig,
    EvaluateConfig,
    LoraConfig,
    PlainModelConfig,
    TrainConfig,
    VerifyConfig,
)


class ProxyConfig(Section):
    """The proxy instruction P of instruction-free tuning and its running average Pbar (see
    medray.models.proxy_instruction).
    """

    count: PositiveInt = Field(
        8, description="Learnable vectors that stand in the instruction's place (paper: 8)."
    )
    mode: Literal["released", "textbook", "frozen", "free"] = Field(
        "textbook",
        description="released: passes use P, which is reset to Pbar after every step (the authors' code); "
        "textbook: passes use Pbar, P moves freely (the paper's words); frozen: nothing moves; free: no "
        "average (the warm-up).",
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.999, description="m of Pbar <- m Pbar + (1 - m) P after every step; of released and textbook."
    )
    lr: NonNegative = Field(
        2e-5,
        description="AdamW learning rate of P; it follows the stage's schedule, and P's gradient is not "
        "clipped.",
    )
    weight_decay: NonNegative = Field(0.01, description="AdamW weight decay of P.")


class InstructionFreeTrainConfig(TrainConfig):
    """One stage of instruction-free tuning: image-description pairs, with a proxy in the instruction's place.

    With all learning rates null the proxy alone trains (the warm-up), without DeepSpeed: each worker holds
    the whole model. Where that does not fit on its device, set lr_projector to 0.0: DeepSpeed then shards the
    model, and nothing in it moves.
    """

    instruction: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="null: the proxy instruction; else this text stands in the user's turn, and there is no "
        "proxy.",
    )
    shuffling: Literal["none", "separator", "sentences"] = Field(
        "separator",
        description="Parts of a description that are put in a new order every epoch: between separators "
        "(attribute lists) or sentences (reports); none: it stays as it is.",
    )
    separator: Annotated[str, Field(min_length=1)] = Field(
        ",", description="What parts a description; of shuffling separator."
    )
    proxy: ProxyConfig = Field(default_factory=ProxyConfig)
    micro_batch: PositiveInt = Field(2, description="Samples per forward pass of one worker.")
    accumulation: PositiveInt | None = Field(1, description=ACCUMULATION)
    epochs: PositiveInt = Field(5, description="Passes over the data.")
    lr_llm: NonNegative | None = Field(
        None,
        description="Learning rate of the language model (its LoRA, or all of it with lora_llm null); null "
        "freezes it, as in the paper.",
    )
    lr_vision: NonNegative | None = Field(
        2e-5,
        description="Learning rate of the vision tower (all of it, or its LoRA with lora_vision given); null "
        "freezes it.",
    )
    lora_vision: LoraConfig | None = Field(
        None, description="Adapters of the vision tower; null trains it in full."
    )
    schedule: Literal["cosine", "constant"] = Field(
        "constant", description="Learning rate after the warm-up: cosine falls to zero, constant stays."
    )
    warmup_ratio: Probability = Field(
        0.0, description="Share of the samples over which the learning rate rises; 0 for no warm-up."
    )
    weight_decay: NonNegative = Field(0.01, description="AdamW weight decay.")

    @property
    def trains_proxy(self) -> bool:
        return self.instruction is None and self.proxy.mode != "frozen"

    def _trains(self) -> bool:
        return self.trains_model or self.trains_proxy


class WarmUpConfig(InstructionFreeTrainConfig):
    """Stage 1: the proxy alone trains, the model does not move; not where tune.instruction is a text.

    What it shares with stage 2 (shuffling, separator, proxy.count) is taken from there.
    """

    epochs: PositiveInt = Field(1, description="Passes over the data (paper: 1).")
    lr_projector: NonNegative | None = Field(
        None, description="null: frozen; see InstructionFreeTrainConfig for 0.0."
    )
    lr_vision: NonNegative | None = Field(None, description="null: frozen.")
    proxy: ProxyConfig = Field(
        default_factory=lambda: ProxyConfig(mode="free"), description="mode free where none is given."
    )

    @model_validator(mode="after")
    def _free(self):
        if "mode" not in self.proxy.model_fields_set:
            self.proxy.mode = "free"
        return self


class DescriptionEvaluateConfig(EvaluateConfig):
    """Held-out questions and descriptions, and general questions that show what the model has kept."""

    describe_prompt: str = Field(
        "Describe this medical scan.", description="What asks for the description of a held-out image."
    )
    general: str | None = Field(
        TESTBED_SCENES,
        description="Questions the base model can answer: testbed:scenes (the bundled models'), or a source "
        "of questions such as a directory of jobs/prepare_data.py; null for none.",
    )
    general_split: str = Field("test", description="Split of evaluate.general that is asked.")
    max_general: PositiveInt | None = Field(100, description="At most this many images of evaluate.general.")


class InstructionFreeConfig(Section):
    """`jobs/instruction_free.py`: instruction-free tuning (arXiv 2603.19482), whole."""

    recipes: ClassVar[str | None] = "instruction_free"

    model: PlainModelConfig = Field(default_factory=PlainModelConfig)
    data: DescriptionDataConfig = Field(default_factory=DescriptionDataConfig)
    warm_up: WarmUpConfig = Field(default_factory=WarmUpConfig)
    tune: InstructionFreeTrainConfig = Field(default_factory=InstructionFreeTrainConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    verify: VerifyConfig = Field(default_factory=VerifyConfig)
    evaluate: DescriptionEvaluateConfig = Field(default_factory=DescriptionEvaluateConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    max_quarantined: Probability = Field(0.05, description=MAX_QUARANTINED)
    seed: int | None = Field(
        None, description="One seed for both stages; sets warm_up.seed and tune.seed (not the evaluation's)."
    )

    @model_validator(mode="after")
    def _spread(self):
        """The stages' common seed and form; a form that warm_up itself gives otherwise is an error."""
        for name in ("shuffling", "separator"):
            adopt(self.warm_up, self.tune, name, "warm_up")
        adopt(self.warm_up.proxy, self.tune.proxy, "count", "warm_up.proxy")
        set_seed(self.seed, self.warm_up, self.tune)
        return self
