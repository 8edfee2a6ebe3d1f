"""Sections that several jobs have: the model, the data, training, engines, judges, evaluation, the
cluster.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from medray.config.section import NonNegative, PositiveInt, Probability, Section
from medray.split_names import as_split

TESTBED_SCENES = "testbed:scenes"  # general questions that the bundled models can answer
SELF_QUESTIONING_SYSTEM_PROMPT = (
    "A conversation between a curious user and an assistant about a medical image. The assistant gives "
    "helpful and "
    "precise answers, and can also take the part of the curious user and ask questions that the image can "
    "answer."
)
ACCUMULATION = (
    "Forward passes per optimiser step and worker, at the largest num_workers; fewer workers "
    "accumulate more. With global_batch given it follows from that: leave it out."
)
ACCELERATOR_LABEL = "ray.io/accelerator-type"
SentParameter = Literal["max_tokens", "temperature", "seed"]
# a parameter of a request that is not the user's to choose
_NOT_PARAMETERS = {"model", "messages", "stream", "n"}
MAX_QUARANTINED = (
    "Largest share of its rows that a stage may set aside (quarantine); more fails it, with the reasons "
    "counted. After the rows are fixed or this is raised, the same "
    "command resumes. A stage that is left with nothing fails at any value."
)
_RESOURCES = {"CPU", "GPU", "memory", "object_store_memory"}
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_LABEL_KEY = re.compile(rf"(?:[A-Za-z0-9][A-Za-z0-9.-]*/)?{_LABEL}")
_LABEL_SELECTOR = re.compile(rf"!?(?:{_LABEL}|in\({_LABEL}(?:, ?{_LABEL})*\))")


class ModelConfig(Section):
    """The vision-language model to tune (any LLaVA-1.5, Qwen2-VL, Qwen2.5-VL, Qwen3-VL or Qwen3.5 class
    model).
    """

    path: str = Field(
        "testbed:base",
        description="Folder in Hugging Face format, hub id, or testbed:base / testbed:expert / "
        "testbed:generalist (bundled tiny models).",
    )
    precision: Literal["bf16", "fp32"] = Field("bf16", description="Precision of training and generation.")
    max_length: PositiveInt = Field(
        2048, description="Longest sequence in tokens, image tokens included; longer rows are quarantined."
    )
    pad_to_square: bool = Field(
        True,
        description="Pad images to a square before the processor (as the paper trains); set false for models "
        "of free aspect such as Qwen-VL.",
    )
    system_prompt: str = Field(
        SELF_QUESTIONING_SYSTEM_PROMPT, description="System prompt of every conversation; empty for none."
    )
    questioner_role: str = Field(
        "vuser", description="Role name the chat template is given for the questioner (the paper's VUSER)."
    )
    chat_template: str | None = Field(
        None,
        description="Jinja file that replaces the model's own chat template (needed where that has no "
        "end-of-turn token).",
    )
    trust_remote_code: bool = Field(
        False,
        description="Run Python code shipped with the model. Leave false unless you have read that code.",
    )


class DataConfig(Section):
    """What is read, and how it is divided."""

    execution_only: ClassVar[frozenset[str]] = frozenset({"read_cpus", "encoders"})

    source: str = Field(
        "testbed:cells",
        description="Folder, file or s3:// / gs:// prefix; testbed:cells renders a synthetic blood-cell set.",
    )
    format: Literal[
        "auto",
        "shards",
        "hf-parquet",
        "wbcatt",
        "skincon",
        "cbis-ddsm",
        "vqa-rad",
        "slake",
        "pmc-vqa",
        "omnimedvqa",
        "llava",
        "llava-med-captions",
        "llava-med-qa",
        "preference",
        "questions",
        "captions",
        "webdataset",
        "images",
        "dicom",
    ] = Field("auto", description="Format of the source; auto looks at its files.")
    images: str | None = Field(
        None,
        description="Folder of the images (default: where the format has them, else the folder of the file "
        "that names them).",
    )
    train_split: str = Field("train", description="Split whose images are trained on.")
    eval_split: str = Field("val", description="Split that is only evaluated on.")
    label_fraction: Probability = Field(
        0.09,
        description="Share of the training images whose labels SFT may use; the rest count as unlabelled "
        "(paper: 9 %).",
    )
    max_labelled: PositiveInt | None = Field(None, description="At most this many labelled images.")
    max_unlabelled: PositiveInt | None = Field(
        10_000, description="At most this many unlabelled images are questioned per round (paper: 10k)."
    )
    unlabelled_per_round: Literal["same", "fresh"] = Field(
        "same", description="Rounds question the same unlabelled images, or a fresh part of them each."
    )
    turns: PositiveInt = Field(
        5, description="Question-answer turns per dialogue made from attributes (WBCAtt)."
    )
    testbed_rows: PositiveInt = Field(3000, description="Images that testbed:cells renders.")
    testbed_val_fraction: Probability = Field(
        0.1, description="Share of the rendered images that form the val split."
    )
    max_image_bytes: PositiveInt = Field(
        32 * 2**20, description="Larger image files are quarantined (bytes)."
    )
    max_image_pixels: Annotated[int, Field(ge=1, le=178_956_970)] = Field(
        64 * 2**20,
        description="Larger images are quarantined before decoding (pixels; Pillow opens none above "
        "178956970).",
    )
    max_aspect: Annotated[float, Field(ge=1)] = Field(
        50.0, description="Images with a longer side over this many times the shorter are quarantined."
    )
    min_image_side: PositiveInt = Field(
        2, description="Images with a shorter side below this are quarantined (pixels)."
    )
    rows_per_shard: PositiveInt = Field(1024, description="Rows per Parquet shard.")
    read_cpus: NonNegative = Field(1.0, description="CPUs per Ray Data task that reads, encodes or writes.")
    encoders: PositiveInt = Field(
        8, description="At most this many actors that decode and tokenise for a training stage."
    )

    @field_validator("train_split", "eval_split")
    @classmethod
    def _split(cls, name: str) -> str:
        # Readers give records train, val and test, however their source spells them.
        if not name.strip():
            raise ValueError("is empty; write train, val, test or a split of the source")
        return as_split(name) or name.strip()


class PlainModelConfig(ModelConfig):
    """The vision-language model to tune, without a system prompt."""

    path: str = Field(
        "testbed:generalist",
        description="Folder in Hugging Face format, hub id, or testbed:base / testbed:expert / "
        "testbed:generalist (bundled tiny models).",
    )
    system_prompt: str = Field(
        "", description="System prompt of every conversation; empty for none, as in the paper."
    )


class DescriptionDataConfig(DataConfig):
    """Images with descriptions: attribute tables (wbcatt, skincon, cbis-ddsm), captions or reports."""

    label_fraction: Probability = Field(
        1.0, description="Share of the training images that are tuned on (paper: all)."
    )


class LoraConfig(Section):
    """Low-rank adapters on one part of the model (PEFT)."""

    rank: PositiveInt = Field(128, description="LoRA rank r.")
    alpha: PositiveInt = Field(256, description="LoRA alpha; the update is scaled by alpha / r.")
    dropout: Probability = Field(0.05, description="LoRA dropout.")


class Placement(Section):
    """Where work may run and the memory it reserves there. It changes nothing of what is made: no stage
    starts over for it.
    """

    labels: dict[str, str] = Field(
        default_factory=dict,
        description="Labels a node must have, as Ray's label selectors: value, !value, in(a,b) or !in(a,b).",
    )
    accelerator: str | None = Field(
        None,
        description="Accelerator a node must have, by Ray's name (A100, H100, L4) or selector "
        "(in(A100,H100)); null for any. Short for the label ray.io/accelerator-type.",
    )
    memory_gib: NonNegative = Field(
        0.0, description="Memory (not the GPU's) each worker or actor reserves (GiB); 0 reserves none."
    )
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="Custom resources each worker or actor takes, by the names under which nodes offer them. "
        "With [min, max] training workers give each group of nodes one: Ray Train does not look at "
        "labels when it counts how many workers there is room for.",
    )

    @property
    def selector(self) -> dict[str, str]:
        """All labels a node must have."""
        return self.labels | ({ACCELERATOR_LABEL: self.accelerator} if self.accelerator else {})

    @property
    def options(self) -> dict[str, Any]:
        """As arguments of ray.remote and of Ray Data's map_batches; none where the work may run anywhere."""
        options: dict[str, Any] = {"label_selector": self.selector} if self.selector else {}
        options |= {"memory": int(self.memory_gib * 2**30)} if self.memory_gib else {}
        return options | ({"resources": self.resources} if self.resources else {})

    @model_validator(mode="after")
    def _selectors(self):
        for key, value in self.selector.items():
            if not _LABEL_KEY.fullmatch(key) or not _LABEL_SELECTOR.fullmatch(value):
                raise ValueError(
                    f"{key}: {value!r} is no label selector; write a value, !value, in(a,b) or !in(a,b)"
                )
        for name in _RESOURCES & self.resources.keys():
            raise ValueError(f"resources: {name} is built in; CPUs, GPUs and memory have fields of their own")
        return self


