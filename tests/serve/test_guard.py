"""The guard before an app, and the tokens it knows people by."""

import asyncio
import stat

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

from medray.errors import ConfigError
from serve.guard import SECURITY_HEADERS, Guard
from serve.tokens import VARIABLE, Holder, add_holder, digest_of, main, read_tokens


async def echo(request: Request):
    holder = request.state.holder
    return JSONResponse({"holder": holder and holder.name, "body": (await request.body()).decode()}, headers={"Cache-Control": "max-age=60"})


PEOPLE = {"secret": Holder("ann"), "other": Holder("ben")}
ROUTES = [Route(path, echo, methods=["GET", "POST"]) for path in ("/", "/v1/models", "/open/any", "/opening")]


def ask(method, path, guard=None, app=None, **options):
    guarded = Guard(app or Starlette(routes=ROUTES), PEOPLE.get, {"/", "/open/"}, max_body_bytes=100, **(guard or {}))

    async def request():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guarded), base_url="http://page.example") as client:
            return await client.request(method, path, **options)

    return asyncio.run(request())


def bearer(token):
    return {"Authorization": f"Bearer {token}"}


@pytest.mark.parametrize("headers", [
    {}, bearer("wrong"), bearer(""), {"Authorization": "secret"}, {"Authorization": "Basic secret"}, {"Cookie": "session=secret"}, bearer("secret2"), bearer("Secret"),
])
def test_no_valid_token_is_401(headers):
    answer = ask("GET", "/v1/models", headers=headers)
    assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.json()["error"]["type"] == "invalid_api_key" and "holder" not in answer.text


def test_a_valid_token_is_passed_on_as_its_holder():
    assert ask("GET", "/v1/models", headers=bearer("secret")).json()["holder"] == "ann"
    assert ask("POST", "/v1/models", headers={"authorization": "bearer  other "}, content="x").json() == {"holder": "ben", "body": "x"}


def test_open_paths_are_open_and_nothing_beside_them():
    assert [ask("GET", path).status_code for path in ("/", "/open/any", "/opening", "/open/../v1/models", "/open")] == [200, 200, 401, 401, 401]
    assert ask("GET", "/").json()["holder"] is None
    assert ask("GET", "/open/any", headers=bearer("secret")).json()["holder"] == "ann"


def test_under_a_prefix():
    """Mounted as Ray Serve mounts an app with a route prefix: paths are told from what stands before them."""
    app = Starlette(routes=[Mount("/study", Guard(Starlette(routes=ROUTES), PEOPLE.get, {"/", "/open/"}))])

    async def statuses(*paths):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://page.example") as client:
            return [(await client.get(path)).status_code for path in paths]

    assert asyncio.run(statuses("/study/", "/study/open/any", "/study/v1/models")) == [200, 200, 401]


def test_cookies_hold_tokens_where_the_app_says_so():
    def cookie(value, method="GET", **headers):
        return ask(method, "/v1/models", {"cookie": "session"}, headers={"Cookie": value, **headers})

    assert cookie("a=b; session=secret").json()["holder"] == "ann"
    assert cookie("session=wrong").status_code == cookie("sessions=secret").status_code == cookie("session").status_code == 401
    # A request that changes something must come from a page of this site.
    assert cookie("session=secret", "POST", **{"Sec-Fetch-Site": "same-origin"}).status_code == 200
    for site in ("cross-site", "same-site"):
        assert cookie("session=secret", "POST", **{"Sec-Fetch-Site": site}).status_code == 403
        assert cookie("session=secret", "GET", **{"Sec-Fetch-Site": site}).status_code == 200
    assert cookie("session=secret", "POST", Origin="http://page.example").status_code == 200
    assert cookie("session=secret", "POST", Origin="http://evil.example").status_code == cookie("session=secret", "POST", Origin="null").status_code == 403


def test_bodies_over_the_limit_are_413_and_the_app_never_sees_them():
    async def pieces():
        for _ in range(11):
            yield b"0123456789"

    reached = []

    async def app(scope, receive, send):
        reached.append(scope["path"])

    for content in ("x" * 101, pieces()):  # with its length declared, and without
        assert ask("POST", "/v1/models", app=app, headers=bearer("secret"), content=content).status_code == 413
    assert ask("POST", "/", app=app, content="x" * 101).status_code == 413
    for length in ("-1", "abc", "9" * 30):
        assert ask("POST", "/v1/models", app=app, headers={**bearer("secret"), "Content-Length": length}).status_code == 413
    assert not reached
    assert ask("POST", "/v1/models", headers=bearer("secret"), content="x" * 100).json()["body"] == "x" * 100


def test_every_answer_has_the_security_headers():
    for answer in (ask("GET", "/v1/models"), ask("GET", "/v1/models", headers=bearer("secret")), ask("GET", "/open/missing"), ask("POST", "/", content="x" * 101)):
        assert {name: answer.headers.get(name) for name in SECURITY_HEADERS if name != "Cache-Control"} == {
            name: value for name, value in SECURITY_HEADERS.items() if name != "Cache-Control"}
    assert ask("GET", "/v1/models").headers["Cache-Control"] == "no-store"
    assert ask("GET", "/", guard={"headers": {"X-Frame-Options": "SAMEORIGIN"}}).headers["X-Frame-Options"] == "SAMEORIGIN"
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
    assert [tokens.holder(token) for token in (ann, ben, head)] == [Holder("dr-ann"), Holder("ben"), Holder("head", lead=True)]
    assert tokens.holder("") is tokens.holder(digest_of(ann)) is tokens.holder(ann + " ") is tokens.holder("\udcff") is None
    with pytest.raises(ConfigError, match="ben or its hash is there twice"):
        add_holder(file, "ben")
    assert (tmp_path / "clinicians.txt").read_text() == content
    monkeypatch.setenv(VARIABLE, f"x {digest_of('t')}, y {digest_of('u')} lead")
    assert read_tokens(None).holder("u") == Holder("y", lead=True)


@pytest.mark.parametrize("content, reason", [
    ("ann", "line 1: not of the form"), ("# nobody\n", "names nobody"), (f"ann {'0' * 63}", "line 1: not of the form"),
    (f"x {'0' * 64}\nann {'1' * 64} boss", "line 2: not of the form"), (f"x {'0' * 64}\ny {'0' * 64}", "line 2: y or its hash"), (f"<b> {'0' * 64}", "line 1"),
])
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
