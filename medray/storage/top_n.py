"""The best of very many (pure, streamed): which of each group lie among its n best, without holding or
sorting them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

DIGIT_BITS = 16
# (group of each item (N,) int, key (N, W) uint64, leading word first), in pieces
Keys = Iterable[tuple[np.ndarray, np.ndarray]]


def descending(scores: np.ndarray) -> np.ndarray:
    """Scores (N,) in 64 bits as uint64 that sort the other way round: the highest score has the lowest
    key. NaN is not allowed.
    """
    bits = np.ascontiguousarray(scores + 0.0, np.float64).view(np.uint64)  # + 0.0: minus zero is zero
    sign = np.uint64(2**63)
    ascending = np.where(bits & sign, ~bits, bits | sign)
    return ~ascending


def thresholds(read: Callable[[], Keys], wanted: Mapping[int, int], words: int) -> dict[int, np.ndarray]:
    """For each group the largest key (W,) of its `wanted` lowest keys: radix selection, a pass over the items
    for every 16 bits.

    Args:
        read: gives the items anew for every pass.
        wanted: from 1 to the number of the group's items. Keys of a group must differ.

    Memory: 65536 counters for each group.
    """
    digits_of_word = 64 // DIGIT_BITS
    prefix = {group: np.zeros(words, np.uint64) for group in wanted}
    left = dict(wanted)
    for place in range(words * digits_of_word):
        word, shift = place // digits_of_word, np.uint64(64 - DIGIT_BITS * (place % digits_of_word + 1))
        counts = {group: np.zeros(2**DIGIT_BITS, np.int64) for group in wanted}
        for groups_N, keys_NW in read():
            for group in wanted:
                mine_MW = keys_NW[groups_N == group]
                same_M = _leading(mine_MW, word, shift) == _leading(prefix[group][None], word, shift)
                digits = (mine_MW[same_M.all(1), word] >> shift) & np.uint64(2**DIGIT_BITS - 1)
                counts[group] += np.bincount(digits.astype(np.int64), minlength=2**DIGIT_BITS)
        for group, found in counts.items():
            upto = found.cumsum()
            digit = int(np.searchsorted(upto, left[group]))
            left[group] -= int(upto[digit] - found[digit])
            prefix[group][word] |= np.uint64(digit) << shift
    return prefix


def at_most(keys: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    """Which keys (N, W) are the threshold (W,) or lower: (N,)."""
    result = np.ones(len(keys), bool)
    for word in reversed(range(keys.shape[1])):
        result = (keys[:, word] < threshold[word]) | ((keys[:, word] == threshold[word]) & result)
    return result


def _leading(keys_NW: np.ndarray, word: int, shift: np.uint64) -> np.ndarray:
    """The words before `word`, and of it the bits above the digit at `shift`: (N, word + 1)."""
    # in two steps: by 64 bits at once is undefined
    above = keys_NW[:, word] >> shift >> np.uint64(DIGIT_BITS - 1) >> np.uint64(1)
    return np.column_stack([keys_NW[:, :word], above])
