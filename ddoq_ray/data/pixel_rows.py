"""Decoded pictures of one size, a row an image: in memory, or in a file on this machine's disk that is read by rows.

A file is read by its rows, never mapped whole: what a process holds does not grow with the file, and the system's page
cache, which all processes of a machine share, keeps as much of it as there is memory.

Shape suffixes: N rows, n of them, S side.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ddoq_ray.data.image_set import read_images
from ddoq_ray.data.pictures import Resize, to_square
from ddoq_ray.data.samples import read_samples
from ddoq_ray.storage.quarantine import Refusal

UInt8 = npt.NDArray[np.uint8]
Int64 = npt.NDArray[np.int64]


class PixelRows(Protocol):
    """Pictures by row; `shape` is (N, 3, H, W)."""

    @property
    def shape(self) -> tuple[int, int, int, int]: ...

    def put(self, row: int, picture: UInt8) -> None:
        """Keep a picture uint8 [H, W, 3]."""

    def take(self, rows: Int64, out: UInt8) -> None:
        """Read int64 [n] rows into uint8 [n, 3, H, W]."""


class MemoryRows:
    """Rows in this process's memory: N x 3 x H x W bytes."""

    def __init__(self, array: UInt8) -> None:
        self.array = array

    @property
    def shape(self) -> tuple[int, int, int, int]:
        n, channels, height, width = self.array.shape
        return n, channels, height, width

    def put(self, row: int, picture: UInt8) -> None:
        self.array[row] = picture.transpose(2, 0, 1)

    def take(self, rows: Int64, out: UInt8) -> None:
        np.take(self.array, rows, axis=0, out=out)


class FileRows:
    """Rows in a file of N x 3 x H x W bytes, which is made where it does not exist."""

    def __init__(self, path: str, shape: tuple[int, int, int, int]) -> None:
        self.path, self.shape = path, shape
        self._bytes = int(np.prod(shape[1:]))
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def put(self, row: int, picture: UInt8) -> None:
        os.pwrite(self._file, np.ascontiguousarray(picture.transpose(2, 0, 1)).tobytes(), row * self._bytes)

    def take(self, rows: Int64, out: UInt8) -> None:
        for place, row in zip(out, rows, strict=True):
            if os.preadv(self._file, [memoryview(place).cast("B")], int(row) * self._bytes) != self._bytes:
                raise ValueError(f"{self.path} is shorter than it was when it was written; remove it and start again")


@dataclass
class Chosen:
    """Some of the rows of others, in their order: those of pictures that could be read."""

    rows: PixelRows
    of: Int64

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self.of), *self.rows.shape[1:])

    def put(self, row: int, picture: UInt8) -> None:
        self.rows.put(int(self.of[row]), picture)

    def take(self, rows: Int64, out: UInt8) -> None:
        self.rows.take(self.of[rows], out)


@dataclass
class Labelled:
    """Pictures with their classes and weights.

    Attributes:
        rows: [N, 3, H, W].
        class_ids: int64 [N].
        weights: float64 [N], companion weights; empty for real images.
        refused: Real images that could not be read.
    """

    rows: PixelRows
    class_ids: Int64
    weights: npt.NDArray[np.float64]
    refused: list[Refusal] = field(default_factory=list)


def record_of(path: str) -> str:
    """Where it is told what a file of rows holds; it is there once the file is whole."""
    return f"{path}.npz"


def write_record(path: str, made: Labelled) -> None:
    """Tell what the file at `path` holds, which is whole from now on."""
    work = f"{path}.tmp.npz"
    rows = made.rows
    np.savez(
        work,
        shape=(rows.rows if isinstance(rows, Chosen) else rows).shape,
        of=rows.of if isinstance(rows, Chosen) else np.arange(rows.shape[0]),
        class_ids=made.class_ids,
        weights=made.weights,
        refused=np.asarray([[bad.name, bad.reason] for bad in made.refused], str),
        offsets=[bad.offset or 0 for bad in made.refused],
        samples=[bad.samples for bad in made.refused],
    )
    os.replace(work, record_of(path))


