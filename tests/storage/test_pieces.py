"""Stages that resume: rows in the order of their input, each id once, whatever happened to their files."""

import time
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medray.errors import DataError, StageError
from medray.ids import contains, digests
from medray.storage.pieces import reconcile
from medray.storage.resumable import write_resumable
from medray.storage.shards import count_rows, parquet_files, readable, stored_rows
from tests.support.damage import cut, delete, empty

IDS = [f"row-{number:03d}" for number in range(48)]


def test_contains_compares_whole_digests():
    known = digests(IDS)
    assert contains(known, digests(IDS[:3])).all()
    assert contains(known, digests(["row-003", "row-999"])).sum() == 1
    assert not contains(digests([]), known).any()


@pytest.fixture
def rows_in(tmp_path):
    """A run folder whose name has glob characters, with 48 rows in two files."""
    folder = tmp_path / "run [2026]*" / "in"
    folder.mkdir(parents=True)
    for part in range(2):
        pq.write_table(pa.table({"sample_id": IDS[24 * part : 24 * part + 24]}), folder / f"{part}.parquet")
    return folder


class Slow:
    """Batches that take longer than their neighbours."""

    def __call__(self, table):
        time.sleep(0.02 * (int(table["sample_id"][0].as_py()[-1]) % 3))
        return table.append_column("size", pa.array([len(name.as_py()) for name in table["sample_id"]]))


def run(rows_in, number=0, **options):
    def stage(rows):
        import ray.data

        pool = ray.data.ActorPoolStrategy(
            size=1, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True
        )
        return rows.map_batches(Slow, batch_size=2, batch_format="pyarrow", num_cpus=0.5, compute=pool)

    out = rows_in.parent / f"out{number}"
    written = write_resumable(
        str(rows_in), str(out / "rows"), str(out / "committed"), stage, 16, 0.5, **options
    )
    return out, written


def ids_of(out):
    return [row["sample_id"] for row in stored_rows(str(out / "rows"))]


@pytest.mark.ray
def test_rows_come_out_in_the_order_of_their_input(ray_cluster, rows_in):
    """Pieces of 16 rows in batches of 2: the bytes of the ids are the same in each of three runs."""
    orders = ["\n".join(ids_of(run(rows_in, number)[0])).encode() for number in range(3)]
    assert orders == ["\n".join(IDS).encode()] * 3


def flip(path):
    """Other bits in the middle of the file's first column."""
    data = bytearray(path.read_bytes())
    place = data.index(b"row-0") + 4
    data[place] ^= 1
    path.write_bytes(bytes(data))


def double(path):
    """The piece a second time, under another name, as a second job would write it."""
    (path.parent / f"second{path.name[6:]}").write_bytes(path.read_bytes())


def orphan(path):
    """Rows without committed ids."""
    (path.parent / "orphan_000000-0.parquet").write_bytes(path.read_bytes())


@pytest.mark.ray
@pytest.mark.parametrize(("of_rows", "of_ids"), [(cut, empty), (flip, delete), (empty, flip), (delete, cut)])
def test_damaged_pieces_are_made_again(ray_cluster, rows_in, of_rows, of_ids):
    """Each damage, of rows and of committed ids, ends with every id once, and whole pieces stay."""
    out, _ = run(rows_in)
    rows, committed = (sorted((out / part).glob("*.parquet")) for part in ("rows", "committed"))
    of_rows(rows[0])
    of_ids(committed[1])
    assert run(rows_in)[1].rows == 48
    assert Counter(ids_of(out)) == Counter(IDS)
    assert rows[2].exists() and not rows[0].exists() and not rows[1].exists()


@pytest.mark.ray
def test_repeated_pieces_are_dropped(ray_cluster, rows_in):
    out, _ = run(rows_in)
    before = sorted((out / "rows").iterdir())
    orphan(before[0])
    for part in ("rows", "committed"):
        double(sorted((out / part).glob("*.parquet"))[-1])
    assert run(rows_in)[1].rows == 48
    assert Counter(ids_of(out)) == Counter(IDS)