class LoopConfig(Section):
    """What every training stage has: workers, batches, schedule, checkpoints."""

    # The loss is normalised over the global batch, so how that is divided changes nothing but rounding.
    execution_only: ClassVar[frozenset[str]] = frozenset(
        {
            "num_workers",
            "cpus_per_worker",
            "gpus_per_worker",
            "threads",
            "micro_batch",
            "accumulation",
            "global_batch",
            "zero_stage",
            "gradient_checkpointing",
            "checkpoint_every",
            "keep_checkpoints",
            "max_failures",
        }
    )

    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = Field(
        1, description="Train workers; [min, max] lets the stage shrink and grow with the cluster."
    )
    cpus_per_worker: NonNegative = Field(
        1.0, description="CPUs each worker reserves. Leave at least one CPU of the cluster for Ray Data."
    )
    gpus_per_worker: NonNegative = Field(0.0, description="GPUs each worker reserves (1 on a GPU cluster).")
    place: Placement = Field(default_factory=Placement, description="Where the workers run.")
    threads: PositiveInt | None = Field(
        None, description="torch threads per worker (default: cpus_per_worker, at least 1)."
    )
    micro_batch: PositiveInt = Field(8, description="Samples per forward pass of one worker.")
    accumulation: PositiveInt | None = Field(4, description=ACCUMULATION)
    global_batch: PositiveInt | None = Field(
        None,
        description="Samples per optimiser step at any number of workers; forward passes follow from it, and "
        "need not divide it. null: micro_batch x accumulation x the largest num_workers.",
    )
    epochs: PositiveInt = Field(3, description="Passes over the data.")
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="Learning rate after the warm-up: cosine falls to zero, constant stays."
    )
    warmup_ratio: Probability = Field(
        0.03, description="Share of the samples over which the learning rate rises; 0 for no warm-up."
    )
    weight_decay: NonNegative = Field(0.0, description="AdamW weight decay.")
    max_grad_norm: NonNegative = Field(
        1.0, description="Gradient norm is clipped to this; 0 for no clipping."
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(3, description="DeepSpeed ZeRO stage.")
    gradient_checkpointing: bool = Field(
        True, description="Recompute activations in the backward pass to save memory."
    )
    checkpoint_every: PositiveInt = Field(
        100, description="Optimiser steps between checkpoints (one more at each epoch's end)."
    )
    keep_checkpoints: PositiveInt | None = Field(2, description="Checkpoints kept; null keeps all.")
    max_failures: int = Field(
        3,
        ge=-1,
        description="Worker-group restarts before the stage fails; -1 for no limit. Preemptions never count.",
    )
    shuffle_buffer: PositiveInt = Field(2048, description="Rows of the local shuffle buffer, per worker.")
    eval_rows: int = Field(
        256, ge=0, description="Held-out rows for the evaluation loss at each epoch's end; 0 for none."
    )
    seed: int = Field(0, description="Seed of weights' initialisation, dropout, order and self-questioning.")

    def outcome(self, *without: str) -> dict[str, Any]:
        """See Section.outcome; of the fields that divide the batch only their product counts."""
        return {**super().outcome(*without), "samples_per_step": self.samples_per_step}

    @property
    def max_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def samples_per_step(self) -> int:
        """Global batch in samples: what one optimiser step sees at any number of workers."""
        return self.global_batch or self.micro_batch * (self.accumulation or 1) * self.max_workers

    @property
    def batch_line(self) -> str:
        """The global batch in words, with the workers that it leaves without a sample in every step."""
        workers = (
            self.num_workers
            if isinstance(self.num_workers, int)
            else f"{self.num_workers[0]} to {self.num_workers[1]}"
        )
        line = (
            f"{self.samples_per_step:,} samples per optimiser step at {workers} worker(s), "
            f"{self.micro_batch} per forward pass"
        )
        idle = self.max_workers - self.samples_per_step
        return line + (
            f"; {idle} of {self.max_workers} workers would get no sample: use fewer, or a larger global_batch"
            if idle > 0
            else ""
        )

    def passes_at(self, workers: int) -> int:
        """Forward passes of the busiest of `workers` workers in one optimiser step."""
        return math.ceil(math.ceil(self.samples_per_step / workers) / self.micro_batch)

    @property
    def trains_model(self) -> bool:
        """Whether any part of the model has a learning rate."""
        return True

    @field_validator("num_workers")
    @classmethod
    def _ordered(cls, value):
        if isinstance(value, tuple) and value[0] > value[1]:
            raise ValueError(f"[min, max] must be ordered, not {list(value)}")
        return value

    @model_validator(mode="after")
    def _batch(self):
        if self.global_batch is None:
            if self.accumulation is None:
                raise ValueError(
                    "accumulation is null, so the batch is not known; give global_batch, in samples"
                )
            return self
        if "accumulation" not in self.model_fields_set:
            # the default is for a batch that global_batch does not give; an assignment would validate again
            self.__dict__["accumulation"] = None
        elif self.accumulation is not None:
            product = self.micro_batch * self.accumulation * self.max_workers
            if product != self.global_batch:
                raise ValueError(
                    f"global_batch {self.global_batch} contradicts accumulation: micro_batch "
                    f"{self.micro_batch} x accumulation {self.accumulation} x "
                    f"{self.max_workers} workers is {product}; leave accumulation out (or null), it follows "
                    "from global_batch"
                )
        return self


class TrainConfig(LoopConfig):
    """One training stage of a vision-language model. `learning rates` of None freeze that part."""

    lr_llm: NonNegative | None = Field(
        2e-4,
        description="Learning rate of the language model (its LoRA, or all of it with lora_llm null); null "
        "freezes it.",
    )
    lr_projector: NonNegative | None = Field(
        2e-5, description="Learning rate of the projector, trained in full; null freezes it."
    )
    lr_vision: NonNegative | None = Field(
        5e-5,
        description="Learning rate of the vision tower (its LoRA, or all of it with lora_vision null); null "
        "freezes it.",
    )
    lora_llm: LoraConfig | None = Field(
        default_factory=LoraConfig, description="Adapters of the language model; null trains it in full."
    )
    lora_vision: LoraConfig | None = Field(
        default_factory=lambda: LoraConfig(rank=32, alpha=64, dropout=0.2),
        description="Adapters of the vision tower; null trains it in full.",
    )

    @property
    def trains_model(self) -> bool:
        """Whether any part of the model has a learning rate."""
        return any(rate is not None for rate in (self.lr_llm, self.lr_projector, self.lr_vision))

    @model_validator(mode="after")
    def _parts(self):
        if not self._trains():
            raise ValueError("nothing would train: give at least one of lr_llm, lr_projector, lr_vision")
        return self

    def _trains(self) -> bool:
        return self.trains_model


class SamplingConfig(Section):
    """How text is sampled. temperature 0 is greedy."""

    temperature: NonNegative = Field(1.2, description="Softmax temperature; 0 is greedy.")
    top_k: int = Field(100, ge=0, description="Keep the k most likely tokens; 0 keeps all.")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(0.95, description="Nucleus mass.")
    max_tokens: PositiveInt = Field(1024, description="Longest output in tokens.")


class EngineConfig(Section):
    """vLLM engines, one per actor."""

    execution_only: ClassVar[frozenset[str]] = frozenset(
        {
            "actors",
            "cpus_per_actor",
            "gpus_per_actor",
            "tensor_parallel_size",
            "memory_utilization",
            "kv_cache_gib",
            "enforce_eager",
            "max_num_seqs",
            "rows_per_task",
            "rows_in_flight",
        }
    )

    actors: tuple[PositiveInt, PositiveInt] = Field(
        (1, 1), description="[min, max] engine actors; Ray Data grows and shrinks the pool."
    )
    cpus_per_actor: NonNegative = Field(1.0, description="CPUs each actor reserves.")
    gpus_per_actor: NonNegative = Field(
        0.0, description="GPUs each actor reserves (tensor_parallel_size on a GPU cluster)."
    )
    place: Placement = Field(default_factory=Placement, description="Where the engines run.")
    tensor_parallel_size: PositiveInt = Field(1, description="GPUs one engine spans.")
    max_model_len: PositiveInt | None = Field(
        None, description="Context in tokens (default: the model's own)."
    )
    memory_utilization: Annotated[float, Field(gt=0, le=1)] = Field(
        0.9, description="Share of device memory vLLM may take (on CPU: of the machine's memory)."
    )
    kv_cache_gib: PositiveInt = Field(
        1, description="KV cache on CPU (GiB); GPUs size it from memory_utilization."
    )
    enforce_eager: bool = Field(
        False, description="Skip graph capture and compilation (true for tiny models and quick starts)."
    )
    max_num_seqs: PositiveInt = Field(256, description="Sequences an engine decodes at once.")
    rows_per_task: PositiveInt = Field(
        128, description="Rows handed to an actor at once: the unit of retry after a lost actor."
    )
    rows_in_flight: PositiveInt = Field(128, description="Rows an actor works on at once.")


class OwnModelConfig(Section):
    """How a local model beside the tuned one is asked: as itself, whatever the tuned model's settings are."""

    precision: Literal["bf16", "fp32"] = Field("bf16", description="Precision of this model.")
    pad_to_square: bool = Field(False, description="Pad images to a square before this model's processor.")
    system_prompt: str = Field("", description="System prompt of what this model is asked; empty for none.")
    questioner_role: str = Field(
        "vuser", description="Role name its chat template is given for the questioner."
    )
    chat_template: str | None = Field(
        None, description="Jinja file that replaces this model's own chat template."
    )
    trust_remote_code: bool = Field(
        False,
        description="Run Python code shipped with this model. Leave false unless you have read that code.",
    )


class OwnEngineConfig(Section):
    """Engines of a local model beside the tuned one; null stands for the value of `engine`, unless a
    field says otherwise.
    """

    execution_only: ClassVar[frozenset[str]] = EngineConfig.execution_only

    actors: tuple[PositiveInt, PositiveInt] | None = Field(None, description="[min, max] engine actors.")
    cpus_per_actor: NonNegative | None = Field(None, description="CPUs each actor reserves.")
    gpus_per_actor: NonNegative | None = Field(None, description="GPUs each actor reserves.")
    place: Placement | None = Field(None, description="Where the engines run.")
    tensor_parallel_size: PositiveInt | None = Field(
        None, description="GPUs one engine spans; null: those that its actor reserves."
    )
    max_model_len: PositiveInt | None = Field(None, description="Context in tokens; null: this model's own.")
    memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Share of device memory vLLM may take."
    )
    kv_cache_gib: PositiveInt | None = Field(None, description="KV cache on CPU (GiB).")
    enforce_eager: bool | None = Field(None, description="Skip graph capture and compilation.")
    max_num_seqs: PositiveInt | None = Field(None, description="Sequences an engine decodes at once.")
    rows_per_task: PositiveInt | None = Field(
        None, description="Rows handed to an actor at once: the unit of retry after a lost actor."
    )
    rows_in_flight: PositiveInt | None = Field(None, description="Rows an actor works on at once.")

    def beside(self, engine: EngineConfig) -> EngineConfig:
        """The engine's settings, with those given here in their place."""
        own = {name: value for name in type(self).model_fields if (value := getattr(self, name)) is not None}
        gpus = own.get("gpus_per_actor", engine.gpus_per_actor)
        own.setdefault("tensor_parallel_size", max(1, int(gpus)))
        return engine.model_copy(update={"max_model_len": None, **own})


