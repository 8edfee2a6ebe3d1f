"""Signing in to the clinician page: sessions in the database, and how many sign-ins may fail. No Ray."""

import asyncio
import time

import httpx
import pytest
from pydantic import ValidationError
from sqlalchemy import create_engine, text

from medray.clinicians.database import open_database
from medray.clinicians.import_export import import_items
from medray.clinicians.store import Store
from medray.serving.clinician_page.app import PageConfig
from medray.serving.clinician_page.asgi_app import COOKIE, make_app
from medray.serving.clinician_page.sessions import (
    FAILURES,
    FAILURES_PER_ADDRESS,
    Sessions,
    TooManyFailures,
    client_address,
)
from medray.serving.tokens import Holder, Tokens, digest_of
from tests.clinicians.test_store import postgres, url  # noqa: F401  (fixtures)

TOKENS = {digest_of("secret"): Holder("ann"), digest_of("other"): Holder("head", lead=True)}


class Page:
    """Replicas of the page on one database; requests go to the one that is named."""

    def __init__(self, database, replicas=2, tokens=TOKENS, **options):
        self.stores = [Store(database) for _ in range(replicas)]
        self.apps = [make_app(store, Tokens(tokens), database, **options) for store in self.stores]
        self.cookies = httpx.Cookies()

    def ask(self, method, path, replica=0, address="10.0.0.1", cookies=None, **options):
        async def request():
            transport = httpx.ASGITransport(self.apps[replica], client=(address, 50000))
            async with httpx.AsyncClient(
                transport=transport,
                base_url="http://page.example",
                cookies=self.cookies if cookies is None else cookies,
            ) as client:
                answer = await client.request(method, path, **options)
                if cookies is None:
                    self.cookies = client.cookies
                return answer

        return asyncio.run(request())

    def sign_in(self, token="secret", **options):
        return self.ask("POST", "/api/sign-in", json={"token": token}, **options)

    def me(self, **options):
        return self.ask("GET", "/api/me", **options).json()["name"]

    def close(self):
        for store in self.stores:
            store.close()


def test_the_cookie_is_a_session_that_signing_out_ends(url, write_items, tmp_path):  # noqa: F811
    import_items(write_items(tmp_path / "items", 2), url)
    page = Page(url)
    answer = page.sign_in()
    identity = answer.cookies[COOKIE]
    assert answer.status_code == 200 and len(identity) >= 43 and "secret" not in answer.headers["Set-Cookie"]
    assert all(
        part in answer.headers["Set-Cookie"] for part in ("HttpOnly", "SameSite=strict", "Max-Age=43200")
    )
    # Every replica knows it, and one that starts anew.
    assert page.me() == page.me(replica=1) == "ann" and page.ask("GET", "/api/next", replica=1).json()["item"]
    later = Page(url, 1)
    assert later.me(cookies={COOKIE: identity}) == "ann"
    # The database holds no session that could be used, and a token is none.
    with page.stores[0].engine.connect() as connection:
        rows = connection.execute(text("select session_hash, token_hash from page_session")).tuples().all()
    assert rows == [(digest_of(identity), digest_of("secret"))]
    assert (
        page.me(cookies={COOKIE: "secret"})
        is page.me(cookies={COOKIE: digest_of(identity)})
        is page.me(cookies={COOKIE: ""})
        is None
    )
    # Signed out at one replica it is nobody's at the others, and a cookie that was copied before is worth
    # nothing.
    assert page.ask("POST", "/api/sign-out", replica=1).status_code == 200 and COOKIE not in page.cookies
    for replica in (0, 1):
        assert page.me(replica=replica, cookies={COOKIE: identity}) is None
        assert page.ask("GET", "/api/next", replica=replica, cookies={COOKIE: identity}).status_code == 401
    page.close()
    later.close()


def test_a_session_ends_by_itself_with_its_token_and_with_the_next(url, monkeypatch):  # noqa: F811
    page = Page(url, session_hours=1)
    first = page.sign_in().cookies[COOKIE]
    second = page.sign_in("other").cookies[COOKIE]  # in the same browser
    assert page.me(cookies={COOKIE: first}) is None and page.me() == "head"
    withdrawn = Page(url, 1, {digest_of("secret"): Holder("ann")})
    assert withdrawn.me(cookies={COOKIE: second}) is None
    at = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: at + 3599 * 10**9)
    assert page.me() == "head"
    monkeypatch.setattr(time, "time_ns", lambda: at + 3602 * 10**9)
    assert page.me(cookies={COOKIE: second}) is None
    page.sign_in()
    with page.stores[0].engine.connect() as connection:
        assert connection.execute(text("select count(*) from page_session")).scalar() == 1, (
            "sessions that ended are removed"
        )
    page.close()
    withdrawn.close()


