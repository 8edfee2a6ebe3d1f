"""What `medray.serving.chat.app` hosts and what it lets in."""

from __future__ import annotations

import re
from typing import Annotated, Any

import yaml
from pydantic import Field, field_validator, model_validator

from medray.config.section import PositiveInt, Section
from medray.config.shared import EngineConfig, Placement

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TEXTS = {"run", "keys", "title", "revision"}  # of ServeConfig's fields
_CPUS = 0.5  # of a replica on CPU: a tuned model, its base and an ingress go onto two
_HOST = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?(:[0-9]{1,5})?")


class LimitsConfig(Section):
    """What one request may ask for. More is answered with 4xx, before a model sees it."""

    body_bytes: PositiveInt = Field(
        24 * 2**20, description="Of the whole request (413). Base64 makes images a third larger."
    )
    images: PositiveInt = Field(
        1, description="Images in one request. Models tuned here have seen one at a time."
    )
    image_bytes: PositiveInt = Field(16 * 2**20, description="Of one encoded image.")
    image_pixels: Annotated[int, Field(ge=1, le=178_956_970)] = Field(
        32 * 2**20, description="Of one image, looked up in its header before a pixel is decoded."
    )
    messages: PositiveInt = Field(64, description="Messages in one request.")
    text_chars: PositiveInt = Field(65_536, description="Characters of all messages together.")
    tokens: PositiveInt = Field(
        1024, description="Tokens of one answer; also what a request without max_tokens gets at most."
    )
    samples: PositiveInt = Field(8, description="Answers to one request (n).")
    schema_bytes: PositiveInt = Field(16_384, description="Of a JSON schema for structured output.")
    requests_per_minute: PositiveInt = Field(
        600,
        description="Requests per minute per key and ingress replica; bursts up to this size; more gets 429.",
    )
    seconds: Annotated[float, Field(gt=0)] = Field(
        120.0, description="Until a request must be answered in full (408)."
    )
    hosts: list[str] = Field(
        default_factory=list,
        description="https hosts that images may be fetched from, such as images.example.org or host:8443; "
        "none: only data URIs. Hosts with private or loopback addresses are refused all the same.",
    )
    fetch_seconds: Annotated[float, Field(gt=0)] = Field(
        10.0, description="For fetching one image, redirects included."
    )

    @field_validator("hosts")
    @classmethod
    def _hosts(cls, hosts: list[str]) -> list[str]:
        hosts = [host.lower() for host in hosts]
        for host in hosts:
            if not _HOST.fullmatch(host):
                raise ValueError(f"{host!r} is no host name; write it without https:// and without a path")
        return hosts


class ServedModel(Section):
    """One name under which a model answers."""

    name: str = Field(description="The `model` of requests: letters, digits and . _ -")
    path: str = Field(
        description="Folder in Hugging Face format, s3:// or gs:// folder, hub id, or a bundled model "
        "(testbed:base)."
    )
    precision: str = Field("bf16", pattern="^(bf16|fp32)$", description="Of the weights: bf16 or fp32.")
    pad_to_square: bool = Field(True, description="Pad images to a square, as the model was tuned.")
    system_prompt: str = Field(
        "", description="Of conversations that bring none, as the model was tuned; empty for none."
    )
    trust_remote_code: bool = Field(
        False,
        description="Run Python code shipped with the model. Leave false unless you have read that code.",
    )


