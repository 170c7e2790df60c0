"""The types and Arrow schemas that cross a stage's border.

Everything that one stage writes and another reads has its shape here, so that a stage can be replaced
without reading the others.
"""

from __future__ import annotations

import io
import json
from collections.abc import ItemsView, Iterable, Iterator, Mapping, ValuesView
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ddoq_ray.storage.artifact import checked, with_check

IMAGES = b'"images": {'  # before the counts in a row of ``shards.json``; in a string its quotes would be escaped
_APART = bytes.maketrans(b'":,', b"   ")


class ClassCounts(Mapping[int, int]):
    """A read-only class_id -> count, in ascending order of class_id, in 12 bytes an entry.

    A class-mixed ImageNet-21K has some 14 million (shard, class) pairs; as dicts they alone would fill gigabytes.

    Attributes:
        class_ids: int32 [C'], ascending, those that have an entry.
        counts: int64 [C'].
    """

    __slots__ = ("class_ids", "counts")

    def __init__(self, counts: Mapping[int, int] | Mapping[str, int]) -> None:
        class_ids = np.fromiter(map(int, counts), np.int32, len(counts))
        order = np.argsort(class_ids, kind="stable")
        self.class_ids: npt.NDArray[np.int32] = class_ids[order]
        self.counts: npt.NDArray[np.int64] = np.fromiter(counts.values(), np.int64, len(counts))[order]

    @staticmethod
    def of_json(text: bytes) -> ClassCounts:
        """From the inside of a JSON object, ``"3": 1, "17": 2``, without the objects that a JSON reader makes of it.

        Raises:
            ValueError: It is no such text.
        """
        numbers = np.fromstring(text.translate(_APART), np.int64, sep=" ") if text else np.zeros(0, np.int64)
        class_ids, counts = numbers[::2].astype(np.int32), numbers[1::2]
        pairs = text.count(b":")
        whole = (len(numbers), text.count(b",")) == (2 * pairs, max(0, pairs - 1))
        if not whole or (class_ids[1:] <= class_ids[:-1]).any():
            return ClassCounts(json.loads(b"{%b}" % text))
        return _counts_of(class_ids.tobytes(), counts.tobytes())

    def __reduce__(self) -> tuple[Any, ...]:
        # As bytes: arrays that come through Ray keep the whole message alive, kilobytes for each shard.
        return _counts_of, (self.class_ids.tobytes(), self.counts.tobytes())

    def __getitem__(self, class_id: int) -> int:
        at = int(np.searchsorted(self.class_ids, class_id))
        if at == len(self.class_ids) or self.class_ids[at] != class_id:
            raise KeyError(class_id)
        return int(self.counts[at])

    def __iter__(self) -> Iterator[int]:
        return iter(self.class_ids.tolist())

    def __len__(self) -> int:
        return len(self.class_ids)

    def items(self) -> ItemsView[int, int]:
        return _Items(self)

    def values(self) -> ValuesView[int]:
        return _Values(self)

    def __repr__(self) -> str:
        return f"ClassCounts({dict(self.items())})"

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def to_json(self) -> dict[str, int]:
        return {str(c): n for c, n in zip(self.class_ids.tolist(), self.counts.tolist(), strict=True)}


class _Items(ItemsView[int, int]):
    """Both arrays at once: Mapping's own view searches for each class, millions of times in a class-mixed log."""

    def __init__(self, counts: ClassCounts) -> None:
        super().__init__(counts)
        self._counts = counts

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._counts.class_ids.tolist(), self._counts.counts.tolist(), strict=True)


class _Values(ValuesView[int]):
    def __init__(self, counts: ClassCounts) -> None:
        super().__init__(counts)
        self._counts = counts

    def __iter__(self) -> Iterator[int]:
        return iter(self._counts.counts.tolist())


def total_counts(counts: Iterable[ClassCounts]) -> ClassCounts:
    """The sum of counts of each class; linear in their entries."""
    total = np.zeros(0, np.int64)
    held = np.zeros(0, bool)
    for each in counts:
        if len(each):
            more = int(each.class_ids[-1]) + 1 - len(total)
            if more > 0:
                more = max(more, len(total))  # doubled, so that growing costs no more than what is counted
                total, held = np.pad(total, (0, more)), np.pad(held, (0, more))
            total[each.class_ids] += each.counts
            held[each.class_ids] = True
    made = ClassCounts({})
    made.class_ids = np.flatnonzero(held).astype(np.int32)
    made.counts = total[made.class_ids]
    return made


def _counts_of(class_ids: bytes, counts: bytes) -> ClassCounts:
    made = ClassCounts({})
    made.class_ids, made.counts = np.frombuffer(class_ids, np.int32), np.frombuffer(counts, np.int64)
    return made


