"""The endpoint as an ASGI app: OpenAI's chat API in front of whatever answers a checked request (no Ray)."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from medray.config.serving import ServeConfig
from medray.models.published import NOT_A_DEVICE
from medray.serving.chat.rate_limit import RateLimit
from medray.serving.chat.request import ANSWER_TOKENS, ApiError, check, parsed, prepared
from medray.serving.chat.request_images import ImageLoader
from medray.serving.chat.served_models import Hosted
from medray.serving.guard import PAGE_HEADERS, Guard, failure, refused, reraise
from medray.serving.tokens import Holder, Tokens

STATIC = Path(__file__).parent / "static"
NOBODY = Holder("anyone")
READY_SECONDS = 5.0  # until /ready gives up

Answer = Callable[[dict[str, Any], str], Awaitable[Response]]
logger = logging.getLogger("ray.serve")


class Endpoint:
    """What the routes do.

    Args:
        models: that can be asked, in the order they are listed.
        answer: a checked request and its id -> JSON or server-sent events. Raises ApiError.
        ready: model -> whether it can answer (a model that starts with its first request can); models it
            leaves out cannot.
        observe: called for every chat request, and of others that failed: model ("" where none was named
            rightly), status, seconds. Of streams when they end.
        examples: {"question", "reference", "image"} to try, image as a data URI.
    """

    def __init__(
        self,
        config: ServeConfig,
        models: Sequence[Hosted],
        answer: Answer,
        ready: Callable[[], Awaitable[dict[str, bool]]],
        observe: Callable[[str, int, float], None] = lambda *_: None,
        examples: Sequence[dict[str, str]] = (),
    ):
        self.config, self.models, self.answer, self.ready, self.observe, self.examples = (
            config,
            {model.name: model for model in models},
            answer,
            ready,
            observe,
            examples,
        )
        self.images = ImageLoader(config.limits)
        self.rates = RateLimit(config.limits.requests_per_minute)
        self.started = int(time.time())
        self._looking, self._looked, self._ready = (
            asyncio.Lock(),
            -math.inf,
            dict.fromkeys(self.models, False),
        )

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        began, number = time.monotonic(), request.state.number
        who, asked, limit_name = (request.state.holder or NOBODY).name, "", ""
        try:
            async with asyncio.timeout(self.config.limits.seconds):
                if wait := self.rates.wait(who):
                    raise _limited(wait)
                body = parsed(await request.body(), self.config.limits)
                # as the caller wrote it
                limit_name = ANSWER_TOKENS if body.max_completion_tokens else "max_tokens"
                model = self._model(body.model)
                asked = model.name
                check(body, self.config.limits)
                made = await prepared(
                    body,
                    self.config.limits,
                    model.system_prompt,
                    lambda url: self.images.load(url, model.pad_to_square),
                )
                response = await self.answer({**made, "model": model.name}, number)
        except ApiError as error:
            if error.param == ANSWER_TOKENS and limit_name:
                error.param = limit_name
            response = error_response(error)
        except TimeoutError:
            response = error_response(_late(self.config.limits.seconds))
        except Exception as error:
            response = failure(error, number)
        seconds = time.monotonic() - began
        # Who, what for, how long: never what was said or shown.
        logger.info(
            "%s key %s model %s: %d in %.2f s%s",
            number,
            who,
            asked or "-",
            response.status_code,
            seconds,
            ", streams" if isinstance(response, StreamingResponse) else "",
        )
        if isinstance(response, StreamingResponse):
            response.body_iterator = self._streamed(response.body_iterator, asked, number, seconds)
        else:
            self.observe(asked, response.status_code, seconds)
        return response

    def _model(self, name: str | None) -> Hosted:
        if name is None and len(self.models) == 1:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise ApiError(
                f"the model {name!r} is not served; there are {', '.join(self.models)}"[:500],
                404,
                "model",
                "model_not_found",
            )
        return self.models[name]

    async def _streamed(self, chunks: Any, model: str, number: str, seconds: float) -> AsyncIterator[Any]:
        """The stream, and where it is not over by the request's deadline or breaks off, an error event at its
        end.

        Args:
            seconds: that are gone.
        """
        broken = None
        try:
            async with asyncio.timeout(self.config.limits.seconds - seconds):
                async for chunk in chunks:
                    yield chunk
        except ApiError as error:
            broken = error_response(error)
        except TimeoutError:
            broken = error_response(_late(self.config.limits.seconds))
        except Exception as error:
            broken = failure(error, number)
        finally:
            self.observe(model, broken.status_code if broken else 200, seconds)
        if broken:
            logger.info("%s broke off: %d", number, broken.status_code)
            yield b"data: " + broken.body + b"\n\ndata: [DONE]\n\n"

    async def list_models(self, request: Request) -> Response:
        """GET /v1/models."""
        return JSONResponse(
            {"object": "list", "data": [self._shown(model) for model in self.models.values()]}
        )

    async def one_model(self, request: Request) -> Response:
        """GET /v1/models/{id}."""
        try:
            return JSONResponse(self._shown(self._model(request.path_params["name"])))
        except ApiError as error:
            return error_response(error)

    def _shown(self, model: Hosted) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": self.started,
            "owned_by": "medray",
            "about": model.about,
        }

    async def health(self, request: Request) -> Response:
        """GET /health: the process answers."""
        return JSONResponse({"status": "ok"})

    async def readiness(self, request: Request) -> Response:
        """GET /ready: 503 until every model can answer. Anybody may ask, so one looks at a time, and what
        is found holds for a second.
        """
        async with self._looking:
            if time.monotonic() - self._looked >= 1:
                try:
                    async with asyncio.timeout(READY_SECONDS):
                        found = await self.ready()
                except TimeoutError:
                    found = {}
                self._ready, self._looked = (
                    {name: found.get(name, False) for name in self.models},
                    time.monotonic(),
                )
        ready = all(self._ready.values())
        return JSONResponse({"ready": ready, "models": self._ready}, 200 if ready else 503)

    async def try_it(self, request: Request) -> Response:
        """GET /try: what the page shows beside the models; behind the key, since examples are images of
        the run.
        """
        models = [self._shown(model) for model in self.models.values()]
        return JSONResponse(
            {
                "title": self.config.title,
                "notice": NOT_A_DEVICE,
                "tokens": self.config.limits.tokens,
                "models": models,
                "examples": list(self.examples),
            }
        )


def _limited(seconds: float) -> ApiError:
    message = f"too many requests with this key; the next may come in {seconds:.1f} seconds"
    return ApiError(message, 429, None, "rate_limit_exceeded", "rate_limit_error", seconds)


def _late(seconds: float) -> ApiError:
    return ApiError(
        f"no whole answer within {seconds:g} seconds; ask for fewer tokens, or try again",
        408,
        None,
        "timeout",
        "timeout_error",
    )


def error_response(error: ApiError) -> JSONResponse:
    return refused(error.status, error.message, error.kind, error.headers, error.param, error.code)


async def _page(request: Request) -> Response:
    return FileResponse(STATIC / "try.html")


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return refused(error.status_code, str(error.detail), "invalid_request_error", error.headers)


def make_app(endpoint: Endpoint, tokens: Tokens | None) -> Guard:
    """The whole app.

    Args:
        tokens: whose keys are taken; None asks for none.
    """
    routes = [
        Route("/v1/chat/completions", endpoint.chat, methods=["POST"]),
        Route("/v1/models", endpoint.list_models),
        Route("/v1/models/{name:path}", endpoint.one_model),
        Route("/health", endpoint.health),
        Route("/ready", endpoint.readiness),
        Route("/try", endpoint.try_it),
        Route("/", _page),
        Mount("/static", StaticFiles(directory=STATIC, packages=[("medray.serving", "static")])),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _http_error, Exception: reraise})
    limits = endpoint.config.limits
    return Guard(
        app,
        tokens.holder if tokens else lambda token: NOBODY,
        {"/", "/static/", "/health", "/ready"},
        limits.body_bytes,
        headers=PAGE_HEADERS,
        open_posts={"/v1/", "/try"} if tokens is None else (),
        body_seconds=limits.seconds,
        failed=lambda seconds: endpoint.observe("", 500, seconds),
    )
