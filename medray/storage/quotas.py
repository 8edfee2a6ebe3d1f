"""How many of each group are taken (pure)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Literal, TypeVar

from medray.stable_draws import hash64

GroupT = TypeVar("GroupT", bound=Hashable)

UNKNOWN = "unknown"  # the group of rows without a modality


def shares(
    total: int, sizes: Mapping[GroupT, int], rule: Literal["proportional", "equal"], seed: int = 0
) -> dict[GroupT, int]:
    """`total` divided over groups of these sizes; all of them where there are no more.

    proportional: the same share of every group, by largest remainders, but at least one of each as long as
        there are enough. equal: the same number of each; what a group is too
    small for goes to the others. Ties are broken by a draw with `seed`.
    """
    left = min(total, sum(sizes.values()))
    drawn = {group: hash64(str(group), seed) for group in sizes}
    if rule == "proportional":
        exact = {group: left * size / max(sum(sizes.values()), 1) for group, size in sizes.items()}
        given = {group: min(sizes[group], max(math.floor(share), 1)) for group, share in exact.items()}
        while sum(given.values()) < left:
            given[max(sizes, key=lambda group: (exact[group] - given[group], drawn[group]))] += 1
        while sum(given.values()) > left:
            given[
                max(
                    sizes,
                    key=lambda group: (
                        given[group] > 1,
                        given[group] > 0,
                        given[group] - exact[group],
                        drawn[group],
                    ),
                )
            ] -= 1
        return given
    given = {}
    # From the smallest on: who cannot take an equal part of what is left takes all it has.
    for place, group in enumerate(sorted(sizes, key=lambda group: (sizes[group], drawn[group]))):
        given[group] = min(sizes[group], left // (len(sizes) - place))
        left -= given[group]
    return given