def read_record(path: str) -> Labelled:
    """What `write_record` told of the file at `path`."""
    with np.load(record_of(path)) as told:
        rows: PixelRows = FileRows(path, tuple(int(n) for n in told["shape"]))  # type: ignore[arg-type]
        if len(told["of"]) < rows.shape[0]:
            rows = Chosen(rows, told["of"])
        refused = [
            Refusal(str(name), str(reason), int(samples), int(offset))
            for (name, reason), samples, offset in zip(
                told["refused"].reshape(-1, 2), told["samples"], told["offsets"], strict=True
            )
        ]
        return Labelled(rows, told["class_ids"], told["weights"], refused)


def common_shape(shards: list[str], size: int, side: int) -> tuple[int, int, int, int]:
    """(N, 3, H, W) of a distilled set as `load_image_arrays` would keep it; every picture is decoded for it."""
    sizes, count = set(), 0
    for item in read_images(shards):
        sizes.add(item.picture.size)
        count += 1
    if len(sizes) != 1:
        return count, 3, side, side
    width, height = sizes.pop()
    return (count, 3, size, size) if min(width, height) < size else (count, 3, height, width)


def decode_set(shards: list[str], rows: PixelRows) -> Labelled:
    """Fill rows of `common_shape` with a distilled set, a picture at a time."""
    _, _, height, width = rows.shape
    class_ids, weights = [], []
    for row, item in enumerate(read_images(shards)):
        picture = item.picture
        rows.put(row, np.asarray(picture) if picture.size == (width, height) else to_square(picture, height))
        class_ids.append(item.class_id)
        weights.append(item.weight)
    return Labelled(rows, np.asarray(class_ids, np.int64), np.asarray(weights, np.float64))


@dataclass(frozen=True)
class Shards:
    """Shards of real images, and how their pictures become squares.

    Attributes:
        urls: Of the tars.
        samples: How many samples each has room for: those of its index.
        num_classes: Labels are 0 to num_classes - 1.
        side: S.
        digests: sha256 of each tar; none where they are not known.
    """

    urls: Sequence[str]
    samples: Sequence[int]
    num_classes: int
    side: int
    resize: Resize = "squash"
    digests: Sequence[str] = ()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return sum(self.samples), 3, self.side, self.side


def decode_shards(shards: Shards, rows: PixelRows, threads: int = 1) -> Labelled:
    """Fill rows of `shards.shape` with real images, a picture at a time and a shard a thread.

    The order is that of the shards and of the samples in them, whatever the number of threads; rows of samples that
    could not be read are left out.

    Raises:
        ValueError: A shard cannot be read, or holds more samples than its index says.
    """
    first = np.cumsum([0, *shards.samples])
    class_ids = np.full(first[-1], -1, np.int64)

    def one(number: int) -> list[Refusal]:
        bad: list[Refusal] = []
        row, url = int(first[number]), shards.urls[number]
        sha256 = shards.digests[number] if shards.digests else ""
        for sample in read_samples(url, shards.num_classes, bad.append, sha256):
            if row == first[number + 1]:
                raise ValueError(f"{url} holds more than the {shards.samples[number]} samples of its index; index it "
                                 "again with the stage prepare")  # fmt: skip
            rows.put(row, to_square(sample.image, shards.side, shards.resize))
            class_ids[row] = sample.class_id
            row += 1
        return bad

    refused = [bad for found in _in_threads(one, range(len(shards.urls)), threads) for bad in found]
    there = np.flatnonzero(class_ids >= 0)
    kept: PixelRows = rows
    if len(there) < len(class_ids):
        kept = MemoryRows(rows.array[there]) if isinstance(rows, MemoryRows) else Chosen(rows, there)
    return Labelled(kept, class_ids[there], np.empty(0), refused)


def _in_threads(work: Callable[[int], list[Refusal]], numbers: Iterable[int], threads: int) -> Iterator[list[Refusal]]:
    if threads <= 1:
        return map(work, numbers)
    with ThreadPoolExecutor(threads) as pool:
        return iter(list(pool.map(work, numbers)))