class EndpointConfig(Section):
    """An OpenAI-compatible endpoint."""

    execution_only: ClassVar[frozenset[str]] = frozenset(
        {
            "key_env",
            "concurrency",
            "retries",
            "give_up",
            "timeout",
            "rename",
            "usd_per_million_input",
            "usd_per_million_output",
        }
    )

    model: str = Field("gpt-4o", description="Model name at the endpoint.")
    base_url: str = Field(
        "https://api.openai.com/v1",
        description="Address of the endpoint. Its key comes from the environment variable named by key_env.",
    )
    key_env: str = Field("OPENAI_API_KEY", description="Environment variable that holds the key.")
    temperature: NonNegative = Field(0.0, description="Sampling temperature.")
    max_tokens: PositiveInt = Field(512, description="Longest reply in tokens.")
    concurrency: PositiveInt = Field(16, description="Requests in flight, per actor.")
    rename: dict[SentParameter, str] = Field(
        default_factory=dict,
        description="Other names for the parameters max_tokens, temperature and seed, for models that refuse "
        "these: {max_tokens: max_completion_tokens} for newer models of OpenAI.",
    )
    omit: tuple[SentParameter, ...] = Field(
        (),
        description="Parameters that are not sent at all, of max_tokens, temperature and seed, for models "
        "that refuse them.",
    )
    parameters: dict[str, Any] = Field(
        default_factory=dict,
        description="Further parameters of every request, as the endpoint names them: {reasoning_effort: "
        "low}.",
    )
    retries: int = Field(
        4,
        ge=0,
        description="Retries of a request that is met with 429, 5xx or no response, with exponential "
        "backoff; then the row is quarantined, as is one that is refused.",
    )
    give_up: PositiveInt = Field(
        10,
        description="Requests that fail one after the other, each after its retries, until the stage stops; "
        "their rows are asked again when it resumes.",
    )
    timeout: Annotated[float, Field(gt=0)] = Field(120.0, description="Seconds one request may take.")
    usd_per_million_input: NonNegative = Field(
        2.5, description="Price of input tokens for the cost ledger (USD per million)."
    )
    usd_per_million_output: NonNegative = Field(
        10.0, description="Price of output tokens for the cost ledger (USD per million)."
    )

    @model_validator(mode="after")
    def _parameters(self):
        sent = [
            self.rename.get(name, name)
            for name in ("max_tokens", "temperature", "seed")
            if name not in self.omit
        ]
        for name in self.parameters:
            if name in _NOT_PARAMETERS:
                raise ValueError(f"parameters: {name} is set by the job; leave it out")
            if name in sent:
                raise ValueError(
                    f"parameters: {name} is sent already; set the field of that name, or name it in omit"
                )
        if len(set(sent)) < len(sent) or _NOT_PARAMETERS.intersection(sent):
            raise ValueError(
                f"rename: the parameters would be sent as {', '.join(sent)}; give each a name of its own"
            )
        if both := self.rename.keys() & set(self.omit):
            raise ValueError(f"omit: {', '.join(sorted(both))} is in rename too; name it in one of them")
        return self


