"""A run's tuned model, and its base, behind an OpenAI-compatible endpoint on Ray Serve.

    python -m serve.tokens keys.txt me                         # prints a key, keeps its hash
    serve run serve.app:build run=runs/demo keys=keys.txt
    curl localhost:8000/v1/models -H "Authorization: Bearer KEY"

docs/serving.md says what is served, what is refused and how to roll out another run; serve/config.yaml is for
`serve deploy`.
"""

# Ray Serve reads the annotation of `build` as a class: no `from __future__ import annotations` here.
import asyncio
import logging
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic import ValidationError
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.llm._internal.serve.core.configs.openai_api_models import OpenAIHTTPException
from ray.serve import Application
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.llm import build_llm_deployment
from ray.serve.llm.ingress import OpenAiIngress
from ray.serve.llm.openai_api_models import ChatCompletionRequest
from ray.util.metrics import Counter, Histogram
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from medray.config.serving import ServeConfig
from medray.plan.demand import served_demands
from medray.serving.chat.asgi_app import Endpoint, make_app
from medray.serving.chat.model_server import ModelServer, settings
from medray.serving.chat.request import ApiError
from medray.serving.chat.served_models import Hosted
from medray.serving.placement import check_fits, check_port, plain_errors

log = logging.getLogger("ray.serve")


@serve.deployment(name="ingress", max_ongoing_requests=512)
@serve.ingress()
class Ingress(OpenAiIngress):
    """Takes requests, checks them, decodes their images and passes them on to the replicas of their model.

    Args:
        handles: of the models' deployments, by name.
        config: ServeConfig as a dict.
        models: Hosted as dicts.
        holders: hash of a key -> (name, lead); None asks for no key.
        examples: see medray.serving.chat.asgi_app.
    """

    def __init__(
        self,
        handles: dict[str, Any],
        config: dict[str, Any],
        models: list[dict[str, Any]],
        holders: dict[str, tuple[str, bool]] | None,
        examples: list[dict[str, str]],
    ):
        from medray.serving.tokens import Holder, Tokens

        super().__init__(handles, dict.fromkeys(handles))
        self.handles = handles
        self.config = ServeConfig.model_validate(config)
        self.tokens = (
            None
            if holders is None
            else Tokens({digest: Holder(*holder) for digest, holder in holders.items()})
        )
        self.requests = Counter(
            "medray_serve_requests",
            "Chat requests, and others that failed, by model and status.",
            ("model", "status"),
        )
        self.seconds = Histogram(
            "medray_serve_seconds",
            "Seconds until a chat request was answered, or its stream began.",
            [0.1, 0.3, 1, 3, 10, 30, 100],
            ("model",),
        )
        # its own, so that a controller that does not answer holds up nothing else
        self.looking = ThreadPoolExecutor(1, "status")
        self.endpoint = Endpoint(
            self.config,
            [Hosted.model_validate(model) for model in models],
            self.answer,
            self.ready,
            self.observe,
            examples,
        )

    def __serve_build_asgi_app__(self) -> Any:
        return make_app(self.endpoint, self.tokens)

    async def answer(self, body: dict[str, Any], number: str) -> Response:
        """A checked request, as the model's replica answers it.

        Raises ApiError for what the engine refuses (4xx) and where no replica can take it (503); so does a
        stream whose replica is lost.
        """
        try:
            # Nothing of the caller's headers goes further than this but the request's id.
            scope = {
                "type": "http",
                "method": "POST",
                "path": "/",
                "query_string": b"",
                "headers": [(b"x-request-id", number.encode())],
            }
            response = await self.chat(ChatCompletionRequest.model_validate(body), Request(scope))
        except (BackPressureError, DeploymentUnavailableError):
            raise _busy("too many requests are waiting for this model; try again") from None
        except Exception as error:
            raise to_api_error(error, number) from error
        if isinstance(response, StreamingResponse):
            response.body_iterator = _streamed(response.body_iterator, number)
        return response

    async def ready(self) -> dict[str, bool]:
        """By model, whether it can answer; none where the controller does not say."""
        application = serve.get_replica_context().app_name
        try:
            status = await asyncio.get_running_loop().run_in_executor(self.looking, serve.status)
            found = status.applications[application].deployments
        except (RayError, RayServeException, KeyError):
            return {}
        return {
            name: deployment.status in ("HEALTHY", "UPSCALING", "DOWNSCALING")
            or deployment.replica_states.get("RUNNING", 0) > 0
            for name, handle in self.handles.items()
            if (deployment := found.get(handle.deployment_name))
        }

    def observe(self, model: str, status: int, seconds: float) -> None:
        self.requests.inc(tags={"model": model, "status": str(status)})
        self.seconds.observe(seconds, tags={"model": model})


