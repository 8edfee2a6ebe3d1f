"""Who is signed in on the clinician page, and who may try to: kept in the study's database, for all replicas
and across restarts.

A browser holds a random session id in its cookie, never a token. The database holds the id's hash; signing
out deletes it.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Any

from sqlalchemy import Engine, delete, func, insert, select
from starlette.datastructures import Headers

from medray.clinicians.database import page_sessions as sessions
from medray.clinicians.database import sign_in_failures as failures
from medray.clinicians.database import writing
from medray.clinicians.store import now
from medray.serving.tokens import Holder, Tokens, digest_of

_SECOND = 10**6  # of now()
_WINDOW = 60 * _SECOND
# in a minute; tokens have 256 bits, so this is against load and noise more than against guessing
FAILURES_PER_ADDRESS, FAILURES = 10, 100


class TooManyFailures(Exception):
    """Too many failed sign-ins; `seconds` until the next one may come."""

    def __init__(self, seconds: float):
        super().__init__(seconds)
        self.seconds = seconds


class Sessions:
    """Sign-ins of the page. Safe to use from several threads, processes and hosts at once.

    Args:
        hours: after which a session ends.
    """

    def __init__(self, engine: Engine, tokens: Tokens, hours: float):
        self.engine, self.tokens, self.seconds = engine, tokens, hours * 3600

    def sign_in(self, token: str, address: str, earlier: str | None = None) -> tuple[Holder, str] | None:
        """The token's holder and a new session id; None for a token that is not known.

        Args:
            earlier: session id that the browser has already; that session ends.

        Raises TooManyFailures, whatever the token.
        """
        moment, place = now(), digest_of(address)
        with writing(self.engine) as connection:
            connection.execute(delete(failures).where(failures.c.failed_at <= moment - _WINDOW))
            for limit, which in ((FAILURES_PER_ADDRESS, failures.c.address_hash == place), (FAILURES, True)):
                latest = (
                    select(failures.c.failed_at)
                    .where(which)
                    .order_by(failures.c.failed_at.desc())
                    .limit(limit)
                    .subquery()
                )
                count, oldest = connection.execute(
                    select(func.count(), func.min(latest.c.failed_at)).select_from(latest)
                ).one()
                if count == limit:
                    raise TooManyFailures(max(1.0, (oldest + _WINDOW - moment) / _SECOND))
            holder = self.tokens.holder(token)
            if holder is None:
                connection.execute(insert(failures).values(address_hash=place, failed_at=moment))
                return None
            identity = secrets.token_urlsafe(32)
            gone = sessions.c.expires_at <= moment
            connection.execute(
                delete(sessions).where(
                    gone if earlier is None else gone | (sessions.c.session_hash == digest_of(earlier))
                )
            )
            expires = moment + int(self.seconds * _SECOND)
            connection.execute(
                insert(sessions).values(
                    session_hash=digest_of(identity), token_hash=digest_of(token), expires_at=expires
                )
            )
            return holder, identity

    def holder(self, identity: str) -> Holder | None:
        """Whose session it is; None for one that has ended, and for a token that is no longer known."""
        wanted = select(sessions.c.token_hash).where(
            sessions.c.session_hash == digest_of(identity), sessions.c.expires_at > now()
        )
        with self.engine.connect() as connection:
            token_hash = connection.scalar(wanted)
        return None if token_hash is None else self.tokens.holders.get(token_hash)

    def sign_out(self, identity: str) -> None:
        """End a session."""
        with writing(self.engine) as connection:
            connection.execute(delete(sessions).where(sessions.c.session_hash == digest_of(identity)))


def client_address(scope: Any, proxies: Collection[str]) -> str:
    """The address a request comes from: of the connection, or, where that is one of the reverse proxies, the
    last other one in X-Forwarded-For.

    Args:
        proxies: addresses, or networks (10.0.0.0/8).
    """
    networks = [ip_network(proxy) for proxy in proxies]
    address = _bare_address((scope.get("client") or ("",))[0])
    forwarded = Headers(scope=scope).getlist("x-forwarded-for")
    for hop in reversed([hop.strip() for line in forwarded for hop in line.split(",")]):
        if not _is_in(address, networks):
            break
        address = _bare_address(hop)
    return address


def _bare_address(hop: str) -> str:
    """An address without the port that some proxies write, an IPv4 one in IPv6's clothes as IPv4; other
    text as it is.
    """
    host = (
        hop[1:].partition("]")[0]
        if hop.startswith("[")
        else hop.partition(":")[0]
        if hop.count(":") == 1
        else hop
    )
    try:
        found = ip_address(host)
    except ValueError:
        return hop
    return str(getattr(found, "ipv4_mapped", None) or found)


def _is_in(address: str, networks: Sequence[IPv4Network | IPv6Network]) -> bool:
    try:
        found = ip_address(address)
    except ValueError:
        return False
    return any(found in network for network in networks)
