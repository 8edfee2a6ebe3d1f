"""Rows in another order through files; quotas; the best of very many."""

import tempfile
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from medray.stable_draws import hash64
from medray.storage import external_sort
from medray.storage.external_sort import Ordered, batches_of, evenly, groups_of, hashed
from medray.storage.quotas import shares
from medray.storage.top_n import at_most, descending, thresholds


def table(ids):
    return pa.table({"sample_id": ids, "size": [len(name) for name in ids]})


def test_the_order_is_of_the_ids_whatever_the_tables_and_their_number(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ids = [f"row-{number % 700}" for number in range(1000)]
    orders = []
    for part_bytes, parts, cut in ((2**30, 1, 1000), (3000, 7, 13), (10, 512, 400)):
        monkeypatch.setattr(external_sort, "PART_BYTES", part_bytes)
        pieces = [table(ids[start : start + cut]) for start in range(0, len(ids), cut)]
        with Ordered(pieces, hashed("sample_id", 3), len(ids), then=["size"]) as rows:
            assert rows.parts == parts
            orders.append([name for part in rows for name in part["sample_id"].to_pylist()])
            assert orders[-1] == [name for part in rows for name in part["sample_id"].to_pylist()]
    expected = sorted(ids, key=lambda name: hash64(name, 3))
    assert orders == [expected, expected, expected]
    assert expected != sorted(ids, key=lambda name: hash64(name, 4))
    assert not list(tmp_path.iterdir()), "temporary files stay behind"


def test_groups_are_whole_and_batches_exact(monkeypatch):
    monkeypatch.setattr(external_sort, "PART_BYTES", 2000)
    ids = [f"row-{number % 40}" for number in range(1000)]
    with Ordered([table(ids)], hashed("sample_id"), 1000) as rows:
        groups = [[row["sample_id"] for row in group] for group in groups_of(rows, "sample_id")]
        assert [table.num_rows for table in batches_of(rows, 64)] == [64] * 15 + [40]
    assert sorted(group[0] for group in groups) == sorted(set(ids))
    assert all(len(group) == 25 and len(set(group)) == 1 for group in groups)


@pytest.mark.parametrize("total", [1, 2, 3, 1000])
def test_places_come_in_their_order(total, monkeypatch):
    monkeypatch.setattr(external_sort, "PART_BYTES", 8 * total / 5)
    places = np.random.default_rng(0).permutation(total)
    with Ordered([pa.table({"place": places})], evenly("place", total), total) as rows:
        found = [table["place"].to_pylist() for table in rows]
    assert [place for part in found for place in part] == list(range(total))
    assert len(found) == min(total, 5)


def test_files_are_as_many_as_the_rows_need(monkeypatch):
    monkeypatch.setattr(external_sort, "PART_BYTES", 2**16)
    rng = np.random.default_rng(0)
    pieces = [
        pa.table(
            {
                "sample_id": [f"{start + number}" for number in range(8)],
                "image": [rng.bytes(2**12) for _ in range(8)],
            }
        )
        for start in range(0, 40, 8)
    ]
    with Ordered(pieces, hashed("sample_id"), 40) as rows:
        sizes = [table.nbytes for table in rows]
    # 160 KiB and a little, of 64 KiB each
    assert len(sizes) == 3 and sum(sizes) > 160 * 2**10 and max(sizes) < 2 * 2**16
    with Ordered([], hashed("sample_id"), 0) as rows:
        assert not list(rows)


@pytest.mark.parametrize(
    ("total", "sizes", "rule", "expected"),
    [
        (10, {"ct": 100, "mri": 3, "gross": 1}, "equal", {"ct": 6, "mri": 3, "gross": 1}),
        (10, {"ct": 100, "mri": 3, "gross": 1}, "proportional", {"ct": 8, "mri": 1, "gross": 1}),
        (50, {"ct": 60, "mri": 40}, "proportional", {"ct": 30, "mri": 20}),
        (50, {"ct": 6, "mri": 4}, "proportional", {"ct": 6, "mri": 4}),
        (2, {"ct": 100, "mri": 3, "gross": 1}, "proportional", {"ct": 1, "mri": 1, "gross": 0}),
        (0, {"ct": 5}, "equal", {"ct": 0}),
        (3, {}, "proportional", {}),
    ],
)
def test_shares(total, sizes, rule, expected):
    assert shares(total, sizes, rule) == expected


@pytest.mark.parametrize("rule", ["equal", "proportional"])
def test_shares_are_whole_and_no_more_than_there_is(rule):
    rng = np.random.default_rng(0)
    for _ in range(300):
        sizes = {
            f"g{number}": int(size) for number, size in enumerate(rng.integers(0, 30, rng.integers(1, 8)))
        }
        total = int(rng.integers(0, 100))
        given = shares(total, sizes, rule, seed=int(rng.integers(99)))
        assert sum(given.values()) == min(total, sum(sizes.values()))
        assert all(0 <= given[group] <= size for group, size in sizes.items())


def test_keys_of_scores_sort_them_downwards():
    scores = np.array([3.5, -1e-300, 0.0, -2.0, 1e300, -7.25, 1e-9])
    keys = descending(scores)
    assert [scores[place] for place in np.argsort(keys)] == sorted(scores, reverse=True)
    assert descending(np.array([-0.0])) == descending(np.array([0.0]))
    assert all(high < low for high, low in pairwise(keys[np.argsort(-scores)].tolist()))


def test_thresholds_are_those_of_a_sort():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 3, 5000)
    # Few scores, so that the second word decides; and words that differ only in their last bits.
    keys = np.stack(
        [descending(rng.integers(0, 4, 5000).astype(float)), rng.permutation(5000).astype(np.uint64)], axis=1
    )
    wanted = {0: 1, 1: 700, 2: int((groups == 2).sum())}
    found = thresholds(
        lambda: ((groups[at : at + 999], keys[at : at + 999]) for at in range(0, 5000, 999)), wanted, words=2
    )
    for group, number in wanted.items():
        mine = keys[groups == group]
        order = np.lexsort((mine[:, 1], mine[:, 0]))[:number]
        assert found[group].tolist() == mine[order[-1]].tolist()
        assert np.flatnonzero(at_most(mine, found[group])).tolist() == sorted(order.tolist())
