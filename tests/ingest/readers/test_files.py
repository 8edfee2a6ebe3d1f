"""Files as streams: JSON and CSV record by record, tars by offset, folders, Parquet tables."""

import hashlib
import io
import json
import os
import tarfile

import pyarrow as pa
import pytest

from medray.images.decoding import ImageError
from medray.ingest.readers import files
from medray.ingest.readers.parquet import hugging_face, shards
from medray.ingest.source_index import INDEX, index_rows, read_image_bytes
from medray.split_names import split_of
from tests.images.test_decoding import noise, saved
from tests.ingest.readers.test_text import PAIR
from tests.ingest.test_source_index import CELL


class Counted(io.BytesIO):
    """Counts the bytes that were read."""

    read_bytes = 0

    def read(self, size=-1):
        data = super().read(size)
        self.read_bytes += len(data)
        return data


@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
def test_json_is_read_value_by_value(monkeypatch, chunk):
    """Wherever a read ends: inside a number, an escape, a letter of two bytes."""
    monkeypatch.setattr(files, "CHUNK", chunk)
    items = [{"a": 1}, 123456, 'x\\"ü\\u00e9', [], {"b": {"c": [1.5e3, None]}}, True]
    found = list(
        files.json_records(
            io.BytesIO(b"\xef\xbb\xbf " + json.dumps(items, ensure_ascii=False).encode() + b"\n")
        )
    )
    assert [(item, error) for _, item, error in found] == [(item, None) for item in items]
    assert found[4][0] == "record 4"


def test_json_is_not_held_whole(monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 100)
    handle = Counted(json.dumps([{"a": "x" * 50}] * 1000).encode())
    stream = files.json_records(handle)
    assert next(stream)[1] == {"a": "x" * 50}
    assert handle.read_bytes <= 300


@pytest.mark.parametrize(
    ("text", "places", "reason"),
    [
        (b'[{"a": 1}, {"a": ', ["record 0", "from record 1 on"], "not JSON"),
        (b'[{"a": 1} {"a": 2}]', ["record 0", "from record 0 on"], "expecting ']'"),
        (b'"text"', ["whole file"], "list of records"),
        (b"", ["whole file"], "list of records"),
    ],
)
def test_broken_json_gives_what_came_before_and_one_error(text, places, reason):
    found = list(files.json_records(io.BytesIO(text)))
    assert [place for place, _, _ in found] == places
    assert reason in found[-1][2]
    assert all(error is None for _, _, error in found[:-1])


def test_json_object_of_lists_and_objects():
    text = json.dumps({"mri": [{"a": 1}, {"a": 2}], "ct": [], "p7": {"a": 3}}).encode()
    assert [found[:2] for found in files.json_records(io.BytesIO(text))] == [
        ("mri record 0", {"a": 1}),
        ("mri record 1", {"a": 2}),
        ("record p7", {"a": 3}),
    ]


def test_a_broken_json_value_does_not_fill_memory(monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 100)
    monkeypatch.setattr(files, "LONGEST_VALUE", 1000)
    handle = Counted(b'["' + b"x" * 100_000)
    ((_, _, error),) = files.json_records(handle)
    assert "not JSON" in error
    assert handle.read_bytes < 5000


def test_csv_quotes_line_feeds_and_broken_parts():
    text = '\ufeffname,path\r\n"a,b","x/y.png\n"\r\nshort\r\none,two,three\r\nlast,z\r\n'.encode()
    found = list(files.csv_records(io.BytesIO(text)))
    assert [record for _, record, _ in found] == [
        {"name": "a,b", "path": "x/y.png\n"},
        {"name": "short", "path": None},
        None,
        {"name": "last", "path": "z"},
    ]
    assert found[2] == ("record 2", None, "the record has more fields than the header")


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("d/train-00000-of-00007.parquet", "train"),
        ("d/validation-00000-of-00001.parquet", "val"),
        ("d/test_clean.csv", "test"),
        ("d/validate.json", "val"),
        ("default/test/0000.parquet", "test"),
        ("test-project/records.jsonl", None),
        ("d/train_test.csv", None),
        ("d/attest.csv", None),
        ("records.jsonl", None),
    ],
)
def test_splits_in_names(path, split):
    assert split_of(path) == split


