"""Self-training (STLLaVA-Med, arXiv 2406.19973): the sections of `jobs/self_train.py`."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from medray.config.section import NonNegative, PositiveInt, Probability, Section, set_seed
from medray.config.shared import (
    ACCUMULATION,
    MAX_QUARANTINED,
    ClusterConfig,
    DataConfig,
    EngineConfig,
    EvaluateConfig,
    JudgeConfig,
    LoraConfig,
    ModelConfig,
    SamplingConfig,
    TrainConfig,
    VerifyConfig,
)


class SftConfig(TrainConfig):
    """SQ-SFT: visual self-questioning instruction tuning."""

    self_questioning: Probability = Field(
        0.5,
        description="rho: chance that a user turn after the first becomes the questioner's, re-drawn every "
        "epoch (released run 0.5; its code's default 0.3; 0 is plain SFT).",
    )


class DpoConfig(TrainConfig):
    """Direct preference optimisation against the frozen SQ-SFT model."""

    execution_only: ClassVar[frozenset[str]] = frozenset({"reference_batch", "reference_workers"})

    micro_batch: PositiveInt = Field(4, description="Pairs per forward pass of one worker.")
    accumulation: PositiveInt | None = Field(16, description=ACCUMULATION)
    epochs: PositiveInt = Field(1, description="Passes over the pairs.")
    lr_llm: NonNegative | None = Field(
        5e-6, description="Learning rate of the language model's LoRA; null freezes it."
    )
    lr_projector: NonNegative | None = Field(
        2e-5, description="Learning rate of the projector; null freezes it."
    )
    lr_vision: NonNegative | None = Field(
        2e-5, description="Learning rate of the vision tower's LoRA; null freezes it."
    )
    lora_vision: LoraConfig | None = Field(
        default_factory=lambda: LoraConfig(rank=32, alpha=64, dropout=0.1),
        description="Adapters of the vision tower; null trains it in full.",
    )
    beta: Annotated[float, Field(gt=0)] = Field(0.1, description="beta of the DPO loss.")
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="Label smoothing (paper: none)."
    )
    length_normalised: bool = Field(
        False, description="Divide log-probabilities by answer length (extension, off in the paper)."
    )
    sft_weight: NonNegative = Field(
        0.0,
        description="Weight of an added cross-entropy on the chosen answer (extension, off in the paper).",
    )
    reference_batch: PositiveInt = Field(
        8, description="Pairs per forward pass of the reference log-probability stage."
    )
    reference_workers: tuple[PositiveInt, PositiveInt] = Field(
        (1, 1), description="[min, max] actors of the reference stage."
    )


class SelfPlayConfig(Section):
    """Self-questions and answers: describe greedily, ask n questions, answer each m times."""

    describe_prompt: str = Field(
        "Describe this medical image in detail.", description="User turn that asks for the description."
    )
    describe: SamplingConfig = Field(
        default_factory=lambda: SamplingConfig(temperature=0, top_k=0, top_p=1.0, max_tokens=1024),
        description="Sampling of the description (paper: greedy, 1024 tokens).",
    )
    questions: PositiveInt = Field(5, description="Questions asked per image.")
    ask: SamplingConfig = Field(
        default_factory=lambda: SamplingConfig(temperature=1.2, top_k=300, top_p=0.95, max_tokens=300),
        description="Sampling of the questions.",
    )
    answers: int = Field(
        2, ge=2, description="Answers sampled per question, each with its own recorded seed; all are kept."
    )
    answer: SamplingConfig = Field(
        default_factory=lambda: SamplingConfig(temperature=1.2, top_k=100, top_p=0.95, max_tokens=1024),
        description="Sampling of the answers.",
    )
    seed: int = Field(
        0,
        description="Base seed; each request's seed is derived from it, the sample_id, the round and the "
        "request's place.",
    )


class SelfTrainingConfig(Section):
    """`jobs/self_train.py`: STLLaVA-Med, whole."""

    recipes: ClassVar[str | None] = "self_train"

    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    sft: SftConfig = Field(default_factory=SftConfig)
    self_play: SelfPlayConfig = Field(default_factory=SelfPlayConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    judge: JudgeConfig = Field(default_factory=JudgeConfig)
    dpo: DpoConfig = Field(default_factory=DpoConfig)
    verify: VerifyConfig = Field(default_factory=VerifyConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    max_quarantined: Probability = Field(0.05, description=MAX_QUARANTINED)
    rounds: int = Field(
        1,
        ge=0,
        description="Self-training rounds (paper: 1); 0 stops after SQ-SFT, round r+1 questions images with "
        "the model of round r.",
    )
    seed: int | None = Field(
        None,
        description="One seed for every stage; sets sft.seed, dpo.seed, self_play.seed, judge.seed (not the "
        "evaluation's).",
    )

    @model_validator(mode="after")
    def _spread_seed(self):
        set_seed(self.seed, self.sft, self.dpo, self.self_play, self.judge)
        return self
