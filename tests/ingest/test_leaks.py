"""Images in two splits: found exactly, nearly and by patient, counted by hand and against brute force."""

import io
import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from PIL import Image, ImageEnhance

from medray.config import DataConfig
from medray.errors import DataError
from medray.images.decoding import ImageError, decode
from medray.ingest.leaks import (
    IMAGES,
    Overlap,
    find_leaks,
    fingerprint,
    leak_picture,
    leak_table_markdown,
    near,
)


def picture(seed, size=(200, 160)):
    """Soft blobs on a gradient: as smooth as a radiograph, different for every seed."""
    rng = np.random.RandomState(seed)
    y, x = np.mgrid[: size[1], : size[0]] / max(size)
    values = 60 + 40 * x + 30 * y
    for _ in range(6):
        cx, cy, width, height = rng.rand(), rng.rand(), 0.05 + 0.2 * rng.rand(), rng.uniform(-120, 120)
        values += height * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / width**2)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")


def recompressed(image, quality):
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality)
    return Image.open(data)


def apart(left, right):
    return (fingerprint(left)[1] ^ fingerprint(right)[1]).bit_count()


def test_hash_of_pixels():
    image = picture(0)
    assert fingerprint(image) == fingerprint(image.copy())
    assert len(fingerprint(image)[0]) == 32
    changed = image.copy()
    changed.putpixel((3, 3), (0, 0, 0))
    assert fingerprint(changed)[0] != fingerprint(image)[0]
    # the same bytes in another shape
    assert fingerprint(Image.new("RGB", (4, 2)))[0] != fingerprint(Image.new("RGB", (2, 4)))[0]


def test_perceptual_hash_worked_by_hand():
    # A horizontal cosine of one frequency has one coefficient that is not zero, so its picture is flat to the
    # hash; 64 of them are not.
    x = (2 * np.arange(32) + 1) * np.pi / 64
    basis = [[np.outer(np.cos(v * x), np.cos(u * x)) for u in range(8)] for v in range(8)]
    one = 128 + 60 * basis[0][3]
    assert fingerprint(Image.fromarray(one.round().astype(np.uint8)))[1] is None
    signs = np.array([[1 if (3 * u + 5 * v) % 2 else -1 for u in range(8)] for v in range(8)])
    signs[0, 0] = 1  # the mean grey
    values = 128 + sum(1.8 * signs[v, u] * basis[v][u] for v in range(8) for u in range(8) if u or v)
    expected = int("".join("1" if sign > 0 else "0" for sign in signs.ravel()), 2)
    # the median itself is not above it
    assert (fingerprint(Image.fromarray(values.round().astype(np.uint8)))[1] ^ expected).bit_count() <= 1


def test_near_copies_are_near():
    for seed in range(8):
        image = picture(seed)
        copies = [
            recompressed(image, 60),
            image.resize((100, 80)),
            image.resize((224, 224)),
            ImageEnhance.Brightness(image).enhance(1.1),
        ]
        assert max(apart(image, copy) for copy in copies) <= 4


def test_other_pictures_are_far():
    images = [picture(seed) for seed in range(12)]
    assert min(apart(a, b) for i, a in enumerate(images) for b in images[:i]) > 10


@pytest.mark.parametrize(
    "image",
    [
        Image.new("RGB", (64, 64), (200, 30, 90)),
        recompressed(Image.new("RGB", (300, 200), (12, 13, 14)), 40),
        Image.fromarray(np.random.RandomState(0).randint(126, 130, (512, 512)).astype(np.uint8)),
        Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (64, 1))),
    ],
    ids=["uniform", "uniform jpeg", "faint noise", "ramp"],
)
def test_flat_pictures_have_no_perceptual_hash(image):
    assert fingerprint(image)[1] is None


@pytest.mark.parametrize("radius", [0, 1, 4, 16])
def test_near_against_brute_force(radius, monkeypatch):
    monkeypatch.setattr("medray.ingest.leaks._BLOCK", 1000)  # many blocks
    rng = np.random.default_rng(0)
    left, right = (rng.integers(0, 2**64, n, dtype=np.uint64) for n in (600, 300))
    for at in range(0, 600, 3):  # every third has a neighbour 0 to 7 bits away
        bits = rng.choice(64, at % 8, replace=False)
        right[at % 300] = left[at] ^ np.bitwise_or.reduce(
            np.uint64(1) << bits.astype(np.uint64), initial=np.uint64(0)
        )
    expected = {
        (i, j, d)
        for i, a in enumerate(left.tolist())
        for j, b in enumerate(right.tolist())
        if (d := (a ^ b).bit_count()) <= radius
    }
    found = list(near(left, right, radius))
    assert len(found) == len(set(found)) >= 10
    assert set(found) == expected
    assert list(near(left[:0], right, radius)) == list(near(left, right[:0], radius)) == []


