"""Clinician preference alignment: demonstrations, dialogues, their rating, pairs of them, and what is kept.

Defaults are BioMed-VITAL's (arXiv 2406.13173) where its paper or code states a value; the other descriptions
say so.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from medray.config.section import NonNegative, PositiveInt, Probability, Section
from medray.config.shared import Placement, SamplingConfig, StrongModelConfig


class DemonstrationsConfig(Section):
    """Diverse images for the clinicians: embeddings, k-means, a draw over clusters and modalities."""

    execution_only: ClassVar[frozenset[str]] = frozenset(
        {"batch", "actors", "cpus_per_actor", "gpus_per_actor"}
    )

    encoder: str = Field(
        "testbed:encoder",
        description="CLIP-family encoder of image and caption: a transformers folder or hub id, "
        "testbed:encoder, or open_clip:NAME@TAG, open_clip:hf-hub:ORG/NAME, open_clip:local-dir:FOLDER "
        "(needs the package open_clip_torch; paper: BiomedCLIP, "
        "open_clip:hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224).",
    )
    precision: Literal["bf16", "fp32"] = Field(
        "fp32", description="Precision of the encoder's forward pass; embeddings are stored in 32 bits."
    )
    batch: PositiveInt = Field(64, description="Images per forward pass.")
    actors: tuple[PositiveInt, PositiveInt] = Field((1, 1), description="[min, max] encoder actors.")
    cpus_per_actor: NonNegative = Field(1.0, description="CPUs each encoder actor reserves.")
    gpus_per_actor: NonNegative = Field(0.0, description="GPUs each encoder actor reserves.")
    place: Placement = Field(default_factory=Placement, description="Where the encoder actors run.")
    clusters: PositiveInt = Field(60, description="k of k-means (paper: 60).")
    kmeans_batch: PositiveInt = Field(4096, description="Embeddings per step of mini-batch k-means.")
    passes: PositiveInt = Field(3, description="Passes of mini-batch k-means over the embeddings.")
    draw: PositiveInt = Field(
        60,
        description="Images drawn: equal shares of the modalities, spread over their clusters (the release "
        "holds 58 demonstrations).",
    )
    picture_points: PositiveInt = Field(
        2000, description="Images shown in the report's picture of the clusters."
    )
    seed: int = Field(0, description="Seed of k-means, the draw and the picture.")


class GenerateConfig(StrongModelConfig):
    """Who writes the dialogues, and how."""

    kind: Literal["vllm", "api"] = Field(
        "api", description="api: any OpenAI-compatible endpoint; vllm: a local VLM."
    )
    model: str = Field(
        "gpt-4o", description="Model name at the endpoint, or path of the local writer (paper: GPT-4V)."
    )
    writing: Literal["dialogue", "asking"] = Field(
        "dialogue",
        description="dialogue: the model writes whole dialogues (paper); asking (vllm only, an extension): "
        "it asks and answers one by one, for models too small to write dialogues.",
    )
    temperature: NonNegative = Field(
        0.7, description="Sampling temperature of written dialogues (not stated by the paper)."
    )
    max_tokens: PositiveInt = Field(2048, description="Longest dialogue in tokens.")
    rounds: tuple[PositiveInt, PositiveInt] = Field(
        (4, 5),
        description="[min, max] question-answer rounds of a dialogue (paper: 4-5); others are refused.",
    )
    answers: Annotated[int, Field(ge=1, le=2)] = Field(
        1, description="Answers to each question: 1, or 2 where clinicians are to choose."
    )
    attempts: PositiveInt = Field(
        2,
        description="Requests, each with a seed of its own, until a written dialogue can be read; then the "
        "image goes without.",
    )
    ask: SamplingConfig = Field(
        default_factory=lambda: SamplingConfig(temperature=1.2, top_k=300, top_p=0.95, max_tokens=300),
        description="Sampling of the questions; of writing asking.",
    )
    answer: SamplingConfig = Field(
        default_factory=lambda: SamplingConfig(temperature=1.2, top_k=100, top_p=0.95, max_tokens=1024),
        description="Sampling of the answers; of writing asking.",
    )
    describe_prompt: str = Field(
        "Describe this medical image in detail.",
        description="Asks for the description that comes before the questions; of writing asking.",
    )
    demonstrated: Probability = Field(
        0.5,
        description="Share of the questions taken from demonstrations of the image's modality; of writing "
        "asking, where there are demonstrations.",
    )
    seed: int = Field(0, description="Base seed of the demonstrations' choice and of every request.")

    @model_validator(mode="after")
    def _possible(self):
        if self.rounds[0] > self.rounds[1]:
            raise ValueError(f"rounds {list(self.rounds)} must be ordered: [min, max]")
        if self.writing == "asking" and self.kind != "vllm":
            raise ValueError("writing asking needs kind vllm: an endpoint knows no questioner's role")
        return self


class RateConfig(StrongModelConfig):
    """Who scores single question-answer pairs from 0 to 10."""

    kind: Literal["vllm", "api"] = Field(
        "api", description="api: any OpenAI-compatible endpoint; vllm: a local VLM."
    )
    model: str = Field(
        "gpt-4o",
        description="Model name at the endpoint, or path of the local rater (testbed:expert is bundled; "
        "paper: GPT-4V).",
    )
    scoring: Literal["scores", "likelihood"] = Field(
        "scores",
        description="scores: a number from 0 to 10 on the first line of the reply; likelihood (vllm only, an "
        "extension): 10 times the probability per token, as a geometric mean, that the model gives the "
        "answer, for models too small to write scores.",
    )
    seed: int = Field(0, description="Seed of sampled ratings (temperature above 0; paper: 0).")

    @model_validator(mode="after")
    def _kinds(self):
        if self.scoring == "likelihood" and self.kind != "vllm":
            raise ValueError(
                "scoring likelihood needs kind vllm: an endpoint does not return the likelihood of a given "
                "answer"
            )
        return self


class PairsConfig(Section):
    """Pairs of rated exchanges, of two distinct score levels."""

    max_pairs: PositiveInt = Field(30_000, description="Pairs drawn at most (paper: about 30,000).")
    level_width: Annotated[float, Field(gt=0)] = Field(
        1.0, description="Scores are put into levels this wide (points); a pair has two levels."
    )
    same_image: bool = Field(
        False, description="Pair only exchanges about one image (extension; the paper pairs any two)."
    )
    uses: PositiveInt = Field(
        8, description="Pairs that one exchange is in, at most (not stated by the paper)."
    )
    seed: int = Field(0, description="Seed of the draw.")


class SelectConfig(Section):
    """Which dialogues the model is tuned on."""

    order: Literal["score", "random"] = Field(
        "score", description="score: the best of the rating model; random: an ablation."
    )
    aggregate: Literal["mean", "min", "turns"] = Field(
        "mean",
        description="Score of a dialogue: mean or min of its turns'; turns ranks every turn by itself and "
        "keeps dialogues of the turns that are left (the released code scores the first turn only).",
    )
    relative_to: Literal["question", "exchange"] | None = Field(
        None,
        description="Rank turns by how much higher they score than others of the same question, or exchange "
        "(question and answer), in the same words; null: by the score itself, as in the paper, which "
        "prefers questions that are easy and answers that are common. An extension.",
    )
    fraction: Annotated[float, Field(gt=0, le=1)] | None = Field(
        0.4, description="Share that is kept (paper: 0.1, 0.4, 0.8); null with top given."
    )
    top: PositiveInt | None = Field(
        None,
        description="Number kept, in place of fraction: dialogues, or turns if aggregate is turns.",
    )
    per_modality: Literal["global", "proportional", "equal"] = Field(
        "proportional",
        description="global: the best of all (the released code; rare modalities may vanish); proportional: "
        "the same share of every modality; equal: as many of each, as far as there are.",
    )
    deduplicate: bool = Field(
        True, description="Of dialogues (or turns) of one image that say the same, keep the best."
    )
    seed: int = Field(0, description="Seed of order random, and of who goes first among equal scores.")

    @model_validator(mode="after")
    def _one_size(self):
        if (self.fraction is None) == (self.top is None):
            raise ValueError("give either fraction or top, and null for the other")
        return self
