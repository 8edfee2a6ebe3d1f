"""Reading shards in small blocks, writing them whole."""

import itertools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from medray.errors import DataError
from medray.files import seal
from medray.storage.resumable import write_converted
from medray.storage.shards import BLOCK_BYTES, parquet_files, read_rows, small_blocks, whole_file, write_shard


@pytest.mark.ray
def test_small_blocks_hold_for_what_is_made_under_them(tmp_path, ray_cluster):
    context = ray_cluster.data.DataContext.get_current()
    before = context.target_max_block_size
    rng = np.random.default_rng(0)
    for part in range(3):
        rows = [{"sample_id": f"{part}/{i}", "image": rng.bytes(2**18)} for i in range(64)]  # 16 MiB a file
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{part}.parquet", row_group_size=16)

    with small_blocks():
        dataset = read_rows(str(tmp_path), num_cpus=0.5, readers=1).map_batches(
            lambda table: table, batch_format="pyarrow", batch_size=8, num_cpus=0.5
        )
    assert context.target_max_block_size == before
    sizes, ids = [], []
    for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        sizes.append(block.nbytes)
        ids += block["sample_id"].to_pylist()
    assert ids == [f"{part}/{i}" for part in range(3) for i in range(64)]
    assert max(sizes) <= 1.5 * BLOCK_BYTES < sum(sizes)


def stored(folder, *files):
    """Files of so many rows in a folder, in row groups of 4; returns the ids."""
    folder.mkdir()
    ids = [f"row-{number:03d}" for number in range(sum(files))]
    for last, rows in zip(itertools.accumulate(files), files):
        pq.write_table(
            pa.table({"sample_id": ids[last - rows : last], "size": list(range(rows))}),
            folder / f"{last:03d}.parquet",
            row_group_size=4,
        )
    return ids


@pytest.mark.ray
def test_converted_shards_after_a_kill(ray_cluster, tmp_path):
    """Files of 5, 1 and 9 rows make shards of 4, 4, 4, 3; the writer of the third dies, and what the
    others wrote stays.
    """
    ids = stored(tmp_path / "in", 5, 1, 9)

    def convert(rows, died=tmp_path / "died"):
        if ids[8] in rows["sample_id"].to_pylist() and not died.exists():
            died.touch()
            raise RuntimeError("the writer dies")
        return rows.select(["sample_id"])

    arguments = (str(tmp_path / "in"), str(tmp_path / "out"), str(tmp_path / "done"), convert, 4, 0.5)
    with pytest.raises(Exception, match="the writer dies"):
        write_converted(*arguments)
    done = {path.name for path in (tmp_path / "done").iterdir()}
    assert "000002" not in done
    before = {
        number: sorted((tmp_path / "out").glob(f"part-{number}*"))[0].stat().st_mtime_ns for number in done
    }
    (tmp_path / "out" / "part-000002-00.parquet.abcd1234.part").write_bytes(b"half a file")
    assert write_converted(*arguments) == write_converted(*arguments) == 15
    assert {
        number: (tmp_path / "out" / f"part-{number}-00.parquet").stat().st_mtime_ns for number in done
    } == before
    assert [
        pq.read_table(path)["sample_id"].to_pylist() for path in sorted((tmp_path / "out").iterdir())
    ] == [ids[:4], ids[4:8], ids[8:12], ids[12:]]


@pytest.mark.ray
def test_shards_that_are_gone_or_cut_are_written_again(ray_cluster, tmp_path, caplog):
    ids = stored(tmp_path / "in", 6)
    arguments = (
        str(tmp_path / "in"),
        str(tmp_path / "out"),
        str(tmp_path / "done"),
        lambda rows: rows,
        4,
        0.5,
    )
    assert write_converted(*arguments) == 6
    first, second = sorted((tmp_path / "out").iterdir())
    for damage in (
        second.unlink,
        lambda: second.write_bytes(second.read_bytes()[:-1]),
        (tmp_path / "done" / "000001").unlink,
        lambda: (tmp_path / "done" / "000001").write_bytes(b""),
    ):
        before = first.stat().st_mtime_ns
        damage()
        assert write_converted(*arguments) == 6
        assert [
            name for path in (first, second) for name in pq.read_table(path)["sample_id"].to_pylist()
        ] == ids
        assert first.stat().st_mtime_ns == before
    assert "part-000001-00.parquet is missing or cut" in caplog.text


@pytest.mark.ray
def test_a_shard_that_is_written_again_may_have_fewer_files(ray_cluster, tmp_path):
    """Its images were larger, or more of them good, the first time."""
    ids = stored(tmp_path / "in", 6)
    arguments = (
        str(tmp_path / "in"),
        str(tmp_path / "out"),
        str(tmp_path / "done"),
        lambda rows: rows,
        4,
        0.5,
    )
    write_converted(*arguments)
    first, _ = sorted((tmp_path / "out").iterdir())
    second_file = first.with_name("part-000000-01.parquet")
    first.rename(second_file)
    sizes = {first.name: 1, second_file.name: second_file.stat().st_size}
    (tmp_path / "done/000000").write_bytes(seal({"files": sizes}))
    assert write_converted(*arguments) == 6
    assert [
        name
        for path in sorted((tmp_path / "out").iterdir())
        for name in pq.read_table(path)["sample_id"].to_pylist()
    ] == ids


@pytest.mark.ray
def test_a_shard_of_another_hand_is_named(ray_cluster, tmp_path):
    stored(tmp_path / "in", 6)
    arguments = (
        str(tmp_path / "in"),
        str(tmp_path / "out"),
        str(tmp_path / "done"),
        lambda rows: rows,
        4,
        0.5,
    )
    write_converted(*arguments)
    (tmp_path / "out" / "mine.parquet").write_bytes(
        (tmp_path / "out" / "part-000001-00.parquet").read_bytes()
    )
    with pytest.raises(DataError, match=r"8 rows in the shards, but 6 were read.*remove .*mine.parquet"):
        write_converted(*arguments)


def test_row_groups_and_files_are_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr("medray.storage.shards.GROUP_BYTES", 1000)
    monkeypatch.setattr("medray.storage.shards.SHARD_BYTES", 2500)
    large = pa.table({"image": [bytes(400)] * 2, "turns": [[{"role": "user"}]] * 2})
    small = pa.table({"image": [b"x"] * 80, "turns": [[]] * 80}, schema=large.schema)
    write_shard([*[large] * 5, small], str(tmp_path), "part-000007")
    files = sorted(tmp_path.iterdir())
    assert [path.name for path in files] == ["part-000007-00.parquet", "part-000007-01.parquet"]
    groups = [
        [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        for file in map(pq.ParquetFile, files)
    ]
    assert [[group.num_rows for group in part] for part in groups] == [[4, 4], [82]]
    columns = [groups[0][0].column(i) for i in range(2)]
    assert [(column.path_in_schema, column.compression) for column in columns] == [
        ("image", "UNCOMPRESSED"),
        ("turns.list.element.role", "SNAPPY"),
    ]


def test_a_file_that_fails_leaves_nothing_readable(tmp_path):
    with pytest.raises(RuntimeError), whole_file(LocalFileSystem(), str(tmp_path / "a.parquet")) as handle:
        handle.write(b"half")
        raise RuntimeError
    assert parquet_files(str(tmp_path)) == []
