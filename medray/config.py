"""Configuration of every job: pydantic models, YAML files and dotted overrides.

Defaults are the paper's (STLLaVA-Med, arXiv 2406.19973, and its public code) unless a field says otherwise;
`configs/` holds the recipes that change them. Importing this module loads neither torch nor Ray, so a wrong
config fails before anything starts.

Example::

    config = load_config(SelfTrainingConfig, "configs/self_train/tiny-cpu.yaml", ["dpo.beta=0.2"])
"""

from __future__ import annotations

import os
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from medray.errors import ConfigError

PositiveInt = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]

SELF_QUESTIONING_SYSTEM_PROMPT = (
    "A conversation between a curious user and an assistant about a medical image. The assistant gives helpful and "
    "precise answers, and can also take the part of the curious user and ask questions that the image can answer."
)


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values are checked on assignment too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The vision-language model to tune (any LLaVA, Qwen2.5-VL or Qwen3-VL class model)."""

    path: str = Field("testbed:base", description="Folder in Hugging Face format, hub id, or testbed:base / testbed:expert / testbed:generalist (bundled tiny models).")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="Precision of training and generation.")
    max_length: PositiveInt = Field(2048, description="Longest sequence in tokens, image tokens included; longer rows are quarantined.")
    pad_to_square: bool = Field(True, description="Pad images to a square before the processor (as the paper trains); set false for models of free aspect such as Qwen-VL.")
    system_prompt: str = Field(SELF_QUESTIONING_SYSTEM_PROMPT, description="System prompt of every conversation; empty for none.")
    questioner_role: str = Field("vuser", description="Role name the chat template is given for the questioner (the paper's VUSER).")
    chat_template: str | None = Field(None, description="Jinja file that replaces the model's own chat template (needed where that has no end-of-turn token).")
    trust_remote_code: bool = Field(False, description="Run Python code shipped with the model. Leave false unless you have read that code.")


class DataConfig(Section):
    """What is read, and how it is divided."""

    source: str = Field("testbed:cells", description="Folder, file or s3:// / gs:// prefix; testbed:cells renders a synthetic blood-cell set.")
    format: Literal[
        "auto", "shards", "hf-parquet", "wbcatt", "skincon", "cbis-ddsm", "vqa-rad", "slake", "pmc-vqa", "omnimedvqa", "llava", "llava-med-captions", "llava-med-qa",
        "preference", "captions", "webdataset", "images", "dicom",
    ] = Field("auto", description="Format of the source; auto looks at its files.")
    images: str | None = Field(None, description="Folder of the images (default: where the format has them, else the folder of the file that names them).")
    train_split: str = Field("train", description="Split whose images are trained on.")
    eval_split: str = Field("val", description="Split that is only evaluated on.")
    label_fraction: Probability = Field(0.09, description="Share of the training images whose labels SFT may use; the rest count as unlabelled (paper: 9 %).")
    max_labelled: PositiveInt | None = Field(None, description="At most this many labelled images.")
    max_unlabelled: PositiveInt | None = Field(10_000, description="At most this many unlabelled images are questioned per round (paper: 10k).")
    unlabelled_per_round: Literal["same", "fresh"] = Field("same", description="Rounds question the same unlabelled images, or a fresh part of them each.")
    turns: PositiveInt = Field(5, description="Question-answer turns per dialogue made from attributes (WBCAtt).")
    testbed_rows: PositiveInt = Field(3000, description="Images that testbed:cells renders.")
    testbed_val_fraction: Probability = Field(0.1, description="Share of the rendered images that form the val split.")
    max_image_bytes: PositiveInt = Field(32 * 2**20, description="Larger image files are quarantined (bytes).")
    max_image_pixels: Annotated[int, Field(ge=1, le=178_956_970)] = Field(64 * 2**20, description="Larger images are quarantined before decoding (pixels; Pillow opens none above 178956970).")
    max_aspect: Annotated[float, Field(ge=1)] = Field(50.0, description="Images with a longer side over this many times the shorter are quarantined.")
    min_image_side: PositiveInt = Field(2, description="Images with a shorter side below this are quarantined (pixels).")
    rows_per_shard: PositiveInt = Field(1024, description="Rows per Parquet shard.")
    read_cpus: NonNegative = Field(1.0, description="CPUs per Ray Data task that reads, encodes or writes.")
    encoders: PositiveInt = Field(8, description="At most this many actors that decode and tokenise for a training stage.")


class LoraConfig(Section):
    """Low-rank adapters on one part of the model (PEFT)."""

    rank: PositiveInt = Field(128, description="LoRA rank r.")
    alpha: PositiveInt = Field(256, description="LoRA alpha; the update is scaled by alpha / r.")
    dropout: Probability = Field(0.05, description="LoRA dropout.")


class TrainConfig(Section):
    """One training stage. `learning rates` of None freeze that part."""

    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = Field(1, description="Train workers; [min, max] lets the stage shrink and grow with the cluster.")
    cpus_per_worker: NonNegative = Field(1.0, description="CPUs each worker reserves. Leave at least one CPU of the cluster for Ray Data.")
    gpus_per_worker: NonNegative = Field(0.0, description="GPUs each worker reserves (1 on a GPU cluster).")
    threads: PositiveInt | None = Field(None, description="torch threads per worker (default: cpus_per_worker, at least 1).")
    micro_batch: PositiveInt = Field(8, description="Samples per forward pass of one worker.")
    accumulation: PositiveInt = Field(4, description="Forward passes per optimiser step and worker, at the largest num_workers; fewer workers accumulate more, so the global batch stays.")
    global_batch: PositiveInt | None = Field(None, description="Samples per optimiser step; if given it must equal micro_batch x accumulation x max workers.")
    epochs: PositiveInt = Field(3, description="Passes over the data.")
    lr_llm: NonNegative | None = Field(2e-4, description="Learning rate of the language model (its LoRA, or all of it with lora_llm null); null freezes it.")
    lr_projector: NonNegative | None = Field(2e-5, description="Learning rate of the projector, trained in full; null freezes it.")
    lr_vision: NonNegative | None = Field(5e-5, description="Learning rate of the vision tower (its LoRA, or all of it with lora_vision null); null freezes it.")
    lora_llm: LoraConfig | None = Field(default_factory=LoraConfig, description="Adapters of the language model; null trains it in full.")
    lora_vision: LoraConfig | None = Field(default_factory=lambda: LoraConfig(rank=32, alpha=64, dropout=0.2), description="Adapters of the vision tower; null trains it in full.")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="Learning rate after the warm-up: cosine falls to zero, constant stays.")
    warmup_ratio: Probability = Field(0.03, description="Share of the samples over which the learning rate rises; 0 for no warm-up.")
    weight_decay: NonNegative = Field(0.0, description="AdamW weight decay.")
    max_grad_norm: NonNegative = Field(1.0, description="Gradient norm is clipped to this; 0 for no clipping.")
    zero_stage: Literal[0, 1, 2, 3] = Field(3, description="DeepSpeed ZeRO stage.")
    gradient_checkpointing: bool = Field(True, description="Recompute activations in the backward pass to save memory.")
    checkpoint_every: PositiveInt = Field(100, description="Optimiser steps between checkpoints (one more at each epoch's end).")
    keep_checkpoints: PositiveInt | None = Field(2, description="Checkpoints kept; null keeps all.")
    max_failures: int = Field(3, ge=-1, description="Worker-group restarts before the stage fails; -1 for no limit. Preemptions never count.")
    shuffle_buffer: PositiveInt = Field(2048, description="Rows of the local shuffle buffer, per worker.")
    eval_rows: int = Field(256, ge=0, description="Held-out rows for the evaluation loss at each epoch's end; 0 for none.")
    seed: int = Field(0, description="Seed of weights' initialisation, dropout, order and self-questioning.")

    @property
    def max_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def samples_per_step(self) -> int:
        """Global batch in samples: what one optimiser step sees at any number of workers."""
        return self.micro_batch * self.accumulation * self.max_workers

    @property
    def trains_model(self) -> bool:
        """Whether any part of the model has a learning rate."""
        return any(rate is not None for rate in (self.lr_llm, self.lr_projector, self.lr_vision))

    @field_validator("num_workers")
    @classmethod
    def _ordered(cls, value):
        if isinstance(value, tuple) and value[0] > value[1]:
            raise ValueError(f"[min, max] must be ordered, not {list(value)}")
        return value

    @model_validator(mode="after")
    def _batch_and_parts(self):
        if self.global_batch is not None and self.global_batch != self.samples_per_step:
            raise ValueError(
                f"global_batch {self.global_batch} is impossible: micro_batch {self.micro_batch} x accumulation "
                f"{self.accumulation} x {self.max_workers} workers is {self.samples_per_step}; change one of them"
            )
        if not self._trains():
            raise ValueError("nothing would train: give at least one of lr_llm, lr_projector, lr_vision")
        return self

    def _trains(self) -> bool:
        return self.trains_model


class SftConfig(TrainConfig):
    """SQ-SFT: visual self-questioning instruction tuning."""

    self_questioning: Probability = Field(0.5, description="rho: chance that a user turn after the first becomes the questioner's, re-drawn every epoch (released run 0.5; its code's default 0.3; 0 is plain SFT).")


class DpoConfig(TrainConfig):
    """Direct preference optimisation against the frozen SQ-SFT model."""

    micro_batch: PositiveInt = Field(4, description="Pairs per forward pass of one worker.")
    accumulation: PositiveInt = Field(16, description="Forward passes per optimiser step and worker, at the largest num_workers.")
    epochs: PositiveInt = Field(1, description="Passes over the pairs.")
    lr_llm: NonNegative | None = Field(5e-6, description="Learning rate of the language model's LoRA; null freezes it.")
    lr_projector: NonNegative | None = Field(2e-5, description="Learning rate of the projector; null freezes it.")
    lr_vision: NonNegative | None = Field(2e-5, description="Learning rate of the vision tower's LoRA; null freezes it.")
    lora_vision: LoraConfig | None = Field(default_factory=lambda: LoraConfig(rank=32, alpha=64, dropout=0.1), description="Adapters of the vision tower; null trains it in full.")
    beta: Annotated[float, Field(gt=0)] = Field(0.1, description="beta of the DPO loss.")
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(0.0, description="Label smoothing (paper: none).")
    length_normalised: bool = Field(False, description="Divide log-probabilities by answer length (extension, off in the paper).")
    sft_weight: NonNegative = Field(0.0, description="Weight of an added cross-entropy on the chosen answer (extension, off in the paper).")
    reference_batch: PositiveInt = Field(8, description="Pairs per forward pass of the reference log-probability stage.")
    reference_workers: tuple[PositiveInt, PositiveInt] = Field((1, 1), description="[min, max] actors of the reference stage.")


class ProxyConfig(Section):
    """The proxy instruction P of instruction-free tuning and its running average Pbar (see medray.models.proxy_instruction)."""

    count: PositiveInt = Field(8, description="Learnable vectors that stand in the instruction's place (paper: 8).")
    mode: Literal["released", "textbook", "frozen", "free"] = Field("textbook", description="released: passes use P, which is reset to Pbar after every step (the authors' code); textbook: passes use Pbar, P moves freely (the paper's words); frozen: nothing moves; free: no average (the warm-up).")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.999, description="m of Pbar <- m Pbar + (1 - m) P after every step; of released and textbook.")
    lr: NonNegative = Field(2e-5, description="AdamW learning rate of P; it follows the stage's schedule, and P's gradient is not clipped.")
    weight_decay: NonNegative = Field(0.01, description="AdamW weight decay of P.")


class InstructionFreeTrainConfig(TrainConfig):
    """One stage of instruction-free tuning: image-description pairs, with a proxy in the instruction's place.

    With all learning rates null the proxy alone trains (the warm-up), without DeepSpeed: each worker holds the whole model.
    Where that does not fit on its device, set lr_projector to 0.0: DeepSpeed then shards the model, and nothing in it moves.
    """

    instruction: Annotated[str, Field(min_length=1)] | None = Field(None, description="null: the proxy instruction; else this text stands in the user's turn, and there is no proxy.")
    shuffling: Literal["none", "separator", "sentences"] = Field("separator", description="Parts of a description that are put in a new order every epoch: between separators (attribute lists) or sentences (reports); none: it stays as it is.")
    separator: Annotated[str, Field(min_length=1)] = Field(",", description="What parts a description; of shuffling separator.")
    proxy: ProxyConfig = Field(default_factory=ProxyConfig)
    micro_batch: PositiveInt = Field(2, description="Samples per forward pass of one worker.")
    accumulation: PositiveInt = Field(1, description="Forward passes per optimiser step and worker, at the largest num_workers; fewer workers accumulate more, so the global batch stays.")
    epochs: PositiveInt = Field(5, description="Passes over the data.")
    lr_llm: NonNegative | None = Field(None, description="Learning rate of the language model (its LoRA, or all of it with lora_llm null); null freezes it, as in the paper.")
    lr_vision: NonNegative | None = Field(2e-5, description="Learning rate of the vision tower (all of it, or its LoRA with lora_vision given); null freezes it.")
    lora_vision: LoraConfig | None = Field(None, description="Adapters of the vision tower; null trains it in full.")
    schedule: Literal["cosine", "constant"] = Field("constant", description="Learning rate after the warm-up: cosine falls to zero, constant stays.")
    warmup_ratio: Probability = Field(0.0, description="Share of the samples over which the learning rate rises; 0 for no warm-up.")
    weight_decay: NonNegative = Field(0.01, description="AdamW weight decay.")

    @property
    def trains_proxy(self) -> bool:
        return self.instruction is None and self.proxy.mode != "frozen"

    def _trains(self) -> bool:
        return self.trains_model or self.trains_proxy


class SamplingConfig(Section):
    """How text is sampled. temperature 0 is greedy."""

    temperature: NonNegative = Field(1.2, description="Softmax temperature; 0 is greedy.")
    top_k: int = Field(100, ge=0, description="Keep the k most likely tokens; 0 keeps all.")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(0.95, description="Nucleus mass.")
    max_tokens: PositiveInt = Field(1024, description="Longest output in tokens.")


class EngineConfig(Section):
    """vLLM engines, one per actor."""

    actors: tuple[PositiveInt, PositiveInt] = Field((1, 1), description="[min, max] engine actors; Ray Data grows and shrinks the pool.")
    cpus_per_actor: NonNegative = Field(1.0, description="CPUs each actor reserves.")
    gpus_per_actor: NonNegative = Field(0.0, description="GPUs each actor reserves (tensor_parallel_size on a GPU cluster).")
    tensor_parallel_size: PositiveInt = Field(1, description="GPUs one engine spans.")
    max_model_len: PositiveInt | None = Field(None, description="Context in tokens (default: the model's own).")
    memory_utilization: Annotated[float, Field(gt=0, le=1)] = Field(0.9, description="Share of device memory vLLM may take (on CPU: of the machine's memory).")
    kv_cache_gib: PositiveInt = Field(1, description="KV cache on CPU (GiB); GPUs size it from memory_utilization.")
    enforce_eager: bool = Field(False, description="Skip graph capture and compilation (true for tiny models and quick starts).")
    max_num_seqs: PositiveInt = Field(256, description="Sequences an engine decodes at once.")
    rows_per_task: PositiveInt = Field(128, description="Rows handed to an actor at once: the unit of retry after a lost actor.")
    rows_in_flight: PositiveInt = Field(128, description="Rows an actor works on at once.")


class SelfPlayConfig(Section):
    """Self-questions and answers: describe greedily, ask n questions, answer each m times."""

    describe_prompt: str = Field("Describe this medical image in detail.", description="User turn that asks for the description.")
    describe: SamplingConfig = Field(default_factory=lambda: SamplingConfig(temperature=0, top_k=0, top_p=1.0, max_tokens=1024), description="Sampling of the description (paper: greedy, 1024 tokens).")
    questions: PositiveInt = Field(5, description="Questions asked per image.")
    ask: SamplingConfig = Field(default_factory=lambda: SamplingConfig(temperature=1.2, top_k=300, top_p=0.95, max_tokens=300), description="Sampling of the questions.")
    answers: int = Field(2, ge=2, description="Answers sampled per question, each with its own recorded seed; all are kept.")
    answer: SamplingConfig = Field(default_factory=lambda: SamplingConfig(temperature=1.2, top_k=100, top_p=0.95, max_tokens=1024), description="Sampling of the answers.")
    seed: int = Field(0, description="Base seed; each request's seed is derived from it, the sample_id, the round and the request's place.")


class EndpointConfig(Section):
    """An OpenAI-compatible endpoint."""

    model: str = Field("gpt-4o", description="Model name at the endpoint.")
    base_url: str = Field("https://api.openai.com/v1", description="Address of the endpoint. Its key comes from the environment variable named by key_env.")
    key_env: str = Field("OPENAI_API_KEY", description="Environment variable that holds the key.")
    temperature: NonNegative = Field(0.0, description="Sampling temperature.")
    max_tokens: PositiveInt = Field(512, description="Longest reply in tokens.")
    concurrency: PositiveInt = Field(16, description="Requests in flight, per actor.")
    retries: int = Field(4, ge=0, description="Retries of a failed request, with exponential backoff; then the row is quarantined.")
    timeout: Annotated[float, Field(gt=0)] = Field(120.0, description="Seconds one request may take.")
    usd_per_million_input: NonNegative = Field(2.5, description="Price of input tokens for the cost ledger (USD per million).")
    usd_per_million_output: NonNegative = Field(10.0, description="Price of output tokens for the cost ledger (USD per million).")


class JudgeConfig(EndpointConfig):
    """Who says which answer is better."""

    kind: Literal["vllm", "api", "random"] = Field("api", description="api: any OpenAI-compatible endpoint; vllm: a local, stronger VLM; random: coin flips, an ablation.")
    scoring: Literal["scores", "likelihood"] = Field("scores", description="scores: the judge writes two numbers on its first line; likelihood (vllm only): mean log-likelihood the judge gives each answer, for judges too small to write scores.")
    model: str = Field("gpt-4o", description="Model name at the endpoint, or path of the local judge (testbed:expert is bundled).")
    temperature: NonNegative = Field(0.2, description="Sampling temperature of written scores.")
    both_orders: bool = Field(True, description="Ask with the answers in both orders and drop pairs on which the verdicts differ.")
    min_margin: NonNegative = Field(0.0, description="Pairs whose scores differ by no more than this are ties and dropped.")
    min_chosen_score: float | None = Field(None, description="Pairs whose better answer scores less are dropped: of two wrong answers neither should be learned. In points from 1 to 10, or in nats per token for likelihood (paper: no such limit).")
    seed: int = Field(0, description="Seed of the random judge and of sampled verdicts.")

    @model_validator(mode="after")
    def _kinds(self):
        if self.scoring == "likelihood" and self.kind != "vllm":
            raise ValueError("scoring likelihood needs kind vllm: an endpoint does not return the likelihood of a given answer")
        return self


class EvaluateConfig(Section):
    """Held-out questions, greedy answers, metrics with bootstrap intervals over images."""

    kinds: tuple[Literal["open", "closed", "mcq"], ...] = Field(("open", "closed", "mcq"), description="Kinds of question made from attributes.")
    max_images: PositiveInt | None = Field(None, description="At most this many held-out images.")
    max_tokens: PositiveInt = Field(128, description="Longest answer in tokens.")
    bootstrap: PositiveInt = Field(1000, description="Bootstrap resamples (of images).")
    arms: tuple[Literal["base", "sft", "dpo"], ...] = Field(("base", "sft", "dpo"), description="Models to evaluate: the base, the SQ-SFT model, each round's DPO model.")
    seed: int = Field(0, description="Seed of question making and of the bootstrap.")


class VerifyConfig(Section):
    """After an export: vLLM's greedy tokens against transformers' on a sample."""

    rows: Annotated[int, Field(ge=0)] = Field(8, description="Rows compared; 0 leaves the comparison out, for studies of many runs of one recipe.")
    max_tokens: PositiveInt = Field(24, description="Tokens compared per row.")
    logprob_tolerance: NonNegative = Field(0.05, description="A differing token is allowed only where transformers' own two best tokens lie this close (nats), as rounding may decide between them.")


class ClusterConfig(Section):
    """How the job uses Ray."""

    address: str | None = Field(None, description="Ray address (default: RAY_ADDRESS, else a local Ray is started).")
    num_cpus: PositiveInt | None = Field(None, description="CPUs of a local Ray (default: all).")
    object_store_gib: Annotated[float, Field(gt=0)] | None = Field(None, description="Object store of a local Ray (GiB).")


class SelfTrainingConfig(Section):
    """`jobs/self_train.py`: STLLaVA-Med, whole."""

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
    rounds: int = Field(1, ge=0, description="Self-training rounds (paper: 1); 0 stops after SQ-SFT, round r+1 questions images with the model of round r.")
    seed: int | None = Field(None, description="One seed for every stage; sets sft.seed, dpo.seed, self_play.seed, judge.seed (not the evaluation's).")

    @model_validator(mode="after")
    def _spread_seed(self):
        if self.seed is not None:
            for section in (self.sft, self.dpo, self.self_play, self.judge):
                if section.seed != self.seed:
                    section.seed = self.seed
        return self


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
    option_likelihood: bool = Field(True, description="Also score options by the log-likelihood of their text (local models).")
    judge: JudgeConfig | None = Field(None, description="Who rates answers to open questions: win rate against the first model, and, by a judge that writes scores, 100 x model / reference (LLaVA-Med's chat score). null: nobody.")
    text_only: bool = Field(False, description="Also answer every question with a blank image: the floor that text alone reaches.")


class PrepareDataConfig(Section):
    """`jobs/prepare_data.py`: a source to canonical shards. Of `data` only what is read and its limits count here."""

    data: DataConfig = Field(default_factory=DataConfig)
    leaks: LeaksConfig = Field(default_factory=LeaksConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)


class PlainModelConfig(ModelConfig):
    """The vision-language model to tune, without a system prompt."""

    path: str = Field("testbed:generalist", description="Folder in Hugging Face format, hub id, or testbed:base / testbed:expert / testbed:generalist (bundled tiny models).")
    system_prompt: str = Field("", description="System prompt of every conversation; empty for none, as in the paper.")


class DescriptionDataConfig(DataConfig):
    """Images with descriptions: attribute tables (wbcatt, skincon, cbis-ddsm), captions or reports."""

    label_fraction: Probability = Field(1.0, description="Share of the training images that are tuned on (paper: all).")


class WarmUpConfig(InstructionFreeTrainConfig):
    """Stage 1: the proxy alone trains, the model does not move; not where tune.instruction is a text.

    What it shares with stage 2 (shuffling, separator, proxy.count) is taken from there.
    """

    epochs: PositiveInt = Field(1, description="Passes over the data (paper: 1).")
    lr_projector: NonNegative | None = Field(None, description="null: frozen; see InstructionFreeTrainConfig for 0.0.")
    lr_vision: NonNegative | None = Field(None, description="null: frozen.")
    proxy: ProxyConfig = Field(default_factory=lambda: ProxyConfig(mode="free"), description="mode free where none is given.")

    @model_validator(mode="after")
    def _free(self):
        if "mode" not in self.proxy.model_fields_set:
            self.proxy.mode = "free"
        return self


class DescriptionEvaluateConfig(EvaluateConfig):
    """Held-out questions and descriptions, and general questions that show what the model has kept."""

    describe_prompt: str = Field("Describe this medical scan.", description="What asks for the description of a held-out image.")
    general: str | None = Field("testbed:scenes", description="Questions the base model can answer: testbed:scenes (the bundled models'), or a source of questions such as a directory of jobs/prepare_data.py; null for none.")
    general_split: str = Field("test", description="Split of evaluate.general that is asked.")
    max_general: PositiveInt | None = Field(100, description="At most this many images of evaluate.general.")


class InstructionFreeConfig(Section):
    """`jobs/instruction_free.py`: instruction-free tuning (arXiv 2603.19482), whole."""

    model: PlainModelConfig = Field(default_factory=PlainModelConfig)
    data: DescriptionDataConfig = Field(default_factory=DescriptionDataConfig)
    warm_up: WarmUpConfig = Field(default_factory=WarmUpConfig)
    tune: InstructionFreeTrainConfig = Field(default_factory=InstructionFreeTrainConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    verify: VerifyConfig = Field(default_factory=VerifyConfig)
    evaluate: DescriptionEvaluateConfig = Field(default_factory=DescriptionEvaluateConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    seed: int | None = Field(None, description="One seed for both stages; sets warm_up.seed and tune.seed (not the evaluation's).")

    @model_validator(mode="after")
    def _spread(self):
        """The stages' common seed and form; a form that warm_up itself gives otherwise is an error."""
        for name in ("shuffling", "separator"):
            _adopt(self.warm_up, self.tune, name, "warm_up")
        _adopt(self.warm_up.proxy, self.tune.proxy, "count", "warm_up.proxy")
        if self.seed is not None:
            for section in (self.warm_up, self.tune):
                if section.seed != self.seed:
                    section.seed = self.seed
        return self


