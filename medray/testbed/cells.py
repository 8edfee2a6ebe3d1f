"""Synthetic peripheral blood cells with the schema of WBCAtt, drawn so that every attribute shows in the
pixels.

`sample_record` draws a label and its 11 attributes from the distribution of WBCAtt's training split,
`render_cell` draws one picture of it, `write_cells` streams a data set in the same form as the WBCAtt folder
(images/*.jpg and records.jsonl). Stain, light, scale, rotation, blur and neighbouring cells vary, and the
ranges of neighbouring attribute values touch, so a model needs many labelled pictures to read them.

Example::

    python -m medray.testbed.cells --to cells --rows 3000 --seed 0
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from medray.data.attribute_questions import check_record
from medray.testbed.cell_statistics import LABEL_COUNTS, TABLES

SIZE = 160
"""Width and height of a rendered picture in pixels."""

_CYTOPLASM = {"light blue": (206, 208, 232), "blue": (146, 160, 214), "purple blue": (158, 128, 200)}
_GRANULES = {"pink": (222, 128, 170), "red": (208, 84, 72), "purple": (92, 40, 130), "nil": (170, 160, 190)}
_NUCLEUS = {"densely": (74, 42, 124), "loosely": (136, 92, 172)}


def _draw_count(counts: dict, rng: random.Random):
    return rng.choices(list(counts), list(counts.values()))[0]


def sample_record(rng: random.Random) -> dict:
    """One record: `label` and the 11 attributes, drawn from WBCAtt's training split (see
    `cell_statistics`).
    """
    record = {"label": _draw_count(LABEL_COUNTS, rng)}
    table = TABLES[record["label"]]
    record["cell_size"], record["cell_shape"] = _draw_count(table["size_shape"], rng)
    shape = record["cell_shape"]
    record["nucleus_shape"] = _draw_count(table["nucleus_given_shape"][shape], rng)
    ratio, colour = _draw_count(table["ratio_colour"], rng)
    record["nuclear_cytoplasmic_ratio"] = ratio
    record["chromatin_density"] = _draw_count(table["chromatin"], rng)
    record["cytoplasm_vacuole"] = _draw_count(table["vacuole_given_shape"][shape], rng)
    record["cytoplasm_texture"] = _draw_count(table["texture"], rng)
    record["cytoplasm_colour"] = colour
    granules = _draw_count(table["granules"], rng)
    record["granule_type"], record["granule_colour"], record["granularity"] = granules
    return record


def _vary(colour, rng: random.Random, spread: float) -> tuple[int, int, int]:
    shift = rng.gauss(0, spread)
    return tuple(int(min(255, max(0, c + shift + rng.gauss(0, spread / 2)))) for c in colour)


def _blob(
    centre, radius, amplitude, rng: random.Random, waves=(2, 5), points=48
) -> list[tuple[float, float]]:
    """A closed outline: a circle whose radius (pixels) is perturbed by a few random sine waves."""
    terms = [(k, rng.gauss(0, amplitude), rng.uniform(0, 2 * math.pi)) for k in range(waves[0], waves[1] + 1)]
    outline = []
    for i in range(points):
        angle = 2 * math.pi * i / points
        r = radius * max(0.35, 1 + sum(a * math.sin(k * angle + p) for k, a, p in terms))
        outline.append((centre[0] + r * math.cos(angle), centre[1] + r * math.sin(angle)))
    return outline


def _disc(draw: ImageDraw.ImageDraw, x, y, r, fill, ry=None):
    draw.ellipse((x - r, y - (ry or r), x + r, y + (ry or r)), fill=fill)


def _arc(draw, centre, radius, width, start, sweep, rng):
    """A thick bent rod with uneven width: the band nucleus."""
    steps = 14
    for i in range(steps + 1):
        angle = start + sweep * i / steps
        bulge = 1 + 0.15 * math.cos(3.2 * math.pi * i / steps)
        x, y = centre[0] + radius * math.cos(angle), centre[1] + radius * math.sin(angle)
        _disc(draw, x, y, width * bulge, 255)


def _nucleus_mask(shape: str, centre, radius: float, rng: random.Random) -> Image.Image:
    """The nucleus as a 0/255 mask; `radius` (pixels) is that of a disc of about its extent."""
    mask = Image.new("L", (SIZE, SIZE))
    draw = ImageDraw.Draw(mask)
    x, y = centre
    turn = rng.uniform(0, 2 * math.pi)
    if shape == "unsegmented-round":
        draw.polygon(_blob(centre, radius, 0.025, rng), fill=255)
    elif shape == "irregular":
        draw.polygon(_blob(centre, radius, 0.13, rng, waves=(3, 8), points=60), fill=255)
    elif shape == "unsegmented-indented":
        draw.polygon(_blob(centre, radius, 0.03, rng), fill=255)
        depth = rng.uniform(0.75, 1.05) * radius
        _disc(
            draw, x + depth * math.cos(turn), y + depth * math.sin(turn), radius * rng.uniform(0.36, 0.5), 0
        )
    elif shape == "unsegmented-band":
        _arc(draw, centre, radius * 0.72, radius * rng.uniform(0.3, 0.38), turn, rng.uniform(3.1, 4.4), rng)
    else:
        lobes = 2 if shape == "segmented-bilobed" else rng.choice((3, 3, 4, 5))
        lobe = radius * (rng.uniform(0.52, 0.6) if lobes == 2 else 1.25 / lobes**0.85)
        sweep = rng.uniform(2.3, 3.1) if lobes == 2 else rng.uniform(1.2, 1.5) * (lobes - 1)
        spots = [
            (x + 0.68 * radius * math.cos(turn + a), y + 0.68 * radius * math.sin(turn + a))
            for a in (sweep * i / (lobes - 1) for i in range(lobes))
        ]
        draw.line(spots, fill=255, width=max(2, int(radius * rng.uniform(0.1, 0.22))))
        for spot in spots:
            draw.polygon(_blob(spot, lobe * rng.uniform(0.88, 1.12), 0.06, rng), fill=255)
    return mask


def _noise(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Smooth noise of shape (SIZE, SIZE), about unit variance, with `cells` bumps per side."""
    small = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    return np.asarray(small.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def _background(rng: random.Random) -> Image.Image:
    bluish = rng.random() < 0.2
    plasma = _vary((222, 222, 240) if bluish else (252, 232, 206), rng, 6)
    red_cell = _vary((186, 178, 200) if bluish else (205, 172, 160), rng, 9)
    image = Image.new("RGB", (SIZE, SIZE), plasma)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(8, 20)):
        angle, distance = rng.uniform(0, 2 * math.pi), rng.uniform(44, 108)
        x, y = SIZE / 2 + distance * math.cos(angle), SIZE / 2 + distance * math.sin(angle)
        r, tone = rng.uniform(12, 18), _vary(red_cell, rng, 6)
        ry = r * rng.uniform(0.8, 1.15)
        _disc(draw, x, y, r, tone, ry)
        if rng.random() < 0.8:
            pallor = tuple((a + 2 * b) // 3 for a, b in zip(tone, plasma))
            _disc(draw, x, y, r * rng.uniform(0.3, 0.55), pallor, ry * rng.uniform(0.3, 0.55))
    for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
        x, y = rng.uniform(0, SIZE), rng.uniform(0, SIZE)
        if math.hypot(x - SIZE / 2, y - SIZE / 2) > 50:
            _disc(draw, x, y, rng.uniform(2, 5), _vary((120, 70, 150), rng, 12))
    return image


def _granules(draw, record, centre, radius, rng: random.Random):
    kind = record["granule_type"]
    if record["granularity"] == "no":
        return
    colour = _GRANULES[record["granule_colour"]]
    count, low, high = {"small": (150, 0.6, 1.2), "round": (110, 1.9, 2.8), "coarse": (75, 1.6, 3.6)}.get(
        kind, (40, 0.6, 1.0)
    )
    for _ in range(int(count * rng.uniform(0.7, 1.2) * (radius / 32) ** 2)):
        r, angle = radius * 1.05 * math.sqrt(rng.random()), rng.uniform(0, 2 * math.pi)
        x, y, s = centre[0] + r * math.cos(angle), centre[1] + r * math.sin(angle), rng.uniform(low, high)
        _disc(draw, x, y, s, _vary(colour, rng, 9), s * (rng.uniform(0.5, 1.5) if kind == "coarse" else 1))


def render_cell(record: dict, rng: random.Random) -> Image.Image:
    """One picture of `record` (RGB, 160 x 160): the same record and state of `rng` give the same pixels.

    Raises:
        ValueError: a missing attribute or one outside WBCAtt's value sets.
    """
    check_record(record)
    noise = np.random.default_rng(rng.getrandbits(64))
    image = _background(rng)
    zoom = rng.uniform(0.9, 1.1)
    radius = zoom * (rng.gauss(35, 2.0) if record["cell_size"] == "big" else rng.gauss(25, 2.0))
    centre = (SIZE / 2 + rng.uniform(-9, 9), SIZE / 2 + rng.uniform(-9, 9))

    cell_mask = Image.new("L", (SIZE, SIZE))
    outline = (
        _blob(centre, radius, 0.018, rng)
        if record["cell_shape"] == "round"
        else _blob(centre, radius, 0.08, rng, (2, 6))
    )
    ImageDraw.Draw(cell_mask).polygon(outline, fill=255)

    body = Image.new("RGB", (SIZE, SIZE), _vary(_CYTOPLASM[record["cytoplasm_colour"]], rng, 8))
    draw = ImageDraw.Draw(body)
    if record["granule_type"] != "coarse":
        _granules(draw, record, centre, radius, rng)
    if record["cytoplasm_texture"] == "frosted":
        ripple = _noise(noise, rng.randint(34, 46))[..., None] * rng.uniform(13, 24)
        body = Image.fromarray(np.clip(np.asarray(body) + ripple, 0, 255).astype(np.uint8))
        draw = ImageDraw.Draw(body)

    share = rng.gauss(0.86, 0.03) if record["nuclear_cytoplasmic_ratio"] == "high" else rng.gauss(0.64, 0.04)
    slack = max(0.0, 1 - share) * radius * 0.7
    angle = rng.uniform(0, 2 * math.pi)
    nucleus_centre = (centre[0] + slack * math.cos(angle), centre[1] + slack * math.sin(angle))
    nucleus_mask = _nucleus_mask(record["nucleus_shape"], nucleus_centre, share * radius, rng)
    loose = record["chromatin_density"] == "loosely"
    grain = _noise(noise, rng.randint(22, 34) if loose else 40)[..., None] * (
        rng.uniform(14, 22) if loose else 6
    )
    chromatin = np.asarray(_vary(_NUCLEUS[record["chromatin_density"]], rng, 11)) + grain
    body.paste(Image.fromarray(np.clip(chromatin, 0, 255).astype(np.uint8)), mask=nucleus_mask)
    draw = ImageDraw.Draw(body)
    if record["granule_type"] == "coarse":  # a basophil's granules lie over its nucleus
        _granules(draw, record, centre, radius, rng)
    if record["cytoplasm_vacuole"] == "yes":
        for _ in range(rng.randint(4, 10)):
            a, d = rng.uniform(0, 2 * math.pi), radius * rng.uniform(0.45, 0.9)
            x, y, r = centre[0] + d * math.cos(a), centre[1] + d * math.sin(a), rng.uniform(1.8, 4.2)
            _disc(draw, x, y, r, _vary((246, 240, 240), rng, 4))
    image.paste(body, mask=cell_mask.filter(ImageFilter.GaussianBlur(0.7)))

    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.5)))
    gain = np.asarray([rng.gauss(1, 0.035) for _ in range(3)]) * rng.uniform(0.88, 1.08)
    pixels = np.asarray(image, dtype=np.float32) * gain.astype(np.float32)
    pixels += noise.standard_normal((SIZE, SIZE, 1), dtype=np.float32) * rng.uniform(1, 6)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def write_cells(directory: str | Path, rows: int, seed: int, val_fraction: float = 0.1) -> Path:
    """Writes `rows` pictures and records in the form of the WBCAtt folder; returns its path.

    Rows are written one by one, so any number fits in memory. Row i depends only on (seed, i): a longer set
    begins with a shorter one. records.jsonl holds img_name, label, the 11 attributes, path, split ("train" or
    "val") and image (relative path), the fields of the WBCAtt copy; the `val_fraction` is spread evenly.
    """
    directory = Path(directory)
    (directory / "images").mkdir(parents=True, exist_ok=True)
    with open(directory / "records.jsonl", "w", encoding="utf-8") as out:
        for i in range(rows):
            rng = random.Random(f"cells/{seed}/{i}")
            record = sample_record(rng)
            name = f"SYN_{seed}_{i:06d}.jpg"
            render_cell(record, rng).save(directory / "images" / name, quality=88)
            split = "val" if math.floor((i + 1) * val_fraction) > math.floor(i * val_fraction) else "train"
            path = f"synthetic/{record['label'].lower()}/{name}"
            row = {"img_name": name, **record, "path": path, "split": split, "image": f"images/{name}"}
            out.write(json.dumps(row) + "\n")
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description="Write synthetic blood cells in the form of WBCAtt.")
    parser.add_argument("--to", required=True, help="folder to write into")
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--val-fraction", type=float, default=0.1)
    args = parser.parse_args()
    print(write_cells(args.to, args.rows, args.seed, args.val_fraction))


if __name__ == "__main__":
    main()
