"""Parquet as a run writes it: values as they lie in memory, so that the same rows are the same bytes.

Latents, centroids and packed labels do not compress, and their statistics and dictionaries would be read by nobody.
"""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

PLAIN: dict[str, Any] = {"compression": "NONE", "use_dictionary": False, "write_statistics": False}


def table_bytes(table: pa.Table, *, checksums: bool = False) -> bytes:
    """A file of one table.

    Args:
        checksums: Of each page: a byte that a disk turns is then an error with a name. For files without a digest
            of their own in a record.
    """
    out = io.BytesIO()
    pq.write_table(table, out, write_page_checksum=checksums, **PLAIN)
    return out.getvalue()


def row_group_writer(path: str, schema: pa.Schema) -> pq.ParquetWriter:
    """A file that takes one table after another, a row group each; by its path, as Arrow is eight times slower
    through a Python file object."""
    return pq.ParquetWriter(path, schema, **PLAIN)