@dataclass(frozen=True, slots=True)
class ClassInfo:
    """One class of the data, and where the networks know it.

    Attributes:
        class_id: The label in the shards' ``.cls`` files, 0 to C - 1.
        name: The source's own name of the class (a folder's name, a WordNet id).
        prompt: Words for users for it; what a text-conditional prior is asked for.
        teacher_index: The output of the teacher that means this class; None until it is resolved.
        prior_label: The class label of a class-conditional prior; None until it is resolved.
    """

    class_id: int
    name: str
    prompt: str
    teacher_index: int | None = None
    prior_label: int | None = None

    def to_json(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class LabelsOutside:
    """Labels of a shard that no class has: how many, the least and the largest."""

    samples: int
    least: int
    largest: int

    @staticmethod
    def of(counts: Mapping[int, int]) -> LabelsOutside | None:
        return LabelsOutside(sum(counts.values()), min(counts), max(counts)) if counts else None


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """What one tar shard holds, read from its member table.

    Attributes:
        path: Where the shard is: a path, or a URL that fsspec opens.
        samples: Labelled samples with an image (decodable or not: that shows only when encoding).
        bytes: Size of the tar.
        images: class_id -> number of such samples.
        digest: Short digest of the member table and the labels; changes when the shard does.
        damage: Why it cannot be read to its end; empty for a whole one.
        lost: Samples that the damage took, as far as can be told (`shard_index.with_losses`).
        outside: Samples whose label is outside the class list.
        sha256: Of the whole file, where the run packed it; empty of given shards, which are not read for it.
    """

    path: str
    samples: int
    bytes: int
    images: ClassCounts
    digest: str
    damage: str = ""
    lost: int = 0
    outside: LabelsOutside | None = None
    sha256: str = ""

    @property
    def expected(self) -> int:
        """Samples that a reader of the shard must account for, as usable or refused."""
        return self.samples + self.lost + (self.outside.samples if self.outside else 0)

    def to_json(self) -> dict[str, object]:
        row: dict[str, object] = {
            "path": self.path,
            "samples": self.samples,
            "bytes": self.bytes,
            "images": self.images.to_json(),
            "digest": self.digest,
        }
        if self.damage:
            row |= {"damage": self.damage, "lost": self.lost}
        if self.outside is not None:
            row["outside"] = asdict(self.outside)
        if self.sha256:
            row["sha256"] = self.sha256
        return row

    @staticmethod
    def from_json(row: dict) -> ShardInfo:
        outside = LabelsOutside(**row["outside"]) if "outside" in row else None
        whole = ShardInfo(row["path"], row["samples"], row["bytes"], ClassCounts(row["images"]), row["digest"])
        found = {"damage": row.get("damage", ""), "lost": row.get("lost", 0), "sha256": row.get("sha256", "")}
        return replace(whole, outside=outside, **found)


def shard_lines(shards: Iterable[ShardInfo]) -> Iterator[bytes]:
    """A ``shards.json`` piece by piece, a row a line, for the same reason as `read_shards`."""
    before = b"[\n"
    for shard in shards:
        yield before + json.dumps(shard.to_json()).encode()
        before = b",\n"
    yield b"\n]\n" if before == b",\n" else b"[]\n"


def read_shards(data: bytes) -> Iterator[ShardInfo]:
    """The rows of a ``shards.json``, one after another: as Python objects all at once they would fill gigabytes.

    A row a line, as `shard_lines` writes them, is not read as JSON where its counts are, which are nearly all of it.
    """
    if not data.startswith((b"[\n{", b"[]")):
        yield from map(ShardInfo.from_json, json.loads(data))
        return
    for line in io.BytesIO(data):
        if line.startswith(b"{"):
            before, mark, rest = line.rstrip(b",\n").partition(IMAGES)
            counts, end, after = rest.partition(b"}")
            found = ShardInfo.from_json(json.loads(before + mark + end + after))
            yield replace(found, images=ClassCounts.of_json(counts)) if mark else found


@dataclass(frozen=True)
class ChunkRecord:
    """One published file of the latent log: its name, its rows of each class, its digest."""

    file: str
    rows: int
    classes: ClassCounts
    sha256: str

    def to_json(self) -> dict[str, object]:
        return {"file": self.file, "rows": self.rows, "classes": self.classes.to_json(), "sha256": self.sha256}

    @staticmethod
    def from_json(row: dict) -> ChunkRecord:
        return ChunkRecord(row["file"], row["rows"], ClassCounts(row["classes"]), row["sha256"])


@dataclass(frozen=True)
class ShardDone:
    """The done record of an encoded shard (``<run>/latents/<shard>/done.json``).

    Attributes:
        shard: Index of the shard in the run's ``shards.json``.
        chunks: The shard's files, in order. Rows of a file are stably sorted by class.
        classes: class_id -> rows, over all chunks.
        refused: Samples of the shard in quarantine.
    """

    shard: int
    chunks: tuple[ChunkRecord, ...]
    classes: ClassCounts
    refused: int

    def dumps(self) -> bytes:
        row = {
            "shard": self.shard,
            "chunks": [c.to_json() for c in self.chunks],
            "classes": self.classes.to_json(),
            "refused": self.refused,
        }
        return (json.dumps(with_check(row)) + "\n").encode()

    @staticmethod
    def loads(data: bytes) -> ShardDone:
        """Inverse of `dumps`.

        Raises:
            NotAsWritten: It is damaged.
        """
        return ShardDone.of(checked(data))

    @staticmethod
    def of(row: dict[str, Any]) -> ShardDone:
        """From a record's row."""
        return ShardDone(
            row["shard"],
            tuple(ChunkRecord.from_json(c) for c in row["chunks"]),
            ClassCounts(row["classes"]),
            row["refused"],
        )


class CodebookWarning(UserWarning):
    """A codebook is exact but not what was asked for: a class has fewer centroids than `ipc`."""


@dataclass(frozen=True)
class Codebook:
    """Centroids, counts, weights and distortion of one class.

    Attributes:
        class_id: The class.
        centroids: float32 [K, D], D the flattened latent dimension.
        counts: int64 [K], exact Voronoi counts of the class's latents; they sum to n.
        distortion: Mean squared distance of the n latents to their nearest centroid, in latent units squared.
        stream_counts: int64 [K], the counts that the algorithm kept while it ran (stale after the last move).
    """

    class_id: int
    centroids: np.ndarray
    counts: np.ndarray
    distortion: float
    stream_counts: np.ndarray

    @property
    def weights(self) -> np.ndarray:
        """float64 [K]: companion weights, the mass of each Voronoi cell; they sum to 1."""
        return self.counts / max(1, int(self.counts.sum()))

    @property
    def k(self) -> int:
        return len(self.counts)


def latent_schema(shape: tuple[int, ...], prior_id: str) -> pa.Schema:
    """Schema of a file of the latent log: fp16 little-endian latents as fixed-size binary."""
    return pa.schema(
        [
            pa.field("key", pa.string()),
            pa.field("class_id", pa.int32()),
            pa.field("latent", pa.binary(2 * int(np.prod(shape)))),
        ],
        metadata={"latent_shape": json.dumps(list(shape)), "prior_id": prior_id},
    )


def codebook_schema(shape: tuple[int, ...], prior_id: str) -> pa.Schema:
    """Schema of a codebook part: one row a centroid, float32 little-endian centroids."""
    return pa.schema(
        [
            pa.field("class_id", pa.int32()),
            pa.field("centroid_id", pa.int32()),
            pa.field("centroid", pa.binary(4 * int(np.prod(shape)))),
            pa.field("count", pa.int64()),
            pa.field("weight", pa.float64()),
            pa.field("distortion", pa.float64()),
            pa.field("stream_count", pa.int64()),
        ],
        metadata={"latent_shape": json.dumps(list(shape)), "prior_id": prior_id, "scaling": "prior"},
    )


def label_schema(codec: str, nbytes: int) -> pa.Schema:
    """Schema of a label shard: soft labels keyed (image_id, epoch), in image order."""
    return pa.schema(
        [
            pa.field("image_id", pa.int64()),
            pa.field("epoch", pa.int32()),
            pa.field("label", pa.binary(nbytes)),
        ],
        metadata={"codec": codec},
    )


def fixed_binary(array: np.ndarray) -> pa.Array:
    """The rows of a 2-D array as a fixed-size binary Arrow array, without a copy."""
    array = np.ascontiguousarray(array)
    width = array.shape[1] * array.itemsize
    return pa.Array.from_buffers(pa.binary(width), len(array), [None, pa.py_buffer(array)])


def binary_rows(column: pa.ChunkedArray | pa.Array, dtype: str) -> np.ndarray:
    """Inverse of `fixed_binary`: an array [rows, width // itemsize] of `dtype`."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # a column without rows has no chunks to combine
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    width = array.type.byte_width
    start = array.offset * width
    flat = np.frombuffer(array.buffers()[1], dtype="u1")[start : start + len(array) * width]
    return flat.view(dtype).reshape(len(array), width // np.dtype(dtype).itemsize)
