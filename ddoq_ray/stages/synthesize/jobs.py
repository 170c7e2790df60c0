"""A codebook laid out as image shards, each the work of one decoder."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

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


def image_jobs(
    run_dir: Folder, folder: str, shard_images: int, identity: str = "", how: Making | None = None
) -> list[Job]:
    """The image shards of a codebook: fixed lists of (class_id, centroid_id), with the parts that hold them."""
    names: list[str] = []
    classes, counts, holders = [], [], []
    book = how.book if how is not None and how.book is not None else Place(folder)
    tiles = how.tiles if how is not None else 1
    for part in open_parts(run_dir / book.codebook):
        classes.append(part.class_ids)
        counts.append(-(-part.rows // tiles))
        holders.append(np.full(len(part.rows), len(names), np.int32))
        names.append(part.name)
    if not names:
        return []
    class_ids, part_of = np.concatenate(classes), np.concatenate(holders)
    ends = np.cumsum(np.concatenate(counts))  # of each class, in rows of the whole codebook
    starts = ends - np.concatenate(counts)
    firsts = np.arange(0, ends[-1] if len(ends) else 0, shard_images)
    lasts = np.minimum(firsts + shard_images, ends[-1] if len(ends) else 0)
    # The classes that a shard's first and last row are in.
    begins, stops = np.searchsorted(ends, firsts, side="right"), np.searchsorted(ends, lasts - 1, side="right") + 1
    jobs = []
    for i, (first, last, a, b) in enumerate(zip(*(x.tolist() for x in (firsts, lasts, begins, stops)), strict=True)):
        low, high = np.maximum(starts[a:b], first) - starts[a:b], np.minimum(ends[a:b], last) - starts[a:b]
        ranges = tuple(map(ClassRange, class_ids[a:b].tolist(), low.tolist(), high.tolist()))
        parts = tuple(names[part] for part in range(part_of[a], part_of[b - 1] + 1))
        jobs.append(Job(folder, ImageUnit(i, ranges), parts, identity, how))
    return jobs


def judge_of(config: RunConfig) -> str | None:
    """The path of the classifier that chooses among candidates; None where there is one image of each centroid."""
    if config.synthesizer.candidates == 1:
        return None
    return config.synthesizer.judge or next(iter(config.teacher.paths), None)
