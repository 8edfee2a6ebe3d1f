"""Stored DICOM values to grey or colour: modality and VOI tables, windows, padding, palettes (numpy only).

Standard: DICOM PS3.3 C.7.6.3 (pixels), C.11.1 (modality), C.11.2 (values of interest).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pydicom import Dataset

from medray.images.decoding import ImageError

OTHER_COLOUR_SPACE = (
    "its PhotometricInterpretation is not one of MONOCHROME1, MONOCHROME2, RGB, YBR_FULL, "
    "YBR_FULL_422, PALETTE COLOR"
)


def render(stored: np.ndarray, photometric: str, header: Dataset, frame: int) -> np.ndarray:
    """Stored values as uint8 [rows, columns] or [rows, columns, 3].

    Raises ImageError for a colour space medray does not know and for segmented palettes.
    """
    words = "<u2" if header.original_encoding[1] else ">u2"
    if photometric in ("MONOCHROME1", "MONOCHROME2"):
        picture = _grey(stored, header, frame, words)
        picture = np.where(
            _padding(stored, header), 0, 1 - picture if photometric == "MONOCHROME1" else picture
        )
    elif photometric == "PALETTE COLOR":
        picture = _palette(stored, header, words)
    elif photometric == "RGB":
        picture = stored / np.float32(2 ** int(header.BitsStored) - 1)
    else:
        raise ImageError(OTHER_COLOUR_SPACE)
    return (picture.clip(0, 1) * 255).round().astype(np.uint8)


def _padding(stored: np.ndarray, header: Dataset) -> np.ndarray:
    """Mask of the pixels outside the picture (PixelPaddingValue, or the range up to
    PixelPaddingRangeLimit).
    """
    value = header.get("PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, bool)
    wrap = 2 ** int(header.BitsAllocated)
    # Signed data often have their padding written as unsigned, and the other way round.
    low, high = sorted(
        _wrapped(int(v), stored.dtype, wrap) for v in (value, header.get("PixelPaddingRangeLimit", value))
    )
    return (stored >= low) & (stored <= high)


def _wrapped(value: int, dtype: np.dtype, wrap: int) -> int:
    limits = np.iinfo(dtype)
    return value - wrap if value > limits.max else value + wrap if value < limits.min else value


def _module(header: Dataset, frame: int, sequence: str) -> Dataset:
    """Where a frame's values stand: its own functional group, the shared one, or the data set itself
    (PS3.3 C.7.6.16).
    """
    for groups, index in (
        (header.get("PerFrameFunctionalGroupsSequence"), frame),
        (header.get("SharedFunctionalGroupsSequence"), 0),
    ):
        if groups and index < len(groups) and groups[index].get(sequence):
            return groups[index].get(sequence)[0]
    return header


def _number(dataset: Dataset, tag: str) -> float | None:
    """A numeric tag's first value; None where it is absent, empty or not finite."""
    if tag not in dataset or dataset[tag].VM == 0:
        return None
    value = float(dataset[tag].value[0] if dataset[tag].VM > 1 else dataset[tag].value)
    return value if np.isfinite(value) else None


def _grey(stored: np.ndarray, header: Dataset, frame: int, words: str) -> np.ndarray:
    """Stored values as grey between 0 and 1 (float32, clipping left to the caller); `words` is the byte
    order of 16-bit tables.
    """
    bits, signed = int(header.BitsStored), int(header.PixelRepresentation)
    ends = np.array([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1] if signed else [0, 2**bits - 1], np.float64)
    module = _module(header, frame, "PixelValueTransformationSequence")
    if header.get("ModalityLUTSequence"):
        item = header.ModalityLUTSequence[0]
        values, top = _lookup(stored, item.LUTDescriptor, item.LUTData, words, bool(signed))
        ends = np.array([0, top], np.float64)
    else:
        slope, intercept = _number(module, "RescaleSlope") or 1.0, _number(module, "RescaleIntercept") or 0.0
        values = stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)
        ends = np.sort(ends * slope + intercept)
    if header.get("VOILUTSequence"):
        item = header.VOILUTSequence[0]
        looked_up, top = _lookup(values.round(), item.LUTDescriptor, item.LUTData, words, bool(ends[0] < 0))
        return looked_up / np.float32(top)
    module = _module(header, frame, "FrameVOILUTSequence")
    centre, width = _number(module, "WindowCenter"), _number(module, "WindowWidth")
    function = str(module.get("VOILUTFunction") or "LINEAR").strip().upper()
    if centre is not None and width is not None and width > 0 and (width >= 1 or function != "LINEAR"):
        return _window(values, centre, width, function)
    if bits > 8:
        inside = values[~_padding(stored, header)]
        ends = np.percentile(inside, (0.5, 99.5)) if inside.size else ends
        if ends[0] == ends[1] and inside.size:
            ends = np.array([inside.min(), inside.max()])
    return (values - np.float32(ends[0])) / np.float32(max(ends[1] - ends[0], 1e-6))


