"""Tokens: who may use an endpoint. The file holds their hashes only; a token is shown once, when it is made.

    python -m serve.tokens clinicians.txt dr-lin          # prints dr-lin's token, adds its hash to the file
    python -m serve.tokens clinicians.txt head --lead     # a lead also sees agreement and may export
    python -m serve.tokens keys.txt pacs-viewer           # a key of the endpoint

A line is `name hash` or `name hash lead`. Take a line out to withdraw a token.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import os
import re
import secrets
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from medray.errors import ConfigError
from medray.private_files import private_file, write_private

# of the clinician page: the same lines, where there is no file; a comma may stand for the end of a line
VARIABLE = "MEDRAY_CLINICIANS"
KEYS_VARIABLE = "MEDRAY_KEYS"  # of the endpoint
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Holder:
    name: str
    lead: bool = False


class Tokens:
    """Who holds which token.

    Args:
        holders: hash of the token -> who holds it. Tokens are 256 random bits, so a plain hash cannot be
            turned back.
    """

    def __init__(self, holders: dict[str, Holder]):
        self.holders = holders

    def holder(self, token: str) -> Holder | None:
        digest = digest_of(token)
        found = [holder for known, holder in self.holders.items() if hmac.compare_digest(known, digest)]
        return found[0] if found else None


def digest_of(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def read_tokens(file: str | None, variable: str = VARIABLE) -> Tokens:
    """The tokens of a file, or of an environment variable where no file is named.

    Raises ConfigError where there are none, or a line is not of the form.
    """
    if file is not None:
        if not Path(file).is_file():
            raise ConfigError(f"tokens: no file {file}; make one with: python -m serve.tokens {file} NAME")
        return Tokens(_parse(_lines(Path(file)), file))
    if not os.environ.get(variable):
        raise ConfigError(
            f"tokens: name a file (python -m serve.tokens FILE NAME makes one) or set {variable}"
        )
    return Tokens(_parse(re.split(r"[\n,]", os.environ[variable]), variable))


def _lines(path: Path) -> list[str]:
    """The file's lines; rights on it that others have are taken away, if this user owns it."""
    try:
        private_file(path)
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"tokens: {path} cannot be read: {error}") from error


def _parse(lines: Iterable[str], where: str) -> dict[str, Holder]:
    holders: dict[str, Holder] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        name, digest, role = [*words, "", ""][:3]
        if (
            not _NAME.fullmatch(name)
            or not _DIGEST.fullmatch(digest)
            or role not in ("", "lead")
            or len(words) > 3
        ):
            raise ConfigError(
                f"tokens: {where}, line {number}: not of the form 'name hash' or 'name hash lead'; make "
                "lines with python -m serve.tokens FILE NAME"
            )
        if digest in holders or name in {holder.name for holder in holders.values()}:
            raise ConfigError(
                f"tokens: {where}, line {number}: {name} or its hash is there twice; take one of the lines "
                "out"
            )
        holders[digest] = Holder(name, role == "lead")
    if not holders:
        raise ConfigError(f"tokens: {where} lists no users; add one with python -m serve.tokens FILE NAME")
    return holders


def add_holder(file: str, name: str, lead: bool = False) -> str:
    """Add a line to the file, which only its owner may read, and return the new token. Raises ConfigError
    for a name that is taken.
    """
    path = Path(file)
    lines = _lines(path) if path.exists() else []
    token = secrets.token_urlsafe(32)
    lines.append(f"{name} {digest_of(token)}{' lead' if lead else ''}")
    _parse(lines, file)
    try:
        write_private(path.resolve(), "\n".join(lines) + "\n")
    except OSError as error:
        raise ConfigError(f"tokens: {file} cannot be written: {error.strerror}") from error
    return token


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="medray keys" if sys.argv[0] == "medray keys" else "python -m serve.tokens",
        description="Make a token for someone; its hash goes into the file.",
    )
    parser.add_argument("file")
    parser.add_argument(
        "name", help="letters, digits and . _ @ -, such as dr-lin; stands beside every judgement"
    )
    parser.add_argument("--lead", action="store_true", help="may also see agreement and export")
    given = parser.parse_args(arguments)
    try:
        print(add_holder(given.file, given.name, given.lead))
    except ConfigError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
