"""The beginning of a table, as far as its format can be told from it: images that records hold inline are
cut short.
"""

from __future__ import annotations

import re
from typing import BinaryIO

CHUNK = 2**20
MOST_BYTES = 64 * 2**20  # read to get past the images of the first records

# Base64 in JSON, with escaped slashes and line breaks, or bytes as a list of numbers.
_BASE64 = re.compile(rb"([A-Za-z0-9+/=_\\-]{64})[A-Za-z0-9+/=_\\-]{192,}")
_NUMBERS = re.compile(rb"(?:\d{1,3},[ \n]*){256,}")


def skim(handle: BinaryIO, size: int) -> bytes:
    """The first `size` bytes of a file, without the rest of each long run of base64 or of numbers.

    A record that begins with an image of a megabyte shows its other fields so. Reads MOST_BYTES at most;
    fewer bytes than `size` are returned if the file ends before.
    """
    head = handle.read(size)
    read = len(head)
    head = _cut(head)
    while len(head) < size and read < MOST_BYTES and read >= size:
        more = handle.read(CHUNK)
        if not more:
            break
        read += len(more)
        # A run that goes on is cut once more: what is left of it is shorter than what is cut.
        head = _cut(head + more)
    return head[:size]


def _cut(text: bytes) -> bytes:
    return _NUMBERS.sub(b"", _BASE64.sub(rb"\1", text))