async def _streamed(chunks: Any, number: str) -> AsyncIterator[Any]:
    try:
        async for chunk in chunks:
            yield chunk
    except Exception as error:
        raise to_api_error(error, number) from error


def _busy(message: str) -> ApiError:
    return ApiError(message, 503, None, "overloaded", "overloaded_error", 2)


def to_api_error(error: Exception, number: str) -> ApiError:
    """What the caller is told of an error behind the checks."""
    # What a replica's code raised comes as a RayTaskError around it; the other errors of Ray's say that a
    # process or node was lost.
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, ApiError):
        return cause
    if isinstance(error, OpenAIHTTPException):
        kind, _, param = error.type.partition("/")
        if error.status_code < 500:
            code = {400: "invalid_request", 404: "not_found"}.get(error.status_code, "refused")
            return ApiError(error.message, error.status_code, param or None, code, kind)
    elif isinstance(cause, ValidationError):
        first = cause.errors(include_url=False, include_input=False)[0]
        param = ".".join(map(str, first["loc"])) or None
        return ApiError(
            f"{param}: {first['msg']}" if param else first["msg"], param=param, code="invalid_value"
        )
    # By type only: the text of an error may hold what was asked.
    log.error("%s failed: %s, %s", number, type(error).__name__, type(cause).__name__)
    if isinstance(cause, RayError | RayServeException) and not isinstance(cause, RayTaskError):
        return _busy("the process that worked on this request was lost; try again")
    return ApiError(
        f"the request failed; the log of the endpoint says more under {number}",
        500,
        None,
        "internal_error",
        "server_error",
    )


def build(config: ServeConfig) -> Application:
    """The application for `serve run` and Serve's config files.

    Raises ConfigError before anything is served: for a run that is not finished, models and keys that are not
    there, what the cluster has no room for, and a port that is taken. `serve run` ends with its words.
    """
    with plain_errors():
        return _application(config)


def _application(config: ServeConfig) -> Application:
    from medray.serving.chat.examples import examples_of
    from medray.serving.chat.served_models import hosted
    from medray.serving.tokens import KEYS_VARIABLE, read_tokens

    models = hosted(config)
    tokens = None if config.open else read_tokens(config.keys, KEYS_VARIABLE)
    check_port()
    check_fits(
        served_demands(config, {model.name: model.engine for model in models})["endpoint"],
        "lower engine_cpus (of each replica), ingress_cpus or replicas, leave the base models out "
        "(base=false), or serve on a larger cluster",
    )
    holders = tokens and {digest: (holder.name, holder.lead) for digest, holder in tokens.holders.items()}
    plain, of_replicas = config.model_dump(mode="json"), config.of_replicas
    # ray.serve.llm's own settings know no labels
    placed = (
        {"placement_group_bundle_label_selector": [selector]} if (selector := config.place.selector) else {}
    )
    handles = {
        model.name: build_llm_deployment(
            settings(model, of_replicas),
            deployment_cls=ModelServer,
            override_serve_options=placed,
            bind_kwargs={
                "model": model.model_dump(mode="json", exclude={"about"}),
                "config": of_replicas.model_dump(mode="json"),
            },
        )
        for model in models
    }
    # ray.serve.llm has a time limit of its own, of ten minutes, which would come first where ours is longer.
    variables = {"RAY_SERVE_LLM_ROUTER_HTTP_TIMEOUT": str(config.limits.seconds + 60)}
    actor = {"num_cpus": config.ingress_cpus, "runtime_env": {"env_vars": variables}}
    ingress = Ingress.options(
        num_replicas=config.ingress_replicas,
        ray_actor_options=actor,
        graceful_shutdown_timeout_s=config.drain_seconds,
    )
    return ingress.bind(
        handles, plain, [model.model_dump(mode="json") for model in models], holders, examples_of(config)
    )
