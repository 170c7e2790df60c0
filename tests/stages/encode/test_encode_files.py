"""What the encode stage does without Ray: how shards are dealt to readers, and parts joined into files of the log."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ddoq_ray.stages.encode.reader import reader_tasks
from ddoq_ray.stages.encode.worker import join_chunks, write_file
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.latent_log import LatentLog
from ddoq_ray.storage.records import latent_schema


def test_parts_are_joined_in_order_into_files_of_bounded_size(tmp_path: Path) -> None:
    """Five parts of 4, 4, 4, 4 and 2 rows, 8 bytes of latents a row; 80 bytes hold two of them."""
    folder = Folder(str(tmp_path))
    schema = latent_schema((4,), "some")
    rng = np.random.default_rng(0)
    class_ids = rng.integers(0, 3, 18).astype(np.int32)
    latents = np.arange(18 * 4, dtype=np.float16).reshape(18, 4)
    parts = [
        write_file(
            folder, f"parts/shard-000007/chunk-{i:05d}.parquet", [f"k{j}" for j in range(a, b)], class_ids[a:b],
            latents[a:b], schema,
        )
        for i, (a, b) in enumerate([(0, 4), (4, 8), (8, 12), (12, 16), (16, 18)])
    ]  # fmt: skip
    files = join_chunks(folder, 7, parts, 80)
    assert [f.rows for f in files] == [8, 10] and join_chunks(folder, 7, parts, 80) == files
    log = LatentLog(folder)
    for c in range(3):
        rows = [x for f in files for _, x in log.read(f, [c])]
        np.testing.assert_array_equal(np.concatenate(rows), latents[class_ids == c])
    (tmp_path / parts[1].file).write_bytes(b"something else")
    with pytest.raises(AssertionError, match="changed after"):
        join_chunks(folder, 7, parts, 80)


def test_reader_tasks_are_long_but_enough_for_all_readers() -> None:
    gigabyte = 1 << 30
    assert reader_tasks([gigabyte // 8] * 1120, readers=8) == 280  # ImageNet-1K, on one machine
    assert reader_tasks([gigabyte // 8] * 1120, readers=1000) == 1120
    assert reader_tasks([1000] * 20, readers=2) == 8
    assert reader_tasks([1000] * 3, readers=2) == 3 and reader_tasks([1000], readers=0.5) == 1