@pytest.mark.parametrize("whole_rows", [False, True])
def test_other_columns_are_read_when_a_stage_resumes(tmp_path, whole_rows):
    """A bit flipped in a text: the ids are right, the page's checksum is not."""
    for part, columns in (
        ("rows", {"sample_id": IDS[:2], "text": ["zzzz", "yyyy"]}),
        ("committed", {"sample_id": IDS[:2]}),
    ):
        (tmp_path / part).mkdir()
        name = "a_000000-0" if part == "rows" else "a_000000"
        pq.write_table(
            pa.table(columns),
            tmp_path / part / f"{name}.parquet",
            write_page_checksum=True,
            compression="NONE",
            use_dictionary=False,
            write_statistics=False,
        )
    path = tmp_path / "rows/a_000000-0.parquet"
    path.write_bytes(path.read_bytes().replace(b"zzzz", b"zzzy"))
    found = reconcile(str(tmp_path / "rows"), str(tmp_path / "committed"), "sample_id", whole_rows=whole_rows)
    assert len(found) == (0 if whole_rows else 2)
    assert path.exists() != whole_rows


def test_committed_ids_that_are_not_utf_8_are_damage(tmp_path):
    """Ray writes these files without checksums of pages."""
    plain = {"compression": "NONE", "use_dictionary": False, "write_statistics": False}
    for part, name in (("rows", "a_000000-0"), ("committed", "a_000000")):
        (tmp_path / part).mkdir()
        pq.write_table(pa.table({"sample_id": IDS[:2]}), tmp_path / part / f"{name}.parquet", **plain)
    path = tmp_path / "committed/a_000000.parquet"
    path.write_bytes(path.read_bytes().replace(b"row-001", b"\xffow-001"))
    assert not len(reconcile(str(tmp_path / "rows"), str(tmp_path / "committed"), "sample_id"))
    assert not list(tmp_path.glob("*/a_*"))


def test_reconcile_finishes_an_interrupted_commit(tmp_path):
    """Rows whose commit is pending are removed; a pending file beside its committed one is only a
    leftover.
    """
    for part, name, ids in (
        ("rows", "a_000000-0", IDS[:2]),
        ("committed", "a_000000", IDS[:2]),
        ("committed", "a_000000.pending", IDS[:2]),
        ("rows", "a_000001-0", IDS[2:4]),
        ("committed", "a_000001.pending", IDS[2:4]),
    ):
        (tmp_path / part).mkdir(exist_ok=True)
        pq.write_table(pa.table({"sample_id": ids}), tmp_path / part / f"{name}.parquet")
    found = reconcile(str(tmp_path / "rows"), str(tmp_path / "committed"), "sample_id")
    assert list(found) == list(digests(IDS[:2]))
    assert sorted(path.name for path in tmp_path.glob("*/*")) == ["a_000000-0.parquet", "a_000000.parquet"]


@pytest.mark.ray
def test_rows_of_no_input_are_not_kept(ray_cluster, rows_in):
    out, _ = run(rows_in)
    for part, name in (("rows", "x_000000-0"), ("committed", "x_000000")):
        pq.write_table(pa.table({"sample_id": ["stranger"]}), out / part / f"{name}.parquet")
    assert run(rows_in)[1].rows == 48
    assert Counter(ids_of(out)) == Counter(IDS)


@pytest.mark.ray
def test_a_stage_that_loses_rows_fails(ray_cluster, rows_in, tmp_path):
    def stage(rows):
        return rows.filter(lambda row: row["sample_id"] != IDS[3], num_cpus=0.5)

    arguments = (str(rows_in), str(tmp_path / "rows"), str(tmp_path / "committed"), stage, 16, 0.5)
    with pytest.raises(StageError, match="1 of 48 input rows"):
        write_resumable(*arguments)
    assert write_resumable(*arguments, keeps=lambda row: row["sample_id"] != IDS[3]).rows == 47


def test_repeated_ids_of_the_input_are_refused(rows_in):
    pq.write_table(pa.table({"sample_id": IDS[:1]}), rows_in / "2.parquet")
    with pytest.raises(StageError, match="1 of 49 rows repeat a sample_id"):
        write_resumable(str(rows_in), str(rows_in / "out"), str(rows_in / "committed"), None, 16)


@pytest.mark.parametrize("damage", [cut, empty, delete])
def test_a_damaged_shard_is_named(rows_in, damage):
    path = sorted(rows_in.iterdir())[1]
    files = parquet_files(str(rows_in))
    damage(path)
    if damage is not delete:
        with pytest.raises(DataError, match=r"in/1.parquet: cannot be read as Parquet"):
            count_rows(str(rows_in))
        with pytest.raises(DataError, match=r"in/1.parquet: cannot be read as Parquet"):
            list(stored_rows(str(rows_in)))
    with pytest.raises(DataError, match=r"1.parquet: cannot be read"), readable(files[1]):
        pq.read_table(files[1])