def rows(*rows):
    """(sample_id, image_id, split, group_id, image_hash, phash); image_hash in short."""
    return pa.Table.from_pylist(
        [
            dict(zip(IMAGES.names, (s, i, split, group, digest and f"{digest:016x}" + "0" * 16, phash)))
            for s, i, split, group, digest, phash in rows
        ],
        schema=IMAGES,
    )


SET = rows(
    # two questions, one image
    ("t1/q1", "t1", "test", "p1", 1, 0b0000),
    ("t1/q0", "t1", "test", "p1", 1, 0b0000),
    ("t2", "t2", "test", "p2", 2, 0xFF00),
    ("t3", "t3", "test", "p3", 3, 0xFFFF_0000),
    ("t4", "t4", "test", None, 4, None),
    ("t5", "t5", "test", None, None, None),
    ("v1", "v1", "val", "p3", 4, None),
    ("v2", "v2", "val", "p9", 20, 0xFF0000000000),
    ("a1", "a1", "train", "p8", 1, 0b0000),
    ("a0", "a0", "train", "p7", 1, 0b0000),  # t1's pixels, twice
    # 2 bits and 1 bit from t2
    ("a2", "a2", "train", "p2", 12, 0xFF03),
    ("a3", "a3", "train", "p2", 13, 0xFF01),
    ("a3b", "a3", "train", "p2", 13, 0xFF01),
    ("a4", "a4", "train", "p3", 14, 0xFFFF_001F),  # 5 bits from t3, but its patient
    ("a5", "a5", "train", None, 15, None),
    ("a6", "a6", None, "p9", 16, 0xFF0000000000),
)


def test_counts_and_pairs_by_hand():
    leaks = find_leaks(lambda: [SET], {"test", "val"})
    assert leaks.overlaps == {
        ("test", "train"): Overlap(images=5, exact=1, near=1, group=2),
        ("test", "val"): Overlap(images=5, exact=1, near=0, group=1),
        ("test", "(no split)"): Overlap(images=5, exact=0, near=0, group=0),
        ("val", "test"): Overlap(images=2, exact=1, near=0, group=1),
        ("val", "train"): Overlap(images=2, exact=0, near=0, group=1),
        ("val", "(no split)"): Overlap(images=2, exact=0, near=1, group=1),
    }
    assert leaks.images == {"(no split)": 1, "test": 5, "train": 6, "val": 2}
    assert leaks.repeated == {"(no split)": 0, "test": 0, "train": 1, "val": 0}
    assert leaks.flat == {"(no split)": 0, "test": 1, "train": 1, "val": 1}
    assert leaks.unread == {"(no split)": 0, "test": 1, "train": 0, "val": 0}
    pairs = [tuple(pair.values()) for pair in leaks.pairs.to_pylist()]
    assert pairs == [
        ("t1/q0", "test", "a0", "train", 0, "exact"),
        ("t4", "test", "v1", "val", 0, "exact"),
        ("v1", "val", "t4", "test", 0, "exact"),
        ("v2", "val", "a6", "(no split)", 0, "near"),
        ("t2", "test", "a3", "train", 1, "near"),
        ("t3", "test", "a4", "train", None, "group"),
        ("t3", "test", "v1", "val", None, "group"),
        ("v1", "val", "a4", "train", None, "group"),
    ]
    assert leaks.pairs_found == 8


def test_radius_and_cap():
    leaks = find_leaks(lambda: [SET], {"test"}, radius=5, max_pairs=2)
    assert leaks.overlaps["test", "train"] == Overlap(images=5, exact=1, near=2, group=2)
    assert leaks.overlaps["test", "train"].leaked == 3
    assert (leaks.pairs.num_rows, leaks.pairs_found) == (2, 5)
    with pytest.raises(ValueError, match="radius is 40"):
        find_leaks(lambda: [SET], {"test"}, radius=40)


@pytest.mark.parametrize("seed", range(4))
def test_order_and_cut_of_the_tables_do_not_matter(seed):
    rng = np.random.RandomState(seed)
    shuffled = SET.take(rng.permutation(SET.num_rows))
    cuts = [0, *sorted(rng.randint(0, SET.num_rows, 3)), SET.num_rows]
    leaks = find_leaks(
        lambda: (shuffled.slice(a, b - a) for a, b in itertools.pairwise(cuts)), {"test", "val"}
    )
    whole = find_leaks(lambda: [SET], {"test", "val"})
    assert leaks.pairs.equals(whole.pairs)
    assert (leaks.overlaps, leaks.repeated, leaks.images, leaks.flat) == (
        whole.overlaps,
        whole.repeated,
        whole.images,
        whole.flat,
    )


