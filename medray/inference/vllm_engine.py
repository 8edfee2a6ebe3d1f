"""One vLLM engine for everything medray generates: descriptions, questions, answers, verdicts, benchmark
answers.

`VLMEngine` owns one AsyncLLM (V1). Requests are small coroutines, so continuous batching mixes whatever rows
are in flight. Sampling is seeded per request: with fp32 weights on one kind of machine a repeated request
gives the same tokens; in bf16 on GPUs rounding may depend on what shares the batch.

Nothing here can fetch media: a request carries a decoded PIL image or none.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from medray.config import EngineConfig, ModelConfig, SamplingConfig
from medray.data.chat_spans import special_tokens
from medray.errors import MedrayError, StageError
from medray.inference.chat import Chat, Turn
from medray.inference.orphan_guard import OWNER_ENV

_GIB = 2**30
_CPU_BATCH_TOKENS = 4096


class EngineLost(MedrayError):
    """The engine's process died. The rows in flight must be redone by a new engine."""


@dataclass(frozen=True)
class Output:
    """One sampled text.

    Attributes:
        text: decoded without special tokens.
        token_ids: as sampled, with the end token where one was reached.
        finish_reason: "stop" or "length".
        seed: the seed of this very sample, or None.
        logprobs: log-probability of each token (nats), if asked for.
        prompt_tokens: length of the prompt as the engine saw it, image tokens included.
        special: a special token other than the final end token was sampled.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    seed: int | None
    logprobs: list[float] | None
    special: bool
    prompt_tokens: int


class Likelihood(NamedTuple):
    """How likely a model finds an answer: nats summed over the answer's tokens (end of turn included),
    their number, and the tokens of prompt and answer together as the engine saw them (image tokens
    included).
    """

    nats: float
    tokens: int
    prompt_tokens: int


class VLMEngine:
    """A vLLM engine with the model's chat template.

    Args:
        model_dir: local folder in Hugging Face format, or a hub id.
        model_config: precision, template and length; its `path` is not read.
        engine_config: memory, parallelism and batch limits.
        max_lora_rank: allows `lora_path` in requests, for adapters of the language model up to this rank;
            merged weights (0) are the normal path.

    Raises StageError where the engine does not start. Must be used from one event loop; `close` ends its
    processes.
    """

    def __init__(
        self, model_dir: str, model_config: ModelConfig, engine_config: EngineConfig, max_lora_rank: int = 0
    ):
        started = time.monotonic()
        self.chat = Chat(model_dir, model_config)
        self._engine = _start(model_dir, model_config, engine_config, max_lora_rank)
        self._ids = itertools.count()
        self._loras: dict[str, int] = {}
        self._special = frozenset(special_tokens(self.chat.tokenizer).values())
        self.start_seconds = time.monotonic() - started

    async def generate(
        self,
        prompt: Sequence[int] | str,
        image: Any,
        sampling: SamplingConfig,
        seed: int | None = None,
        n: int = 1,
        *,
        image_id: str | None = None,
        logprobs: bool = False,
        lora_path: str | None = None,
        pattern: str | None = None,
    ) -> list[Output]:
        """Sample `n` texts.

        Args:
            prompt: token ids with one image token per image (not expanded), or rendered text.
            image: decoded PIL image (already padded if the model wants it), or None.
            sampling: temperature 0 is greedy; then the seed has no effect.
            seed: sample i uses seed + i.
            image_id: stands for the image in vLLM's caches; must differ for images that differ. Default: vLLM
                hashes it.
            pattern: regular expression the text must match (structured output).

        Raises EngineLost when the engine died; ValueError for a prompt that does not fit.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        params = SamplingParams(
            n=n,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=seed,
            logprobs=0 if logprobs else None,
            output_kind=RequestOutputKind.FINAL_ONLY,
            structured_outputs=StructuredOutputsParams(regex=pattern) if pattern else None,
        )
        result = await self._run(self._request(prompt, image, image_id), params, self._lora(lora_path))
        return [
            self._output(one, None if seed is None else seed + one.index, len(result.prompt_token_ids))
            for one in result.outputs
        ]

    async def loglikelihood(
        self,
        turns: list[Turn],
        image: Any,
        answer: str,
        *,
        image_id: str | None = None,
    ) -> Likelihood:
        """How likely the model itself would answer so.

        Raises EngineLost, or ValueError for an answer that does not fit into the context.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        prompt_ids, answer_ids = self.chat.answer_ids(turns, answer)
        params = SamplingParams(
            temperature=0,
            max_tokens=1,
            prompt_logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        # The engine needs room for one sampled token after the answer, which is thrown away.
        result = await self._run(self._request([*prompt_ids, *answer_ids], image, image_id), params, None)
        scored = result.prompt_logprobs[-len(answer_ids) :]
        total = sum(position[token].logprob for position, token in zip(scored, answer_ids, strict=True))
        return Likelihood(total, len(answer_ids), len(result.prompt_token_ids))

    async def prompt_ids(self, prompt: Sequence[int] | str, image: Any) -> list[int]:
        """The prompt's ids as the engine sees them, image tokens expanded."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        result = await self._run(
            self._request(prompt, image, None),
            SamplingParams(temperature=0, max_tokens=1, output_kind=RequestOutputKind.FINAL_ONLY),
            None,
        )
        return list(result.prompt_token_ids)

    def close(self) -> None:
        self._engine.shutdown(timeout=1)
        del self._engine  # vLLM's own finaliser fails noisily when it runs at interpreter exit

    def _request(self, prompt: Sequence[int] | str, image: Any, image_id: str | None) -> dict[str, Any]:
        ids = self.chat.tokenize(prompt) if isinstance(prompt, str) else list(prompt)
        request: dict[str, Any] = {"prompt_token_ids": ids}
        if image is not None:
            request["multi_modal_data"] = {"image": image}
            if image_id is not None:
                request["multi_modal_uuids"] = {"image": image_id}
        return request

    async def _run(self, request: dict[str, Any], params: Any, lora: Any) -> Any:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            # FINAL_ONLY: one result, when the whole request is done.
            results = [
                result
                async for result in self._engine.generate(
                    request, params, f"r{next(self._ids)}", lora_request=lora
                )
            ]
        except EngineDeadError as error:
            raise EngineLost("the vLLM engine process died; its log is above") from error
        return results[-1]

    def _lora(self, path: str | None) -> Any:
        if path is None:
            return None
        from vllm.lora.request import LoRARequest

        number = self._loras.setdefault(path, len(self._loras) + 1)
        return LoRARequest(path, number, path)

    def _output(self, one: Any, seed: int | None, prompt_tokens: int) -> Output:
        ids = list(one.token_ids)
        body = ids[:-1] if one.finish_reason == "stop" and ids else ids
        logprobs = None
        if one.logprobs is not None:
            logprobs = [position[token].logprob for position, token in zip(one.logprobs, ids, strict=True)]
        return Output(
            one.text,
            ids,
            one.finish_reason,
            seed,
            logprobs,
            any(token in self._special for token in body),
            prompt_tokens,
        )