class StrongModelConfig(EndpointConfig):
    """A model beside the tuned one: at an endpoint, or a local one with settings of its own."""

    model_settings: OwnModelConfig = Field(
        default_factory=OwnModelConfig, description="How a local model (kind vllm) is asked."
    )
    engine: OwnEngineConfig = Field(
        default_factory=OwnEngineConfig,
        description="Engines of a local model (kind vllm); where they run holds for kind rater too.",
    )

    def own_model(self) -> ModelConfig:
        """The settings of the local model."""
        return ModelConfig(path=self.model, **self.model_settings.model_dump())

    def described(self, section: str) -> str:
        """How a local model is asked, for the log: none of it follows from the tuned model's settings."""
        own = self.model_settings
        parts = [
            f"the chat template {own.chat_template}" if own.chat_template else "its own chat template",
            "padded images" if own.pad_to_square else "images as they are",
            own.precision,
            "a system prompt" if own.system_prompt else "no system prompt",
            f"at most {self.engine.max_model_len} tokens"
            if self.engine.max_model_len
            else "its own context length",
        ]
        return (
            f"{section}: {self.model} is asked with {', '.join(parts)} ({section}.model_settings, "
            f"{section}.engine)"
        )


class JudgeConfig(StrongModelConfig):
    """Who says which answer is better."""

    kind: Literal["vllm", "api", "rater", "random"] = Field(
        "api",
        description="api: any OpenAI-compatible endpoint; vllm: a local, stronger VLM; rater: the rating "
        "model of jobs/clinician_preference.py, an extension; random: coin flips, an ablation.",
    )
    scoring: Literal["scores", "likelihood"] = Field(
        "scores",
        description="scores: the judge writes two numbers on its first line; likelihood (vllm only): mean "
        "log-likelihood the judge gives each answer, for judges too small to write scores.",
    )
    model: str = Field(
        "gpt-4o",
        description="Model name at the endpoint, or path of the local judge (testbed:expert is bundled) or "
        "rating model.",
    )
    temperature: NonNegative = Field(0.2, description="Sampling temperature of written scores.")
    both_orders: bool = Field(
        True, description="Ask with the answers in both orders and drop pairs on which the verdicts differ."
    )
    min_margin: NonNegative = Field(
        0.0, description="Pairs whose scores differ by no more than this are ties and dropped."
    )
    min_chosen_score: float | None = Field(
        None,
        description="Pairs whose better answer scores less are dropped: of two wrong answers neither should "
        "be learned. In points from 1 to 10, in nats per token for likelihood, or in logits of a rating "
        "model (paper: no such limit).",
    )
    seed: int = Field(0, description="Seed of the random judge and of sampled verdicts.")

    @model_validator(mode="after")
    def _kinds(self):
        if self.scoring == "likelihood" and self.kind != "vllm":
            raise ValueError(
                "scoring likelihood needs kind vllm: an endpoint does not return the likelihood of a given "
                "answer"
            )
        return self


