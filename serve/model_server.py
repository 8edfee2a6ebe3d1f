"""A replica: one vLLM engine with one model, as ray.serve.llm runs it, with medray's settings."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer
from ray.serve.llm.openai_api_models import ErrorResponse

from medray.config.serving import ReplicaConfig
from medray.inference.chat import special_texts, spells_special
from medray.inference.engine import vllm_arguments, vllm_environment
from medray.inference.engine_guard import OWNER_ENV
from medray.models.cache import localize
from medray.models.vlm import load_processor
from serve.hosted import Hosted


def settings(model: Hosted, config: ReplicaConfig, local: str | None = None) -> LLMConfig:
    """What ray.serve.llm is told.

    Args:
        local: folder of the model on this node, or a hub id; None where only placement is asked for, and the model may be elsewhere.
    """
    engine, place, (low, high) = model.engine, config.place, config.replicas
    _, cpus, gpus = config.bundle(engine)
    bundle: dict[str, float] = {"CPU": cpus, **({"GPU": gpus} if gpus else {}), **({"memory": int(place.memory_gib * 2**30)} if place.memory_gib else {}), **place.resources}
    deployment: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": 0},  # the engine's bundle counts its CPUs
        "max_ongoing_requests": max(2 * int(config.target_ongoing_requests), engine.max_num_seqs), "max_queued_requests": config.queued,
        "graceful_shutdown_timeout_s": config.drain_seconds, "graceful_shutdown_wait_loop_s": 1.0,
        "autoscaling_config": {
            "min_replicas": low, "max_replicas": high, "initial_replicas": low, "target_ongoing_requests": config.target_ongoing_requests,
            "upscale_delay_s": config.upscale_delay_s, "downscale_delay_s": config.downscale_delay_s,
        },
    }
    arguments: dict[str, Any] = {"tensor_parallel_size": engine.tensor_parallel_size}
    if local is not None:
        arguments = {
            **vllm_arguments(local, model.precision, model.trust_remote_code, engine, config.limits.images),
            "override_generation_config": {"max_new_tokens": config.limits.tokens},
            # A schema allows blanks between its parts without end, and a small model can lose itself in them.
            "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        }
    return LLMConfig(
        model_loading_config={"model_id": model.name, "model_source": local or model.path}, engine_kwargs=arguments,
        placement_group_config={"bundle_per_worker": bundle}, deployment_config=deployment, runtime_env={"env_vars": vllm_environment(engine)},
        callback_config={"callback_class": ModelIsHere}, experimental_configs={"stream_batching_interval_ms": config.stream_milliseconds},
    )


class ModelIsHere(CallbackBase):
    """Leaves out ray.serve.llm's own download, for which it starts a task that imports vLLM: the replica has fetched its model."""

    async def on_before_node_init(self) -> None:
        self.ctx.run_init_node = False


class CPUEngine(VLLMEngine):
    """ray.serve.llm starts a process for each worker of an engine on CPU; one worker can live in the engine's own, as in vLLM's server."""

    def _prepare_engine_config(self, callback_ctx: Any) -> Any:
        arguments, frontend, config = super()._prepare_engine_config(callback_ctx)
        if config.parallel_config.world_size == 1:
            config.parallel_config.distributed_executor_backend = "uni"
        return arguments, frontend, config


class ModelServer(LLMServer):
    """Args of the deployment: the configuration of ray.serve.llm (for placement), and what to make it of on the node itself."""

    async def __init__(self, llm_config: LLMConfig, *, model: dict[str, Any], config: dict[str, Any]):
        hosted = Hosted.model_validate(model)
        local = await asyncio.to_thread(localize, hosted.path)
        os.environ[OWNER_ENV] = str(os.getpid())
        await super().__init__(settings(hosted, ReplicaConfig.model_validate(config), local), engine_cls=None if hosted.engine.gpus_per_actor else CPUEngine)
        self._specials = special_texts(await asyncio.to_thread(load_processor, local, hosted.trust_remote_code))

    async def chat(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[Any]:
        """As LLMServer's; texts that spell a special token are refused, since the template would make the token of them."""
        for message in request.messages:
            content = message["content"]
            texts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
            if any(spells_special(text, self._specials) for text in texts):
                return _refusal("messages: a text spells a special token of the model; leave it out")
        return await super().chat(request, raw_request_info)


async def _refusal(message: str) -> AsyncIterator[ErrorResponse]:
    yield ErrorResponse.model_validate({"error": {"message": message, "type": "invalid_request_error", "code": 400}})
