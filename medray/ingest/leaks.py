"""Images that stand in more than one split: the same pixels, nearly the same picture, or the same patient
(pure, no Ray).

Near means a small Hamming distance between 64-bit perceptual hashes (pHash: the signs of the low DCT
frequencies of a 32 x 32 grey thumbnail about their median; Zauner 2010, and at most a few bits from the
`phash` of the imagehash library, which takes four times as long over the thumbnail and needs scipy and
PyWavelets for one matrix product).
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from PIL import Image, ImageDraw, ImageFont

from medray.config import DataConfig
from medray.errors import DataError
from medray.images.decoding import decode

# What find_leaks reads: any number of rows per image. image_hash is null where the image could not be read,
# phash where it is flat too.
IMAGES = pa.schema(
    [
        ("sample_id", pa.string()),
        ("image_id", pa.string()),
        ("split", pa.string()),
        ("group_id", pa.string()),
        ("image_hash", pa.string()),
        ("phash", pa.uint64()),
    ]
)
PAIRS = pa.schema(
    [
        ("held_out_id", pa.string()),
        ("held_out_split", pa.string()),
        ("other_id", pa.string()),
        ("other_split", pa.string()),
        ("distance", pa.int32()),  # bits; null for a shared group
        ("kind", pa.string()),  # exact | near | group
    ]
)
NO_SPLIT = "(no split)"

SIDE, LOW = 32, 8
# DCT-II, [LOW, SIDE]
_DCT = 2 * np.cos(np.pi * np.outer(np.arange(LOW), 2 * np.arange(SIDE) + 1) / (2 * SIDE))
# Rounding the thumbnail to 8 bits alone moves a coefficient by about 2 * SIDE * 0.29 = 19. Where half of the
# coefficients are within four times that, the bits are noise, and two blank pictures would be as near as two
# copies of one.
FLAT = 75.0
_BLOCK = 2**18  # hash pairs compared at once: 2 MiB an array
_NONE = 65  # farther than any two hashes


def fingerprint(image: Image.Image) -> tuple[str, int | None]:
    """(XXH3 of the RGB pixels and size, 32 hex digits; 64-bit perceptual hash, or None for a picture too flat
    to tell from others).

    XXH3 is no cryptographic hash: equal pictures are found by it, forged ones are not its business.
    """
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    pixels = xxhash.xxh3_128(rgb.tobytes())
    pixels.update(f"|{rgb.width}x{rgb.height}".encode())
    digest = pixels.hexdigest()
    # Lanczos over every pixel would take as long as decoding; box-averaged to at least twice the thumbnail's
    # size first, at most a few bits differ.
    grey = np.asarray(
        rgb.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=2.0), np.float64
    )
    # Not @: it wakes BLAS threads, which spin; two processes on two cores then took four times as long over
    # everything.
    low = np.einsum("ux,vx->vu", _DCT, np.einsum("vy,yx->vx", _DCT, grey)).ravel()
    # Medians by sorting: np.median takes four times as long for so few numbers.
    if np.sort(np.abs(low[1:]))[LOW * LOW // 2 - 1] < FLAT:
        return digest, None
    return digest, int.from_bytes(np.packbits(low > np.sort(low)[LOW * LOW // 2 - 1 :][:2].mean()).tobytes())


@dataclass(frozen=True)
class Overlap:
    """Images of a held-out split that stand in another split too."""

    images: int  # of the held-out split
    exact: int  # whose pixels are there
    near: int  # of the rest: with a picture within the radius
    group: int  # whose group (patient) is there, whatever their pixels

    @property
    def leaked(self) -> int:
        """Images seen in the other split, exactly or nearly."""
        return self.exact + self.near


@dataclass(frozen=True)
class Leaks:
    """What `find_leaks` found. Counts are of images (distinct image_id within a split)."""

    radius: int
    images: dict[str, int]  # by split
    repeated: dict[str, int]  # by split: images whose pixels the split holds under another image_id already
    flat: dict[str, int]  # by split: images without a perceptual hash, compared by their pixels only
    unread: dict[str, int]  # by split: images without any hash
    overlaps: dict[tuple[str, str], Overlap]  # by (held-out split, other split)
    # PAIRS: for each leaking image its strongest pair per other split; exact first, then near by distance,
    # then group
    pairs: pa.Table
    pairs_found: int  # before the cap on `pairs`


@dataclass
class _HeldOut:
    """One held-out split, image by image, and the best match so far in each other split."""

    sample_ids: list[str] = field(default_factory=list)
    groups: list[str | None] = field(default_factory=list)
    hashes: list[str | None] = field(default_factory=list)
    # image_hash, group_id -> the values of this split
    known: dict[str, pa.Array] = field(default_factory=dict)
    phashes: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))  # distinct
    # image -> place in phashes, -1 for none
    phash_of: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    # (other split, image_hash) -> smallest sample_id there
    exact: dict[tuple[str, str], str] = field(default_factory=dict)
    # (other split, group_id) -> smallest sample_id there
    group: dict[tuple[str, str], str] = field(default_factory=dict)
    # other split -> smallest distance of each of phashes
    distance: dict[str, np.ndarray] = field(default_factory=dict)
    # other split -> sample_id at that distance, the smallest of several
    nearest: dict[str, list[str]] = field(default_factory=dict)


class _Distinct:
    """Distinct 64-bit numbers, counted in 8 bytes each."""

    def __init__(self) -> None:
        self.known, self.new, self.waiting = np.empty(0, np.uint64), [], 0

    def add(self, values: np.ndarray) -> None:
        self.new.append(values)
        self.waiting += len(values)
        if self.waiting > max(len(self.known), 2**16):
            self.count()

    def count(self) -> int:
        self.known, self.new, self.waiting = np.unique(np.concatenate([self.known, *self.new])), [], 0
        return len(self.known)


def find_leaks(
    source: Callable[[], Iterable[pa.Table]], held_out: set[str], radius: int = 4, max_pairs: int = 1000
) -> Leaks:
    """Compare the held-out splits with every other split, in two passes over the source.

    Args:
        source: gives the tables (columns of IMAGES) anew at each call, in any order and cut.
        held_out: names of splits that nothing else may share images with; each is compared with all others,
            held out or not.
        radius: largest number of differing hash bits, of 64, that counts as nearly the same picture.
        max_pairs: longest list of pairs; the counts know all.

    Memory: the held-out images' ids and hashes, one table, and 16 bytes per image of the rest (to count
    repeats). Time: see `near`; less than a minute on one core for 10,000 held-out images against a million at
    radius 4. The result does not depend on the order of the rows.

    Raises DataError where a column is missing.
    """
    if not 0 <= radius <= 16:
        raise ValueError(
            f"radius is {radius}; it must be 0 to 16 (unrelated pictures differ in about 32 bits)"
        )
    held = _collect(source, held_out)
    counts: dict[str, dict[str, _Distinct]] = {}
    for split, rows in _by_split(source()):
        own = counts.setdefault(split, {name: _Distinct() for name in ("images", "pixels", "flat", "unread")})
        _count(rows, own)
        for name, side in held.items():
            if name != split:
                _compare(rows, split, side, radius)
    sizes = {
        split: {name: distinct.count() for name, distinct in own.items()}
        for split, own in sorted(counts.items())
    }
    overlaps, pairs = {}, []
    for name, side in sorted(held.items()):
        for split in sizes:
            if split != name and name in sizes:
                overlaps[name, split], found = _overlap(name, split, side, radius)
                pairs += found
    pairs.sort(
        key=lambda pair: (pair["kind"] == "group", pair["distance"] or 0, pair["kind"], *pair.values())
    )
    return Leaks(
        radius,
        {split: size["images"] for split, size in sizes.items()},
        {split: size["images"] - size["unread"] - size["pixels"] for split, size in sizes.items()},
        {split: size["flat"] for split, size in sizes.items()},
        {split: size["unread"] for split, size in sizes.items()},
        overlaps,
        pa.Table.from_pylist(pairs[:max_pairs], schema=PAIRS),
        len(pairs),
    )


def _by_split(tables: Iterable[pa.Table]) -> Iterator[tuple[str, pa.Table]]:
    """Each table's rows per split, one per image, in the order of their sample_id."""
    for table in tables:
        missing = [name for name in IMAGES.names if name not in table.column_names]
        if missing:
            raise DataError(f"looking for leaks needs the columns {IMAGES.names}; {missing} are missing")
        table = table.select(IMAGES.names).cast(IMAGES).sort_by("sample_id")
        splits = pc.fill_null(table["split"], NO_SPLIT)
        for split in pc.unique(splits).to_pylist():
            rows = table.filter(pc.equal(splits, split))
            _, first = np.unique(
                rows["image_id"].combine_chunks().dictionary_encode().indices.to_numpy(), return_index=True
            )
            yield split, rows.take(np.sort(first))


