"""Tables are read by what is in them: JSON Lines under any name, lists in objects, delimiters, encodings,
compression."""

import codecs
import gzip
import json

import pytest

from medray.config import DataConfig
from medray.errors import DataError
from medray.ingest.source_index import detect, manifest_of, survey
from tests.support.sources import dialogue, index, payloads, unused, write

RECORDS = [dialogue(f"{n}.png", f"Answer {n}.") for n in range(5)]
LINES = "\n".join(map(json.dumps, RECORDS))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("train.json", LINES + "\n"),
        ("train.json", json.dumps(RECORDS[0]) + "\n" + LINES.partition("\n")[2].replace("\n", "\n\n")),
        ("train.json", "\n".join(json.dumps(one, indent=2) for one in RECORDS)),
        ("train.json", "".join(map(json.dumps, RECORDS))),
        ("train.json", ",\n".join(map(json.dumps, RECORDS))),
        ("train.json", json.dumps(RECORDS[:2]) + "\n" + json.dumps(RECORDS[2:])),
        (
            "train.json",
            json.dumps({"info": {"year": 2024, "splits": ["a"]}, "version": "1.0", "data": RECORDS}),
        ),
        ("train.json", json.dumps({"meta": {"n": 5}, "annotations": {"items": RECORDS}})),
        ("train.json", json.dumps({str(n): record for n, record in enumerate(RECORDS)})),
        ("train.jsonl", json.dumps(RECORDS)),
        ("train.jsonl", json.dumps(RECORDS, indent=1)),
        ("train.JSONL", LINES),
        ("train.JSON", json.dumps(RECORDS)),
        ("train.ndjson", LINES),
    ],
    ids=[
        "lines",
        "blank lines",
        "indented objects",
        "objects without breaks",
        "objects and commas",
        "two lists",
        "list in an object",
        "list in objects",
        "objects by id",
        "list named jsonl",
        "indented list named jsonl",
        "JSONL",
        "JSON",
        "ndjson",
    ],
)
def test_json_in_every_layout(tmp_path, name, text):
    write(tmp_path / name, text)
    kind, rows, _ = index(tmp_path)
    assert kind == "llava"
    assert [one["turns"][1]["text"] for one in payloads(rows)] == [f"Answer {n}." for n in range(5)]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_json_in_other_encodings(tmp_path, encoding, name):
    bom = codecs.BOM_UTF16_LE if encoding == "utf-16-le" else b""
    text = LINES if name.endswith("l") else json.dumps(RECORDS)
    write(tmp_path / name, bom + text.encode(encoding))
    assert len(payloads(index(tmp_path)[1])) == 5


def test_one_record_alone(tmp_path):
    for name in ("a/data.json", "b/data.jsonl"):
        write(tmp_path / name, json.dumps(RECORDS[0]))
        assert len(payloads(index((tmp_path / name).parent)[1])) == 1


def test_compressed_tables(tmp_path):
    write(tmp_path / "a/train.json.gz", gzip.compress(json.dumps(RECORDS).encode()))
    write(tmp_path / "b/train.jsonl.gz", gzip.compress(LINES.encode()))
    write(tmp_path / "c/metadata.csv.gz", gzip.compress(b"file_name,text\na.png,A lung.\n"))
    assert [len(payloads(index(tmp_path / name)[1])) for name in "abc"] == [5, 5, 1]
    write(tmp_path / "d/train.jsonl.gz", gzip.compress(LINES.encode())[:-20])
    rows = index(tmp_path / "d", format="llava")[1]
    assert any(
        "compression is damaged" in (row["error"] or "") or "cannot be read" in (row["error"] or "")
        for row in rows
    )


def test_what_follows_a_list_is_named(tmp_path):
    write(tmp_path / "train.json", json.dumps(RECORDS) + "\ntrailing words")
    rows = index(tmp_path)[1]
    assert [row["error"] is None for row in rows] == [True] * 5 + [False]
    assert "after the end of a value" in rows[-1]["error"]


def test_parts_beside_the_records_are_named(tmp_path):
    write(
        tmp_path / "train.json",
        {"info": {"year": 1}, "version": 2, "categories": [{"name": "x"}, {"name": "y"}], "data": RECORDS},
    )
    _, rows, notes = index(tmp_path)
    assert len(payloads(rows)) == 5
    assert unused(notes) == {"train.json": {"member info", "member version", "member categories"}}


def test_sections_named_after_splits(tmp_path):
    """{"train": [...], "test": [...]}: no record of the test section is trained on."""
    write(
        tmp_path / "annotation.json",
        {
            "train": RECORDS[:2],
            "val": RECORDS[2:3],
            "test": {str(n): one for n, one in enumerate(RECORDS[3:])},
        },
    )
    rows = index(tmp_path)[1]
    assert [row["split"] for row in rows] == ["train", "train", "val", "test", "test"]


