"""Which characters a path may hold, so that no library reads it as a pattern or as another address."""

from __future__ import annotations

import os
import re

_PROTOCOL = re.compile(r"[A-Za-z0-9+.-]{2,}://")
_PATTERN = re.compile(r"[*?\[\]]")


def address_problems(field: str, address: str) -> list[str]:
    """Why an address would be read as another one: fsspec chains addresses at "::" and takes what is before
    "://" for a
    protocol."""
    if "::" in address:
        return [f"{field}: {address} holds '::', which joins two addresses; rename the folder"]
    if "://" in address and not _PROTOCOL.match(address):
        return [f"{field}: {address} holds '://' after what is no protocol; rename the folder"]
    return []


def output_problems(field: str, address: str) -> list[str]:
    """Problems of a place that is written: as of any address, and in an object store no pattern, since fsspec
    would remove
    everything that it matches."""
    problems = address_problems(field, address)
    if not problems and _PROTOCOL.match(address) and _PATTERN.search(address):
        return [
            f"{field}: {address} holds one of * ? [ ], which object stores' clients read as a pattern; "
            "choose another name"
        ]
    return problems


def model_folder_problems(field: str, path: str) -> list[str]:
    """Problems of a folder that models are loaded from: vLLM and DeepSpeed look for files by patterns that
    begin with it."""
    problems = address_problems(field, path)
    whole = path if _PROTOCOL.match(path) else os.path.abspath(path)
    if not problems and _PATTERN.search(whole):
        return [
            f"{field}: {whole} holds one of * ? [ ], and models are looked for by patterns that begin with "
            "their folder; rename it or choose another"
        ]
    return problems