def test_failed_sign_ins_are_limited_by_address_at_all_replicas(url):  # noqa: F811
    page = Page(url)
    assert [
        page.sign_in("wrong", replica=number % 2).status_code for number in range(FAILURES_PER_ADDRESS)
    ] == [401] * FAILURES_PER_ADDRESS
    for token in ("wrong", "secret"):  # the right one too, or one could go on guessing
        refused = page.sign_in(token, replica=1)
        assert (
            refused.status_code == 429
            and 1 <= int(refused.headers["Retry-After"]) <= 60
            and "try again in" in refused.json()["error"]["message"]
        )
    assert Page(url, 1).sign_in().status_code == 429, "a restart does not reset it"
    assert page.sign_in(address="10.0.0.2").status_code == 200 and page.me(address="10.0.0.1") == "ann", (
        "who is signed in works on"
    )
    page.close()


def test_failed_sign_ins_are_limited_in_all_and_for_a_minute(url, monkeypatch):  # noqa: F811
    sessions = Sessions(open_database(url), Tokens(TOKENS), 1)
    at = time.time_ns()
    for number in range(FAILURES):
        monkeypatch.setattr(time, "time_ns", lambda number=number: at + number * 10**6)
        assert sessions.sign_in("wrong", f"10.0.0.{number}") is None
    with pytest.raises(TooManyFailures) as error:
        sessions.sign_in("secret", "10.9.9.9")
    assert 55 < error.value.seconds <= 60
    monkeypatch.setattr(time, "time_ns", lambda: at + 60 * 10**9 + 10**6)
    assert sessions.sign_in("secret", "10.9.9.9")[0].name == "ann"
    with sessions.engine.connect() as connection:
        assert connection.execute(text("select count(*) from sign_in_failure")).scalar() < FAILURES
    sessions.engine.dispose()


@pytest.mark.parametrize(
    ("peer", "forwarded", "address"),
    [
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["6.6.6.6"], "10.0.0.1"),
        ("127.0.0.1", [], "127.0.0.1"),
        ("127.0.0.1", ["10.0.0.1"], "10.0.0.1"),
        ("127.0.0.1", ["6.6.6.6, 10.0.0.1"], "10.0.0.1"),
        ("127.0.0.1", ["6.6.6.6", "10.0.0.1"], "10.0.0.1"),
        ("127.0.0.1", ["6.6.6.6, 10.0.0.1, ::1"], "10.0.0.1"),
        (None, ["10.0.0.1"], ""),
        ("127.0.0.1", ["10.0.0.1:4711"], "10.0.0.1"),
        ("127.0.0.1", ["[2001:db8::1]:4711"], "2001:db8::1"),
        ("::ffff:127.0.0.1", ["10.0.0.1"], "10.0.0.1"),
        ("10.8.0.3", ["10.0.0.1"], "10.0.0.1"),
        ("127.0.0.1", ["unknown"], "unknown"),
    ],
)
def test_only_a_reverse_proxy_may_say_whom_it_asks_for(peer, forwarded, address):
    scope = {
        "type": "http",
        "client": peer and (peer, 1),
        "headers": [(b"x-forwarded-for", line.encode()) for line in forwarded],
    }
    assert client_address(scope, ("127.0.0.1", "::1", "10.8.0.0/16")) == address


def test_proxies_of_a_command_line():
    assert (
        PageConfig(proxies="10.0.0.1, ::1").proxies
        == PageConfig(proxies='["10.0.0.1","::1"]').proxies
        == ["10.0.0.1", "::1"]
    )


@pytest.mark.parametrize("proxies", ["nginx", "10.0.0.1:80", "10.0.0.0/99"])
def test_what_is_no_address_of_a_proxy_is_refused(proxies):
    with pytest.raises(ValidationError, match="neither an address nor a network"):
        PageConfig(proxies=proxies)


def test_a_database_that_does_not_answer_is_503(tmp_path):
    page = Page(f"sqlite:///{tmp_path}/j.db", 1)
    page.sign_in()
    page.stores[0].engine.dispose()
    silent = create_engine(f"sqlite:///{tmp_path}/gone/j.db")  # cannot be opened
    for part in (
        page.stores[0],
        *[
            cell.cell_contents
            for cell in page.apps[0].holder_of_cookie.__closure__
            if isinstance(cell.cell_contents, Sessions)
        ],
    ):
        part.engine = silent
    answer = page.ask("GET", "/api/me")
    assert (
        answer.status_code == 503
        and answer.headers["Retry-After"]
        and answer.json()["error"]["type"] == "unavailable"
    )
