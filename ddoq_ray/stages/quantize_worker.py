"""A quantizer actor: the classes of its codebook parts, each with a cursor of its own over the latent log.

Order matters only within a class. `advance` is idempotent, and the state of the open classes is snapshotted with
their cursors in one atomic file; so an actor may die at any moment, restart without limit, and the codebook is the
same bytes.

Memory: `quantize.plan_memory` states it, and the driver asks Ray for it.
"""

from __future__ import annotations

import heapq
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from ddoq_ray.artifacts import Folder
from ddoq_ray.config.quantizer import ClvqConfig, GramConfig, MinibatchKmeansConfig, QuantizerConfig
from ddoq_ray.core.clvq import Clvq
from ddoq_ray.core.distortion import assign
from ddoq_ray.core.sizing import GIB, exact_algorithm
from ddoq_ray.records import Codebook, codebook_schema, fixed_binary, read_shards
from ddoq_ray.runtime import device, pin_blas_threads
from ddoq_ray.stages.latent_log import LatentLog

BATCH_BYTES = 256 << 20  # of fp16 latents that one call of an exact algorithm gets: fixed, so that its bytes are
READ_BYTES = 512 << 20  # of fp16 latents that one pass over the log collects
SNAPSHOT_SHARE = 0.05  # of an actor's time, at most, goes into snapshots
SNAPSHOT_SCHEMA = pa.schema(
    [("class_id", pa.int32()), ("field", pa.string()), ("dtype", pa.string()), ("shape", pa.string()),
     ("data", pa.large_binary())]
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What an actor is told beside its parts: small values and paths only, an ObjectRef would not survive a restart."""

    ipc: int
    seed: int
    small_class: str
    threads: int
    latent_shape: tuple[int, ...]
    prior_id: str
    identity: str
    num_actors: int

    @property
    def dim(self) -> int:
        return int(np.prod(self.latent_shape))


def part_name(part: int) -> str:
    return f"part-{part:05d}.parquet"


def record_name(part: int) -> str:
    """The record of a part, published after it: rows, counts, digest, dropped classes, warnings."""
    return f"part-{part:05d}.json"


def fit(x: np.ndarray, k: int, algorithm: QuantizerConfig, seed: int, class_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Run an algorithm that wants the whole class.

    Args:
        x: float32 [n, D], the class's latents in the log's order.
        k: Centroids wanted, at most n.

    Returns:
        Centroids float32 [K', D] and the algorithm's own counts int64 [K'].
    """
    from ddoq_ray.core.baselines import faiss_kmeans, lloyd, minibatch_kmeans
    from ddoq_ray.core.gram_kmeans import gram_kmeans

    if isinstance(algorithm, GramConfig):
        return gram_kmeans(
            x,
            k,
            seed=seed,
            class_id=class_id,
            hartigan=algorithm.hartigan,
            restarts=algorithm.restarts,
            product=algorithm.product,
            max_gram_bytes=int(algorithm.max_gram_gb * GIB),
        )
    if isinstance(algorithm, MinibatchKmeansConfig):
        return minibatch_kmeans(x, k, variant=algorithm.variant, seed=seed, class_id=class_id)
    if algorithm.name == "kmeans":
        return lloyd(x, k, seed=seed, class_id=class_id)
    assert algorithm.name == "faiss", algorithm.name
    return faiss_kmeans(x, k, seed=seed, class_id=class_id)


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
        self.codebook, self.log = codebook, LatentLog(latents, settings.dim)
        self.algorithm, self.settings = algorithm, settings
        published = {p for p in parts if codebook.exists(record_name(p))}
        self.parts = {p: c for p, c in parts.items() if p not in published}
        self.part_of = {c: p for p, classes in self.parts.items() for c in classes}
        self.shards, self.rows = _shards_of(data, np.array(sorted(self.part_of), np.int64))
        self.cursor = dict.fromkeys(self.part_of, 0)
        self.seen = dict.fromkeys(self.part_of, 0)  # latents of the consumed shards
        self.state: dict[int, Clvq] = {}
        self.open = {p: sum(len(self.shards[c]) > 0 for c in classes) for p, classes in self.parts.items()}
        self.pending = [p for p, n in self.open.items() if n == 0]  # consumed, not yet written
        self.waiting: dict[int, list[int]] = {}  # shard -> the classes whose next shard it is
        self.snapshot_name = f"snapshots/{min(parts):05d}.arrow"
        self.snapshot_seconds = self.snapshot_at = 0.0
        self.since_snapshot = 0
        self.seconds = 0.0
        self.failed: Exception | None = None
        if self.parts:
            self._restore()
        for c, at in self.cursor.items():
            self._wait_for_next(c, at)

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
        except Exception as error:
            self.failed = error
            raise
        self.seconds += time.monotonic() - start
        return self.seconds

    def _wait_for_next(self, c: int, at: int) -> int | None:
        """Register a class with its next shard; the shard, None when it has no more."""
        if at == len(self.shards[c]):
            return None
        shard = int(self.shards[c][at])
        self.waiting.setdefault(shard, []).append(c)
        return shard

    def _advance(self, ready: npt.NDArray[np.uint8]) -> None:
        queue = [s for s in self.waiting if ready[s]]
        heapq.heapify(queue)  # lowest first: a log that is complete opens as few classes as its order allows
        while queue:
            shard = heapq.heappop(queue)
            takers = self.waiting.pop(shard)
            self._consume(shard, np.array(takers, np.int64))
            for c in takers:
                self.cursor[c] += 1
                follower = self._wait_for_next(c, self.cursor[c])
                if follower is None:
                    self._class_consumed(c)
                elif ready[follower] and len(self.waiting[follower]) == 1:
                    heapq.heappush(queue, follower)
            self.since_snapshot += 1
            if self._worth_finishing():
                self._finish_pending()
            if self.since_snapshot >= self.algorithm.snapshot_every:
                self._snapshot_if_due()
        if self.pending and not self.waiting:
            self._finish_pending()
        if self.since_snapshot:
            self._snapshot_if_due()

    def _class_consumed(self, c: int) -> None:
        part = self.part_of[c]
        self.open[part] -= 1
        if self.open[part] == 0:
            self.pending.append(part)

    def _consume(self, shard: int, takers: npt.NDArray[np.int64]) -> None:
        done = self.log.done(shard)
        if not isinstance(self.algorithm, ClvqConfig):
            for c in takers.tolist():
                self.seen[c] += done.classes.get(c, 0)
            return
        for chunk in done.chunks:
            for c, latents in self.log.read(chunk, takers):
                if c not in self.state:
                    self.state[c] = self._clvq(c, self.algorithm)
                self.state[c].update(latents)
                self.seen[c] += len(latents)

    def _clvq(self, c: int, options: ClvqConfig) -> Clvq:
        s = self.settings
        buffer = options.buffer or None
        return Clvq(s.ipc, s.dim, winner=options.winner, batch=options.batch, buffer=buffer, seed=s.seed, class_id=c)

    # ------------------------------------------------------------------ finishing

    def _worth_finishing(self) -> bool:
        """Whether reading the pending classes again now reads at most twice what is theirs.

        In a class-sorted log that is so at once, and their memory is freed. In a class-mixed one a pass over the log
        serves all classes together, at the end.
        """
        if not self.pending:
            return False
        classes = [c for p in self.pending for c in self.parts[p]]
        held = np.unique(np.concatenate([self.shards[c] for c in classes] or [np.empty(0, np.int32)]))
        own = sum(self.seen[c] for c in classes)
        return bool(2 * self.settings.num_actors * own >= self.rows[held].sum())

    def _finish_pending(self) -> None:
        """Give each pending class its centroids and its exact assignment pass; write and free each part."""
        self.pending.sort()
        wanted = [c for p in self.pending for c in self.parts[p] if self._wanted(c)]
        if isinstance(self.algorithm, ClvqConfig):
            books = self._assigned({c: self.state.pop(c).result() for c in wanted})
        else:
            books = self._quantized(wanted)
        for part in self.pending:
            classes = self.parts.pop(part)
            self._publish(part, classes, [books.pop(c) for c in classes if c in books])
            for c in classes:
                self.state.pop(c, None)
                del self.cursor[c], self.seen[c], self.shards[c], self.part_of[c]
            del self.open[part]
        self.pending = []

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

    def _assigned(self, grids: dict[int, tuple[np.ndarray, np.ndarray]]) -> dict[int, Codebook]:
        """Exact Voronoi counts and distortion of each grid (centroids, stream counts), by one pass over the log."""
        counts = {c: np.zeros(len(centroids), np.int64) for c, (centroids, _) in grids.items()}
        totals = dict.fromkeys(grids, 0.0)
        for c, latents in self._chunks_of(grids):
            labels, squared = assign(latents, grids[c][0])
            counts[c] += np.bincount(labels, minlength=len(counts[c]))
            totals[c] += float(squared.sum())
        return {c: self._book(c, *grids[c], counts[c], totals[c]) for c in grids}

    def _book(self, c: int, centroids: np.ndarray, stream: np.ndarray, counts: np.ndarray, total: float) -> Codebook:
        assert counts.sum() == self.seen[c], (c, counts.sum(), self.seen[c])
        return Codebook(c, centroids, counts, total / self.seen[c], stream)

    def _quantized(self, classes: Sequence[int]) -> dict[int, Codebook]:
        """Codebooks by an algorithm that wants whole classes: as many of them in memory as `READ_BYTES` allows."""
        books: dict[int, Codebook] = {}
        group: list[list[int]] = []
        size = 0
        for batch in self._batches(classes):
            own = sum(self._class_bytes(c) for c in batch)
            if group and size + own > READ_BYTES:
                books |= self._quantize_group(group)
                group, size = [], 0
            group.append(batch)
            size += own
        return books | (self._quantize_group(group) if group else {})

    def _class_bytes(self, c: int) -> int:
        return 2 * self.seen[c] * self.settings.dim

    def _batches(self, classes: Sequence[int]) -> Iterator[list[int]]:
        """Cut into what one call gets: never across a part, so that neither actors nor arrival change a batch."""
        batch: list[int] = []
        size = 0
        for c in classes:
            own = self._class_bytes(c)
            if batch and (size + own > BATCH_BYTES or self.part_of[c] != self.part_of[batch[0]]):
                yield batch
                batch, size = [], 0
            batch.append(c)
            size += own
        if batch:
            yield batch

    def _quantize_group(self, group: list[list[int]]) -> dict[int, Codebook]:
        books: dict[int, Codebook] = {}
        streamed = [c for batch in group for c in batch if self._algorithm_of(c) == "clvq"]
        whole = {c for batch in group for c in batch} - set(streamed)
        pieces: dict[int, list[np.ndarray]] = {c: [] for c in whole}
        for c, latents in self._chunks_of(whole):
            pieces[c].append(latents)
        for batch in group:
            mine = [c for c in batch if c in whole]
            for c, grid in self._fitted(mine, pieces):
                labels, squared = assign(x := np.concatenate(pieces.pop(c)), grid[0])
                assert len(x) == self.seen[c], (c, len(x))
                counts = np.bincount(labels, minlength=len(grid[0])).astype(np.int64)
                books[c] = self._book(c, *grid, counts, float(squared.sum()))
        for c in streamed:
            stream = self._clvq(c, ClvqConfig(name="clvq"))
            for _, latents in self._chunks_of([c]):
                stream.update(latents)
            books |= self._assigned({c: stream.result()})
        return books

    def _algorithm_of(self, c: int) -> str:
        """The algorithm a class of its size gets (`core.sizing.exact_algorithm`)."""
        if not isinstance(self.algorithm, GramConfig):
            return self.algorithm.name
        return exact_algorithm(
            self.seen[c],
            self.settings.dim,
            max_gram_bytes=self.algorithm.max_gram_gb * GIB,
            max_class_bytes=self.algorithm.max_class_gb * GIB,
        )

    def _fitted(
        self, classes: list[int], pieces: dict[int, list[np.ndarray]]
    ) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray]]]:
        """(class_id, (centroids, stream counts)) of a batch; on a GPU all classes of the Gram space at once."""
        from ddoq_ray.core.baselines import faiss_kmeans

        s, algorithm = self.settings, self.algorithm
        together: list[int] = []
        if isinstance(algorithm, GramConfig) and ray.get_gpu_ids():
            from ddoq_ray.core.gram_batched import gram_kmeans_batched

            together = [c for c in classes if self._algorithm_of(c) == "gram"]
            grids = gram_kmeans_batched(
                [np.concatenate(pieces[c]) for c in together],
                s.ipc,
                seed=s.seed,
                class_ids=together,
                hartigan=algorithm.hartigan,
                restarts=algorithm.restarts,
                product=algorithm.product,
                device=device(),
                max_bytes=int(algorithm.max_class_gb * GIB),
            )
            yield from zip(together, grids, strict=True)
        for c in classes:
            if c in together:
                continue
            x = np.concatenate(pieces[c]).astype(np.float32)
            k = min(s.ipc, len(x))
            if isinstance(algorithm, GramConfig) and self._algorithm_of(c) == "faiss":
                yield c, faiss_kmeans(x, k, seed=s.seed, class_id=c)
            else:
                yield c, fit(x, k, algorithm, s.seed, c)

    def _publish(self, part: int, classes: list[int], books: list[Codebook]) -> None:
        """Write a part, a row group a class, then its record."""
        s = self.settings
        schema = codebook_schema(s.latent_shape, s.prior_id)
        with (
            self.codebook.writing(part_name(part)) as f,
            pq.ParquetWriter(f, schema, compression="NONE", use_dictionary=False, write_statistics=False) as writer,
        ):
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
        kept = {b.class_id for b in books}
        notes = []
        for b in books:
            wanted = min(s.ipc, self.seen[b.class_id])
            distinct = int((b.counts > 0).sum())
            if distinct < wanted:
                notes.append(
                    f"class {b.class_id}: {distinct} of {wanted} centroids have latents of their own (its "
                    f"{self.seen[b.class_id]} latents hold that many different ones at most, or its algorithm left "
                    "cells empty); look for repeated images, or choose a smaller ipc"
                )
        used: dict[str, int] = {}
        for c in kept:
            used[self._algorithm_of(c)] = used.get(self._algorithm_of(c), 0) + 1
        digest, size = self.codebook.digest(part_name(part))
        self.codebook.publish_json(
            record_name(part),
            {
                "digest": digest,
                "bytes": size,
                "latents": sum(self.seen[c] for c in kept),
                "centroids": sum(b.k for b in books),
                "dropped": sorted(set(classes) - kept),
                "algorithms": used,
                "warnings": notes,
            },
        )

    # ------------------------------------------------------------------ snapshots

    def _snapshot_if_due(self) -> None:
        """Snapshot, unless that would take more than its share of the time; a death then costs a little more again."""
        now = time.monotonic()
        if now - self.snapshot_at < self.snapshot_seconds * (1 / SNAPSHOT_SHARE - 1):
            return
        self._snapshot()
        self.since_snapshot = 0
        self.snapshot_at = time.monotonic()
        self.snapshot_seconds = self.snapshot_at - now

    def _snapshot(self) -> None:
        schema = SNAPSHOT_SCHEMA.with_metadata({"identity": self.settings.identity})
        with self.codebook.writing(self.snapshot_name) as f, pa.ipc.new_stream(f, schema) as out:
            for c, at in self.cursor.items():
                if at == 0:
                    continue
                arrays = {"cursor": np.array(at), "seen": np.array(self.seen[c])}
                if c in self.state:
                    arrays |= {f"state/{k}": np.asarray(v) for k, v in self.state[c].state().items()}
                rows = [(c, k, v.dtype.str, json.dumps(v.shape), v.tobytes()) for k, v in arrays.items()]
                columns = [pa.array(column, f.type) for column, f in zip(zip(*rows, strict=True), schema, strict=True)]
                out.write_batch(pa.record_batch(columns, schema=schema))

    def _restore(self) -> None:
        """Take up the open classes where the last snapshots left them; another number of actors may have left them."""
        for name in self.codebook.names("snapshots/*.arrow"):
            with self.codebook.reading(name) as f, pa.ipc.open_stream(f) as snapshot:
                if snapshot.schema.metadata[b"identity"].decode() != self.settings.identity:
                    raise ValueError(
                        f"snapshot {self.codebook.path(name)} belongs to another configuration; use another run_dir, "
                        "or overwrite=true"
                    )
                for batch in snapshot:
                    c = batch["class_id"][0].as_py()
                    if c not in self.cursor:
                        continue
                    saved = {
                        row["field"]: np.frombuffer(row["data"], row["dtype"]).reshape(json.loads(row["shape"]))
                        for row in batch.to_pylist()
                    }
                    if int(saved["cursor"]) <= self.cursor[c]:
                        continue
                    self.cursor[c], self.seen[c] = int(saved["cursor"]), int(saved["seen"])
                    state = {k.removeprefix("state/"): v for k, v in saved.items() if k.startswith("state/")}
                    if state:
                        self.state[c] = Clvq.from_state(state)
        for c, at in self.cursor.items():
            if at and at == len(self.shards[c]):
                self._class_consumed(c)


def _shards_of(data: Folder, classes: npt.NDArray[np.int64]) -> tuple[dict[int, np.ndarray], npt.NDArray[np.int64]]:
    """For each class the shards that hold it (int32, ascending), and the samples of every shard (int64)."""
    samples, found_class, found_shard = [], [np.empty(0, np.int64)], [np.empty(0, np.int32)]
    for index, shard in enumerate(read_shards(data.read("shards.json"))):
        samples.append(shard.samples)
        mine = np.intersect1d(shard.images.class_ids, classes, assume_unique=True)
        found_class.append(mine)
        found_shard.append(np.full(len(mine), index, np.int32))
    ids, shards = np.concatenate(found_class), np.concatenate(found_shard)
    shards = shards[np.argsort(ids, kind="stable")]
    ends = np.cumsum(np.bincount(np.searchsorted(classes, ids), minlength=len(classes)))
    pieces = np.split(shards, ends[:-1]) if len(classes) else []
    return dict(zip(classes.tolist(), pieces, strict=True)), np.array(samples, np.int64)
