"""Images that records hold themselves: decoded, or set aside with a short reason."""

import base64
import csv
import io
import json

import pyarrow as pa
import pytest

from medray.config import DataConfig
from medray.errors import BadRecord
from medray.ingest.files.inline_images import inline_image, take_out
from medray.ingest.group_by_image import _prepared, group_rows, image_of
from medray.ingest.readers.parquet import hugging_face
from medray.ingest.source_index import INDEX, _pieces, detect, index_rows
from tests.images.test_decoding import noise, saved

PNG, JPEG = saved(noise()), saved(noise(seed=1), "JPEG")
TEXT = base64.b64encode(PNG).decode()
WRITTEN = {
    "plain": TEXT,
    "uri": f"data:image/png;base64,{TEXT}",
    "upper": f"DATA:image/PNG;BASE64,{TEXT}",
    "line breaks": f"data:image/png;base64,\r\n{base64.encodebytes(PNG).decode()}",
    "blank": f"data:image/png;base64, {TEXT}",
    "parameters": f"data:image/png;charset=utf-8;name=a.png;base64,{TEXT}",
    "no type": f"data:;base64,{TEXT}",
    "url-safe": base64.urlsafe_b64encode(PNG).decode(),
    "no padding": TEXT.rstrip("="),
    "octet-stream": f"data:application/octet-stream;base64,{TEXT}",
    "percent": "data:image/png;base64," + TEXT.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D"),
    "python": f"b'{TEXT}'",
    "bytes": {"bytes": PNG, "path": "x.png"},
    "base64 in bytes": {"bytes": TEXT, "path": None},
    "numbers": {"bytes": list(PNG), "path": None},
    "url": {"url": f"data:image/png;base64,{TEXT}"},
    "json text": json.dumps({"bytes": TEXT, "path": None}),
    "python text": repr({"bytes": PNG, "path": None}),
}


@pytest.mark.parametrize("written", WRITTEN.values(), ids=WRITTEN)
def test_every_way_of_writing_an_image(written):
    assert inline_image(written) == PNG


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "JPEG2000", "PPM", "AVIF"])
def test_base64_is_told_by_what_it_holds(kind):
    data = saved(noise(), kind)
    assert inline_image(base64.b64encode(data).decode()) == data


@pytest.mark.parametrize(
    "value",
    [
        "a.png",
        "images/train/p1/1.jpg",
        "",
        None,
        3,
        "9j/4AAQSkZJRg.jpg",
        "iVBORw0KGgo",
        "deadbeef" * 8 + ".png",
        "A" * 200,
        {"bytes": None, "path": "a.png"},
        {},
        [],
        [1, 2],
        "https://example.org/a.png",
        "s3://bucket/key",
    ],
)
def test_names_are_no_images(value):
    assert inline_image(value) is None


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("data:image/png;base64,@@@@", "cannot be decoded"),
        ("data:image/png;base64,", "empty"),
        (f"data:image/png {TEXT}", "no comma"),
        ("x" * 5000, "5000 characters are neither"),
        ("lung " * 2000, "neither"),
        (base64.b64encode(b"no image" * 200).decode(), "neither"),
        (f"data:image/png;base64,{TEXT[:-9]}?{TEXT[-9:]}", "cannot be decoded"),
        ([300] * 100 and {"bytes": [1] * 99 + ["x"], "path": None}, "not bytes"),
    ],
)
def test_what_is_neither_has_a_short_reason(value, reason):
    with pytest.raises(BadRecord, match=reason) as caught:
        inline_image(value)
    assert len(str(caught.value)) < 200


def test_a_record_keeps_its_other_fields():
    record = {
        "image": f"data:image/png;base64,{TEXT}",
        "caption": "data: none",
        "n": 3,
        "images": [{"bytes": None, "path": "b.png"}],
    }
    taken, images = take_out(record)
    ((name, data),) = images.items()
    assert data == PNG and taken == {**record, "image": name, "images": "b.png"}
    same = {"image": "a.png", "text": "A" * 500}
    assert take_out(same) == (same, {})


def groups_of(source, **fields):
    config = DataConfig(source=str(source), **fields)
    kind, files = detect(config)
    rows = [row for piece in _pieces(kind, config, files) for row in index_rows(**piece)]
    return group_rows(_prepared(pa.Table.from_pylist(rows, schema=INDEX)), config.model_dump()).to_pylist()


RECORDS = {
    "captions.jsonl": {"caption": "A lung."},
    "captions.csv": {"caption": "A lung."},
    "llava.json": {
        "id": "1",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A lung."}],
    },
    "preference.jsonl": {"prompt": "What?", "chosen": "A lung.", "rejected": "A heart."},
}


@pytest.mark.parametrize("way", ["uri", "plain", "base64 in bytes", "line breaks"])
@pytest.mark.parametrize("name", RECORDS)
def test_every_reader_takes_inline_images(tmp_path, name, way):
    value = WRITTEN[way]
    records = [
        {**RECORDS[name], "image": value},
        {**RECORDS[name], "id": "2", "image": "good.jpg"},
        {**RECORDS[name], "id": "3", "image": "y" * 6000},
    ]
    text = io.StringIO()
    if name.endswith(".csv"):
        records = [
            {"image": json.dumps(value) if isinstance(value, dict) else value, "caption": record["caption"]}
            for record in records[:1]
        ] + [{"image": record["image"], "caption": record["caption"]} for record in records[1:]]
        writer = csv.DictWriter(text, ["image", "caption"])
        writer.writeheader()
        writer.writerows(records)
    elif name.endswith(".jsonl"):
        text.writelines(json.dumps(record) + "\n" for record in records)
    else:
        json.dump(records, text)
    (tmp_path / name).write_text(text.getvalue())
    (tmp_path / "good.jpg").write_bytes(JPEG)
    groups = groups_of(tmp_path)
    assert sorted(
        image_of(group, DataConfig())[0] for group in groups if json.loads(group["members"])
    ) == sorted([PNG, JPEG])
    (bad,) = [json.loads(bad) for group in groups for bad in group["bad"]]
    assert "6000 characters" in bad["reason"] and max(map(len, bad.values())) < 300


@pytest.mark.parametrize("way", WRITTEN)
def test_parquet_takes_inline_images(way):
    value = WRITTEN[way]
    made = hugging_face({"image": value, "question": "Is it?", "answer": "yes"}, "train", "/d")
    assert (made["error"], made["image"], made["image_file"]) == (None, PNG, None)
    bad = hugging_face({"image": "z" * 6000, "question": "Is it?", "answer": "yes"}, "train", "/d")
    assert "6000 characters" in bad["error"] and len(str(bad)) < 1000
