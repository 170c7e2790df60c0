"""A quantizer actor: the classes of its codebook parts, each with a cursor of its own over the latent log.

Order matters only within a class. `advance` is idempotent, and the state of the open classes is snapshotted with
their cursors in one atomic file; so an actor may die at any moment, restart without limit as long as it gets on
(`deaths`), and the codebook is the same bytes.

Memory: `memory.plan_memory` states it, and the driver asks Ray for it.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import ray

from ddoq_ray.config.quantizer import ClvqConfig, QuantizerConfig
from ddoq_ray.core.clvq import Clvq
from ddoq_ray.execution.workers import pin_blas_threads
from ddoq_ray.stages.quantize.class_quantizers import Settings, WholeClasses, exact_codebooks, new_clvq
from ddoq_ray.stages.quantize.deaths import Deaths, last_words, too_many
from ddoq_ray.storage import layout
from ddoq_ray.storage.codebook import Account, write_part
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.latent_log import LatentLog
from ddoq_ray.storage.records import Codebook, read_shards
from ddoq_ray.storage.snapshots import read_snapshots, write_snapshot

SNAPSHOT_SHARE = 0.05  # of an actor's time, at most, goes into snapshots


def enough_to_finish(own: int, held: int, num_actors: int) -> bool:
    """Whether to give pending classes their pass over the log now: it reads at most twice an actor's share.

    In a class-sorted log that is so at once, and their memory is freed. In a class-mixed one a single pass at the end
    serves all classes.

    Args:
        own: Samples of the pending classes.
        held: Samples of the shards that hold any of them.
    """
    return 2 * num_actors * own >= held


class Pending:
    """Parts that are consumed and not yet written, and what a pass over the log for all of them would read.

    Attributes:
        parts: In the order of their arrival.
        own: Samples of their classes.
        held: Samples of the shards that hold any of these.
    """

    def __init__(self, samples: npt.NDArray[np.int64]) -> None:
        """`samples`: of every shard."""
        self._samples = samples
        self.clear()

    def clear(self) -> None:
        self.parts: list[int] = []
        self.own = self.held = 0
        self._seen = np.zeros(len(self._samples), bool)

    def add(self, part: int, own: int, shards: Iterable[npt.NDArray[np.int32]]) -> None:
        """A part with `own` samples, and for each of its classes the shards that hold it."""
        self.parts.append(part)
        self.own += own
        for mine in shards:  # each class once: in a class-mixed log a union anew for each shard would take hours
            new = mine[~self._seen[mine]]
            self._seen[new] = True
            self.held += int(self._samples[new].sum())


@ray.remote(max_restarts=-1, max_task_retries=-1)
class Quantizer:
    """Holds the open classes of its parts. Made from paths and small values only."""

    def __init__(
        self,
        codebook: Folder,
        latents: Folder,
        data: Folder,
        parts: dict[int, list[int]],
        algorithm: QuantizerConfig,
        settings: Settings,
    ) -> None:
        # BLAS only: loading torch here would cost seconds and hundreds of MB for nothing.
        pin_blas_threads(settings.threads)
        self.codebook, self.log = codebook, LatentLog(latents, settings.dim, settings.noise)
        self.algorithm, self.settings, self.pooling = algorithm, settings, settings.pooling
        published = {p for p in parts if codebook.exists(layout.codebook_record(p))}
        self.parts = {p: c for p, c in parts.items() if p not in published}
        self.part_of = {c: p for p, classes in self.parts.items() for c in classes}
        self.shards, self.samples = _index(data, np.array(sorted(self.part_of), np.int64))
        self.cursor = dict.fromkeys(self.part_of, 0)
        self.seen = dict.fromkeys(self.part_of, 0)  # latents of the consumed shards
        self.state: dict[int, Clvq] = {}
        self.open = {p: sum(len(self.shards[c]) > 0 for c in classes) for p, classes in self.parts.items()}
        self.pending = Pending(self.samples)
        for p, n in self.open.items():
            if n == 0:
                self._part_consumed(p)
        self.waiting: dict[int, list[int]] = {}  # shard -> the classes whose next shard it is
        self.ready = np.zeros(len(self.samples), bool)  # what was told; no class waits for any of these between calls
        self.snapshot_name = f"snapshots/{min(parts):05d}.arrow"
        self.snapshot_seconds = self.snapshot_at = 0.0
        self.since_snapshot = 0
        self.seconds = 0.0
        self.failed: Exception | None = None
        self.damaged: list[str] = []  # snapshots that were left out
        self.deaths = Deaths(codebook, f"snapshots/{min(parts):05d}.deaths.json", settings.driver)
        try:
            self._take_up()
        except Exception as error:  # told by the next call: one that a constructor raises comes with pages of Ray's own
            self.failed = error

    def advance(self, done: bytes) -> float:
        """Consume what can be consumed of the done shards, in each class's order. Calling it again is harmless.

        Args:
            done: Bitmap of the shards whose done record is published (numpy.packbits).

        Returns:
            Seconds that this actor has worked since it started; the rest of its life it waits for encoders.
        """
        if self.failed is not None:  # half a shard may be consumed: going on would count it twice
            raise self.failed
        start = time.monotonic()
        try:
            self._advance(np.unpackbits(np.frombuffer(done, np.uint8)))
            self.deaths.work(False)
        except Exception as error:
            self.failed = error
            raise
        self.seconds += time.monotonic() - start
        return self.seconds

    def left_out(self) -> list[str]:
        """Snapshots that this actor found damaged when it started; their classes it read from the log anew."""
        return self.damaged

    def _take_up(self) -> None:
        """Go on where the last snapshots left the open classes.

        Raises:
            ValueError: When this actor has died too often without getting on.
        """
        if not self.parts:
            return
        again = ray.get_runtime_context().was_current_actor_reconstructed
        if again and too_many(self.deaths.restarted()):  # before the state is loaded: that may be what kills
            streaming = isinstance(self.algorithm, ClvqConfig)
            raise ValueError(last_words(sorted(self.part_of), self.settings.need, streaming=streaming))
        self._restore()
        self.deaths.work(False)
        for c, at in self.cursor.items():
            self._wait_for_next(c, at)

    def _wait_for_next(self, c: int, at: int) -> int | None:
        """Register a class with its next shard; the shard, None when it has no more."""
        if at == len(self.shards[c]):
            return None
        shard = int(self.shards[c][at])
        self.waiting.setdefault(shard, []).append(c)
        return shard

    def _advance(self, ready: npt.NDArray[np.uint8]) -> None:
        told = ready[: len(self.ready)].astype(bool)
        # The news alone: to go through all that is waited for, at each shard's news, would take the square of them.
        queue = [s for s in np.flatnonzero(told & ~self.ready).tolist() if s in self.waiting]
        self.ready |= told
        if queue or self.pending.parts:
            self.deaths.work(True)
        heapq.heapify(queue)  # lowest first: a log that is complete opens as few classes as its order allows
        while queue:
            shard = heapq.heappop(queue)
            takers = self.waiting.pop(shard)
            self._consume(shard, np.sort(np.array(takers, np.int64)))
            for c in takers:
                self.cursor[c] += 1
                follower = self._wait_for_next(c, self.cursor[c])
                if follower is None:
                    self._class_consumed(c)
                elif self.ready[follower] and len(self.waiting[follower]) == 1:
                    heapq.heappush(queue, follower)
            self.since_snapshot += 1
            if self._enough_to_finish():
                self._finish_pending()
            if self.since_snapshot >= self.algorithm.snapshot_every:
                self._snapshot_if_due()
        if self.pending.parts and not self.waiting:
            self._finish_pending()
        if self.since_snapshot:
            self._snapshot_if_due()

    def _class_consumed(self, c: int) -> None:
        part = self.part_of[c]
        self.open[part] -= 1
        if self.open[part] == 0:
            self._part_consumed(part)

    def _part_consumed(self, part: int) -> None:
        classes = self.parts[part]
        self.pending.add(part, sum(self.seen[c] for c in classes), (self.shards[c] for c in classes))

    def _consume(self, shard: int, takers: npt.NDArray[np.int64]) -> None:
        done = self.log.done(shard)
        if not isinstance(self.algorithm, ClvqConfig):
            counts = dict(done.classes.items())
            for c in takers.tolist():
                self.seen[c] += counts.get(c, 0)
            return
        for chunk in done.chunks:
            for c, latents in self.log.read(chunk, takers):
                if c not in self.state:
                    self.state[c] = new_clvq(self.settings, c, self.algorithm)
                self.state[c].update(self.pooling(latents))
                self.seen[c] += len(latents)

    # ------------------------------------------------------------------ finishing

    def _enough_to_finish(self) -> bool:
        pending = self.pending
        return bool(pending.parts) and enough_to_finish(pending.own, pending.held, self.settings.num_actors)

    def _finish_pending(self) -> None:
        """Give each pending class its centroids and its exact assignment pass; write and free each part."""
        pending = sorted(self.pending.parts)
        wanted = [c for p in pending for c in self.parts[p] if self._wanted(c)]
        books = self._books(wanted)
        for part in pending:
            classes = self.parts[part]
            self._publish(part, classes, [next(books) for c in classes if self._wanted(c)])
            self.deaths.got_on()
            del self.parts[part]
            for c in classes:
                self.state.pop(c, None)
                del self.cursor[c], self.seen[c], self.shards[c], self.part_of[c]
            del self.open[part]
        self.pending.clear()

    def _books(self, wanted: list[int]) -> Iterator[Codebook]:
        """The codebooks of consumed classes, in their order."""
        if isinstance(self.algorithm, ClvqConfig):
            found = {c: self.state.pop(c).result() for c in wanted}
            return exact_codebooks(found, self._chunks_of, shrink=self.algorithm.shrink, pooling=self.pooling)
        return WholeClasses(self.algorithm, self.settings, self.seen, self.part_of, self._chunks_of).codebooks(wanted)

    def _wanted(self, c: int) -> bool:
        """Whether a consumed class gets centroids.

        Raises:
            ValueError: When it is smaller than `ipc` and `small_class` does not say what to do.
        """
        n, ipc = self.seen[c], self.settings.ipc
        if n < ipc and self.settings.small_class == "error":
            raise ValueError(
                f"class {c} has {n} usable images, fewer than ipc={ipc} (the others are in quarantine); choose a "
                "smaller ipc, small_class=cap or small_class=drop"
            )
        return n >= ipc or (n > 0 and self.settings.small_class == "cap")

    def _chunks_of(self, classes: Iterable[int]) -> Iterator[tuple[int, npt.NDArray[np.float16]]]:
        """(class_id, latents) of these classes, one pass over the shards that hold them, in the log's order."""
        wanted = np.array(sorted(classes), np.int64)
        if len(wanted):
            for shard in np.unique(np.concatenate([self.shards[c] for c in wanted.tolist()])).tolist():
                for chunk in self.log.done(shard).chunks:
                    yield from self.log.read(chunk, wanted)

    def _publish(self, part: int, classes: list[int], books: list[Codebook]) -> None:
        notes, used = [], Counter[str]()
        for b in books:
            assert b.counts.sum() == self.seen[b.class_id], (b.class_id, b.counts.sum(), self.seen[b.class_id])
            used[self.settings.algorithm_of(self.algorithm, self.seen[b.class_id])] += 1
            wanted = min(self.settings.ipc, self.seen[b.class_id])
            distinct = int((b.counts > 0).sum())
            if distinct < wanted:
                notes.append(
                    f"class {b.class_id}: {distinct} of {wanted} centroids have latents of their own (its "
                    f"{self.seen[b.class_id]} latents hold that many different ones at most, or its algorithm left "
                    "cells empty); look for repeated images, or choose a smaller ipc"
                )
        account = Account(sorted(set(classes) - {b.class_id for b in books}), dict(used), notes)
        shape, prior_id = self.settings.latent_shape, self.settings.prior_id
        write_part(self.codebook, part, books, account, latent_shape=shape, prior_id=prior_id)

    # ------------------------------------------------------------------ snapshots

    def _snapshot_if_due(self) -> None:
        """Snapshot, unless that would take more than its share of the time; a death then costs a little more again."""
        now = time.monotonic()
        if now - self.snapshot_at < self.snapshot_seconds * (1 / SNAPSHOT_SHARE - 1):
            return
        self._snapshot()
        self.deaths.got_on()
        self.since_snapshot = 0
        self.snapshot_at = time.monotonic()
        self.snapshot_seconds = self.snapshot_at - now

    def _snapshot(self) -> None:
        def classes() -> Iterator[tuple[int, dict[str, np.ndarray]]]:
            for c, at in self.cursor.items():
                if at:
                    state = self.state[c].state() if c in self.state else {}
                    arrays = {f"state/{k}": np.asarray(v) for k, v in state.items()}
                    yield c, {"cursor": np.array(at), "seen": np.array(self.seen[c]), **arrays}

        write_snapshot(self.codebook, self.snapshot_name, self.settings.identity, classes())

    def _restore(self) -> None:
        """Take up the open classes where the last snapshots left them; another number of actors may have left them."""
        for c, saved in read_snapshots(self.codebook, self.settings.identity, self.damaged):
            if c not in self.cursor or int(saved["cursor"]) <= self.cursor[c]:
                continue
            self.cursor[c], self.seen[c] = int(saved["cursor"]), int(saved["seen"])
            state = {k.removeprefix("state/"): v for k, v in saved.items() if k.startswith("state/")}
            if state:
                self.state[c] = Clvq.from_state(state)
        for c, at in self.cursor.items():
            if at and at == len(self.shards[c]):
                self._class_consumed(c)


