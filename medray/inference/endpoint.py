"""An OpenAI-compatible endpoint: GPT-4o, a vLLM server or any other.

Requests in flight are bounded per client; 429, 5xx and timeouts are retried with exponential backoff and jitter, then
the request has failed. Where every request fails no row is to blame, and the stage stops, to be gone on with. The key comes
from the environment of the node the client runs on, and is never logged.
"""

from __future__ import annotations

import asyncio
import base64
import os
import random
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from medray.config import DataConfig, EndpointConfig
from medray.config.section import without_passwords
from medray.errors import StageError

_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_REFUSED = frozenset({401, 402, 404})  # whatever is asked: the key, the account, the address or the model's name is wrong
_FORBIDDEN = 403  # a key without the right to this, or what one request asks
_GIVE_UP = 10  # requests that failed one after the other, each after its retries
_LONGEST_WAIT = 60.0
_SENT_AS_THEY_ARE = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}


@dataclass
class Usage:
    """What some requests took. A retry is a request that failed and was sent again; it is not in `requests`."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    requests: int = 0
    retries: int = 0


@dataclass(frozen=True)
class Reply:
    text: str
    finish_reason: str | None
    tokens: int | None


class EndpointError(Exception):
    """No usable reply to a request, after the retries."""


class EndpointDown(StageError):
    """The endpoint answers no request; rows under way are not written, and the same command asks for them again."""


class Endpoint:
    """A client of one endpoint and model.

    Args:
        config: endpoint, model, bounds.
        section: the configuration section's name, for errors.

    Raises StageError where a remote endpoint has no key in this process's environment.
    """

    backoff_seconds = 1.0  # before the first retry; doubles each time, times a random factor from 0.5 to 1.5

    def __init__(self, config: EndpointConfig, section: str):
        self.config = config
        key = os.environ.get(config.key_env)
        if not key and urlsplit(config.base_url).hostname not in ("localhost", "127.0.0.1", "::1"):
            raise StageError(f"{section}.key_env: {config.key_env} is not set on this node; it must hold the key for {without_passwords(config.base_url)}")
        self._section, self._failed = section, 0
        self._requests = asyncio.Semaphore(config.concurrency)
        self._client = httpx.AsyncClient(
            timeout=config.timeout, headers={"Authorization": f"Bearer {key}"} if key else {}, limits=httpx.Limits(max_connections=config.concurrency),
        )

    async def ask(self, text: str, image_url: str | None, seed: int, usage: Usage) -> Reply:
        """One reply to a user turn, after retries.

        Args:
            image_url: see `data_url`; None for a question without an image.
            seed: endpoints take 32 bits at most.

        Raises EndpointError; EndpointDown where the key, the address or the model is refused, or requests fail one after the other.
        """
        content: list[dict[str, Any]] = [{"type": "text", "text": text}]
        if image_url is not None:
            content.insert(0, {"type": "image_url", "image_url": {"url": image_url}})
        body = {
            "model": self.config.model, "temperature": self.config.temperature, "max_tokens": self.config.max_tokens, "seed": seed,
            "messages": [{"role": "user", "content": content}],
        }
        problem = ""
        for attempt in range(self.config.retries + 1):
            wait = self.backoff_seconds * 2**attempt * random.uniform(0.5, 1.5)
            try:
                async with self._requests:
                    response = await self._client.post(f"{self.config.base_url.rstrip('/')}/chat/completions", json=body)
            except httpx.TransportError as error:  # timeouts and broken connections
                problem = type(error).__name__
            else:
                if response.status_code == 200:
                    self._failed = 0
                    return _reply(response, usage)
                problem = f"HTTP {response.status_code}: {response.text[:200]}"
                if response.status_code in _REFUSED:
                    raise self._down(problem)
                if response.status_code == _FORBIDDEN:
                    raise self._failure(problem)
                if response.status_code not in _RETRIED:
                    self._failed = 0
                    raise EndpointError(problem)
                wait = max(wait, _retry_after(response))
            if attempt < self.config.retries:
                usage.retries += 1
                await asyncio.sleep(min(wait, _LONGEST_WAIT))
        raise self._failure(f"{problem} (after {self.config.retries} retries)")

    def _failure(self, problem: str) -> EndpointError | EndpointDown:
        self._failed += 1
        if self._failed < _GIVE_UP:
            return EndpointError(problem)
        return self._down(f"{self._failed} requests one after the other failed, the last with {problem}")

    def _down(self, problem: str) -> EndpointDown:
        where = f"{self._section}.base_url {without_passwords(self.config.base_url)}, {self._section}.model {self.config.model}, the key in {self.config.key_env}"
        return EndpointDown(f"{self._section}: the endpoint answers no request: {problem}. Look at {where}")


def _reply(response: httpx.Response, usage: Usage) -> Reply:
    usage.requests += 1
    try:
        content = response.json()
        counted = content.get("usage") or {}
        usage.prompt_tokens += counted.get("prompt_tokens") or 0
        usage.completion_tokens += counted.get("completion_tokens") or 0
        choice = content["choices"][0]
        return Reply(choice["message"]["content"] or "", choice.get("finish_reason"), counted.get("completion_tokens"))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise EndpointError(f"the endpoint's reply is not a chat completion ({type(error).__name__})") from error


def _retry_after(response: httpx.Response) -> float:
    value = response.headers.get("retry-after", "")
    return float(value) if value.isdigit() else 0.0


def data_url(data: bytes | None, limits: DataConfig) -> str:
    """A data: URL of the image; formats endpoints do not know are sent as PNG.

    Raises medray.errors.DataError for an image outside the limits.
    """
    from medray.data.images import decode, image_format, is_plain, png_url

    image = decode(data, limits)
    mime = _SENT_AS_THEY_ARE.get(image_format(data))
    if mime is None or not is_plain(data):  # else the endpoint would see other pixels than the tuned model
        return png_url(image)
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"
