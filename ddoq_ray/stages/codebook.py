"""A codebook on disk: parts of fixed class ranges, each an Arrow table with a record of what it holds beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ddoq_ray.artifacts import Folder
from ddoq_ray.records import Codebook, codebook_schema, fixed_binary

PART_BYTES = 64 << 20  # of centroids in one file: 21,841 classes must not mean 21,841 files


@dataclass(frozen=True)
class PartRecord:
    """``part-*.json``, published after its part: without it the part is not finished.

    Attributes:
        digest: sha256 (hex) of the part's file.
        bytes: Size of the part's file.
        latents: Latents that its counts stand for.
        centroids: Its rows.
        dropped: Classes of its range that have no centroid.
        algorithms: How many classes each algorithm quantized.
        warnings: Words for what is not as asked, a class each.
    """

    digest: str
    bytes: int
    latents: int
    centroids: int
    dropped: list[int]
    algorithms: dict[str, int]
    warnings: list[str]


def part_classes(num_classes: int, ipc: int, dim: int) -> list[list[int]]:
    """Class ids of each codebook part: at least 16 parts where there are classes for them, none above 64 MB."""
    size = max(1, min(-(-num_classes // 16), PART_BYTES // max(1, 4 * ipc * dim)))
    return [list(range(first, min(first + size, num_classes))) for first in range(0, num_classes, size)]


def part_name(part: int) -> str:
    return f"part-{part:05d}.parquet"


def record_name(part: int) -> str:
    return f"part-{part:05d}.json"


def write_part(
    codebook: Folder,
    part: int,
    books: Sequence[Codebook],
    *,
    latent_shape: tuple[int, ...],
    prior_id: str,
    dropped: list[int],
    algorithms: dict[str, int],
    warnings: list[str],
) -> None:
    """Publish a part, a row group a class (so that one class can be read alone), then its record."""
    schema = codebook_schema(latent_shape, prior_id)
    plain = {"compression": "NONE", "use_dictionary": False, "write_statistics": False}
    # By its path: through a Python file object Arrow writes eight times slower.
    with codebook.writing(part_name(part)) as f, pq.ParquetWriter(f.name, schema, **plain) as writer:
        for b in books:
            columns = [
                pa.array(np.full(b.k, b.class_id, np.int32)),
                pa.array(np.arange(b.k, dtype=np.int32)),
                fixed_binary(b.centroids.astype("<f4", copy=False)),
                pa.array(b.counts),
                pa.array(b.weights),
                pa.array(np.full(b.k, b.distortion)),
                pa.array(b.stream_counts),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
    digest, size = codebook.digest(part_name(part))
    latents, centroids = sum(int(b.counts.sum()) for b in books), sum(b.k for b in books)
    record = PartRecord(digest, size, latents, centroids, dropped, algorithms, warnings)
    codebook.publish_json(record_name(part), asdict(record))


def read_record(codebook: Folder, part: int) -> PartRecord:
    return PartRecord(**codebook.read_json(record_name(part)))


def read_part(codebook: Folder, part: str) -> pa.Table:
    """A part of a codebook, by its file's name, as an Arrow table (schema `records.codebook_schema`)."""
    return pq.read_table(pa.BufferReader(codebook.read(part)))


def latent_shape_of(table: pa.Table) -> tuple[int, ...]:
    return tuple(json.loads(table.schema.metadata[b"latent_shape"]))
