"""Formats of tables whose records begin with large images."""

import base64
import io
import json

import pytest

from medray.config import DataConfig
from medray.images.decoding import decode
from medray.ingest.readers.skim import skim
from medray.ingest.source_index import detect
from tests.images.test_decoding import noise, saved
from tests.ingest.test_inline_images import RECORDS, groups_of

LARGE = saved(noise((400, 300)))  # 360 kB, as text half a megabyte


def test_long_runs_are_cut_and_the_rest_is_kept():
    record = {"image": base64.b64encode(LARGE).decode(), "bytes": list(LARGE), "caption": "A lung."}
    head = skim(io.BytesIO(json.dumps(record).encode()), 4096)
    assert list(json.loads(head)) == list(record) and len(head) < 500
    short = b'{"a": "' + b"b" * 200 + b'", "c": [1, 2, 3]}'
    assert skim(io.BytesIO(short), 4096) == short
    assert skim(io.BytesIO(b"word " * 10_000), 4096) == b"word " * 819 + b"w"


@pytest.mark.parametrize(
    "value",
    [
        "data:image/png;base64," + base64.b64encode(LARGE).decode(),
        base64.encodebytes(LARGE).decode(),
        {"bytes": list(LARGE), "path": None},
    ],
    ids=["uri", "line breaks", "numbers"],
)
@pytest.mark.parametrize("name", [name for name in RECORDS if not name.endswith(".csv")])
def test_the_format_is_told_behind_a_large_image(tmp_path, name, value):
    records = [{"image": value, **RECORDS[name]}, {"image": value, **RECORDS[name]}]
    (tmp_path / name).write_text(
        "\n".join(map(json.dumps, records)) if name.endswith(".jsonl") else json.dumps(records)
    )
    assert detect(DataConfig(source=str(tmp_path)))[0] == name.partition(".")[0]
    good = [group for group in groups_of(tmp_path) if json.loads(group["members"])]
    assert [decode(group["image"], DataConfig()).size for group in good] == [(400, 300)]
