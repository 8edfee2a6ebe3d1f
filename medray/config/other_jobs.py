"""The sections of `jobs/prepare_data.py` and `jobs/evaluate.py`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from medray.config.section import PositiveInt, Probability, Section
from medray.config.shared import (
    MAX_QUARANTINED,
    ClusterConfig,
    DataConfig,
    EndpointConfig,
    EngineConfig,
    EvaluateConfig,
    JudgeConfig,
    ModelConfig,
)


class LeaksConfig(Section):
    """The search for images that stand in more than one split."""

    held_out: tuple[str, ...] = Field(("val", "validation", "test"), description="Splits that must share no image with the others.")
    radius: Annotated[int, Field(ge=0, le=16)] = Field(4, description="Images whose 64-bit perceptual hashes differ in at most this many bits count as near-duplicates.")
    max_pairs: PositiveInt = Field(1000, description="Pairs listed in leaks/pairs.parquet; all are counted.")


class EvaluateJobConfig(Section):
    """`jobs/evaluate.py`: models on benchmarks. Which models, benchmarks and data are the command's arguments."""

    model: ModelConfig = Field(default_factory=ModelConfig, description="Of every local model; its path is the command's --model.")
    data: DataConfig = Field(default_factory=DataConfig, description="Limits and CPUs of reading; the source is the command's --data.")
    engine: EngineConfig = Field(default_factory=EngineConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    api: EndpointConfig = Field(default_factory=EndpointConfig, description="Endpoint of models given as api:NAME.")
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    max_quarantined: Probability = Field(0.05, description=MAX_QUARANTINED)
    option_likelihood: bool = Field(True, description="Also score options by the log-likelihood of their text (local models).")
    judge: JudgeConfig | None = Field(None, description="Who rates answers to open questions: win rate against the first model, and, by a judge that writes scores, 100 x model / reference (LLaVA-Med's chat score). null: nobody.")
    text_only: bool = Field(False, description="Also answer every question with a blank image: the floor that text alone reaches.")


class PrepareDataConfig(Section):
    """`jobs/prepare_data.py`: a source to canonical shards. Of `data` only what is read and its limits count here."""

    data: DataConfig = Field(default_factory=DataConfig)
    leaks: LeaksConfig = Field(default_factory=LeaksConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    max_quarantined: Probability = Field(0.05, description=MAX_QUARANTINED + " Up to 20 rows set aside never fail this job: it names each of them.")