def test_blank_pictures_are_no_duplicates_of_each_other():
    blanks = [
        (f"{split}{i}", f"{split}{i}", split, None, *fingerprint(Image.new("RGB", (50 + i, 50), (i, i, i))))
        for split in ("test", "train")
        for i in range(20)
    ]
    table = pa.Table.from_pylist(
        [dict(zip(IMAGES.names, row)) for row in blanks[:20] + blanks[30:]], schema=IMAGES
    )
    leaks = find_leaks(lambda: [table], {"test"})
    assert leaks.overlaps["test", "train"] == Overlap(images=20, exact=10, near=0, group=0)
    assert leaks.flat == {"test": 20, "train": 10}


def test_nothing_held_out_and_missing_columns():
    leaks = find_leaks(lambda: [SET.filter(pc.equal(SET["split"], "train"))], {"test"})
    assert (leaks.overlaps, leaks.images) == ({}, {"train": 6})
    with pytest.raises(DataError, match=r"\['phash'\] are missing"):
        find_leaks(lambda: [SET.drop_columns(["phash"])], {"test"})


def test_markdown():
    text = leak_table_markdown(find_leaks(lambda: [SET], {"test"}))
    assert (
        "| test | train | 1 of 5 (20.0%) | 1 of 5 (20.0%) | 2 of 5 (40.0%) | 2 of 5 (40.0%) |"
        in text.splitlines()
    )
    assert "| train | 6 | 1 | 1 | 0 |" in text.splitlines()


def test_picture_shows_the_pairs_side_by_side():
    colours = {"t1/q0": (255, 0, 0), "a0": (0, 255, 0), "t2": (0, 0, 255), "a3": (255, 255, 0)}

    def load(sample_id):
        if sample_id not in colours:
            raise ImageError("gone")
        data = io.BytesIO()
        Image.new("RGB", (400, 200), colours[sample_id]).save(data, "PNG")
        return data.getvalue()

    sheet = Image.open(io.BytesIO(leak_picture(find_leaks(lambda: [SET], {"test"}), load, rows=3, side=100)))
    # Rows of 100 pixels of picture, 34 of text and 8 of gap: t1 beside a0, then the pair with t4, which
    # cannot be read, then t2 beside a3.
    assert sheet.size == (2 * 108 + 8, 3 * 142 + 8)
    assert [sheet.getpixel((x, 58)) for x in (58, 166)] == [(255, 0, 0), (0, 255, 0)]
    assert [sheet.getpixel((x, 58 + 2 * 142)) for x in (58, 166)] == [(0, 0, 255), (255, 255, 0)]
    assert sheet.getpixel((58, 58 + 142)) == (255, 255, 255)
    empty = find_leaks(lambda: [rows()], {"test"})
    assert Image.open(io.BytesIO(leak_picture(empty, load))).format == "PNG"


@pytest.mark.real_data
def test_vqa_rads_test_images_are_in_train_too(real_data):
    """All 203 in the MEVF re-split; in the official file one of them, synpic23571.jpg, has test questions
    only.
    """
    folder, seen = real_data / "vqa_rad", {}

    def read(name, split_of):
        for line in (folder / name).read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            image = record["image"]
            if image not in seen:
                seen[image] = fingerprint(decode((folder / image).read_bytes(), DataConfig()))
            yield dict(zip(IMAGES.names, (str(record["qid"]), image, split_of(record), None, *seen[image])))

    official = list(
        read("records.jsonl", lambda record: "test" if record["phrase_type"].startswith("test") else "train")
    )
    mevf = [
        row
        for split in ("train", "test")
        for row in read(f"mevf_{split}set.jsonl", lambda record, split=split: split)
    ]
    for rows, exact in ((official, 202), (mevf, 203)):
        table = pa.Table.from_pylist(rows, schema=IMAGES)
        leaks = find_leaks(
            lambda table=table: (table.slice(at, 500) for at in range(0, table.num_rows, 500)), {"test"}
        )
        assert leaks.overlaps["test", "train"] == Overlap(images=203, exact=exact, near=0, group=0)
        assert leaks.flat == {"test": 0, "train": 0}
    images = {
        split: {row["image_id"] for row in official if row["split"] == split} for split in ("test", "train")
    }
    assert images["test"] - images["train"] == {"images/synpic23571.jpg"}