def _window(values: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
    """PS3.3 C.11.2.1.2 (LINEAR) and C.11.2.1.3 (SIGMOID, LINEAR_EXACT), with outputs from 0 to 1 where
    those are inside the window.
    """
    if function == "SIGMOID":
        return 1 / (1 + np.exp((-4 / width) * (values - np.float32(centre))))
    if function == "LINEAR_EXACT":
        return (values - np.float32(centre)) / np.float32(width) + np.float32(0.5)
    if width == 1:
        return (values > centre - 0.5).astype(np.float32)
    return (values - np.float32(centre - 0.5)) / np.float32(width - 1) + np.float32(0.5)


def _lookup(
    values: np.ndarray, descriptor: Any, table: Any, words: str, signed: bool
) -> tuple[np.ndarray, int]:
    """(table entries of the values as float32, the greatest an entry can be), by PS3.3 C.11.1.1: values
    below the first mapped one take the first entry, values beyond the table the last.
    """
    first = int(descriptor[1])
    if signed and first > 2**15 - 1:
        first -= 2**16
    table = _entries(descriptor, table, words)
    index = np.clip(values.astype(np.int64) - first, 0, len(table) - 1)
    return table[index], _greatest(descriptor, float(table.max()))


def _entries(descriptor: Any, table: Any, words: str) -> np.ndarray:
    """The entries of a table (float32). Their size follows from the table's length, whatever the
    descriptor says (PS3.3 C.7.6.3.1.5, second note).
    """
    entries = int(descriptor[0]) & 0xFFFF or 2**16
    if isinstance(table, bytes):
        table = np.frombuffer(table, words if len(table) >= 2 * entries else np.uint8)
    made = np.atleast_1d(np.asarray(table, np.float32))[:entries]
    if not made.size:
        raise ImageError("a lookup table is empty")
    return made


def _greatest(descriptor: Any, largest: float) -> int:
    """The greatest value that entries can have, if `largest` is the largest there is: by the descriptor's
    bits, which some files give as 8 for words of 16 bits, and as 16 for bytes.
    """
    bits = int(descriptor[2])
    if not 1 <= bits <= 16 or largest > 2**bits - 1:
        return 255 if largest <= 255 else 2**16 - 1
    return 2**bits - 1


def _palette(stored: np.ndarray, header: Dataset, words: str) -> np.ndarray:
    """[rows, columns, 3] between 0 and 1. Raises ImageError for segmented palettes: a few bytes of those
    unfold without bound.
    """
    if "RedPaletteColorLookupTableData" not in header:
        raise ImageError("its palette is segmented or missing; convert the file to RGB")
    tables = [
        (
            header[f"{colour}PaletteColorLookupTableDescriptor"].value,
            header[f"{colour}PaletteColorLookupTableData"].value,
        )
        for colour in ("Red", "Green", "Blue")
    ]
    # One scale for the three colours: a palette of blues has a red table of small numbers.
    largest = max(float(_entries(descriptor, table, words).max()) for descriptor, table in tables)
    top = np.float32(255 if largest <= 255 else _greatest(tables[0][0], largest))
    signed = bool(int(header.PixelRepresentation))
    return np.stack(
        [_lookup(stored, descriptor, table, words, signed)[0] / top for descriptor, table in tables], axis=-1
    )
