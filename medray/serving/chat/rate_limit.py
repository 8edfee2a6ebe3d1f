"""How often one key may ask."""

from __future__ import annotations

import time
from collections.abc import Callable


class RateLimit:
    """Token buckets, one for each name: a minute's worth may come at once, and refills evenly.

    Args:
        per_minute: requests.
        clock: seconds that only go up.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic):
        self.per_minute, self.clock = per_minute, clock
        self._left: dict[str, tuple[float, float]] = {}  # name -> (tokens, when)

    def wait(self, name: str) -> float:
        """Take one; 0.0, or the seconds until there is one again."""
        now = self.clock()
        tokens, then = self._left.get(name, (float(self.per_minute), now))
        tokens = min(self.per_minute, tokens + (now - then) * self.per_minute / 60)
        self._left[name] = (tokens - 1 if tokens >= 1 else tokens, now)
        return 0.0 if tokens >= 1 else (1 - tokens) * 60 / self.per_minute