def _start(model_dir: str, model: ModelConfig, config: EngineConfig, max_lora_rank: int) -> Any:
    """An AsyncLLM with medray's settings; its processes end with this one."""
    os.environ[OWNER_ENV] = str(os.getpid())
    for name, value in vllm_environment(config).items():
        os.environ.setdefault(name, value)

    from vllm import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = AsyncEngineArgs(
        model_dir,
        **vllm_arguments(model_dir, model.precision, model.trust_remote_code, config),
        # Inside a Ray actor vLLM would pick Ray itself; the actor already holds the GPUs.
        distributed_executor_backend="mp" if config.tensor_parallel_size > 1 else "uni",
        enable_lora=max_lora_rank > 0,
        max_lora_rank=max(8, max_lora_rank),
        disable_log_stats=True,
    )
    try:
        # The batch limits of the offline class: here, too, throughput counts and nobody waits for a first
        # token.
        return AsyncLLM.from_engine_args(arguments, usage_context=UsageContext.LLM_CLASS)
    except (RuntimeError, ValueError, OSError) as error:
        raise StageError(
            f"the vLLM engine for {model_dir} did not start: {error}. Its own log says more; on GPUs lower "
            "engine.memory_utilization or engine.max_model_len, on CPU engine.kv_cache_gib"
        ) from error


def vllm_environment(config: EngineConfig) -> dict[str, str]:
    """Environment variables of a process that starts an engine, to be set before vLLM is imported."""
    on_cpu = config.gpus_per_actor == 0
    variables = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "ERROR" if on_cpu else "WARNING",  # on CPU it warns thirty times per start
        "TOKENIZERS_PARALLELISM": "false",
    }
    if on_cpu:
        variables["OMP_NUM_THREADS"] = str(max(1, int(config.cpus_per_actor)))
        # vLLM's CPU build puts its worker into a third process to bind threads; without it the engine starts
        # in two thirds of the time, and OMP_NUM_THREADS above already keeps it to its share of the cores.
        variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        if config.enforce_eager:
            # vLLM compiles some small functions (of prompt log-probabilities) even then, which asks for a C++
            # compiler.
            variables["TORCHDYNAMO_DISABLE"] = "1"
    return variables


def vllm_arguments(
    model_dir: str, precision: str, trust_remote_code: bool, config: EngineConfig, images: int = 1
) -> dict[str, Any]:
    """Engine arguments that every engine of ours has, in jobs and behind the endpoint.

    Args:
        images: in one request, at most.
    """
    on_cpu = config.gpus_per_actor == 0
    limits: dict[str, Any] = {}
    if on_cpu:
        # Where a prompt is prefilled in parts, vLLM 0.29 rewinds the request's seeded generator, which CPU
        # generators cannot ("CPU Generator does not use offset"), and the engine dies: prefill whole prompts.
        longest = config.max_model_len or _own_length(model_dir, trust_remote_code)
        limits = {
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(_CPU_BATCH_TOKENS, longest),
            "kv_cache_memory_bytes": config.kv_cache_gib * _GIB,
        }
    return {
        "dtype": "float32" if precision == "fp32" else "bfloat16",
        "trust_remote_code": trust_remote_code,
        "load_format": "safetensors",  # "auto" falls back on pickles
        "max_model_len": config.max_model_len,
        "gpu_memory_utilization": config.memory_utilization,
        "enforce_eager": config.enforce_eager,
        "max_num_seqs": config.max_num_seqs,
        "tensor_parallel_size": config.tensor_parallel_size,
        "limit_mm_per_prompt": {"image": images, "video": 0},
        "enable_prefix_caching": True,
        "worker_extension_cls": "medray.inference.orphan_guard.EngineGuard",
        "use_tqdm_on_load": False,
        "skip_mm_profiling": on_cpu,
        **limits,
    }


def _own_length(model_dir: str, trust_remote_code: bool) -> int:
    from transformers import AutoConfig

    return (
        AutoConfig.from_pretrained(model_dir, trust_remote_code=trust_remote_code)
        .get_text_config()
        .max_position_embeddings
    )


def image_key(data: bytes, padded: bool) -> str:
    """Cache key of an image for vLLM: its bytes, and whether it is padded to a square."""
    return f"{hashlib.sha256(data).hexdigest()[:32]}{'p' if padded else ''}"
