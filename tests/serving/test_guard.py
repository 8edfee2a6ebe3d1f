"""The guard before an app, and the tokens it knows people by."""

import asyncio
import json
import logging
import re
import stat
import traceback

import httpx
import pytest
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

from medray.clinicians.store import Store
from medray.errors import ConfigError
from medray.serving.clinician_page.asgi_app import make_app
from medray.serving.guard import SECURITY_HEADERS, Guard, Unavailable, reraise
from medray.serving.tokens import VARIABLE, Holder, Tokens, add_holder, digest_of, main, read_tokens


async def echo(request: Request):
    holder = request.state.holder
    return JSONResponse(
        {"holder": holder and holder.name, "body": (await request.body()).decode()},
        headers={"Cache-Control": "max-age=60"},
    )


async def broken(request: Request):
    raise RuntimeError(SECRET)


SECRET = "a 54 year old man called Doe"
PEOPLE = {"secret": Holder("ann"), "other": Holder("ben")}
ROUTES = [
    Route(path, echo, methods=["GET", "POST"])
    for path in ("/", "/v1/models", "/open/any", "/opening", "/sign-in")
] + [Route("/broken", broken)]


def guarded_by(app=None, **options):
    return Guard(
        app or Starlette(routes=ROUTES, exception_handlers={Exception: reraise}),
        PEOPLE.get,
        {"/", "/open/"},
        max_body_bytes=100,
        **options,
    )


def ask(method, path, guard=None, app=None, **options):
    guarded = guarded_by(app, **(guard or {}))

    async def request():
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(guarded), base_url="http://page.example"
        ) as client:
            return await client.request(method, path, **options)

    return asyncio.run(request())


def bearer(token):
    return {"Authorization": f"Bearer {token}"}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("wrong"),
        bearer(""),
        {"Authorization": "secret"},
        {"Authorization": "Basic secret"},
        {"Cookie": "session=secret"},
        bearer("secret2"),
        bearer("Secret"),
    ],
)
def test_no_valid_token_is_401(headers):
    answer = ask("GET", "/v1/models", headers=headers)
    assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.json()["error"]["type"] == "invalid_api_key" and "holder" not in answer.text


def test_a_valid_token_is_passed_on_as_its_holder():
    assert ask("GET", "/v1/models", headers=bearer("secret")).json()["holder"] == "ann"
    assert ask("POST", "/v1/models", headers={"authorization": "bearer  other "}, content="x").json() == {
        "holder": "ben",
        "body": "x",
    }


def test_open_paths_are_open_and_nothing_beside_them():
    assert [
        ask("GET", path).status_code for path in ("/", "/open/any", "/opening", "/open/../v1/models", "/open")
    ] == [200, 200, 401, 401, 401]
    assert ask("GET", "/").json()["holder"] is None
    assert ask("GET", "/open/any", headers=bearer("secret")).json()["holder"] == "ann"


def test_under_a_prefix():
    """Mounted as Ray Serve mounts an app with a route prefix: paths are told from what stands before them."""
    app = Starlette(routes=[Mount("/study", Guard(Starlette(routes=ROUTES), PEOPLE.get, {"/", "/open/"}))])

    async def statuses(*paths):
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://page.example"
        ) as client:
            return [(await client.get(path)).status_code for path in paths]

    assert asyncio.run(statuses("/study/", "/study/open/any", "/study/v1/models")) == [200, 200, 401]


def test_cookies_hold_sessions_where_the_app_says_so():
    async def of_session(identity):
        if identity == "silent":
            raise Unavailable("the database does not answer")
        return {"s1": PEOPLE["secret"]}.get(identity)

    def cookie(value, method="GET", **headers):
        return ask(
            method,
            "/v1/models",
            {"cookie": "session", "holder_of_cookie": of_session},
            headers={"Cookie": value, **headers},
        )

    assert cookie("session=secret").status_code == 401, "a token is no session"
    silent = cookie("session=silent")
    assert (
        silent.status_code == 503
        and silent.headers["Retry-After"]
        and silent.headers["X-Request-ID"]
        and silent.json()["error"]["type"] == "unavailable"
    )

    assert cookie("a=b; session=s1").json()["holder"] == "ann"
    assert (
        cookie("session=wrong").status_code
        == cookie("sessions=secret").status_code
        == cookie("session").status_code
        == 401
    )
    # A request that changes something must come from a page of this site.
    assert cookie("session=s1", "POST", **{"Sec-Fetch-Site": "same-origin"}).status_code == 200
    for site in ("cross-site", "same-site"):
        assert cookie("session=s1", "POST", **{"Sec-Fetch-Site": site}).status_code == 403
        assert cookie("session=s1", "GET", **{"Sec-Fetch-Site": site}).status_code == 200
    assert cookie("session=s1", "POST", Origin="http://page.example").status_code == 200
    assert (
        cookie("session=s1", "POST", Origin="http://evil.example").status_code
        == cookie("session=s1", "POST", Origin="null").status_code
        == 403
    )