def _index(data: Folder, classes: npt.NDArray[np.int64]) -> tuple[dict[int, np.ndarray], npt.NDArray[np.int64]]:
    """For each class the shards that hold it, and the samples of every shard (int64)."""
    samples, held = [], []
    own = np.zeros(1 + int(classes.max(initial=-1)), bool)
    own[classes] = True
    for shard in read_shards(data.read(layout.SHARDS)):
        samples.append(shard.samples)
        ids = shard.images.class_ids[: np.searchsorted(shard.images.class_ids, len(own))]
        held.append(ids[own[ids]])
    return shards_of(held, classes), np.array(samples, np.int64)


def shards_of(
    held: Sequence[npt.NDArray[np.integer]], classes: npt.NDArray[np.int64]
) -> dict[int, npt.NDArray[np.int32]]:
    """For each of `classes` (ascending) the shards that hold it, int32 and ascending.

    Args:
        held: For each shard in order which of `classes` are in it.
    """
    ids = np.concatenate([np.empty(0, np.int32), *held])
    most = int(classes.max(initial=-1)) + 1
    small = ids.astype(np.uint16) if most <= 1 << 16 else ids  # numpy sorts these alone in linear time
    where = np.repeat(np.arange(len(held), dtype=np.int32), [len(mine) for mine in held])
    shards = where[np.argsort(small, kind="stable")]
    ends = np.cumsum(np.bincount(ids, minlength=most)[classes])
    pieces = np.split(shards, ends[:-1]) if len(classes) else []
    return dict(zip(classes.tolist(), pieces, strict=True))
