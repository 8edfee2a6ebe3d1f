"""Files and rows that cannot be read: each is set aside with its row and its path, and the others come in."""

import io
import json
import os
import tarfile

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from medray.config import DataConfig
from medray.images.decoding import ImageError
from medray.ingest.canonical_rows import ToSamples
from medray.ingest.group_by_image import _prepared, group_rows
from medray.ingest.source_index import INDEX, _pieces, detect, index_rows, read_image_bytes
from tests.images.test_decoding import noise, saved
from tests.images.test_dicom import saved as dicom
from tests.images.test_dicom import tagged

PNG = saved(noise())


def samples_of(source, **fields):
    """SAMPLE rows of a source, as jobs make them, but without Ray."""
    config = DataConfig(source=str(source), **fields)
    kind, files = detect(config)
    rows = [row for piece in _pieces(kind, config, files) for row in index_rows(**piece)]
    groups = group_rows(_prepared(pa.Table.from_pylist(rows, schema=INDEX)), config.model_dump())
    return ToSamples(config.model_dump(), kind)(groups).to_pylist()


def good_and_set_aside(rows):
    return [row for row in rows if row["error"] is None], [bad for row in rows for bad in row["set_aside"]]


def unreadable(root):
    """name in a record -> a part of the reason."""
    (root / "film.png").write_bytes(PNG)
    (root / "folder.png").mkdir()
    os.mkfifo(root / "pipe.png")
    (root / "dangling.png").symlink_to("nowhere.png")
    (root / "self.png").symlink_to("self.png")
    (root / "null.png").symlink_to("/dev/zero")
    return {
        "x" * 300 + ".png": "name that is too long",
        "film.png/a.png": "a part of its path is a file",
        "a\0b.png": "a name that no file can have",
        "gone.png": "does not exist",
        "dangling.png": "does not exist",
        "self.png": "a link that leads to itself",
        "folder.png": "is a folder",
        "pipe.png": "is a pipe or a device",
        "null.png": "is a pipe or a device",
        ".": "is a folder",
        "deep/" * 900 + "a.png": "",
    }


def test_no_name_in_a_record_stops_a_job(tmp_path):
    reasons = unreadable(tmp_path)
    lines = [{"file_name": name, "text": "A text."} for name in ["film.png", *reasons]]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    good, bad = good_and_set_aside(samples_of(tmp_path))
    assert [row["image"] for row in good] == [PNG] and len(bad) == len(reasons)
    for number, (name, reason) in enumerate(reasons.items(), start=2):
        (row,) = [row for row in bad if f"(line {number})" in row["file"]]
        assert reason in row["reason"] and len(row["reason"]) < 300
        assert row["file"].startswith("metadata.jsonl byte ")
        assert name[:16].replace("\0", "?") in row["file"] + row["reason"] or len(name) > 4096


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_no_permission(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "a.png").chmod(0)
    with pytest.raises(ImageError, match=r"'a\.png' cannot be read: permission denied"):
        read_image_bytes(str(tmp_path / "a.png"), 10**6)


class Failing(fsspec.AbstractFileSystem):
    """A store that refuses: its errors are of no kind that Python knows."""

    protocol = "failing"
    cachable = False

    def size(self, path):
        raise {"permission": PermissionError("arn:aws:iam::123456"), "gone": FileNotFoundError(path)}.get(
            path, ConnectionResetError(104, "reset")
        )

    def info(self, path, **kwargs):
        return {"name": path, "size": 1, "type": "file"}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("permission", "cannot be read: permission denied"),
        ("gone", "does not exist"),
        ("reset", "cannot be read: reset"),
    ],
)
def test_a_store_that_fails_sets_the_row_aside(name, reason):
    fsspec.register_implementation("failing", Failing, clobber=True)
    with pytest.raises(ImageError, match=f"^image file '{name}' {reason}$"):
        read_image_bytes(f"failing://{name}", 100)