def test_bodies_over_the_limit_are_413_and_the_app_never_sees_them():
    async def pieces():
        for _ in range(11):
            yield b"0123456789"

    reached = []

    async def app(scope, receive, send):
        reached.append(scope["path"])

    for content in ("x" * 101, pieces()):  # with its length declared, and without
        assert (
            ask("POST", "/v1/models", app=app, headers=bearer("secret"), content=content).status_code == 413
        )
    assert ask("POST", "/sign-in", {"open_posts": {"/sign-in"}}, app, content="x" * 101).status_code == 413
    for length in ("-1", "abc", "9" * 30):
        assert (
            ask(
                "POST", "/v1/models", app=app, headers={**bearer("secret"), "Content-Length": length}
            ).status_code
            == 413
        )
    assert not reached
    assert ask("POST", "/v1/models", headers=bearer("secret"), content="x" * 100).json()["body"] == "x" * 100


async def answer_of(guard, method, path, receive, headers=None):
    """(status, headers, body) to a request whose body comes from `receive`."""
    sent = []

    async def send(message):
        sent.append(message)

    raw = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    await guard(
        {"type": "http", "method": method, "path": path, "query_string": b"", "headers": raw}, receive, send
    )
    return (
        sent[0]["status"],
        Headers(raw=sent[0]["headers"]),
        b"".join(message.get("body", b"") for message in sent[1:]),
    )


async def unread():
    raise AssertionError("the body was read")


def test_no_body_is_read_of_requests_without_a_key_nor_on_open_paths():
    guard = guarded_by()
    size = {"Content-Length": "99999999"}
    for method, path, headers, status in (
        ("POST", "/v1/models", size, 401),
        ("POST", "/v1/models", bearer("wrong"), 401),
        ("GET", "/", size, 200),
        ("GET", "/open/any", size | bearer("secret"), 200),
        ("POST", "/", {}, 405),
        ("PUT", "/open/any", size, 405),
        ("OPTIONS", "/", {}, 405),
        ("POST", "/open/any", bearer("secret"), 405),
    ):
        answered, told, body = asyncio.run(answer_of(guard, method, path, unread, headers))
        assert answered == status, (method, path)
        if status == 405:
            assert (
                told["Allow"] == "GET, HEAD" and json.loads(body)["error"]["type"] == "invalid_request_error"
            )
    assert ask("GET", "/", content="x" * 1000).json()["body"] == ""
    assert ask("POST", "/sign-in", {"open_posts": {"/sign-in"}}, content="word").json() == {
        "holder": None,
        "body": "word",
    }


@pytest.mark.parametrize("pause", [10, 0.02])
def test_a_body_that_does_not_come_is_408(pause):
    """Not at all, or so slowly that every piece by itself is in time."""

    async def slow():
        await asyncio.sleep(pause)
        return {"type": "http.request", "body": b"x", "more_body": True}

    status, headers, body = asyncio.run(
        asyncio.wait_for(
            answer_of(guarded_by(body_seconds=0.2), "POST", "/v1/models", slow, bearer("secret")), 5
        )
    )
    assert status == 408 and headers["Connection"] == "close" and headers["X-Request-ID"]
    assert json.loads(body)["error"] | {"message": ""} == {
        "message": "",
        "type": "timeout_error",
        "param": None,
        "code": "timeout",
    }


def test_every_answer_has_the_requests_id():
    statuses = []
    for method, path, options in (
        ("GET", "/v1/models", {}),
        ("GET", "/", {}),
        ("POST", "/", {}),
        ("GET", "/missing", {"headers": bearer("secret")}),
        ("GET", "/broken", {"headers": bearer("secret")}),
        ("POST", "/v1/models", {"headers": bearer("secret"), "content": "x" * 101}),
    ):
        answer = ask(
            method, path, **(options | {"headers": {**options.get("headers", {}), "X-Request-ID": "mine-1"}})
        )
        assert answer.headers["X-Request-ID"] == "mine-1"
        statuses.append(answer.status_code)
        for given in ({}, {"X-Request-ID": "bad id"}, {"X-Request-ID": "x" * 65}):
            assert re.fullmatch(
                "[0-9a-f]{32}",
                ask(method, path, **(options | {"headers": {**options.get("headers", {}), **given}})).headers[
                    "X-Request-ID"
                ],
            )
    assert statuses == [401, 200, 405, 404, 500, 413]


