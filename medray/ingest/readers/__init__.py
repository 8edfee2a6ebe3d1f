"""One small module per family of formats: a record as its source holds it to index rows
(medray.ingest.source_index.INDEX).

A reader is a pure function (record, Place) -> iterator of rows made with `common.row`; it raises
`common.BadRecord` for a record that cannot be used. Files, byte ranges and detection are
`medray.ingest.source_index`' and `files`' business.
"""