def _collect(source: Callable[[], Iterable[pa.Table]], held_out: set[str]) -> dict[str, _HeldOut]:
    found: dict[str, dict[str, dict]] = {split: {} for split in held_out}
    for split, rows in _by_split(source()):
        if split in held_out:
            for row in rows.to_pylist():
                known = found[split].setdefault(row["image_id"], row)
                known["sample_id"] = min(known["sample_id"], row["sample_id"])
    held = {}
    for split, images in found.items():
        side = held[split] = _HeldOut()
        rows = sorted(images.values(), key=lambda row: row["sample_id"])
        side.sample_ids, side.groups, side.hashes = (
            [row[name] for row in rows] for name in ("sample_id", "group_id", "image_hash")
        )
        side.known = {
            "image_hash": pa.array(set(side.hashes) - {None}, pa.string()),
            "group_id": pa.array(set(side.groups) - {None}, pa.string()),
        }
        side.phashes, places = np.unique(
            np.array([row["phash"] for row in rows if row["phash"] is not None], np.uint64),
            return_inverse=True,
        )
        side.phash_of = np.full(len(rows), -1)
        side.phash_of[[at for at, row in enumerate(rows) if row["phash"] is not None]] = places
    return held


def _count(rows: pa.Table, own: dict[str, _Distinct]) -> None:
    ids = np.array(
        [
            int.from_bytes(hashlib.blake2b(i.encode(), digest_size=8).digest())
            for i in rows["image_id"].to_pylist()
        ],
        np.uint64,
    )
    read = rows["image_hash"].is_valid().to_numpy(zero_copy_only=False)
    own["images"].add(ids)
    own["unread"].add(ids[~read])
    own["flat"].add(ids[read & rows["phash"].is_null().to_numpy(zero_copy_only=False)])
    own["pixels"].add(
        np.array([int(digest[:16], 16) for digest in rows["image_hash"].drop_null().to_pylist()], np.uint64)
    )


