"""A codebook laid out as image shards, each the work of one decoder."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt

from ddoq_ray.config import RunConfig
from ddoq_ray.config.synthesizer import SynthesizerConfig
from ddoq_ray.storage.artifact import digest_of
from ddoq_ray.storage.codebook import open_parts
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.layout import Place, image_shard


class ClassRange(NamedTuple):
    """Centroids of one class: `first` to before `end`."""

    class_id: int
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class ImageUnit:
    """The unit of synthesis: one image shard, a fixed list of (class_id, centroid_id) as ranges of classes."""

    index: int
    ranges: tuple[ClassRange, ...]

    def __len__(self) -> int:
        return sum(r.end - r.first for r in self.ranges)

    @property
    def keys(self) -> list[tuple[int, int]]:
        return [(r.class_id, k) for r in self.ranges for k in range(r.first, r.end)]

    @property
    def name(self) -> str:
        return image_shard(self.index)


@dataclass(frozen=True)
class Making:
    """How an image set is made of a codebook.

    Attributes:
        book: Whose codebook it is, where it is not the set's own: then its masses are not the images'.
        tiles: Centroids of an image, a square.
        settings: Start, strength and what else is asked of the prior.
    """

    settings: SynthesizerConfig
    book: Place | None = None
    tiles: int = 1


@dataclass(frozen=True, slots=True)
class Job:
    """One unit of work for a decoder: an image shard of the set in `folder`, and the codebook parts it needs.

    Attributes:
        identity: Digest of what the set follows from.
        how: How the set is made of its codebook; None: as a run's own.
    """

    folder: str
    unit: ImageUnit
    parts: tuple[str, ...]
    identity: str = ""
    how: Making | None = None

    @property
    def name(self) -> str:
        return posixpath.join(Place(self.folder).images, self.unit.name)

    @property
    def made_from(self) -> str:
        """Digest of what the shard's bytes follow from."""
        return digest_of([self.identity, self.unit.index, self.unit.ranges])


@dataclass(frozen=True, eq=False)
class ImageJobs(Sequence[Job]):
    """The image shards of a codebook, in order; each job is made when it is asked for, since there may be 20,000.

    Attributes:
        folder, identity, how: As of each `Job`.
        shard_images: Images of each shard but the last.
        names: Of the codebook's parts.
        class_ids, counts, part_of: int32 [C], int64 [C], int32 [C]; of each class in order: its id, images, and part.
    """

    folder: str
    identity: str
    how: Making | None
    shard_images: int
    names: Sequence[str]
    class_ids: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int64]
    part_of: npt.NDArray[np.int32]

    @cached_property
    def ends(self) -> npt.NDArray[np.int64]:
        """Of each class, in images of the whole set."""
        return np.cumsum(self.counts)

    @property
    def images(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __len__(self) -> int:
        return -(-self.images // self.shard_images)

    @overload
    def __getitem__(self, index: int) -> Job: ...
    @overload
    def __getitem__(self, index: slice) -> list[Job]: ...
    def __getitem__(self, index: int | slice) -> Job | list[Job]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        first = index * self.shard_images
        last = min(first + self.shard_images, self.images)
        # The classes that the shard's first and last image are in.
        a, b = np.searchsorted(self.ends, first, side="right"), np.searchsorted(self.ends, last - 1, side="right") + 1
        begins = self.ends[a:b] - self.counts[a:b]
        low, high = np.maximum(begins, first) - begins, np.minimum(self.ends[a:b], last) - begins
        ranges = tuple(map(ClassRange, self.class_ids[a:b].tolist(), low.tolist(), high.tolist()))
        parts = tuple(self.names[part] for part in range(self.part_of[a], self.part_of[b - 1] + 1))
        return Job(self.folder, ImageUnit(index, ranges), parts, self.identity, self.how)


def image_jobs(
    run_dir: Folder, folder: str, shard_images: int, identity: str = "", how: Making | None = None
) -> ImageJobs:
    """The image shards of a codebook: fixed lists of (class_id, centroid_id), with the parts that hold them."""
    names: list[str] = []
    classes, counts, holders = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
    book = how.book if how is not None and how.book is not None else Place(folder)
    tiles = how.tiles if how is not None else 1
    for part in open_parts(run_dir / book.codebook):
        classes.append(part.class_ids)
        counts.append(-(-part.rows // tiles))
        holders.append(np.full(len(part.rows), len(names), np.int32))
        names.append(part.name)
    return ImageJobs(
        folder,
        identity,
        how,
        shard_images,
        names,
        np.concatenate(classes),
        np.concatenate(counts),
        np.concatenate(holders),
    )


def judge_of(config: RunConfig) -> str | None:
    """The path of the classifier that chooses among candidates; None where there is one image of each centroid."""
    if config.synthesizer.candidates == 1:
        return None
    return config.synthesizer.judge or next(iter(config.teacher.paths), None)
