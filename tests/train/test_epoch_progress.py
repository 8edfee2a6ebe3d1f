"""Which samples are done: over workers and starts, and looked up by digests."""

import json

import pyarrow as pa

from medray.train.epoch_progress import ROWS, Ids, count_done, done_rows, keep_done, write_done


def batches(ids, size=1000):
    rows = pa.table({"sample_id": ids, "error": [None] * len(ids)}, schema=ROWS)
    return rows.to_batches(size)


def checkpoint(folder, parts, before=None):
    """A checkpoint's files: one dict of ids per worker, and what was done before they started."""
    folder.mkdir()
    (folder / "progress.json").write_text(json.dumps({"world_size": len(parts)}))
    for rank, done in enumerate(parts):
        write_done(folder, rank, done, before if rank == 0 else None)
    return folder


def test_ids_are_found_and_no_others():
    """Among them digests that begin or end with zero bytes, which numpy's fixed-width bytes do not tell
    from padding.
    """
    ids = [f"set/{number}.png#é" for number in range(30_000)]
    held = Ids(batches(ids[::2]))
    assert len(held) == 15_000
    assert all((sample_id in held) == (number % 2 == 0) for number, sample_id in enumerate(ids))
    assert "a" not in Ids() and len(Ids()) == 0


def test_sixteen_bytes_for_each():
    assert Ids(batches([str(number) * 20 for number in range(1000)]))._sorted.nbytes == 16_000


def test_what_is_done_outlives_any_number_of_starts(tmp_path):
    first = checkpoint(tmp_path / "first", [{"a": None, "b": "cannot be decoded"}, {"c": None}])
    before = keep_done(first, tmp_path / "kept")
    second = checkpoint(tmp_path / "second", [{"d": None}, {}, {"e": "empty"}], before)
    # a later one of the same start
    again = checkpoint(tmp_path / "again", [{"d": None, "f": None}, {}, {"e": "empty"}], before)
    assert count_done(first) == (3, {"b": "cannot be decoded"})
    assert count_done(second) == (5, {"b": "cannot be decoded", "e": "empty"})
    third = checkpoint(tmp_path / "third", [{"g": None}], keep_done(again, tmp_path / "kept again"))
    found = [row for batch in done_rows(third) for row in batch.to_pylist()]
    assert sorted(row["sample_id"] for row in found) == list("abcdefg")
    assert {row["sample_id"]: row["error"] for row in found if row["error"]} == {
        "b": "cannot be decoded",
        "e": "empty",
    }


def test_an_empty_epoch(tmp_path):
    folder = checkpoint(tmp_path / "empty", [{}])
    assert count_done(folder) == (0, {}) and "a" not in Ids(done_rows(folder))
