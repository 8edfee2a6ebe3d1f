"""What is sent to an OpenAI-compatible /chat/completions, and what its responses say (pure).

Servers differ: some refuse parameters that others need, send an error with status 200, give the content as a
list of parts, or the thinking in a field of its own.
"""

from __future__ import annotations

import email.utils
import math
import re
import time
from dataclasses import dataclass
from typing import Any

import httpx

from medray.config import EndpointConfig
from medray.config.section import without_passwords
from medray.inference.thinking import FINISHED, UNFINISHED, Thinking

_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_WHATEVER_IS_ASKED = frozenset(
    {401, 402, 404}
)  # the key, the account, the address or the model's name is wrong
_REFUSES = re.compile(
    r"support|unknown|unrecogni[sz]ed|unexpected|not (?:permitted|allowed|accepted)|extra |deprecated|removed"
    r"|instead|invalid|only the default",
    re.IGNORECASE,
)
_INSTEAD = re.compile(r"[Uu]se [`'\"]?([a-z_]+)[`'\"]? instead")
_DATA = re.compile(r"data:[\w./+-]*;base64,[A-Za-z0-9+/=]*")
_TEXT_PARTS = ("text", "output_text")
_THINKING_FIELDS = ("reasoning_content", "reasoning", "thinking")
_LONGEST_PROBLEM = 300


@dataclass
class Usage:
    """What some requests took. A retry is a request that failed and was sent again; `requests` has none."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    requests: int = 0
    retries: int = 0


@dataclass(frozen=True)
class Reply:
    """A usable response. `thinking` says whether the model's thinking came beside the text, in a field or
    part of its own.
    """

    text: str
    finish_reason: str | None
    tokens: int | None
    thinking: Thinking | None = None

    @property
    def spoken(self) -> str:
        """The text, which tells by an opening tag where the thinking was never finished."""
        return f"<think>{self.text}" if self.thinking == UNFINISHED else self.text


class Unusable(Exception):
    """No usable reply to one request.

    Attributes:
        status: HTTP status, or that which a 200 carries in its body; None without a response.
        retry: another attempt may succeed.
        wait: seconds the server asks to wait first.
    """

    def __init__(self, problem: str, status: int | None = None, retry: bool = False, wait: float = 0.0):
        super().__init__(problem)
        self.status, self.retry, self.wait = status, retry, wait

    @property
    def whatever_is_asked(self) -> bool:
        """Every other request would most likely fail too."""
        return self.status in _WHATEVER_IS_ASKED or 300 <= (self.status or 0) < 400


def request_body(config: EndpointConfig, text: str, image_url: str | None, seed: int) -> dict[str, Any]:
    """One user turn, with the parameters as the section names them."""
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if image_url is not None:
        content.insert(0, {"type": "image_url", "image_url": {"url": image_url}})
    own = {"temperature": config.temperature, "max_tokens": config.max_tokens, "seed": seed}
    named = {config.rename.get(name, name): value for name, value in own.items() if name not in config.omit}
    return {
        "model": config.model,
        **named,
        **config.parameters,
        "messages": [{"role": "user", "content": content}],
    }


def read_reply(response: httpx.Response, usage: Usage) -> Reply:
    """The reply in a response; its tokens are added to `usage`. Raises Unusable for any other response."""
    try:
        body = response.json()
    except ValueError:
        body = None
    if not response.is_success:
        raise _unusable(response, response.status_code, _message(body) or response.text)
    choice = _choice(body)
    error = _error_in(body) or _error_in(choice)
    if error is not None:
        code = error.get("code") if isinstance(error, dict) else None
        status = int(code) if str(code).isdigit() else response.status_code
        raise _unusable(response, status, f"an error in the body: {_message({'error': error})}")
    if body is None:
        raise Unusable(f"HTTP {response.status_code} with a body that is not JSON", response.status_code)
    if choice is None:
        raise Unusable(
            f"HTTP {response.status_code}: the reply is not a chat completion (it has no choices[0].message)",
            response.status_code,
        )
    usage.requests += 1
    counted = body.get("usage") if isinstance(body.get("usage"), dict) else {}
    usage.prompt_tokens += _whole(counted.get("prompt_tokens")) or 0
    usage.completion_tokens += _whole(counted.get("completion_tokens")) or 0
    finish = choice.get("finish_reason") if isinstance(choice.get("finish_reason"), str) else None
    return _reply(choice["message"], finish, _whole(counted.get("completion_tokens")), response.status_code)


def _reply(message: dict[str, Any], finish: str | None, tokens: int | None, status: int) -> Reply:
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    text = (
        content
        if isinstance(content, str)
        else "".join(_part_text(part, _TEXT_PARTS, "text") for part in parts)
    )
    text = (
        text
        or "".join(_part_text(part, ("refusal",), "refusal") for part in parts)
        or (message.get("refusal") if isinstance(message.get("refusal"), str) else "")
        or ""
    )
    text = text.encode("utf-8", "replace").decode()  # JSON can write half of a surrogate pair, Arrow cannot
    thought = any(message.get(name) for name in _THINKING_FIELDS) or any(
        isinstance(part, dict) and part.get("type") in _THINKING_FIELDS for part in parts
    )
    if not text.strip() and (thought or finish == "length"):
        return Reply("", finish, tokens, UNFINISHED)  # some endpoints keep the thinking to themselves
    if not text and not isinstance(content, str):
        raise Unusable(f"HTTP {status}: a reply without content (finish_reason {finish})", status)
    return Reply(text, finish, tokens, FINISHED if thought else None)


def _part_text(part: Any, kinds: tuple[str, ...], field: str) -> str:
    if isinstance(part, str):
        return part if field == "text" else ""
    if not isinstance(part, dict) or part.get("type", "text") not in kinds:
        return ""
    text = part.get(field)
    text = text.get("value") if isinstance(text, dict) else text
    return text if isinstance(text, str) else ""


def _choice(body: Any) -> dict[str, Any] | None:
    choices = body.get("choices") if isinstance(body, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    return (
        choice
        if isinstance(choice, dict) and (isinstance(choice.get("message"), dict) or choice.get("error"))
        else None
    )


def _error_in(value: Any) -> Any:
    return (value.get("error") or None) if isinstance(value, dict) else None


def _message(body: Any) -> str:
    """What an error's body says, in one of the forms that servers use; not what it repeats of the request."""
    if not isinstance(body, dict):
        return ""
    found = body.get("error") or body.get("detail") or body.get("message") or body.get("errors")
    if isinstance(found, list):
        parts = [item for item in found if isinstance(item, dict)]
        return "; ".join(
            f"{_dotted(part.get('loc'))} {part.get('msg') or part.get('message') or ''}".strip()
            for part in parts
        ) or str(found)
    if isinstance(found, dict):
        about = [str(found[name]) for name in ("param",) if found.get(name)]
        return " ".join(
            [
                str(found.get("message") or found.get("msg") or found.get("type") or found),
                *(f"(param {name})" for name in about),
            ]
        )
    return str(found or "")


