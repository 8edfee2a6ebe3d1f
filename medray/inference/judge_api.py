"""The api judge: GPT-4o, a vLLM server or any other OpenAI-compatible endpoint.

Requests in flight are bounded per actor; 429, 5xx and timeouts are retried with exponential backoff and jitter, then
the verdict is an error. The key comes from the environment of the node the actor runs on, and is never logged.
"""

from __future__ import annotations

import asyncio
import base64
import io
import os
import random
from urllib.parse import urlsplit

import httpx

from medray.config import DataConfig, JudgeConfig
from medray.errors import StageError
from medray.inference.engine import seed_for
from medray.inference.judge_prompt import judge_prompt
from medray.inference.verdicts import Judge, JudgeUnavailable, Usage, written_verdict

_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_LONGEST_WAIT = 60.0
_SENT_AS_THEY_ARE = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}


class ApiJudge(Judge):
    """Written scores from an endpoint.

    Args:
        config: endpoint, model, bounds and prices.
        data_config: limits an image must keep.

    Raises StageError where a remote endpoint has no key in this actor's environment.
    """

    backoff_seconds = 1.0  # before the first retry; doubles each time, times a random factor from 0.5 to 1.5

    def __init__(self, config: JudgeConfig | dict, data_config: DataConfig | dict):
        self.config = JudgeConfig.model_validate(config)
        super().__init__(rows_in_flight=self.config.concurrency)
        self.data_config = DataConfig.model_validate(data_config)
        self.name = f"api:{self.config.model}"
        key = os.environ.get(self.config.key_env)
        if not key and urlsplit(self.config.base_url).hostname not in ("localhost", "127.0.0.1", "::1"):
            raise StageError(f"judge.key_env: {self.config.key_env} is not set on this node; it must hold the key for {self.config.base_url}")
        self._requests = asyncio.Semaphore(self.config.concurrency)
        self._client = httpx.AsyncClient(
            timeout=self.config.timeout, headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=self.config.concurrency),
        )

    async def verdicts(self, row, question, places, usage):
        url = await asyncio.to_thread(data_url, row["image"], self.data_config)

        async def ask(question_id: str, text: str, first: str, second: str, order: int) -> str:
            seed = seed_for(self.config.seed, question_id, "judge", first, second) >> 31  # endpoints take 32 bits at most
            return await self._complete(judge_prompt(text, first, second), url, seed, usage)

        return await asyncio.gather(*(written_verdict(question, i, j, ask, self.config.both_orders) for i, j in places))

    async def _complete(self, text: str, image_url: str, seed: int, usage: Usage) -> str:
        """One reply, after retries. Raises JudgeUnavailable."""
        body = {
            "model": self.config.model, "temperature": self.config.temperature, "max_tokens": self.config.max_tokens, "seed": seed,
            "messages": [{"role": "user", "content": [
                {"type": "image_url", "image_url": {"url": image_url}}, {"type": "text", "text": text},
            ]}],
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
                    return _reply(response, usage)
                problem = f"HTTP {response.status_code}: {response.text[:200]}"
                if response.status_code not in _RETRIED:
                    raise JudgeUnavailable(problem)
                wait = max(wait, _retry_after(response))
            if attempt < self.config.retries:
                usage.retries += 1
                await asyncio.sleep(min(wait, _LONGEST_WAIT))
        raise JudgeUnavailable(f"{problem} (after {self.config.retries} retries)")


def _reply(response: httpx.Response, usage: Usage) -> str:
    usage.requests += 1
    try:
        content = response.json()
        counted = content.get("usage") or {}
        usage.prompt_tokens += counted.get("prompt_tokens") or 0
        usage.completion_tokens += counted.get("completion_tokens") or 0
        return content["choices"][0]["message"]["content"] or ""
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise JudgeUnavailable(f"the endpoint's reply is not a chat completion ({type(error).__name__})") from error


def _retry_after(response: httpx.Response) -> float:
    value = response.headers.get("retry-after", "")
    return float(value) if value.isdigit() else 0.0


def data_url(data: bytes | None, limits: DataConfig) -> str:
    """A data: URL of the image; formats endpoints do not know are sent as PNG.

    Raises medray.errors.DataError for an image outside the limits.
    """
    from medray.data.images import decode, image_format

    image = decode(data, limits)
    mime = _SENT_AS_THEY_ARE.get(image_format(data))
    if mime is None:
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        data, mime = buffer.getvalue(), "image/png"
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"