def _adopt(section: Section, leader: Section, name: str, where: str) -> None:
    """Set a field to the leader's value. Raises ValueError where it was given another one."""
    own, wanted = getattr(section, name), getattr(leader, name)
    if own == wanted:
        return
    if name in section.model_fields_set:
        raise ValueError(f"{where}.{name} {own!r} differs from tune's {wanted!r}; leave it out, it is taken from tune")
    setattr(section, name, wanted)


ConfigT = TypeVar("ConfigT", bound=Section)


def load_config(cls: type[ConfigT], path: str | os.PathLike | None = None, overrides: list[str] | tuple[str, ...] = ()) -> ConfigT:
    """Read a YAML file, apply `a.b=value` overrides (values are YAML) and validate.

    Raises ConfigError naming the field, what is wrong and where the value came from.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values = _read_yaml(Path(path))
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {override!r}: write it as section.field=value, for example dpo.beta=0.2")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {override!r}: the value is not YAML ({error})") from error
        _assign(cls, values, key.split("."), _numeric(value), override)
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        where = f" (in {path})" if path is not None else ""
        raise ConfigError("\n".join(_explain(cls, item) for item in error.errors()) + where) from None


def fields_of(cls: type[Section]) -> dict[str, type[Section] | None]:
    """Field names of a section, each with its own section class or None for a plain value."""
    return {name: _section(info.annotation) for name, info in cls.model_fields.items()}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist; see configs/ for recipes") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} is not YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"config file {path} must hold sections such as 'model:', not a {type(values).__name__}")
    return _numeric(values)


def _numeric(value: Any) -> Any:
    """YAML 1.1 reads 2e-4 (no dot) as text; every number here may be written so."""
    if isinstance(value, dict):
        return {key: _numeric(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numeric(item) for item in value]
    if isinstance(value, str):
        mantissa, e, exponent = value.lower().partition("e")
        if e and mantissa.replace(".", "", 1).isdigit() and exponent.lstrip("+-").isdigit():
            return float(value)
    return value


def _assign(cls: type[Section], values: dict, keys: list[str], value: Any, override: str) -> None:
    section: type[Section] | None = cls
    for depth, key in enumerate(keys):
        if section is None or key not in section.model_fields:
            at = ".".join(keys[:depth]) or "the top level"
            raise ConfigError(f"--set {override!r}: {_unknown(section, key)} at {at}")
        if depth == len(keys) - 1:
            values[key] = value
            return
        section = fields_of(section)[key]
        if not isinstance(values.get(key), dict):
            values[key] = {}
        values = values[key]


def _section(annotation: Any) -> type[Section] | None:
    options = typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else (annotation,)
    return next((o for o in options if isinstance(o, type) and issubclass(o, Section)), None)


def _unknown(section: type[Section] | None, key: str) -> str:
    import difflib

    names = list(section.model_fields) if section else []
    near = difflib.get_close_matches(key, names, n=1)
    return f"unknown field {key!r}" + (f", did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}")


def _explain(cls: type[Section], item: Any) -> str:
    # Tuple unions put type tags into `loc`; only names and indices help a reader.
    location = [part for part in item["loc"] if isinstance(part, int) or str(part).replace("_", "").isalnum()]
    section: type[Section] | None = cls
    for part in location[:-1]:
        section = fields_of(section).get(part) if section else None
    field = ".".join(str(part) for part in location) or "config"
    if item["type"] == "extra_forbidden":
        return f"{field}: {_unknown(section, str(location[-1]))}"
    message = item["msg"].removeprefix("Value error, ")
    given = item.get("input")
    return f"{field}: {message}" + ("" if isinstance(given, (dict, BaseModel)) else f" (given: {given!r})")
