"""An OpenAI-compatible endpoint: GPT-4o, a vLLM server or any other.

Requests in flight are bounded per client; 429, 5xx and timeouts are retried with exponential backoff and
jitter, then the request has failed. Where every request fails no row is to blame: the stage stops, and the
same command asks again. The key comes from the environment of the node the client runs on, and is never
logged.
"""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import os
import random
from typing import Any
from urllib.parse import urlsplit

import httpx

from medray.config import DataConfig, EndpointConfig
from medray.config.section import without_passwords
from medray.errors import StageError
from medray.inference.completions import (
    Reply,
    Unusable,
    Usage,
    how_to_fix,
    read_reply,
    request_body,
)

logger = logging.getLogger("medray")

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
_LONGEST_WAIT = 60.0
_SENT_AS_THEY_ARE = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
_TRIAL = "Reply with one word: yes."


class EndpointError(Exception):
    """No usable reply to a request, after the retries."""


class EndpointDown(StageError):
    """The endpoint answers no request; rows under way are not written, and the same command asks for them
    again.
    """


class Endpoint:
    """A client of one endpoint and model. A stage asks through one actor, so what is counted here is counted
    over all its requests.

    Whether a refused request or the endpoint itself is at fault shows in the others: `config.give_up`
    requests that fail one after the other, for whatever reasons, stop the stage. Where some were answered
    before, one of those is sent again first, so that neighbouring rows that each are refused do not.
    `settled` decides about fewer of them before their rows are handed on.

    Args:
        config: endpoint, model, bounds.
        section: the configuration section's name, for errors.

    Raises StageError where a remote endpoint has no key in this process's environment.
    """

    backoff_seconds = 1.0  # before the first retry; doubles each time, times a random factor from 0.5 to 1.5

    def __init__(self, config: EndpointConfig, section: str):
        self.config = config
        key = (os.environ.get(config.key_env) or "").strip()
        if not key and urlsplit(config.base_url).hostname not in LOCAL_HOSTS:
            raise StageError(
                f"{section}.key_env: {config.key_env} is not set on this node; it must hold the key for "
                f"{without_passwords(config.base_url)}"
            )
        if not (key.isascii() and key.isprintable()):
            raise StageError(
                f"{section}.key_env: {config.key_env} holds characters that no key has; "
                "set it to the key alone"
            )
        self._section, self._key = section, key
        self._failed = 0  # requests that failed one after the other, each after its retries
        self._last: Unusable | None = None
        self._answered: dict[str, Any] | None = None  # the last request that was
        self._down: str | None = None
        self._checking = asyncio.Lock()
        self._requests = asyncio.Semaphore(config.concurrency)
        self._client = httpx.AsyncClient(
            timeout=config.timeout,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=config.concurrency),
        )

    async def ask(self, text: str, image_url: str | None, seed: int, usage: Usage) -> Reply:
        """One reply to a user turn, after retries.

        Args:
            image_url: see `data_url`; None for a question without an image.
            seed: endpoints take 32 bits at most.

        Raises EndpointError; EndpointDown where requests fail one after the other, or one does for the key,
        the address or the model.
        """
        if self._down is not None:
            raise EndpointDown(self._down)
        body = request_body(self.config, text, image_url, seed)
        try:
            reply = await self._sent(body, usage)
        except Unusable as problem:
            await self._count(problem)
            raise EndpointError(str(problem)) from None
        if reply.text.strip():
            self._failed, self._answered = 0, body
        else:
            empty = f"HTTP 200: a reply without content (finish_reason {reply.finish_reason})"
            await self._count(Unusable(empty + self._cut_off(reply), 200))
        return reply

    async def settled(self) -> None:
        """Find out, before rows are handed on, whether the last failures were the endpoint's: then no row of
        theirs must be kept.

        Raises EndpointDown.
        """
        if self._failed and self._last is not None:
            await self._check(self._last)

    async def _sent(self, body: dict[str, Any], usage: Usage) -> Reply:
        url = f"{self.config.base_url.rstrip('/')}/chat/completions"
        for attempt in range(self.config.retries + 1):
            try:
                async with self._requests:
                    response = await self._client.post(url, json=body)
                return read_reply(response, usage)
            # Timeouts, broken connections, bodies that cannot be decoded.
            except (httpx.RequestError, httpx.InvalidURL) as error:
                problem = Unusable(type(error).__name__, retry=isinstance(error, httpx.RequestError))
            except Unusable as error:
                problem = error
            if not problem.retry:
                break
            if attempt < self.config.retries:
                usage.retries += 1
                wait = max(self.backoff_seconds * 2**attempt * random.uniform(0.5, 1.5), problem.wait)
                await asyncio.sleep(min(wait, _LONGEST_WAIT))
        said = str(problem).replace(self._key, "...") if len(self._key) > 7 else str(problem)
        after = f" (after {self.config.retries} retries)" if problem.retry else ""
        raise Unusable(said + after, problem.status)

    async def _count(self, problem: Unusable) -> None:
        self._failed, self._last = self._failed + 1, problem
        if problem.whatever_is_asked or self._failed >= self.config.give_up:
            await self._check(problem)

    async def _check(self, problem: Unusable) -> None:
        """Raise EndpointDown unless a request is answered."""
        async with self._checking:
            if self._down is None and self._failed and not await self._answers():
                self._down = self._why(problem)
            if self._down is not None:
                raise EndpointDown(self._down)
            # a trial alone does not clear an endpoint that has answered no row
            if self._answered is not None:
                self._failed = 0

    async def _answers(self) -> bool:
        if self._answered is None and self._failed >= self.config.give_up:
            return False  # nothing was ever answered, and enough was asked
        body = self._answered or request_body(self.config, _TRIAL, _trial_image(), 0)
        logger.info(
            "%s: %d requests in a row failed; one more is sent to see whether the endpoint answers",
            self._section,
            self._failed,
        )
        try:
            return bool((await self._sent(body, Usage())).text.strip())
        except Unusable:
            return False

    def _cut_off(self, reply: Reply) -> str:
        longest = "evaluate.max_tokens" if self._section == "api" else f"{self._section}.max_tokens"
        return (
            f"; its tokens were used up before the answer: raise {longest}"
            if reply.finish_reason == "length" or reply.thinking
            else ""
        )

    def _why(self, problem: Unusable) -> str:
        many = (
            f"{self._failed} requests one after the other failed, the last with " if self._failed > 1 else ""
        )
        fix = how_to_fix(self.config, self._section, problem)
        where = (
            f"{self._section}.base_url {without_passwords(self.config.base_url)}, "
            f"{self._section}.model {self.config.model}, the key in {self.config.key_env}"
        )
        fix = f"{fix}; check {where}" if fix else f"check {where}"
        return f"{self._section}: every request to the endpoint fails: {many}{problem}; {fix}"


def data_url(data: bytes | None, limits: DataConfig) -> str:
    """A data: URL of the image; formats endpoints do not know are sent as PNG.

    Raises medray.errors.DataError for an image outside the limits.
    """
    from medray.images.decoding import decode, image_format, is_plain, png_url

    image = decode(data, limits)
    mime = _SENT_AS_THEY_ARE.get(image_format(data))
    if mime is None or not is_plain(data):  # else the endpoint would see other pixels than the tuned model
        return png_url(image)
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def _trial_image() -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "grey").save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
