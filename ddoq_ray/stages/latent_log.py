"""Reading the latent log: a class's latents in the log's order, whoever wrote them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow.parquet as pq

from ddoq_ray.artifacts import Folder
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

    def _table(self, chunk: ChunkRecord):  # type: ignore[no-untyped-def]
        try:
            if self.folder.local:
                table = pq.read_table(self.folder.path(chunk.file), memory_map=True)
            else:
                table = pq.read_table(io.BytesIO(self.folder.read(chunk.file)))
        except FileNotFoundError:
            raise ValueError(
                f"latent file {self.folder.path(chunk.file)} is missing although its shard was encoded "
                "(latents.keep=false removes them after a run); encode again in a new run_dir"
            ) from None
        except Exception as error:  # pyarrow raises OSError, ArrowInvalid and others for a damaged file
            raise ValueError(
                f"latent file {self.folder.path(chunk.file)} cannot be read ({error}); "
                "encode again in a new run_dir"
            ) from error
        if table.num_rows != chunk.rows:
            raise ValueError(
                f"latent file {self.folder.path(chunk.file)} has {table.num_rows} rows, its record says {chunk.rows}; "
                "encode again in a new run_dir"
            )
        return table

    def shape(self, shard: int) -> tuple[tuple[int, ...], str]:
        """(latent shape, prior id) from the schema of the first chunk of a shard."""
        schema = self._table(self.done(shard).chunks[0]).schema
        return tuple(json.loads(schema.metadata[b"latent_shape"])), schema.metadata[b"prior_id"].decode()
