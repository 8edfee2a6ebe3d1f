"""Draws that keys alone decide: the same on every machine, in any order of the rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import xxhash


def digest(*keys: Any) -> str:
    """16 hex digits fixed by the keys: the same on every machine."""
    return hashlib.sha256("|".join(map(str, keys)).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def image_digest(image: bytes) -> str:
    """16 hex digits of an encoded image: its id where the source gives none."""
    return hashlib.sha256(image).hexdigest()[:16]


def drawn(items: Iterable[str], *keys: Any) -> list[str]:
    """The items in a random order that the keys and the items alone fix."""
    return sorted(items, key=lambda item: digest(*keys, item))


def unit(*keys: Any) -> float:
    """A number in [0, 1) fixed by the keys: the same on every machine."""
    return int.from_bytes(hashlib.sha256("|".join(map(str, keys)).encode()).digest()[:7], "big") / 2**56


def hash64(text: str, seed: int = 0) -> int:
    """A number below 2**64 fixed by text and seed: the same on every machine."""
    return xxhash.xxh3_64_intdigest(text.encode(), seed & (2**64 - 1))


def seed_for(base_seed: int, sample_id: str, *place: str | int) -> int:
    """A request's seed: the same on every run and machine for the same base seed, sample and place.

    Below 2**62, so that `seed + i` stays a valid 64-bit seed.
    """
    text = "\x1f".join([str(base_seed), sample_id, *map(str, place)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2
