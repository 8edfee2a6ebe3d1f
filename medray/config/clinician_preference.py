"""Clinician preference alignment (BioMed-VITAL, arXiv 2406.13173): the sections of
`jobs/clinician_preference.py`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from medray.config.clinician_preference_sections import (
    DemonstrationsConfig,
    GenerateConfig,
    PairsConfig,
    RateConfig,
    SelectConfig,
)
from medray.config.rating_model import RaterConfig, ScoreConfig
from medray.config.section import NonNegative, PositiveInt, Probability, Section, set_seed
from medray.config.self_training import SftConfig
from medray.config.shared import (
    ACCUMULATION,
    MAX_QUARANTINED,
    ClusterConfig,
    DataConfig,
    EngineConfig,
    EvaluateConfig,
    JudgeConfig,
    LoraConfig,
    PlainModelConfig,
    VerifyConfig,
)


class TunedModelConfig(PlainModelConfig):
    """The vision-language model to tune."""

    path: str = Field(
        "testbed:base",
        description="Folder in Hugging Face format, hub id, or testbed:base / testbed:expert / "
        "testbed:generalist (bundled tiny models).",
    )


class CaptionedDataConfig(DataConfig):
    """Images with what is known of them: captions and in-text mentions, or attribute tables."""

    max_unlabelled: PositiveInt | None = Field(
        None, description="At most this many images that have neither caption nor attributes."
    )
    label_fraction: Probability = Field(
        1.0,
        description="Share of the training images with a caption or attributes that dialogues are written "
        "about (paper: all).",
    )


class CaptionsConfig(Section):
    """What is made of an attribute table: captions and modalities. Sources with captions of their own
    keep them.
    """

    attributes: int = Field(
        3,
        ge=0,
        description="Number of an image's attributes in its caption, drawn by its id; 0: no caption.",
    )
    modality: str | None = Field(
        None,
        description="Attribute that stands for the modality where the source names none; demonstrations and "
        "quotas are spread over it.",
    )


class CliniciansConfig(Section):
    """Who ticks the answers about the drawn images."""

    kind: Literal["simulated", "database", "export"] = Field(
        "simulated",
        description="simulated: from the images' true attributes, with error_rate; database: the clinician "
        "page's (medray/serving/clinician_page/app.py); export: JUDGEMENT shards it has exported.",
    )
    source: str | None = Field(
        None, description="database: its SQLAlchemy URL; export: folder of Parquet shards."
    )
    names: PositiveInt = Field(3, description="Simulated clinicians.")
    judgements_per_item: PositiveInt = Field(
        1, description="Clinicians who judge each item; the job waits until so many have."
    )
    enough: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0,
        description="Share of the items that must be judged before the job goes on; of database and export.",
    )
    error_rate: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.1, description="Chance that a simulated clinician's tick is the wrong one, drawn for each answer."
    )
    seed: int = Field(0, description="Seed of the simulated clinicians.")

    @model_validator(mode="after")
    def _sources(self):
        if self.kind != "simulated" and not self.source:
            wanted = (
                "the database's SQLAlchemy URL, such as sqlite:///judgements.db"
                if self.kind == "database"
                else "the folder of the exported shards"
            )
            raise ValueError(f"kind {self.kind} needs source: {wanted}")
        if self.kind == "simulated" and self.judgements_per_item > self.names:
            raise ValueError(
                f"judgements_per_item {self.judgements_per_item} needs as many clinicians; there are "
                f"{self.names} (names)"
            )
        return self


class PreferenceTuneConfig(SftConfig):
    """Tuning on the selected dialogues: the LLaVA-Med recipe, vision tower frozen (learning rates, batch
    and epochs inferred, as the paper's tables were not readable).
    """

    self_questioning: Probability = Field(0.0, description="Of self-training; no part of this method.")
    micro_batch: PositiveInt = Field(16, description="Samples per forward pass of one worker.")
    accumulation: PositiveInt | None = Field(8, description=ACCUMULATION)
    lr_llm: NonNegative | None = Field(
        2e-5,
        description="Learning rate of the language model (its LoRA, or all of it with lora_llm null); null "
        "freezes it.",
    )
    lr_vision: NonNegative | None = Field(
        None,
        description="Learning rate of the vision tower (its LoRA, or all of it with lora_vision null); null "
        "freezes it.",
    )
    lora_llm: LoraConfig | None = Field(
        None, description="Adapters of the language model; null trains it in full."
    )
    lora_vision: LoraConfig | None = Field(
        None, description="Adapters of the vision tower; null trains it in full."
    )


class PreferenceEvaluateConfig(EvaluateConfig):
    """Held-out questions, greedy answers, metrics with bootstrap intervals over images."""

    arms: tuple[Literal["selected", "random", "all", "right"], ...] = Field(
        ("selected", "random"),
        description="Models to tune and evaluate beside the base: on the selected dialogues, on as many "
        "drawn at random, on all; right: on as many whose answers are right by the images' true "
        "attributes, where the source has them (an extension): the most that a selection by correctness "
        "alone can gain.",
    )


class ClinicianPreferenceConfig(Section):
    """`jobs/clinician_preference.py`: clinician preference alignment (BioMed-VITAL, arXiv 2406.13173),
    whole.
    """

    recipes: ClassVar[str | None] = "clinician_preference"

    model: TunedModelConfig = Field(default_factory=TunedModelConfig)
    data: CaptionedDataConfig = Field(default_factory=CaptionedDataConfig)
    captions: CaptionsConfig = Field(default_factory=CaptionsConfig)
    demonstrations: DemonstrationsConfig = Field(default_factory=DemonstrationsConfig)
    clinicians: CliniciansConfig = Field(default_factory=CliniciansConfig)
    generate: GenerateConfig = Field(default_factory=GenerateConfig)
    rate: RateConfig = Field(default_factory=RateConfig)
    pairs: PairsConfig = Field(default_factory=PairsConfig)
    rater: RaterConfig = Field(default_factory=RaterConfig)
    score: ScoreConfig = Field(default_factory=ScoreConfig)
    select: SelectConfig = Field(default_factory=SelectConfig)
    tune: PreferenceTuneConfig = Field(default_factory=PreferenceTuneConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    verify: VerifyConfig = Field(default_factory=VerifyConfig)
    evaluate: PreferenceEvaluateConfig = Field(default_factory=PreferenceEvaluateConfig)
    judge: JudgeConfig | None = Field(
        None, description="Judge of win rates on the held-out open questions; null: none."
    )
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    max_quarantined: Probability = Field(0.05, description=MAX_QUARANTINED)
    with_demonstrations: bool = Field(
        True,
        description="Show the generating model demonstrations that clinicians accepted; false: an ablation.",
    )
    weights: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (),
        description="Weights w of the clinicians' pairs to try, such as [1, 10, 100, 200, 300, 400]; the "
        "rating model best aligned with held-out clinicians' pairs goes on. Empty: "
        "rater.clinician_weight alone.",
    )
    seed: int | None = Field(None, description="One seed for every stage that draws (not the evaluation's).")

    @model_validator(mode="after")
    def _spread_seed(self):
        set_seed(
            self.seed,
            self.demonstrations,
            self.clinicians,
            self.generate,
            self.rate,
            self.pairs,
            self.rater,
            self.select,
            self.tune,
        )
        return self
