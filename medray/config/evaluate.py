"""The sections of `jobs/prepare_data.py` and `jobs/evaluate.py`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from medray.config.section import Probability, Section
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


class EvaluateJobConfig(Section):
    """`jobs/evaluate.py`: models on benchmarks. Which models, benchmarks and data are the command's
    arguments.
    """

    recipes: ClassVar[str | None] = "evaluate"

    model: ModelConfig = Field(
        default_factory=ModelConfig, description="Of every local model; its path is the command's --model."
    )
    data: DataConfig = Field(
        default_factory=DataConfig,
        description="Limits and CPUs of reading; the source is the command's --data.",
    )
    engine: EngineConfig = Field(default_factory=EngineConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    api: EndpointConfig = Field(
        default_factory=EndpointConfig, description="Endpoint of models given as api:NAME."
    )
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    max_quarantined: Probability = Field(0.05, description=MAX_QUARANTINED)
    option_likelihood: bool = Field(
        True, description="Also score options by the log-likelihood of their text (local models)."
    )
    judge: JudgeConfig | None = Field(
        None,
        description="Judge of open questions: win rate against the first model, and, by a judge "
        "that writes scores, 100 x model / reference (LLaVA-Med's chat score). null: nobody.",
    )
    text_only: bool = Field(
        False, description="Also answer every question with a blank image: the floor that text alone reaches."
    )