def tar(path, members):
    with tarfile.open(path, "w") as out:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            out.addfile(member, io.BytesIO(data))
    return path


def tar_rows(path):
    return list(index_rows(str(path), 0, 0, "webdataset", str(path.parent)))


def test_webdataset_points_into_the_tar(tmp_path):
    first, second = saved(noise((30, 20))), saved(noise((20, 30)), "JPEG")
    path = tar(
        tmp_path / "train-000000.tar",
        [
            ("a/0001.png", first),
            ("a/0001.txt", b" A caption.\n"),
            ("a/0001.cls", b"3"),
            ("0002.JPG", second),
            (
                "0002.json",
                json.dumps(
                    {
                        "sample_id": "s2",
                        "image_id": "i2",
                        "split": "test",
                        "question": "Is it?",
                        "answer": "Yes.",
                    }
                ).encode(),
            ),
            ("0003.json", b'{"caption": "no image"}'),
            ("0004.png", first),
            ("0004.json", b"[1]"),
            ("0005.jpg", second),
            ("0005.seg.png", first),
            ("__meta__/x.json", b"{}"),
        ],
    )
    rows = tar_rows(path)
    assert [(row["sample_id"], row["split"], row["error"]) for row in rows] == [
        ("train-000000/a/0001", "train", None),
        ("s2", "test", None),
        ("train-000000/0003", None, "the sample has 0 images; it must have one"),
        ("train-000000/0004", None, "the sample's JSON is a list, not an object"),
        ("train-000000/0005", "train", None),
    ]
    assert json.loads(rows[0]["payload"]) == {"caption": "A caption.", "context": None}
    assert json.loads(rows[1]["payload"])["qa"] == {
        "question": "Is it?",
        "reference": "Yes.",
        "answer_type": "closed",
        "attribute": None,
        "choices": None,
        "language": None,
    }
    assert rows[1]["image_id"] == "i2"
    assert json.loads(rows[4]["payload"]) == {}
    assert all(row["image"] is None for row in rows)
    assert [read_image_bytes(rows[n]["image_file"], 10**6) for n in (0, 1)] == [first, second]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[: 6 * 512] + b"\x01" * 512 + data[7 * 512 :],
        lambda data: b"no tar" * 300,
    ],
)
def test_a_broken_tar_gives_what_came_before_and_one_error(tmp_path, damage):
    path = tar(tmp_path / "x.tar", [(f"{n}.jpg", bytes([65 + n]) * 600) for n in range(8)])
    path.write_bytes(damage(path.read_bytes()))
    rows = tar_rows(path)
    errors = [row["error"] for row in rows if row["error"]]
    assert len(errors) == 1
    assert "cannot be read on" in errors[0]
    good = [row for row in rows if not row["error"]]
    assert [read_image_bytes(row["image_file"], 1000) for row in good[:-1]] == [
        bytes([65 + n]) * 600 for n in range(len(good) - 1)
    ]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"turns": "hello"}, "'turns' is no list"),
        ({"turns": ["hello"]}, "'turns' is no list"),
        ({"attributes": "x"}, "'attributes' is no object"),
        ({"question": "q", "answer": "a", "choices": "abc"}, "'choices' is no list"),
        ({"question": "q", "answer": "a", "language": 3}, "'language' is no text"),
        ({"question": {}, "answer": "a"}, "'question' is empty or no text"),
        ({"question": "q", "answer": "a", "answer_type": "maybe"}, "answer_type"),
        ({"caption": "c", "context": ["m"]}, "'context' is empty or no text"),
        ({"caption": 5}, "'caption' is empty or no text"),
        ({"caption": "half \ud800"}, "surrogate"),
        ({"sample_id": "half \ud800", "caption": "c"}, "surrogate"),
        ({"chosen": 1, "rejected": 2, "prompt": 3}, "'chosen' is a int"),
        ({"conversations": {}}, None),
        ({"split": 3}, "split"),
        ({"modality": 4, "group_id": "Jane Doe"}, None),
    ],
)
def test_whatever_json_says_the_row_fits_the_index(tmp_path, record, reason):
    rows = tar_rows(tar(tmp_path / "x.tar", [("1.jpg", b"x"), ("1.json", json.dumps(record).encode())]))
    assert pa.Table.from_pylist(rows, schema=INDEX).num_rows == 1
    assert (reason or "None") in str(rows[0]["error"])
    assert "Jane" not in str(rows)