def _compare(rows: pa.Table, split: str, side: _HeldOut, radius: int) -> None:
    """Note for one held-out split what these rows of another split share with it."""
    for column, matches in (("image_hash", side.exact), ("group_id", side.group)):
        hits = rows.filter(pc.is_in(rows[column], value_set=side.known[column]))
        for value, sample_id in zip(hits[column].to_pylist(), hits["sample_id"].to_pylist()):
            matches[split, value] = min(matches.get((split, value), sample_id), sample_id)
    rows = rows.filter(rows["phash"].is_valid())
    if not len(side.phashes) or not rows.num_rows:
        return
    best = side.distance.setdefault(split, np.full(len(side.phashes), _NONE, np.uint8))
    nearest = side.nearest.setdefault(split, [""] * len(side.phashes))
    others, first = np.unique(rows["phash"].to_numpy(), return_index=True)
    sample_ids = rows["sample_id"].take(first).to_pylist()
    for at, other, distance in near(side.phashes, others, radius):
        candidate = (distance, sample_ids[other])
        if candidate < (int(best[at]), nearest[at]):
            best[at], nearest[at] = candidate


def near(left: np.ndarray, right: np.ndarray, radius: int) -> Iterator[tuple[int, int, int]]:
    """(index in left, index in right, distance) of every pair of 64-bit hashes that differ in at most
    `radius` bits.

    Exact, not approximate: cut into radius + 1 bands, two such hashes agree in one band at least, and only
    those are compared.
    """
    edges = np.linspace(0, 64, radius + 2).astype(np.uint64)
    masks = (np.uint64(1) << np.diff(edges)) - np.uint64(1)
    for band, (low, mask) in enumerate(zip(edges, masks)):
        keys = left >> low & mask
        order = np.argsort(keys, kind="stable")
        wanted = right >> low & mask
        begin, end = (np.searchsorted(keys[order], wanted, side) for side in ("left", "right"))
        total = np.concatenate([[0], np.cumsum(end - begin)])
        start = 0
        while start < len(right):
            stop = max(start + 1, int(np.searchsorted(total, total[start] + _BLOCK, "right")) - 1)
            count = end[start:stop] - begin[start:stop]
            theirs = np.repeat(np.arange(start, stop), count)
            ours = order[
                np.arange(len(theirs))
                + np.repeat(begin[start:stop] - total[start:stop] + total[start], count)
            ]
            different = left[ours] ^ right[theirs]
            kept = np.bitwise_count(different) <= radius
            for earlier in range(band):  # a pair that shares several bands was found at the first
                kept &= (different >> edges[earlier] & masks[earlier]) != 0
            yield from zip(
                ours[kept].tolist(), theirs[kept].tolist(), np.bitwise_count(different[kept]).tolist()
            )
            start = stop