class EvaluateConfig(Section):
    """Held-out questions, greedy answers, metrics with bootstrap intervals over images."""

    kinds: tuple[Literal["open", "closed", "mcq"], ...] = Field(
        ("open", "closed", "mcq"), description="Kinds of question made from attributes."
    )
    max_images: PositiveInt | None = Field(None, description="At most this many held-out images.")
    max_tokens: PositiveInt = Field(128, description="Longest answer in tokens.")
    bootstrap: PositiveInt = Field(1000, description="Bootstrap resamples (of images).")
    arms: tuple[Literal["base", "sft", "dpo"], ...] = Field(
        ("base", "sft", "dpo"),
        description="Models to evaluate: the base, the SQ-SFT model, each round's DPO model.",
    )
    seed: int = Field(0, description="Seed of question making and of the bootstrap.")


class VerifyConfig(Section):
    """After an export: vLLM's greedy tokens against transformers' on a sample."""

    rows: Annotated[int, Field(ge=0)] = Field(
        8, description="Rows compared; 0 leaves the comparison out, for studies of many runs of one recipe."
    )
    max_tokens: PositiveInt = Field(24, description="Tokens compared per row.")
    logprob_tolerance: NonNegative = Field(
        0.05,
        description="A differing token is allowed only where transformers' own two best tokens lie this "
        "close (nats), as rounding may decide between them.",
    )


class ClusterConfig(Section):
    """How the job uses Ray."""

    address: str | None = Field(
        None, description="Ray address (default: RAY_ADDRESS, else a local Ray is started)."
    )
    num_cpus: PositiveInt | None = Field(None, description="CPUs of a local Ray (default: all).")
    object_store_gib: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Object store of a local Ray (GiB)."
    )
    data_labels: dict[str, str] = Field(
        default_factory=dict,
        description="Labels of the nodes that read, encode and write, as label selectors; engines and "
        "workers whose place names the same label go by theirs.",
    )