TABLE = [("file_name", "text"), ("0.png", "Clear lungs."), ("1.png", "Ödem, links")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["metadata.csv", "Metadata.CSV", "captions.tsv"])
def test_tables_in_every_dialect(tmp_path, encoding, delimiter, name):
    text = (
        "\r\n".join(
            delimiter.join(f'"{cell}"' if delimiter in cell else cell for cell in row) for row in TABLE
        )
        + "\r\n"
    )
    write(tmp_path / name, text.encode(encoding))
    kind, rows, _ = index(tmp_path)
    assert kind == "captions"
    assert [one["caption"] for one in payloads(rows)] == ["Clear lungs.", "Ödem, links"]


def test_excel_says_the_delimiter(tmp_path):
    write(tmp_path / "metadata.csv", 'sep=;\nfile_name;text\n0.png;"Two\nlines; one cell"\n')
    assert payloads(index(tmp_path)[1]) == [{"caption": "Two\nlines; one cell", "context": None}]


def test_windows_letters_spoil_their_own_row(tmp_path):
    write(tmp_path / "metadata.csv", "file_name;text\n0.png;Ödem\n1.png;Clear.\n".encode("cp1252"))
    bad, good = index(tmp_path)[1]
    assert "UTF-8" in bad["error"]
    assert good["error"] is None


def test_broken_quotes_cost_their_own_rows(tmp_path):
    write(
        tmp_path / "metadata.csv",
        'file_name,text\n0.png,"a "b" c"\n1.png,Clear.\n2.png,"never closed\n3.png,Clear.\n',
    )
    rows = index(tmp_path)[1]
    assert [row["error"] is None for row in rows] == [False, True, False]
    assert "lines 4 to 5" in rows[2]["error"] and "never closed" in rows[2]["error"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "labels.csv",
            "image;finding\n0.png;mass\n",
            ["labels.csv", "image, finding", "name the column of the texts caption"],
        ),
        ("labels.tsv", "picture\treport\n0.png\tmass\n", ["labels.tsv", "picture, report", "file_name"]),
        ("labels.json", [{"img": "0.png", "impression": "mass"}], ["labels.json", "img, impression"]),
        ("labels.xlsx", b"PK\x03\x04", ["labels.xlsx", "save it as CSV"]),
        ("labels.pkl", b"\x80\x04", ["labels.pkl"]),
        ("0.txt", "mass", ["0.txt", "file_name and text"]),
        ("labels.txt", "0.png\tmass\nfilm7.png\tnone\n", ["labels.txt", "save it as CSV"]),
        ("labels.parquet", [{"embedding": [0.1], "name": "0"}], ["labels.parquet", "embedding, name"]),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 20 else "",
)
def test_labels_that_nobody_can_read_are_no_bare_images(tmp_path, name, content, words):
    write(tmp_path / "0.png", b"x")
    write(tmp_path / "film7.png", b"x")
    write(tmp_path / name, content)
    with pytest.raises(DataError) as refused:
        detect(DataConfig(source=str(tmp_path)))
    assert all(word in str(refused.value) for word in words)
    assert detect(DataConfig(source=str(tmp_path), format="images"))[0] == "images"


def test_readmes_and_notes_beside_images_refuse_nothing(tmp_path):
    for name, content in (
        ("film7.png", b"x"),
        ("README.txt", "Films of a hospital."),
        ("LICENSE", "MIT"),
        ("notes.md", "x"),
    ):
        write(tmp_path / name, content)
    assert detect(DataConfig(source=str(tmp_path)))[0] == "images"


def test_tables_beside_the_one_that_is_read_are_named(tmp_path):
    write(tmp_path / "metadata.csv", "file_name,text,age\n0.png,Clear.,40\n")
    write(tmp_path / "labels.csv", "name,label\n0.png,1\n")
    write(tmp_path / "more.json", RECORDS)
    write(tmp_path / "sheet.xlsx", b"PK")
    found = survey(DataConfig(source=str(tmp_path), format="auto"))
    assert (found.kind, len(found.files)) == ("captions", 1)
    assert set(found.passed) == {"labels.csv", "more.json", "sheet.xlsx"}
    assert "name, label" in found.passed["labels.csv"]
    assert "llava" in found.passed["more.json"]
    assert unused(index(tmp_path)[2]) == {"metadata.csv": {"age"}}


def test_a_column_that_is_named_twice_is_refused(tmp_path):
    write(tmp_path / "metadata.csv", "file_name,text,text\n0.png,a,b\n")
    with pytest.raises(DataError, match="'text' twice"):
        detect(DataConfig(source=str(tmp_path)))


def test_a_file_that_is_cut_is_named(tmp_path):
    write(tmp_path / "train.json", json.dumps(RECORDS)[:-200])
    _, rows, notes = index(tmp_path)
    assert [row["error"] is None for row in rows][-1:] == [False]
    assert unused(notes) == {"train.json": {f"what stands from record {len(rows) - 1} on"}}


def test_a_manifest_of_somebody_else(tmp_path):
    """manifest.json is ours only beside shards/."""
    write(tmp_path / "manifest.json", [{"any": "thing"}])
    write(tmp_path / "train.json", RECORDS)
    assert detect(DataConfig(source=str(tmp_path)))[0] == "llava"
    assert manifest_of(str(tmp_path)) is None
    (tmp_path / "shards").mkdir()
    assert manifest_of(str(tmp_path)) is None
    write(tmp_path / "manifest.json", "{cut")
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        manifest_of(str(tmp_path))