def _overlap(name: str, split: str, side: _HeldOut, radius: int) -> tuple[Overlap, list[dict]]:
    counts, pairs = {"exact": 0, "near": 0, "group": 0}, []
    best, nearest = side.distance.get(split), side.nearest.get(split)
    for sample_id, digest, group, place in zip(side.sample_ids, side.hashes, side.groups, side.phash_of):
        shared = side.group.get((split, group)) if group is not None else None
        counts["group"] += shared is not None
        if digest is not None and (split, digest) in side.exact:
            kind, other, distance = "exact", side.exact[split, digest], 0
        elif best is not None and place >= 0 and best[place] <= radius:
            kind, other, distance = "near", nearest[place], int(best[place])
        elif shared is not None:
            kind, other, distance = "group", shared, None
        else:
            continue
        counts[kind] += kind != "group"
        pairs.append(
            {
                "held_out_id": sample_id,
                "held_out_split": name,
                "other_id": other,
                "other_split": split,
                "distance": distance,
                "kind": kind,
            }
        )
    return Overlap(len(side.sample_ids), **counts), pairs


def _of(part: int, whole: int) -> str:
    return f"{part} of {whole} ({part / whole:.1%})" if whole else "0 of 0"


def leak_table_markdown(leaks: Leaks) -> str:
    """What is shared, as Markdown: one line per pair of splits, then what each split repeats in itself."""
    lines = [
        f"| held-out split | also in | same pixels | near (at most {leaks.radius} of 64 bits) | either | "
        "same group |",
        "|---|---|---|---|---|---|",
        *(
            (
                f"| {held} | {other} | {_of(o.exact, o.images)} | {_of(o.near, o.images)} | "
                f"{_of(o.leaked, o.images)} | {_of(o.group, o.images)} |"
            )
            for (held, other), o in leaks.overlaps.items()
        ),
        "",
        "| split | images | repeated under another id | flat (compared by pixels only) | unread |",
        "|---|---|---|---|---|",
        *(
            f"| {split} | {n} | {leaks.repeated[split]} | {leaks.flat[split]} | {leaks.unread[split]} |"
            for split, n in leaks.images.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def leak_picture(leaks: Leaks, load: Callable[[str], bytes], rows: int = 12, side: int = 160) -> bytes:
    """PNG sheet of the first pairs, held-out image left, its match right, with their ids.

    Args:
        load: sample_id -> the image as encoded bytes. An image that cannot be read leaves an empty box.
        rows: most pairs shown.
        side: greatest width and height of a picture (pixels).
    """
    shown = leaks.pairs.slice(0, rows).to_pylist()
    text, gap = 34, 8
    sheet = Image.new(
        "RGB", (2 * (side + gap) + gap, max(1, len(shown)) * (side + text + gap) + gap), "white"
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    if not shown:
        draw.text((gap, gap), "no image is in two splits", fill="black", font=font)
    for number, pair in enumerate(shown):
        top = gap + number * (side + text + gap)
        how = {
            "exact": "same pixels",
            "near": f"{pair['distance']} of 64 bits differ",
            "group": "same group",
        }[pair["kind"]]
        for left, who, split in (
            (gap, pair["held_out_id"], pair["held_out_split"]),
            (2 * gap + side, pair["other_id"], pair["other_split"]),
        ):
            draw.rectangle((left, top, left + side - 1, top + side - 1), outline="lightgrey")
            try:
                image = decode(load(who), DataConfig())
                image.thumbnail((side, side))
                sheet.paste(image, (left + (side - image.width) // 2, top + (side - image.height) // 2))
            except DataError:
                draw.text((left + 4, top + 4), "cannot be read", fill="grey", font=font)
            draw.text(
                (left, top + side + 2), _fitting(f"{split}: {who}", draw, font, side), fill="black", font=font
            )
        draw.text((gap, top + side + 16), how, fill="black", font=font)
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()


def _fitting(text: str, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, with its middle left out where it is wider."""
    for kept in range(len(text), 0, -1):
        shown = text if kept == len(text) else text[: kept - kept // 2] + "…" + text[len(text) - kept // 2 :]
        if draw.textlength(shown, font) <= width:
            return shown
    return ""
