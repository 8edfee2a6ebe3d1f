"""What stands before every endpoint: who may come in, how much they may send, which headers go out (plain
ASGI, any app).

    app = Guard(app, tokens.holder, open_paths={"/", "/static/"}, max_body_bytes=2**20)

Errors have the form {"error": {"message", "type", "param", "code"}}, which OpenAI clients know. Every answer
has the request's id as X-Request-ID.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable, Collection, Mapping
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action "
    "'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}
# Of pages: scripts, styles and requests of this site only, nothing inline: text that got into the page as
# HTML could still do nothing.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' "
    "blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}
_SAFE = ("GET", "HEAD", "OPTIONS")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

logger = logging.getLogger("ray.serve")


class Unavailable(Exception):
    """What a request needs does not answer now; the text is for the caller."""


class Guard:
    """ASGI middleware. `request.state.holder` is who sent the request, `request.state.number` its id (the
    caller's, or a new one).

    Unauthenticated requests are answered with 401, before their body is read. It is read whole before the app
    sees it, so that no app can forget the limits. An error that the app does not answer is answered with 500,
    and logged without its text. WebSockets are refused.

    Args:
        holder_of: who holds a token, or None.
        open_paths: paths that anybody may GET, and of whose requests no body is read; one that ends in "/"
            and is longer stands for all below it.
        max_body_bytes: larger bodies are answered with 413.
        cookie: name of a cookie that may hold a session's id, for pages. Browsers send it along with whatever
            another site makes them ask for, so requests that change something must then come from this site:
            403 otherwise.
        holder_of_cookie: whose session the cookie's value names, or None. Raises Unavailable (503) if that
            cannot be looked up.
        headers: beside and before SECURITY_HEADERS; a header the app sets itself stays.
        open_posts: paths that anybody may ask for with any method and a body.
        body_seconds: bodies that are not there by then are answered with 408.
        failed: called for every request with an error that the app does not answer, in seconds.
    """

    def __init__(
        self,
        app: Any,
        holder_of: Callable[[str], Any],
        open_paths: Collection[str] = (),
        max_body_bytes: int = 2**20,
        cookie: str | None = None,
        headers: Mapping[str, str] | None = None,
        open_posts: Collection[str] = (),
        body_seconds: float = 30.0,
        failed: Callable[[float], None] = lambda seconds: None,
        holder_of_cookie: Callable[[str], Awaitable[Any]] | None = None,
    ):
        if (cookie is None) != (holder_of_cookie is None):
            raise TypeError("cookie and holder_of_cookie go together")
        self.holder_of_cookie = holder_of_cookie
        self.app, self.holder_of, self.open_paths, self.max_body_bytes, self.cookie = (
            app,
            holder_of,
            open_paths,
            max_body_bytes,
            cookie,
        )
        self.headers = {**SECURITY_HEADERS, **(headers or {})}
        self.open_posts, self.body_seconds, self.failed = open_posts, body_seconds, failed

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _http(self, scope: Any, receive: Any, send: Any) -> None:
        """An answer with its headers, whatever happens."""
        headers, began, started = Headers(scope=scope), time.monotonic(), False
        given = headers.get("x-request-id", "")
        number = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

        async def sending(message: Any) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                answered = MutableHeaders(scope=message)
                answered["X-Request-ID"] = number
                for name, value in self.headers.items():
                    answered.setdefault(name, value)
            await send(message)

        try:
            await self._guarded(scope, headers, number, receive, sending)
        except Exception as error:
            response = failure(error, number)
            self.failed(time.monotonic() - began)
            if started:
                # Too late for another answer: the server must cut the connection. It logs the error it gets,
                # so not the one with the text.
                raise RuntimeError(f"the answer to {number} broke off") from None
            await response(scope, receive, sending)

    async def _guarded(self, scope: Any, headers: Headers, number: str, receive: Any, send: Any) -> None:
        try:
            holder = await self._holder(headers)
        except Unavailable as error:
            return await unavailable(str(error))(scope, receive, send)
        body: bytes | None = b""
        if _is_among(self.open_paths, scope):
            if scope["method"] not in ("GET", "HEAD"):
                return await refused(
                    405,
                    "only GET and HEAD are answered here",
                    "invalid_request_error",
                    {"Allow": "GET, HEAD"},
                )(scope, receive, send)
        else:
            if holder is None and not _is_among(self.open_posts, scope):
                refusal = refused(
                    401,
                    "no valid token; send it as Authorization: Bearer TOKEN",
                    "invalid_api_key",
                    {"WWW-Authenticate": "Bearer"},
                )
                return await refusal(scope, receive, send)
            if self.cookie and scope["method"] not in _SAFE and not from_this_site(headers):
                return await refused(403, "this request comes from another site", "forbidden")(
                    scope, receive, send
                )
            try:
                async with asyncio.timeout(self.body_seconds):
                    body = await self._body(headers, receive)
            except TimeoutError:
                message = f"the request was not there in full within {self.body_seconds:g} seconds"
                return await refused(408, message, "timeout_error", {"Connection": "close"}, code="timeout")(
                    scope, receive, send
                )
        if body is None:
            return await refused(
                413, f"the request is larger than {self.max_body_bytes} bytes", "request_too_large"
            )(scope, receive, send)
        scope["state"] = {**scope.get("state", {}), "holder": holder, "number": number}
        return await self.app(scope, _again(body, receive), send)

    async def _holder(self, headers: Headers) -> Any:
        kind, _, token = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            return self.holder_of(token.strip())
        value = cookie_of(headers, self.cookie) if self.cookie else None
        return None if value is None or self.holder_of_cookie is None else await self.holder_of_cookie(value)

    async def _body(self, headers: Headers, receive: Any) -> bytes | None:
        """The request's body, None where it is too large."""
        declared = headers.get("content-length", "0")
        if not declared.isdecimal() or int(declared) > self.max_body_bytes:
            return None
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            more = message.get("more_body", False)  # also False when the client has gone
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.max_body_bytes:
                return None
        return b"".join(parts)


def refused(
    status: int,
    message: str,
    kind: str,
    headers: Mapping[str, str] | None = None,
    param: str | None = None,
    code: str | None = None,
) -> JSONResponse:
    """An error in the form of every error here, which is OpenAI's."""
    return JSONResponse(
        {"error": {"message": message, "type": kind, "param": param, "code": code}},
        status,
        dict(headers or {}),
    )


def unavailable(message: str) -> JSONResponse:
    return refused(503, message, "unavailable", {"Retry-After": "5"})


def failure(error: Exception, number: str) -> JSONResponse:
    """What is answered to an error that nobody foresaw; the log has its type and place. Not its text,
    which may hold what was asked.
    """
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    logger.error(
        "%s failed: %s at %s",
        number,
        type(error).__name__,
        " > ".join(f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}" for frame in frames),
    )
    return refused(
        500,
        f"the request failed; the log of the server says more under {number}",
        "server_error",
        code="internal_error",
    )


async def reraise(request: Request, error: Exception) -> Response:
    """Starlette's handler of such errors, in place of its own, which answers before the Guard can."""
    raise error


def cookie_of(headers: Headers, name: str) -> str | None:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(name)
    except CookieError:
        return None
    return found and found.value


def from_this_site(headers: Headers) -> bool:
    """Whether a browser made the request for a page of this site, by what it says itself (Fetch Metadata,
    else Origin).

    Requests without either come from no browser's page, or from one too old to be fooled past SameSite
    cookies.
    """
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:
        return site in ("same-origin", "none")
    return origin is None or urlsplit(origin).netloc == headers.get("host")


def _is_among(paths: Collection[str], scope: Any) -> bool:
    path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
    return any(
        path == known or (len(known) > 1 and known.endswith("/") and path.startswith(known))
        for known in paths
    )


def _again(body: bytes, receive: Any) -> Any:
    """A receive channel that gives the body that was read, then whatever follows (the client's leaving)."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def receiving() -> Any:
        return waiting.pop() if waiting else await receive()

    return receiving
