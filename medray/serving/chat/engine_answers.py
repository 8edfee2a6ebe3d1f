"""What an engine answers, with its errors in the endpoint's form: as an error while nothing was said yet,
streaming or not (no Ray, no vLLM).

vLLM begins a stream before it looks at the request, and writes an error into it as an event. A client would
get status 200.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from medray.serving.chat.request import ApiError

_PROMPT = ("input_tokens", "input_text", "prompt")  # vLLM's names for what is made of the messages


def api_error(status: Any, message: str, param: str | None) -> ApiError:
    """An engine's error in the endpoint's form.

    Args:
        param: vLLM's name of the field. What it refuses without naming a field is the prompt: too long, or
            images that do not fit it.
    """
    if isinstance(status, int) and 400 <= status < 500:
        code = {400: "invalid_request", 404: "not_found"}.get(status, "refused")
        return ApiError(
            message[:1000], status, "messages" if param is None or param in _PROMPT else param, code
        )
    return ApiError("the model's engine failed at this request", 500, None, "internal_error", "server_error")


async def checked(items: AsyncIterator[Any], refuse: Callable[[ApiError], Any]) -> AsyncIterator[Any]:
    """An engine's items: one answer or error, or strings (or lists of strings) of server-sent events.

    Args:
        refuse: makes of an error what is yielded in its place.

    Raises ApiError where a stream that has started ends with an error.
    """
    held: list[str] = []  # events before the first that says something
    started = False
    async for item in items:
        # ray.serve.llm batches all that a request for a stream yields
        for part in item if isinstance(item, list) else [item]:
            failure = _error_in(part)
            if failure is not None:
                if started:
                    if held:
                        yield held
                    raise failure
                yield refuse(failure)
                return
            if not isinstance(part, str):
                yield part
                continue
            held.append(part)
            started = started or not _says_nothing(part)
        if started and held:
            yield held
            held = []
    if held:
        yield held


def _error_in(part: Any) -> ApiError | None:
    if not isinstance(part, str):
        error = getattr(part, "error", None)
        return (
            None
            if error is None
            else api_error(getattr(error, "code", None), error.message, getattr(error, "param", None))
        )
    if not part.startswith('data: {"error"'):
        return None
    error = json.loads(part.removeprefix("data: "))["error"]
    return api_error(error.get("code"), error.get("message") or "", error.get("param"))


def _says_nothing(event: str) -> bool:
    """Whether it is one of the events that only name the role of what follows."""
    try:
        choices = json.loads(event.removeprefix("data: "))["choices"]
    except (ValueError, KeyError, TypeError):  # [DONE]
        return False
    return bool(choices) and all(
        choice.get("finish_reason") is None
        and not (choice.get("delta") or {}).get("content")
        and choice.get("logprobs") is None
        for choice in choices
    )