@pytest.mark.parametrize("text", [b"[" * 100_000, b"1" * 5000], ids=["nested", "digits"])
def test_json_that_python_refuses_is_one_bad_record(text):
    for found in (
        list(files.json_lines(io.BytesIO(b'{"a": 1}\n' + text + b"\n"), 0, 10**6)),
        list(files.json_records(io.BytesIO(b'[{"a": 1}, ' + text + b"]"))),
    ):
        assert [error is None for _, _, error in found] == [True, False]
        assert "cannot be read" in found[1][2]


def test_images_are_read_with_limits(tmp_path):
    (tmp_path / "a.png").write_bytes(b"12345")
    path = tar(tmp_path / "x.tar", [("a.jpg", b"abcdef")])
    assert read_image_bytes(str(tmp_path / "a.png"), 5) == b"12345"
    assert read_image_bytes(f"{path}#offset=514&size=3", 5) == b"cde"
    for name, reason in (
        ("a.png", "max_image_bytes 4"),
        ("b.png", "'b.png' does not exist"),
        ("x.tar#offset=512&size=6", "max_image_bytes 4"),
        (f"x.tar#offset={path.stat().st_size - 1}&size=3", "ends within"),
        ("y.tar#offset=0&size=3", "'y.tar' does not exist"),
    ):
        with pytest.raises(ImageError, match=reason):
            read_image_bytes(f"{tmp_path}/{name}", 4)
    with pytest.raises(ImageError, match="is a folder"):
        read_image_bytes(str(tmp_path), 10**6)


