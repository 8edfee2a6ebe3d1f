"""A replica: one vLLM engine with one model, as ray.serve.llm runs it, with medray's settings."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer
from ray.serve.llm.openai_api_models import ErrorResponse
from vllm.exceptions import GenerationError
from vllm.v1.engine.exceptions import EngineDeadError

from medray.config.serving import ReplicaConfig
from medray.inference.chat import special_texts, spells_special
from medray.inference.orphan_guard import OWNER_ENV
from medray.inference.vllm_engine import vllm_arguments, vllm_environment
from medray.models.cache import localize
from medray.models.vlm import load_processor
from medray.serving.chat.engine_answers import api_error, checked
from medray.serving.chat.grammars import Grammars, has_grammar, schema_of
from medray.serving.chat.request import ANSWER_TOKENS, SCHEMA, ApiError
from medray.serving.chat.served_models import Hosted

ENGINE_DIED = "the vLLM engine died"
_WATCHED_EVERY = 0.05  # seconds

log = logging.getLogger("ray.serve")


def settings(model: Hosted, config: ReplicaConfig, local: str | None = None) -> LLMConfig:
    """Settings of ray.serve.llm.

    Args:
        local: folder of the model on this node, or a hub id; None where only placement is asked for, and the
            model may be elsewhere.
    """
    engine, place, (low, high) = model.engine, config.place, config.replicas
    _, cpus, gpus = config.bundle(engine)
    bundle: dict[str, float] = {
        "CPU": cpus,
        **({"GPU": gpus} if gpus else {}),
        **({"memory": int(place.memory_gib * 2**30)} if place.memory_gib else {}),
        **place.resources,
    }
    deployment: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": 0},  # the engine's bundle counts its CPUs
        "max_ongoing_requests": max(2 * int(config.target_ongoing_requests), engine.max_num_seqs),
        "max_queued_requests": config.queued,
        "graceful_shutdown_timeout_s": config.drain_seconds,
        "graceful_shutdown_wait_loop_s": 1.0,
        "autoscaling_config": {
            "min_replicas": low,
            "max_replicas": high,
            "initial_replicas": low,
            "target_ongoing_requests": config.target_ongoing_requests,
            "upscale_delay_s": config.upscale_delay_s,
            "downscale_delay_s": config.downscale_delay_s,
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
        model_loading_config={"model_id": model.name, "model_source": local or model.path},
        engine_kwargs=arguments,
        placement_group_config={"bundle_per_worker": bundle},
        deployment_config=deployment,
        runtime_env={"env_vars": vllm_environment(engine)},
        callback_config={"callback_class": ModelIsHere},
        experimental_configs={"stream_batching_interval_ms": config.stream_milliseconds},
    )


class ModelIsHere(CallbackBase):
    """Leaves out ray.serve.llm's own download, for which it starts a task that imports vLLM: the replica
    has fetched its model.
    """

    async def on_before_node_init(self) -> None:
        self.ctx.run_init_node = False


class CPUEngine(VLLMEngine):
    """ray.serve.llm starts a process for each worker of an engine on CPU; one worker can live in the
    engine's own, as in vLLM's server.
    """

    def _prepare_engine_config(self, callback_ctx: Any) -> Any:
        arguments, frontend, config = super()._prepare_engine_config(callback_ctx)
        if config.parallel_config.world_size == 1:
            config.parallel_config.distributed_executor_backend = "uni"
        return arguments, frontend, config


class ModelServer(LLMServer):
    """A replica. Args of the deployment: the configuration of ray.serve.llm (for placement), and what to make
    of it on the node itself.

    A replica whose engine died ends its process at once: Ray Serve then asks the others and starts a new one.
    """

    async def __init__(self, llm_config: LLMConfig, *, model: dict[str, Any], config: dict[str, Any]):
        hosted = Hosted.model_validate(model)
        local = await asyncio.to_thread(localize, hosted.path)
        os.environ[OWNER_ENV] = str(os.getpid())
        await super().__init__(
            settings(hosted, ReplicaConfig.model_validate(config), local),
            engine_cls=None if hosted.engine.gpus_per_actor else CPUEngine,
        )
        client = self.engine._engine_client
        threading.Thread(target=_end_with, args=(client,), name="engine-watch", daemon=True).start()
        processor = await asyncio.to_thread(load_processor, local, hosted.trust_remote_code)
        self._specials = special_texts(processor)
        self._grammars = Grammars(processor.tokenizer, client.model_config.get_vocab_size())

    async def chat(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[Any]:
        """As LLMServer's. Refused are texts that spell a special token, of which the template would make
        the token, and schemas that no answer can follow.
        """
        for message in request.messages:
            content = message["content"]
            texts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
            if any(spells_special(text, self._specials) for text in texts):
                return _one(
                    _refusal(
                        ApiError(
                            "messages: a text spells a special token of the model; leave it out",
                            param="messages",
                        )
                    )
                )
        schema = schema_of(request)
        if schema is not None and (problem := await self._grammars.problem(schema)):
            return _one(_refusal(ApiError(f"{SCHEMA}: {problem}", param=SCHEMA)))
        return _answered(await super().chat(request, raw_request_info), request, self.engine._engine_client)


async def _answered(items: AsyncIterator[Any], request: Any, client: Any) -> AsyncIterator[Any]:
    def to_api_error(error: ApiError) -> ApiError:
        if error.status < 500:
            # vLLM names the prompt where prompt and answer together pass the context; then the greater part
            # is at fault.
            if (
                error.param == "messages"
                and (request.max_completion_tokens or 0) > client.model_config.max_model_len // 2
            ):
                error.param = ANSWER_TOKENS
            return error
        if client.errored:
            _end(ENGINE_DIED)  # vLLM writes this, too, into a stream
        # The engine gave this one request up. By far most often no token fitted its grammar any more.
        return _unfollowed(request) if has_grammar(request) else error

    try:
        async for item in checked(items, lambda error: _refusal(to_api_error(error))):
            yield item
    except ApiError as error:
        raise to_api_error(error) from None
    except GenerationError:
        yield _refusal(to_api_error(api_error(500, "", None)))
    except EngineDeadError:
        _end(ENGINE_DIED)


def _unfollowed(request: Any) -> ApiError:
    param = "response_format" if request.response_format is not None else "structured_outputs"
    return ApiError(
        f"{param}: the engine found no text that goes on in this form; use a simpler one", param=param
    )


async def _one(item: Any) -> AsyncIterator[Any]:
    yield item


def _refusal(error: ApiError) -> ErrorResponse:
    # Of an error ray.serve.llm's ingress (2.60) hands on message, code and type only: the type carries the
    # field too.
    return ErrorResponse.model_validate(
        {
            "error": {
                "message": error.message,
                "type": f"{error.kind}/{error.param or ''}",
                "code": error.status,
            }
        }
    )


def _end_with(client: Any) -> None:
    """End this process when its engine is dead. Ray Serve's own health check would notice after many
    seconds, and hand out requests meanwhile.
    """
    while not client.errored:
        time.sleep(_WATCHED_EVERY)
    _end(ENGINE_DIED)


def _end(reason: str) -> None:
    log.error("%s; this replica ends, and Ray Serve starts a new one", reason)
    logging.shutdown()
    os._exit(1)
