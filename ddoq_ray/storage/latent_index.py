"""Which shards of a latent log hold which classes, and how many latents of each: read once, used by all that ask.

Every done record is read one time. What looks at whole classes (herding, medoids, the report's distances) then opens
the shards of its classes only; and where shards share their classes, as many parts of a codebook are looked at in one
reading as memory holds (`LatentIndex.passes`): 270 parts must not mean 270 readings of a class-mixed log.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from ddoq_ray.storage.artifact import Artifact, digest_of
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.latent_log import read_done
from ddoq_ray.storage.records import ClassCounts, ShardDone

READ_AT_ONCE = 32  # done records on their way: each is a wait where the log is in an object store
LEAST_PASSES = 16  # so many tasks may read a class-mixed log side by side, though memory would allow fewer
KEPT = 2  # indices in memory: of the log and of the held-out one

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

_built: dict[tuple[str, int, str], LatentIndex] = {}  # of this process


@dataclass(frozen=True)
class LatentIndex:
    """8 bytes a (class, shard) pair: 113 MB for a class-mixed ImageNet-21K.

    Attributes:
        starts: int64 [C + 1], where each class's pairs begin; C is one more than the largest class_id.
        shards: int32 [pairs], the shards of each class, ascending.
        rows: int32 [pairs], how many latents of the class each of them holds.
        held: int64 [S], latents of every shard.
    """

    starts: Int64
    shards: Int32
    rows: Int32
    held: Int64

    @staticmethod
    def of(counts: Iterable[ClassCounts]) -> LatentIndex:
        """From what each shard holds, in the order of the shards; linear in the pairs, but for one sort by class."""
        class_ids, rows, lengths, held = [], [], [], []
        for each in counts:
            class_ids.append(each.class_ids)
            rows.append(each.counts.astype(np.int32))
            lengths.append(len(each))
            held.append(each.total)
        ids = np.concatenate(class_ids or [np.empty(0, np.int32)])
        order = np.argsort(ids, kind="stable")
        where = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        starts = np.concatenate([[0], np.cumsum(np.bincount(ids))]).astype(np.int64)
        every = np.concatenate(rows or [np.empty(0, np.int32)])
        return LatentIndex(starts, where[order], every[order], np.asarray(held, np.int64))

    def pairs(self, class_id: int) -> tuple[Int32, Int32]:
        """The shards that hold a class, ascending, and its latents in each."""
        if not 0 <= class_id < len(self.starts) - 1:
            return self.shards[:0], self.rows[:0]
        mine = slice(int(self.starts[class_id]), int(self.starts[class_id + 1]))
        return self.shards[mine], self.rows[mine]

    @property
    def counts(self) -> Int64:
        """int64 [C], latents of each class."""
        ends = np.concatenate([[0], np.cumsum(self.rows, dtype=np.int64)])
        return ends[self.starts[1:]] - ends[self.starts[:-1]]

    def holding(self, classes: Collection[int]) -> Int32:
        """The shards that hold any of some classes, ascending."""
        found = np.zeros(len(self.held), bool)
        for c in classes:
            found[self.pairs(c)[0]] = True
        return np.flatnonzero(found).astype(np.int32)

    def passes(self, parts: Sequence[Collection[int]], latent_bytes: int, most: int) -> list[list[int]]:
        """Runs of parts (by their places in `parts`) that are read together, in order.

        A part whose shards hold mostly its own latents is read by itself, as in a class-sorted log. Where shards are
        shared with parts that follow, these join it, up to `most` bytes of latents and to a sixteenth of all, so that
        tasks still work side by side. So a log is read twice, or 16 times, or as often as its latents hold `most`.

        Args:
            parts: Classes of each part; those without latents cost nothing.
            latent_bytes: Of one latent.
            most: Bytes of latents that one pass may hold; a single part may be larger.
        """
        counts = self.counts
        sizes = [int(sum(counts[c] for c in classes if c < len(counts))) for classes in parts]
        limit = min(most // max(1, latent_bytes), -(-sum(sizes) // LEAST_PASSES))
        found: list[list[int]] = []
        own = held = 0
        seen = np.zeros(len(self.held), bool)
        for part, classes in enumerate(parts):
            if not found or 2 * own >= held or own + sizes[part] > limit:
                found.append([])
                own = held = 0
                seen[:] = False
            found[-1].append(part)
            own += sizes[part]
            for c in classes:
                shards = self.pairs(c)[0]
                new = shards[~seen[shards]]
                seen[new] = True
                held += int(self.held[new].sum())
        return found


def done_records(latents: Folder, shards: Sequence[int] | range) -> Iterator[ShardDone]:
    """The done records of some shards of a log, in their order, some of them read ahead.

    Raises:
        ValueError: When one is gone or damaged.
    """

    with ThreadPoolExecutor(READ_AT_ONCE) as threads:
        for first in range(0, len(shards), 8 * READ_AT_ONCE):  # not all: those of a class-mixed log fill gigabytes
            yield from threads.map(partial(read_done, latents), shards[first : first + 8 * READ_AT_ONCE])


def latent_index(latents: Folder, shards: int) -> LatentIndex:
    """The index of a log of so many shards, built when it is first asked for and kept while the log is the same."""
    manifest = Artifact(latents, "encode").manifest()
    key = (latents.uri, shards, digest_of(manifest))
    if manifest is None or key not in _built:
        made = LatentIndex.of(record.classes for record in done_records(latents, range(shards)))
        if manifest is None:  # nothing says which log it is
            return made
        while len(_built) >= KEPT:
            _built.pop(next(iter(_built)))
        _built[key] = made
    return _built[key]
