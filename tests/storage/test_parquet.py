"""Tables as a run writes them: the same rows are the same bytes, with the options that every file of a run has."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ddoq_ray.storage.parquet import row_group_writer, table_bytes
from ddoq_ray.storage.records import fixed_binary

TABLE = pa.table({"key": ["a", "b", "a"], "latent": fixed_binary(np.arange(12, dtype="<f2").reshape(3, 4))})


def test_bytes_are_those_of_the_plain_options() -> None:
    out = io.BytesIO()
    pq.write_table(TABLE, out, compression="NONE", use_dictionary=False, write_statistics=False)
    assert table_bytes(TABLE) == out.getvalue()
    assert pq.read_table(io.BytesIO(out.getvalue())).equals(TABLE)


def test_the_writer_of_row_groups_has_them_too(tmp_path: Path) -> None:
    with row_group_writer(str(tmp_path / "x"), TABLE.schema) as writer:
        writer.write_table(TABLE)
    assert (tmp_path / "x").read_bytes() == table_bytes(TABLE)
