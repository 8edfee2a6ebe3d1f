"""Configuration of every job: pydantic models, YAML files and dotted overrides.

Defaults are the papers' unless a field says otherwise (self-training: STLLaVA-Med, arXiv 2406.19973, and its
public code); `medray/recipes/` holds the recipes that change them. Importing this package loads neither torch
nor Ray, so a wrong config fails before anything starts.

Example::

    config = load_config(SelfTrainingConfig, "self_train/tiny-cpu", ["dpo.beta=0.2"])
"""

from medray.config.clinician_preference import (
    CaptionedDataConfig,
    CaptionsConfig,
    ClinicianPreferenceConfig,
    CliniciansConfig,
    PreferenceEvaluateConfig,
    PreferenceTuneConfig,
    TunedModelConfig,
)
from medray.config.clinician_preference_sections import (
    DemonstrationsConfig,
    GenerateConfig,
    PairsConfig,
    RateConfig,
    SelectConfig,
)
from medray.config.evaluate import EvaluateJobConfig
from medray.config.instruction_free import (
    DescriptionEvaluateConfig,
    InstructionFreeConfig,
    InstructionFreeTrainConfig,
    ProxyConfig,
    WarmUpConfig,
)
from medray.config.loading import ConfigT, fields_of, load_config
from medray.config.prepare_data import LeaksConfig, PrepareDataConfig
from medray.config.rating_model import RaterConfig, ScoreConfig
from medray.config.section import Section
from medray.config.self_training import DpoConfig, SelfPlayConfig, SelfTrainingConfig, SftConfig
from medray.config.serving import ServeConfig
from medray.config.shared import (
    SELF_QUESTIONING_SYSTEM_PROMPT,
    TESTBED_SCENES,
    ClusterConfig,
    DataConfig,
    DescriptionDataConfig,
    EndpointConfig,
    EngineConfig,
    EvaluateConfig,
    JudgeConfig,
    LoopConfig,
    LoraConfig,
    ModelConfig,
    OwnEngineConfig,
    OwnModelConfig,
    Placement,
    PlainModelConfig,
    SamplingConfig,
    StrongModelConfig,
    TrainConfig,
    VerifyConfig,
)

__all__ = [
    "SELF_QUESTIONING_SYSTEM_PROMPT",
    "TESTBED_SCENES",
    "CaptionedDataConfig",
    "CaptionsConfig",
    "ClinicianPreferenceConfig",
    "CliniciansConfig",
    "ClusterConfig",
    "ConfigT",
    "DataConfig",
    "DemonstrationsConfig",
    "DescriptionDataConfig",
    "DescriptionEvaluateConfig",
    "DpoConfig",
    "EndpointConfig",
    "EngineConfig",
    "EvaluateConfig",
    "EvaluateJobConfig",
    "GenerateConfig",
    "InstructionFreeConfig",
    "InstructionFreeTrainConfig",
    "JudgeConfig",
    "LeaksConfig",
    "LoopConfig",
    "LoraConfig",
    "ModelConfig",
    "OwnEngineConfig",
    "OwnModelConfig",
    "PairsConfig",
    "Placement",
    "PlainModelConfig",
    "PreferenceEvaluateConfig",
    "PreferenceTuneConfig",
    "PrepareDataConfig",
    "ProxyConfig",
    "RateConfig",
    "RaterConfig",
    "SamplingConfig",
    "ScoreConfig",
    "Section",
    "SelectConfig",
    "SelfPlayConfig",
    "SelfTrainingConfig",
    "ServeConfig",
    "SftConfig",
    "StrongModelConfig",
    "TrainConfig",
    "TunedModelConfig",
    "VerifyConfig",
    "WarmUpConfig",
    "fields_of",
    "load_config",
]