def test_image_folders(tmp_path):
    latin = os.fsdecode(b"other/\xe9.png")
    (tmp_path / "other").mkdir()
    (tmp_path / latin).write_bytes(b"x")
    (bad,) = index_rows(str(tmp_path), 0, 0, "images", str(tmp_path))
    assert (bad["sample_id"], "surrogate" in bad["error"]) == ("other/?.png", True)
    (tmp_path / latin).unlink()
    for name in (
        "b.PNG",
        "train/a.jpg",
        "train/deep/c.webp",
        "valid/d.tif",
        "train/notes.txt",
        "other/e.jpeg",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    rows = list(index_rows(str(tmp_path), 0, 0, "images", str(tmp_path)))
    assert [(row["sample_id"], row["split"]) for row in rows] == [
        ("b.PNG", None),
        ("other/e.jpeg", None),
        ("train/a.jpg", "train"),
        ("train/deep/c.webp", "train"),
        ("valid/d.tif", "val"),
    ]
    assert [json.loads(row["payload"]) for row in rows] == [{}] * 5
    assert rows[2]["image_file"] == str(tmp_path / "train/a.jpg")
    pieces = [("", 1), ("other", 0), ("train", 0), ("valid", 0)]
    parts = [
        row
        for name, depth in pieces
        for row in index_rows(
            str(tmp_path / name) if name else str(tmp_path), 0, depth, "images", str(tmp_path)
        )
    ]
    assert parts == rows


def test_dicom_folders(tmp_path):
    """Each file with the suffix, or with DICM at byte 128 and whatever suffix, goes to the DICOM module."""
    header = b"\0" * 128 + b"DICM" + b"\x02\x00\x10\x00UI\x14\x001.2.840.10008.1.2.1\0"
    picture = b"".join(
        (
            b"\x08\x00\x60\x00CS\x02\x00CT",
            b"\x28\x00\x10\x00US\x02\x00\x10\x00",
            b"\x28\x00\x11\x00US\x02\x00\x20\x00",
        )
    )
    for name, data in (
        ("p1/a.dcm", header + picture),
        ("p1/1.2.840", header + picture),
        ("p1/readme.txt", header),
        ("p1/other", b"hello"),
        ("bad.dcm", b"hello"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    rows = list(index_rows(str(tmp_path), 0, 0, "dicom", str(tmp_path)))
    assert [(row["image_file"], row["modality"], row["error"] is None) for row in rows] == [
        (f"{tmp_path}/bad.dcm#frame=0", None, False),
        (f"{tmp_path}/p1/1.2.840#frame=0", "ct", True),
        (f"{tmp_path}/p1/a.dcm#frame=0", "ct", True),
        (f"{tmp_path}/p1/readme.txt#frame=0", None, False),
    ]
    assert pa.Table.from_pylist(rows, schema=INDEX).num_rows == 4


def test_hugging_face_rows():
    """PathVQA's columns, captions, TRL's list of images, a file's name instead of bytes."""
    data = saved(noise())
    image_id = hashlib.sha256(data).hexdigest()[:16]
    image = {"bytes": data, "path": "x.jpg"}
    closed = hugging_face({"image": image, "question": "is it?", "answer": "yes"}, "val", "/d")
    assert (closed["image_id"], closed["image"], closed["image_file"], closed["split"], closed["error"]) == (
        image_id,
        data,
        None,
        "val",
        None,
    )
    assert json.loads(closed["payload"])["qa"]["answer_type"] == "closed"
    opened = hugging_face({"image": image, "question": "what?", "answer": "a lung"}, None, "/d")
    assert json.loads(opened["payload"])["qa"]["answer_type"] == "open"
    assert closed["sample_id"].startswith(image_id)
    assert closed["sample_id"] != opened["sample_id"]
    caption = hugging_face(
        {"image": {"bytes": None, "path": "i/x.jpg"}, "text": "A lung.", "split": "test"}, "train", "/d"
    )
    assert (caption["image_file"], caption["image"], caption["image_id"], caption["split"]) == (
        "/d/i/x.jpg",
        None,
        "i/x.jpg",
        "test",
    )
    assert json.loads(caption["payload"]) == {"caption": "A lung.", "context": None}
    pair = hugging_face({**PAIR, "images": [image]}, None, "/d")
    assert json.loads(pair["payload"])["preference"]["rejected"] == "A bone."
    alone = hugging_face({"image": data}, None, "/d")
    assert (alone["sample_id"], alone["payload"]) == (image_id, "{}")
    for record, reason in (
        ({"image": None, "question": "q", "answer": "a"}, "'image' is empty"),
        ({"image": image, "question": "q", "answer": None}, "'answer' is empty"),
        ({"images": [image, image], "text": "t"}, "2 images"),
        ({"image": {"bytes": None, "path": "../x"}}, "leads out of"),
    ):
        assert reason in hugging_face(record, None, "/d")["error"]


def test_own_shards_of_each_kind():
    """What is said of an image in several columns becomes several rows, and the image goes with the first
    only.
    """
    base = {"sample_id": "s", "image": b"x", "image_id": None, "split": "train"}
    turns = [{"role": "user", "text": "q"}, {"role": "assistant", "text": "a"}]
    cell = {key: CELL[key] for key in CELL if key not in ("img_name", "split", "image")}
    cases = [
        ({"turns": turns}, [("s", {"turns": turns})]),
        (
            {"caption": "c", "context": "m", "attributes": [("lesion", "1")], "modality": "CT"},
            [("s", {"caption": "c", "context": "m"}), ("s/attributes", {"attributes": {"lesion": "1"}})],
        ),
        ({"attributes": list(cell.items())}, [("s", {"record": cell})]),
        (
            {"prompt": "p", "chosen": "c", "rejected": "r"},
            [("s", {"preference": {"prompt": "p", "chosen": "c", "rejected": "r"}})],
        ),
        ({}, [("s", {})]),
    ]
    for columns, wanted in cases:
        rows = list(shards({**base, **columns}))
        assert [(row["sample_id"], json.loads(row["payload"])) for row in rows] == wanted
        assert [row["image"] for row in rows] == [b"x", None][: len(rows)]
        assert {(row["image_id"], row["split"], row["error"]) for row in rows} == {("s", "train", None)}
    assert rows[0]["where"] == "shard row s"
    (bad,) = shards({**base, "turns": turns[:1]})
    assert bad["error"] == "the last turn has no answer"
    (nameless,) = shards({**base, "sample_id": ""})
    assert nameless["error"] == "sample_id is empty"