def test_errors_name_the_row_and_the_path_in_the_image_folder(tmp_path):
    """SLAKE's images are all called source.jpg: the name alone tells none from the others."""
    records = [
        {
            "id": str(n),
            "image": f"xmlab{n}/source.jpg",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat?"},
                {"from": "gpt", "value": "A lung."},
            ],
        }
        for n in range(3)
    ]
    (tmp_path / "sub").mkdir()
    (tmp_path / "llava.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "images").mkdir()
    good, bad = good_and_set_aside(samples_of(tmp_path, images=str(tmp_path / "images")))
    assert not good
    assert sorted(row["reason"] for row in bad) == [
        f"image file 'xmlab{n}/source.jpg' does not exist" for n in range(3)
    ]
    assert all(
        row["file"].startswith("llava.jsonl byte ") and row["file"].endswith("/source.jpg") for row in bad
    )
    assert str(tmp_path) not in str(bad)


def test_patients_in_paths_are_hashed(tmp_path):
    records = [
        {"file_name": "p10000032/s50414267/1.jpg", "text": "A text."},
        {"file_name": "wards/MUELLER_7/1.jpg", "text": "A text.", "patient_id": "Mueller_7"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, records)))
    _, bad = good_and_set_aside(samples_of(tmp_path))
    shown = str([(row["file"], row["reason"]) for row in bad]).lower()
    assert len(bad) == 2 and shown.count("does not exist") == 2
    assert not any(part in shown for part in ("10000032", "50414267", "mueller"))


def test_an_image_folder_with_things_that_are_no_images(tmp_path):
    unreadable(tmp_path)
    (tmp_path / "._film.png").write_bytes(b"\0\5\x16\7 a Mac's notes")
    (tmp_path / "text.png").write_bytes(b"hello")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    (tmp_path / "sub" / "b.PPM").write_bytes(saved(noise(), "PPM"))
    good, bad = good_and_set_aside(samples_of(tmp_path))
    assert sorted(row["sample_id"] for row in good) == ["film.png", "sub/b.PPM"]
    assert {row["file"] for row in bad} == {
        "dangling.png",
        "null.png",
        "pipe.png",
        "self.png",
        "sub/up",
        "text.png",
    }


def test_a_page_a_row(tmp_path):
    pages = [noise(seed=seed) for seed in range(4)]
    pages[0].save(tmp_path / "stack.TIF", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "one.tif")
    (tmp_path / "cut.tif").write_bytes((tmp_path / "stack.TIF").read_bytes()[:200])
    good, bad = good_and_set_aside(samples_of(tmp_path))
    assert sorted(row["sample_id"] for row in good) == [
        "one.tif",
        *(f"stack.TIF/p{page:04d}" for page in range(4)),
    ]
    assert len({row["image_hash"] for row in good}) == 4
    assert [row["file"] for row in bad] == ["cut.tif"]


def test_other_frames_of_a_named_file_are_a_warning(tmp_path):
    noise().save(tmp_path / "a.gif", save_all=True, append_images=[noise(seed=1)])
    noise().save(tmp_path / "b.tif", save_all=True, append_images=[noise(seed=1)])
    (tmp_path / "c.bin").write_bytes(
        dicom(tagged(np.zeros((2, 8, 8), "uint8"), frames=2, BurnedInAnnotation="NO"))
    )
    (tmp_path / "metadata.csv").write_text("file_name,text\na.gif,A\nb.tif,B\nc.bin,C\n")
    good, bad = good_and_set_aside(samples_of(tmp_path))
    assert not bad
    assert {row["sample_id"]: row["warnings"] for row in good} == {
        "a.gif": ["first-frame-of-animated-GIF"],
        "b.tif": ["first-page-of-TIFF"],
        "c.bin": ["first-frame-of-DICOM"],
    }
    # what a file holds decides, not its name
    assert {row["image_format"] for row in good} == {"GIF", "TIFF", "PNG"}


