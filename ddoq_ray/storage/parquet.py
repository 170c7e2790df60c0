"""Parquet as a run writes it: values as they lie in memory, so that the same rows are the same bytes.

Latents, centroids and packed labels do not compress, and their statistics and dictionaries would be read by nobody.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

PLAIN: dict[str, Any] = {"compression": "NONE", "use_dictionary": False, "write_statistics": False}


def table_bytes(table: pa.Table) -> bytes:
    """A file of one table."""
    out = io.BytesIO()
    pq.write_table(table, out, **PLAIN)
    return out.getvalue()


def row_group_writer(path: str, schema: pa.Schema, counting: Sequence[str] = ()) -> pq.ParquetWriter:
    """A file that takes one table after another, a row group each; by its path, as Arrow is eight times slower
    through a Python file object.

    Args:
        counting: Columns of numbers that count up or stay, which are kept as differences: they take next to nothing.
    """
    encoding = dict.fromkeys(counting, "DELTA_BINARY_PACKED") or None
    return pq.ParquetWriter(path, schema, column_encoding=encoding, **PLAIN)