class ReplicaConfig(Section):
    """The replicas of a model."""

    engine: EngineConfig | None = Field(
        None,
        description="Of every replica; none: as in the run's configuration (rows_* and actors are not used).",
    )
    engine_cpus: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Logical CPUs that each replica reserves; on CPU its whole ones are also the engine's "
        "threads (at least 1). null: engine.cpus_per_actor; "
        "but 0.5 on CPU with a run's own settings, which are those of a job that has the machine to itself.",
    )
    replicas: tuple[Annotated[int, Field(ge=0)], PositiveInt] = Field(
        (1, 1), description="[min, max] of each model; from 0 it is started by its first request."
    )
    target_ongoing_requests: Annotated[float, Field(gt=0)] = Field(
        16.0, description="Requests at work in one replica above which another is started."
    )
    upscale_delay_s: Annotated[float, Field(ge=0)] = Field(
        30.0, description="Seconds of sustained load before a replica is added."
    )
    downscale_delay_s: Annotated[float, Field(ge=0)] = Field(
        600.0, description="Seconds of low load before a replica is removed."
    )
    queued: PositiveInt = Field(
        256, description="Requests that may wait for a replica of one model; more are answered with 503."
    )
    drain_seconds: Annotated[float, Field(ge=0)] = Field(
        120.0, description="A replica that is replaced finishes what it has for so long."
    )
    stream_milliseconds: Annotated[float, Field(ge=0)] = Field(
        10.0, description="Tokens of a stream that come within so long go out together; 0 for each by itself."
    )
    place: Placement = Field(default_factory=Placement, description="Where replicas run.")
    limits: LimitsConfig = Field(default_factory=LimitsConfig)

    def engine_of(self, tuned: EngineConfig | None = None) -> EngineConfig:
        """Engine settings of a model's replicas.

        Args:
            tuned: those of the model's run.
        """
        engine = self.engine or tuned or EngineConfig()
        cpus = self.engine_cpus
        if cpus is None and self.engine is None and not engine.gpus_per_actor:
            cpus = min(engine.cpus_per_actor, _CPUS) or _CPUS
        return engine if cpus is None else engine.model_copy(update={"cpus_per_actor": cpus})

    def bundle(self, engine: EngineConfig) -> tuple[int, float, float]:
        """What one replica asks for: so many places, of so many CPUs and GPUs each."""
        if not engine.gpus_per_actor:
            return 1, engine.cpus_per_actor, 0.0
        places = engine.tensor_parallel_size
        return places, engine.cpus_per_actor / places, engine.gpus_per_actor / places

    @property
    def of_replicas(self) -> ReplicaConfig:
        """What a replica depends on: one whose settings here are the same is not replaced."""
        return ReplicaConfig.model_validate(
            {
                **self.model_dump(include=set(ReplicaConfig.model_fields)),
                "limits": {"tokens": self.limits.tokens, "images": self.limits.images},
            }
        )


class ServeConfig(ReplicaConfig):
    """`serve run serve.app:build run=RUN_DIR`, and the args of a Serve config file."""

    run: str | None = Field(
        None,
        description="Run directory of a job, local or s3://, gs://; its tuned model answers as `tuned`, its "
        "base as `base`.",
    )
    runs: dict[str, str] = Field(
        default_factory=dict,
        description="Several run directories by name: the tuned model of each answers under it, the base of "
        "each under NAME-base (one that several share, once).",
    )
    base: bool = Field(True, description="Serve base models too.")
    models: list[ServedModel] = Field(default_factory=list, description="Models that belong to no run.")
    keys: str | None = Field(
        None, description="File made by python -m serve.tokens; none: the environment variable MEDRAY_KEYS."
    )
    revision: str = Field(
        "",
        description="Any text. Ray Serve leaves alone what is deployed with equal settings: another text "
        "makes `serve deploy` read keys, models and runs again.",
    )
    open: bool = Field(False, description="Ask for no key. Only where nobody else can reach the port.")
    ingress_replicas: PositiveInt = Field(
        1, description="Processes that take requests, check them and decode images."
    )
    ingress_cpus: Annotated[float, Field(ge=0)] = Field(0.5, description="Logical CPUs per ingress replica.")
    title: str = Field("medray", description="Of the web page.")
    examples: Annotated[int, Field(ge=0, le=50)] = Field(
        6, description="Held-out questions of the first run that the page offers to try, of one image each."
    )

    @model_validator(mode="before")
    @classmethod
    def _parse_cli_values(cls, given: Any) -> Any:
        """`serve run` hands on words: replicas=[1,4] is a list all the same."""
        if not isinstance(given, dict):
            return given
        try:
            return {
                name: yaml.safe_load(value)
                if isinstance(value, str) and value[:1] in ("[", "{") and name not in _TEXTS
                else value
                for name, value in given.items()
            }
        except yaml.YAMLError as error:
            raise ValueError(f"a list or map cannot be read: {error}") from None

    @field_validator("runs")
    @classmethod
    def _runs(cls, runs: dict[str, str]) -> dict[str, str]:
        for name in runs:
            _check(name)
        return runs

    @model_validator(mode="after")
    def _something(self):
        if not (self.run or self.runs or self.models):
            raise ValueError(
                "nothing to serve: give run=RUN_DIR (runs and models in a config file serve several)"
            )
        names = [model.name for model in self.models]
        for name in names:
            _check(name)
        taken = [*names, *self.runs, *(["tuned"] if self.run else [])]
        if twice := {name for name in taken if taken.count(name) > 1}:
            raise ValueError(f"two models are named {', '.join(sorted(twice))}")
        if self.replicas[0] > self.replicas[1]:
            raise ValueError(f"replicas: [min, max] is {list(self.replicas)}")
        return self


def _check(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a valid model name; use letters, digits, '.', '_' and '-'")