def test_a_dicom_folder_guards_each_file(tmp_path):
    sound = dicom(tagged(np.zeros((8, 8), "uint8")))
    for name in ("a.dcm", "e1s1i1.MRDC", "e1s1i2.img", "XX.mag", "b.dicm", "IM_0006", "c.txt"):
        (tmp_path / name).write_bytes(sound)
    (tmp_path / "notes.txt").write_bytes(b"hello")
    (tmp_path / "cut.dcm").write_bytes(sound[:200])
    os.mkfifo(tmp_path / "pipe.dcm")
    (tmp_path / "dangling.dcm").symlink_to("nowhere")
    (tmp_path / "._a.dcm").write_bytes(b"\0\5\x16\7")
    good, bad = good_and_set_aside(samples_of(tmp_path))
    assert len(good) == 7 and len(bad) == 3
    assert all(row["file"].startswith("dcm-") for row in bad) and not any(
        name in str(bad) for name in ("cut.dcm", "pipe.dcm", "dangling")
    )


def test_a_table_that_cannot_be_read_on_is_one_error(tmp_path, monkeypatch):
    from medray.ingest.readers import files

    class Torn(io.BytesIO):
        def readline(self, *args):
            if self.tell():
                raise OSError(5, "Input/output error")
            return super().readline(*args)

    found = list(files.readable(files.json_lines(Torn(b'{"a": 1}\n{"a": 2}\n'), 0, 100)))
    assert [error for _, _, error in found] == [None, "the file cannot be read: Input/output error"]
    assert found[1][0] == "after record 1"


def test_a_tar_of_odd_members(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as out:
        for name, data in (
            ("1.png", PNG),
            ("1.txt", b"A text."),
            ("2.png", b"hello"),
            ("2.txt", b"B"),
            ("3.txt", b"no image"),
            ("4.jpe", saved(noise(), "JPEG")),
            ("4.txt", b"\xff"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            out.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("5.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        out.addfile(link)
    good, bad = good_and_set_aside(samples_of(tmp_path))
    assert [row["sample_id"] for row in good] == ["x/1"]
    assert sorted((row["sample_id"], row["file"]) for row in bad) == [
        ("x/2", "x.tar 2"),
        ("x/3", "x.tar 3"),
        ("x/4", "x.tar 4"),
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tar", "a.parquet"])
def test_a_pipe_beside_a_table_is_never_opened(tmp_path, name):
    (tmp_path / "film.png").write_bytes(PNG)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "film.png", "text": "A text."}))
    os.mkfifo(tmp_path / name)
    good, _ = good_and_set_aside(samples_of(tmp_path))
    assert [row["image"] for row in good] == [PNG]


def test_folders_of_a_table_that_no_file_system_can_name(tmp_path):
    """CBIS-DDSM's series are looked for in folders: a name that is too long is a series that is not there."""
    columns = [
        "patient_id",
        "abnormality type",
        "pathology",
        "image file path",
        "cropped image file path",
        "ROI mask file path",
        "abnormality id",
    ]
    values = ["P_1", "mass", "BENIGN", "x" * 300 + "/b/c/1.dcm", "y" * 300 + "/b/c/1.dcm", "", "1"]
    (tmp_path / "mass_case_description_train_set.csv").write_text(
        f"{','.join(columns)}\n{','.join(values)}\n"
    )
    good, bad = good_and_set_aside(samples_of(tmp_path))
    assert not good and "neither its crop nor its mammogram is there" in bad[0]["reason"]


def test_a_record_that_no_reader_thought_of_is_set_aside(tmp_path, monkeypatch):
    from medray.ingest import source_index

    def odd(record, place):
        raise AttributeError("'float' object has no attribute 'strip'")

    monkeypatch.setitem(source_index.READERS, "captions", odd)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "film.png", "text": "A text."}))
    _, bad = good_and_set_aside(samples_of(tmp_path))
    assert [row["reason"] for row in bad] == ["the record cannot be read (AttributeError)"]
