"""Files of a source that nothing was read from: counted by suffix, whatever the source."""

import io
import json
import os
import tarfile

import fsspec
import pytest

from medray.config import DataConfig
from medray.ingest import unread
from medray.ingest.files.notes import MOST_NAMES, OTHERS, UNREAD, Notes, read_notes
from medray.ingest.source_index import _pieces, detect, index_rows
from medray.ingest.unread import account_of, unread_files, unread_line
from tests.images.test_decoding import noise, saved


def account(source, notes, **fields):
    """The account of a source, as jobs make it, but without Ray."""
    config = DataConfig(source=str(source), **fields)
    rows = []
    for number, piece in enumerate(_pieces(*[detect(config)[0], config, detect(config)[1]])):
        seen = Notes()
        rows += index_rows(**piece, notes=seen)
        seen.write(str(notes), number)
    return account_of(
        config, str(notes), lambda: iter([[row["image_file"] for row in rows]]), len(rows)
    ), rows


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(saved(noise()))


def test_image_folder_counts_what_it_leaves(tmp_path):
    for name in (
        "a.png",
        "train/b.PNG",
        "c.heic",
        "C.HEIC",
        "notes.xyz",
        ".DS_Store",
        "LICENSE",
        "train/README.md",
        "deep/er/slides.pptx",
    ):
        picture(tmp_path / "in" / name)
    found, rows = account(tmp_path / "in", tmp_path / "notes")
    assert found["unread"] == {"(none)": 2, ".heic": 2, ".md": 1, ".pptx": 1, ".xyz": 1}
    assert len(rows) == 2


def test_table_counts_images_that_no_record_names(tmp_path):
    for name in ("a.png", "b.png", "more/a.png", "more/c#frame=3.png"):
        picture(tmp_path / "in" / name)
    records = [
        {"file_name": name, "text": "A text."} for name in ("a.png", "a.png", "gone.png", "./more/../b.png")
    ]
    (tmp_path / "in" / "metadata.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "in" / "metadata.tsv").write_text("x")
    found, _ = account(tmp_path / "in", tmp_path / "notes")
    assert found["unread"] == {".png": 2, ".tsv": 1}


@pytest.mark.parametrize("written", ["in", "./in/", "{}/in/"])
def test_a_source_is_the_same_however_its_path_is_written(tmp_path, monkeypatch, written):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "sub/b.png", "sub/c.txt"):
        picture(tmp_path / "in" / name)
    assert account(written.format(tmp_path), tmp_path / "notes")[0]["unread"] == {".txt": 1}


def test_files_of_an_object_store():
    fs = fsspec.filesystem("memory")
    for name in ("a.png", "sub/b.png", "sub/c.txt"):
        fs.pipe_file(f"/unread/{name}", saved(noise()))
    assert account("memory://unread", "memory://notes")[0]["unread"] == {".txt": 1}


def test_a_single_file_as_source_says_nothing_of_its_neighbours(tmp_path):
    picture(tmp_path / "other.png")
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"file_name": "a.png", "text": "t"}))
    assert account(path, tmp_path / "notes")[0]["unread"] == {}


def test_members_of_tars_and_files_beside_them(tmp_path):
    (tmp_path / "in").mkdir()
    for shard in range(2):
        with tarfile.open(tmp_path / "in" / f"{shard}.tar", "w") as out:
            for name in ("1.jpg", "1.txt", "1.cls", "2.jxl", "2.json", "README", "__meta__/a.yaml"):
                member = tarfile.TarInfo(name)
                member.size = 2
                out.addfile(member, io.BytesIO(b"{}"))
    (tmp_path / "in" / "3.tar.gz").write_bytes(b"x")
    found, _ = account(tmp_path / "in", tmp_path / "notes")
    assert found["unread"] == {"(none)": 2, ".cls": 2, ".jxl": 2, ".yaml": 2, ".tar.gz": 1}


def test_every_file_is_counted_once_however_many_walks_it_takes(tmp_path, monkeypatch):
    for number in range(60):
        picture(tmp_path / "in" / str(number % 4) / f"{number}.png")
    named = [str(tmp_path / "in" / str(number % 4) / f"{number}.png#frame=2") for number in range(0, 60, 3)]
    monkeypatch.setattr(unread, "READ_AT_ONCE", 5)
    calls = []

    def batches():
        calls.append(1)
        return iter([named, [None], named])

    assert unread_files(str(tmp_path / "in"), [], batches, 41) == {".png": 40}
    assert len(calls) == 9


def test_notes_are_bounded_and_added_up(tmp_path):
    notes = Notes()
    for number in range(MOST_NAMES + 50):
        notes.add(UNREAD, "a.tar", f".s{number}")
    notes.write(str(tmp_path), "a.tar", 0)
    notes.write(str(tmp_path), "a.tar", 0)  # a task that runs again
    notes.write(str(tmp_path), "a.tar", 1)
    assert len(os.listdir(tmp_path)) == 2
    total = read_notes(str(tmp_path)).total(UNREAD)
    assert (total[".s0"], total[OTHERS], len(total)) == (2, 100, MOST_NAMES + 1)
    assert read_notes(str(tmp_path / "none")).total(UNREAD) == {}


@pytest.mark.parametrize(
    ("counts", "line"),
    [
        ({}, ""),
        ({".md": 70, "(none)": 5, ".heic": 12}, "files not read: 12 .heic, 5 without a suffix, 70 .md"),
        ({f".s{n}": 1 for n in range(20)}, "and 8 of other kinds"),
    ],
)
def test_line_names_data_before_companions(counts, line):
    assert unread_line(counts).endswith(line)