def test_an_error_that_nobody_foresaw(caplog, monkeypatch):
    # else not seen where an earlier test has started Ray, which keeps its own logs
    for name, value in (("handlers", [caplog.handler]), ("propagate", False)):
        monkeypatch.setattr(logging.getLogger("ray.serve"), name, value)
    failed = []
    answer = ask(
        "GET", "/broken", {"failed": failed.append}, headers={**bearer("secret"), "X-Request-ID": "r1"}
    )
    assert (
        answer.status_code == 500
        and answer.headers["X-Frame-Options"] == "DENY"
        and "r1" in answer.json()["error"].pop("message")
    )
    assert answer.json()["error"] | {"message": ""} == {
        "message": "",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    (told,) = [record.getMessage() for record in caplog.records]
    assert (
        told.startswith("r1 failed: RuntimeError at ")
        and "serving/test_guard.py:" in told
        and SECRET not in answer.text + caplog.text
        and len(failed) == 1
    )

    async def breaks_off(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError(SECRET)

    with pytest.raises(RuntimeError, match="r2 broke off") as error:  # the server then cuts the connection
        ask("GET", "/", {"failed": failed.append}, breaks_off, headers={"X-Request-ID": "r2"})
    assert SECRET not in "".join(traceback.format_exception(error.value)) + caplog.text and len(failed) == 2


def test_the_clinician_page_answers_errors_in_the_same_form(tmp_path):
    class Broken(Store):
        def next_item(self, name):
            raise RuntimeError(SECRET)

    app = make_app(
        Broken(f"sqlite:///{tmp_path}/j.db"), Tokens({digest_of("secret"): Holder("ann")}), "sqlite://"
    )

    async def requests():
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://page.example"
        ) as client:
            return (
                await client.get("/api/next", headers=bearer("secret")),
                await client.post("/api/sign-in", json={"token": "secret"}),
                await client.post("/api/me"),
            )

    broken, signed_in, wrong = asyncio.run(requests())
    assert (
        broken.status_code == 500
        and broken.json()["error"]["code"] == "internal_error"
        and SECRET not in broken.text
    )
    assert signed_in.json()["name"] == "ann" and wrong.status_code == 405


def test_every_answer_has_the_security_headers():
    for answer in (
        ask("GET", "/v1/models"),
        ask("GET", "/v1/models", headers=bearer("secret")),
        ask("GET", "/open/missing"),
        ask("POST", "/v1/models", headers=bearer("secret"), content="x" * 101),
    ):
        assert {name: answer.headers.get(name) for name in SECURITY_HEADERS if name != "Cache-Control"} == {
            name: value for name, value in SECURITY_HEADERS.items() if name != "Cache-Control"
        }
    assert ask("GET", "/v1/models").headers["Cache-Control"] == "no-store"
    assert (
        ask("GET", "/", guard={"headers": {"X-Frame-Options": "SAMEORIGIN"}}).headers["X-Frame-Options"]
        == "SAMEORIGIN"
    )
    assert ask("GET", "/").headers["Cache-Control"] == "max-age=60"  # what the app says itself stays


def test_websockets_are_closed_and_lifespans_reach_the_app():
    seen, sent = [], []

    async def app(scope, receive, send):
        seen.append(scope["type"])

    async def send(message):
        sent.append(message)

    guard = Guard(app, PEOPLE.get, {"/"})
    asyncio.run(guard({"type": "websocket", "path": "/"}, None, send))
    asyncio.run(guard({"type": "lifespan"}, None, send))
    assert (seen, sent) == (["lifespan"], [{"type": "websocket.close", "code": 1008}])


def test_a_file_of_tokens(tmp_path, capsys, monkeypatch):
    file = str(tmp_path / "clinicians.txt")
    ann, head = add_holder(file, "dr-ann"), add_holder(file, "head", lead=True)
    main([file, "ben"])
    ben = capsys.readouterr().out.strip()
    content = (tmp_path / "clinicians.txt").read_text()
    assert not any(token in content for token in (ann, ben, head)) and min(map(len, (ann, ben, head))) >= 43
    assert stat.S_IMODE((tmp_path / "clinicians.txt").stat().st_mode) == 0o600
    tokens = read_tokens(file)
    assert [tokens.holder(token) for token in (ann, ben, head)] == [
        Holder("dr-ann"),
        Holder("ben"),
        Holder("head", lead=True),
    ]
    assert (
        tokens.holder("")
        is tokens.holder(digest_of(ann))
        is tokens.holder(ann + " ")
        is tokens.holder("\udcff")
        is None
    )
    with pytest.raises(ConfigError, match="ben or its hash is there twice"):
        add_holder(file, "ben")
    assert (tmp_path / "clinicians.txt").read_text() == content
    monkeypatch.setenv(VARIABLE, f"x {digest_of('t')}, y {digest_of('u')} lead")
    assert read_tokens(None).holder("u") == Holder("y", lead=True)


@pytest.mark.parametrize(
    "content, reason",
    [
        ("ann", "line 1: not of the form"),
        ("# nobody\n", "lists no users"),
        (f"ann {'0' * 63}", "line 1: not of the form"),
        (f"x {'0' * 64}\nann {'1' * 64} boss", "line 2: not of the form"),
        (f"x {'0' * 64}\ny {'0' * 64}", "line 2: y or its hash"),
        (f"<b> {'0' * 64}", "line 1"),
    ],
)
def test_bad_files_of_tokens_are_named(tmp_path, content, reason):
    (tmp_path / "tokens").write_text(content)
    with pytest.raises(ConfigError, match=reason):
        read_tokens(str(tmp_path / "tokens"))


def test_no_tokens_at_all_is_an_error(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(ConfigError, match="name a file"):
        read_tokens(None)
    with pytest.raises(ConfigError, match="no file"):
        read_tokens(str(tmp_path / "nothing"))
