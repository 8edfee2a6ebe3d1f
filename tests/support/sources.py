"""What the tests of sources as people have them share: files, and the index rows of a source without Ray."""

import json

import pyarrow as pa
import pyarrow.parquet as pq

from medray.config import DataConfig
from medray.ingest.files.notes import UNUSED, Notes
from medray.ingest.source_index import _pieces, detect, index_rows


def write(path, content):
    """A file of bytes, text, JSON, or rows of Parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif path.suffix.lower() == ".parquet":
        pq.write_table(content if isinstance(content, pa.Table) else pa.Table.from_pylist(content), path)
    else:
        path.write_text(json.dumps(content), encoding="utf-8")
    return path


def index(source, **fields):
    """(format, INDEX rows, notes) of a source."""
    config = DataConfig(source=str(source), **fields)
    kind, files = detect(config)
    notes = Notes()
    return (
        kind,
        [row for piece in _pieces(kind, config, files) for row in index_rows(**piece, notes=notes)],
        notes,
    )


def payloads(rows):
    assert [row["error"] for row in rows if row["error"]] == []
    return [json.loads(row["payload"]) for row in rows]


def unused(notes):
    return {file: set(names) for file, names in notes.by_file(UNUSED).items()}


def dialogue(image, answer="A cell.", question="<image>\nWhat?", **more):
    return {
        "image": image,
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
        **more,
    }
