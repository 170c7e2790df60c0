"""Reading the latent log: a class's latents in the log's order, whoever wrote them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ddoq_ray.artifacts import Folder, digest_of
from ddoq_ray.records import ChunkRecord, ShardDone, binary_rows


class LatentLog:
    """A ``latents/`` folder. Done records are kept in memory once read; latents never are."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._done: dict[int, ShardDone] = {}

    def done(self, shard: int) -> ShardDone:
        if shard not in self._done:
            self._done[shard] = ShardDone.loads(self.folder.read(f"shard-{shard:06d}/done.json"))
        return self._done[shard]

    def read(self, chunk: ChunkRecord, classes: Iterable[int]) -> Iterator[tuple[int, np.ndarray, list[str]]]:
        """(class_id, latents float32 [n, D], keys) of those `classes` that the chunk holds, ascending.

        Raises:
            ValueError: When the file is gone or is not the one that was encoded.
        """
        wanted = sorted(set(classes) & set(chunk.classes))
        if not wanted:
            return
        table = self._table(chunk)
        starts = dict(zip(chunk.classes, np.cumsum([0, *chunk.classes.values()]).tolist(), strict=False))
        for class_id in wanted:
            part = table.slice(starts[class_id], chunk.classes[class_id])
            rows = binary_rows(part["latent"], "<f2").astype(np.float32)
            yield class_id, rows, part["key"].to_pylist()

    def _table(self, chunk: ChunkRecord) -> pa.Table:
        path = self.folder.path(chunk.file)
        try:
            data = self.folder.read(chunk.file)
        except FileNotFoundError:
            raise ValueError(
                f"latent file {path} is missing although its shard was encoded (latents.keep=false removes them after "
                "a run); encode again in a new run_dir"
            ) from None
        if digest_of(data) != chunk.sha256:
            raise ValueError(
                f"latent file {path} is not the one that was encoded: it has {len(data):,} bytes and another digest "
                "than its record; encode again in a new run_dir"
            )
        return pq.read_table(pa.BufferReader(data))