def _dotted(place: Any) -> str:
    return ".".join(map(str, place)) if isinstance(place, list) else ""


def _unusable(response: httpx.Response, status: int, said: str) -> Unusable:
    said = " ".join(_DATA.sub("data:...", said).split())[:_LONGEST_PROBLEM]
    if 300 <= status < 400:
        said = f"redirected to {without_passwords(response.headers.get('location', 'nowhere'))}"
    return Unusable(
        f"HTTP {status}: {said}" if said else f"HTTP {status}",
        status,
        status in _RETRIED,
        retry_after(response),
    )


def retry_after(response: httpx.Response) -> float:
    """Seconds that a response asks to wait: a number, or a date."""
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = response.headers.get(name, "").strip()
        try:
            seconds = float(value) * scale
        except ValueError:
            seconds = _until(value)
        if math.isfinite(seconds) and seconds > 0:
            return seconds
    return 0.0


def _until(date: str) -> float:
    try:
        return email.utils.parsedate_to_datetime(date).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _whole(value: Any) -> int | None:
    # Beyond that no count of tokens is one, and Arrow has no room for it.
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31 else None


def how_to_fix(config: EndpointConfig, section: str, problem: Unusable) -> str:
    """What the user can change where every request fails with this problem; empty where only the address and
    the key can be looked at.
    """
    said = str(problem)
    if 300 <= (problem.status or 0) < 400:
        return f"set {section}.base_url to the address it redirects to"
    if problem.status == 413:
        return "the requests are too large for it: allow larger ones there, or give smaller images"
    if problem.status == 429:
        more = f"lower {section}.concurrency, raise {section}.retries, or look at the account"
        return f"it limits requests or their price: {more}"
    if problem.status is None or problem.status >= 500:
        return "see whether the server is up"
    if problem.status not in (400, 422):
        return ""
    sent = {
        config.rename.get(name, name): name
        for name in ("max_tokens", "temperature", "seed")
        if name not in config.omit
    }
    blamed = (
        [
            own
            for named, own in sent.items()
            if re.search(rf"(?<![A-Za-z0-9_]){re.escape(named)}(?![A-Za-z0-9_])", said)
        ]
        if _REFUSES.search(said)
        else []
    )
    options = []
    for own in blamed:
        instead = _INSTEAD.search(said)
        if instead and instead[1] not in sent:
            renamed = ", ".join(f"{old}: {new}" for old, new in {**config.rename, own: instead[1]}.items())
            options.append(f"--set '{section}.rename={{{renamed}}}'")
        else:
            options.append(f"--set '{section}.omit=[{', '.join([*config.omit, own])}]'")
    if options:
        return f"it refuses {', '.join(blamed)}: add {' '.join(options)}"
    return (
        f"if it refuses a parameter, --set '{section}.omit=[seed]' leaves one of max_tokens, temperature and "
        "seed out, "
        f"--set '{section}.rename={{max_tokens: max_completion_tokens}}' renames one"
    )
