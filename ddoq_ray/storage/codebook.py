"""A codebook on disk: parts of fixed class ranges, each an Arrow table with a record of what it holds beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ddoq_ray.storage import layout
from ddoq_ray.storage.artifact import Artifact, digest_of
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.parquet import row_group_writer
from ddoq_ray.storage.records import Codebook, codebook_schema, fixed_binary

PART_BYTES = 64 << 20  # of centroids in one file: 21,841 classes must not mean 21,841 files
MEND = (
    "bring it back, or remove this part's two files and the manifest.json beside them and run the quantize stage "
    "again: that writes it anew from the latents and keeps the other parts"
)


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


@dataclass(frozen=True)
class Account:
    """What became of the classes of a part.

    Attributes:
        dropped: Class ids without a codebook.
        algorithms: Name of an algorithm -> classes that it quantized.
        warnings: One a class, for the user.
    """

    dropped: list[int]
    algorithms: dict[str, int]
    warnings: list[str]


def write_part(
    codebook: Folder,
    part: int,
    books: Sequence[Codebook],
    account: Account,
    *,
    latent_shape: tuple[int, ...],
    prior_id: str,
) -> None:
    """Publish a part, a row group a class (so that one class can be read alone), then its record with the account."""
    schema = codebook_schema(latent_shape, prior_id)
    with codebook.writing(layout.codebook_part(part)) as f, row_group_writer(f.name, schema) as writer:
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
    digest, size = codebook.digest(layout.codebook_part(part))
    latents, centroids = sum(int(b.counts.sum()) for b in books), sum(b.k for b in books)
    record = PartRecord(digest, size, latents, centroids, **asdict(account))
    codebook.publish_json(layout.codebook_record(part), asdict(record))


def read_record(codebook: Folder, part: int) -> PartRecord:
    """The record of a finished part.

    Raises:
        ValueError: When it is gone or damaged.
    """
    try:
        data = codebook.read(layout.codebook_record(part))
    except FileNotFoundError:
        raise ValueError(f"{codebook.path(layout.codebook_record(part))} is missing; {MEND}") from None
    try:
        return PartRecord(**json.loads(data))
    except (ValueError, TypeError):
        raise ValueError(
            f"{codebook.path(layout.codebook_record(part))} is damaged: it is not a part's record; {MEND}"
        ) from None


def part_files(codebook: Folder) -> list[str]:
    """Names of the files of a finished codebook, in the order of their classes.

    Raises:
        ValueError: When one is gone: what it held would be left out of everything that follows, without a word.
    """
    stems = {
        name.split(".")[0]
        for name in (*codebook.names(layout.CODEBOOK_PARTS), *codebook.names(layout.CODEBOOK_RECORDS))
    }
    records = [read_record(codebook, part) for part in range(len(stems))]
    names = [layout.codebook_part(part) for part in range(len(stems))]
    there = set(codebook.names(layout.CODEBOOK_PARTS))
    for name in names:
        if name not in there:
            raise ValueError(f"codebook part {codebook.path(name)} is missing although it was written; {MEND}")
    made, held = (Artifact(codebook, "quantize").manifest() or {}).get("centroids"), sum(r.centroids for r in records)
    if made is not None and held != made:
        raise ValueError(
            f"{codebook.uri} had {made:,} centroids when it was finished, and its {len(stems)} parts hold {held:,}; "
            f"{MEND}"
        )
    return names


def read_part(codebook: Folder, part: str) -> pa.Table:
    """A part of a codebook, by its file's name, as an Arrow table (schema `records.codebook_schema`).

    Raises:
        ValueError: When the file or its record is gone, or the file is not the one that was written.
    """
    record = read_record(codebook, int(part.removeprefix("part-").removesuffix(".parquet")))
    try:
        data = codebook.read(part)
    except FileNotFoundError:
        raise ValueError(f"codebook part {codebook.path(part)} is missing although it was written; {MEND}") from None
    if digest_of(data) != record.digest:
        raise ValueError(
            f"codebook part {codebook.path(part)} is damaged: it has {len(data):,} bytes of the {record.bytes:,} that "
            f"were written, or others; {MEND}"
        )
    return pq.read_table(pa.BufferReader(data))


class ClassRows:
    """The rows of single classes, asked for in the order of their parts: one part in memory at a time."""

    def __init__(self, codebook: Folder, parts: Mapping[str, Iterable[int]]) -> None:
        """`parts`: a part's file name -> its classes."""
        self.codebook = codebook
        self._part_of = {c: part for part, classes in parts.items() for c in classes}
        self._part, self._table, self._class_ids = "", pa.table({}), np.empty(0, np.int32)

    def of(self, class_id: int) -> pa.Table:
        """All columns of a class.

        Raises:
            ValueError: As `read_part`.
        """
        part = self._part_of[class_id]
        if part != self._part:
            self._table = read_part(self.codebook, part)
            self._part, self._class_ids = part, self._table["class_id"].to_numpy()
        start, end = np.searchsorted(self._class_ids, [class_id, class_id + 1]).tolist()
        return self._table.slice(start, end - start)


def read_layout(codebook: Folder, part: str) -> pa.Table:
    """class_id and centroid_id of a part's rows, without its centroids: what a driver may hold of every part.

    Raises:
        ValueError: When the file is gone or cannot be read. Whoever reads its centroids checks its digest.
    """
    try:
        with codebook.reading(part) as f:
            return pq.read_table(f, columns=["class_id", "centroid_id"])
    except (FileNotFoundError, pa.ArrowInvalid, OSError) as error:
        words = "missing" if isinstance(error, FileNotFoundError) else "damaged"
        raise ValueError(f"codebook part {codebook.path(part)} is {words}; {MEND}") from None


def parts_with_classes(codebook: Folder) -> tuple[list[str], list[list[int]], int]:
    """The files of a finished codebook, the classes of each in order, and the flattened dimension of a centroid.

    Raises:
        ValueError: As `part_files` and `read_layout`.
    """
    names, classes, dim = part_files(codebook), [], 1
    for name in names:
        layout = read_layout(codebook, name)
        classes.append(np.unique(layout["class_id"].to_numpy()).tolist())
        dim = int(np.prod(json.loads(layout.schema.metadata[b"latent_shape"])))
    return names, classes, dim
