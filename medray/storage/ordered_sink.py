"""Parquet files of a Ray Data write with their rows in the order of the dataset.

Ray's own sink (2.60) hands the blocks of a task to `pyarrow.dataset.write_dataset` with threads and without
`preserve_order`: a file made of several batches has them in another order each time. Here one writer takes
them in turn. Can go when Ray passes `preserve_order`.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from ray.data._internal.datasource.parquet_datasink import (
    ParquetDatasink,  # Ray exports no base class for file sinks
)

GROUP_ROWS = 64  # of a row group, which readers hold whole


class OrderedParquetSink(ParquetDatasink):
    """One file per write task, rows in order, pages with checksums."""

    def _write_parquet_files(
        self,
        tables: list[pa.Table],
        filename: str,
        output_schema: pa.Schema,
        write_uuid: str,
        *_: Any,
    ) -> None:
        table = (
            pa.concat_tables(tables, promote_options="permissive")
            .select(output_schema.names)
            .cast(output_schema)
        )
        name = self._get_basename_template(filename, write_uuid).replace("{i}", "0")
        with (
            self.filesystem.open_output_stream(f"{self.path}/{name}") as stream,
            pq.ParquetWriter(stream, output_schema, write_page_checksum=True) as writer,
        ):
            writer.write_table(table, row_group_size=GROUP_ROWS)
