"""Configuration of jobs/prepare_data.py."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from medray.config.section import PositiveInt, Probability, Section
from medray.config.shared import MAX_QUARANTINED, ClusterConfig, DataConfig


class LeaksConfig(Section):
    """The search for images that stand in more than one split."""

    held_out: tuple[str, ...] = Field(
        ("val", "validation", "test"), description="Splits that must share no image with the others."
    )
    radius: Annotated[int, Field(ge=0, le=16)] = Field(
        4,
        description="Images whose 64-bit perceptual hashes differ in at most this many bits count as "
        "near-duplicates.",
    )
    max_pairs: PositiveInt = Field(1000, description="Pairs listed in leaks/pairs.parquet; all are counted.")


class PrepareDataConfig(Section):
    """`jobs/prepare_data.py`: a source to canonical shards. Of `data` only what is read and its limits
    count here.
    """

    recipes: ClassVar[str | None] = "prepare_data"

    data: DataConfig = Field(default_factory=DataConfig)
    leaks: LeaksConfig = Field(default_factory=LeaksConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    max_quarantined: Probability = Field(
        0.05,
        description=MAX_QUARANTINED + " Up to 20 rows set aside never fail this job: it names each of them.",
    )
