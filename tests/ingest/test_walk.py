"""Walks of folders: every file once, and what cannot be read is named."""

import os

import fsspec
import pytest

from medray.errors import DataError
from medray.ingest.files.walk import NO_SUFFIX, subfolders, suffix_of, walk_files


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("a.JPG", ".jpg"),
        ("a.b/c", NO_SUFFIX),
        (".DS_Store", NO_SUFFIX),
        ("._a.Png", ".png"),
        ("brain.nii.gz", ".nii.gz"),
        ("x.gz", ".gz"),
        ("1.2.840.113619", NO_SUFFIX),
        ("scan.00012345", NO_SUFFIX),
        ("a.7z", ".7z"),
        ("IM_0001", NO_SUFFIX),
        ("a.", NO_SUFFIX),
        ("a.much-too-long-for-one", NO_SUFFIX),
        ("study.12345678.gz", ".gz"),
    ],
)
def test_suffix_is_no_part_of_an_id(name, suffix):
    assert suffix_of(name) == suffix


def folder(root):
    for name in ("b.png", "a.txt", "two/deep/c.png", "one/d.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def test_files_come_folder_by_folder_in_order(tmp_path):
    root = folder(tmp_path)
    paths = [found.path for found in walk_files(str(root))]
    assert paths == [f"{root}/{name}" for name in ("a.txt", "b.png", "one/d.png", "two/deep/c.png")]
    assert sorted(found.path for found in walk_files(str(root), in_order=False)) == sorted(paths)
    assert [found.path for found in walk_files(str(root), depth=1)] == paths[:2]
    assert list(walk_files(paths[0])) == [(paths[0], None)]
    assert subfolders(str(root)) == [f"{root}/one", f"{root}/two"]


def test_linked_folders_are_read_and_loops_are_named(tmp_path):
    root = folder(tmp_path / "source")
    other = folder(tmp_path / "elsewhere")
    (root / "one" / "linked").symlink_to(other / "two")
    (root / "one" / "up").symlink_to(root)
    (root / "self").symlink_to("self")
    (root / "gone.png").symlink_to("nowhere.png")
    found = {path.removeprefix(f"{root}/"): problem for path, problem in walk_files(str(root))}
    assert "one/linked/deep/c.png" in found
    assert "leads back" in found.pop("one/up")
    assert set(found.values()) == {None}
    assert {"self", "gone.png"} <= set(found)  # opening them says what is wrong


def test_a_part_of_a_source_knows_the_whole(tmp_path):
    root = folder(tmp_path / "source")
    (root / "one" / "up").symlink_to(root)
    found = list(walk_files(f"{root}/one", part_of=str(root)))
    assert [path.removeprefix(f"{root}/") for path, problem in found if problem] == ["one/up"]
    assert list(walk_files(f"{root}/gone", part_of=str(root))) == [
        (f"{root}/gone", "the folder cannot be read: No such file or directory")
    ]


def test_pipes_are_named_and_never_opened(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    ((path, problem),) = walk_files(str(tmp_path))
    assert path.endswith("a.png") and "pipe" in problem


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_folders_without_permission_are_named(tmp_path):
    root = folder(tmp_path)
    (root / "one").chmod(0)
    try:
        assert [problem for path, problem in walk_files(str(root)) if problem] == [
            "the folder cannot be read: Permission denied"
        ]
    finally:
        (root / "one").chmod(0o700)


def test_a_source_that_cannot_be_read_is_an_error(tmp_path):
    for read in (
        lambda: list(walk_files(str(tmp_path / "none"))),
        lambda: subfolders(str(tmp_path / "none")),
    ):
        with pytest.raises(DataError, match="cannot be read"):
            read()


def test_object_stores_are_walked_alike():
    fs = fsspec.filesystem("memory")
    for name in ("b.png", "one/d.png", "two/deep/c.png"):
        fs.pipe_file(f"/walk/{name}", b"x")
    paths = [found.path for found in walk_files("memory://walk")]
    assert paths == [f"memory://walk/{name}" for name in ("b.png", "one/d.png", "two/deep/c.png")]
    assert [path.rsplit("/", 1)[1] for path in subfolders("memory://walk")] == ["one", "two"]
