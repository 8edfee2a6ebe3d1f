"""Ids as 16-byte digests (XXH3-128): those of a hundred million rows fit into the memory of one process."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import xxhash


def digests(ids: Iterable[str]) -> np.ndarray:
    """Digests of ids, sorted, equal ones kept; dtype S16."""
    joined = b"".join(xxhash.xxh3_128_digest(identity.encode()) for identity in ids)
    return np.sort(np.frombuffer(joined, "S16"))


def contains(known: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """For each digest of `asked` whether it is in `known`, which is sorted."""
    if not len(known):
        return np.zeros(len(asked), bool)
    places = np.minimum(np.searchsorted(known, asked), len(known) - 1)
    return known[places] == asked
