"""quantize: actors, sharded over classes, pull the latent log while encoders still run.

Order matters only within a class: each class has its own cursor over the shards that hold it and takes them in
order, whatever the order of their completion. State and cursors of the classes that are open are snapshotted in one
atomic file an actor, and `advance` is idempotent; so an actor may die at any moment, restart without limit, and the
codebook is the same bytes under any number of actors.

Classes are written in parts (fixed ranges of class ids, which do not depend on the number of actors). When the last
shard of a part's last class is consumed, each class of the part gets its exact assignment pass over the log, the part
is published, and its state is freed.

Memory of an actor: C_open x K x (4 D + 24) bytes of state, about five times that for a class whose first samples are
still buffered (k-means++ seeds from 4 K of them), and one chunk of latents; the exact algorithms hold one class's
latents (4 n D bytes) while its part is finished.
"""

from __future__ import annotations

import io
import json
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from ddoq_ray.artifacts import Artifact, Folder, digest_of
from ddoq_ray.config import RunConfig
from ddoq_ray.config.quantizer import ClvqConfig, GramConfig, MinibatchKmeansConfig, QuantizerConfig
from ddoq_ray.core.distortion import assign
from ddoq_ray.records import Codebook, codebook_schema, fixed_binary
from ddoq_ray.runtime import Events, Progress, pin_blas_threads
from ddoq_ray.stages import encode
from ddoq_ray.stages.latent_log import LatentLog
from ddoq_ray.stages.networks import Networks
from ddoq_ray.stages.prepare import Data

PART_BYTES = 64 << 20  # of centroids in one file: 21,841 classes must not mean 21,841 files


def part_classes(num_classes: int, ipc: int, dim: int) -> list[list[int]]:
    """Class ids of each codebook part: at least 16 parts where there are classes for them, none above 64 MB."""
    size = max(1, min(-(-num_classes // 16), PART_BYTES // max(1, 4 * ipc * dim)))
    return [list(range(first, min(first + size, num_classes))) for first in range(0, num_classes, size)]


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
        return gram_kmeans(x, k, seed=seed, class_id=class_id, hartigan=algorithm.hartigan)
    if isinstance(algorithm, MinibatchKmeansConfig):
        return minibatch_kmeans(x, k, variant=algorithm.variant, seed=seed, class_id=class_id)
    if algorithm.name == "kmeans":
        return lloyd(x, k, seed=seed, class_id=class_id)
    assert algorithm.name == "faiss", algorithm.name
    return faiss_kmeans(x, k, seed=seed, class_id=class_id)


@ray.remote(max_restarts=-1, max_task_retries=-1)
class Quantizer:
    """Holds the open classes of its parts. Made from paths only: an ObjectRef would not survive a restart."""

    def __init__(
        self,
        codebook: Folder,
        latents: Folder,
        run: Folder,
        parts: dict[int, list[int]],
        algorithm: QuantizerConfig,
        settings: dict[str, Any],
    ) -> None:
        # BLAS only: loading torch here would cost seconds and hundreds of MB for nothing.
        pin_blas_threads(settings["threads"])
        self.codebook, self.log = codebook, LatentLog(latents)
        self.algorithm, self.settings = algorithm, settings
        self.parts = parts
        data = Data.load(run)
        mine = {c for classes in parts.values() for c in classes}
        self.shards: dict[int, list[int]] = {c: [] for c in mine}
        for index, shard in enumerate(data.train):
            for c in mine & set(shard.images):
                self.shards[c].append(index)
        self.cursor = dict.fromkeys(mine, 0)
        self.state: dict[int, Any] = {}
        self.seconds = 0.0
        self.failed: Exception | None = None
        self.snapshot_name = f"snapshots/{min(parts):05d}.npz"
        self._restore()

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
            self._advance(done)
        except Exception as error:
            self.failed = error
            raise
        self.seconds += time.monotonic() - start
        return self.seconds

    def _advance(self, done: bytes) -> None:
        ready = np.flatnonzero(np.unpackbits(np.frombuffer(done, np.uint8)))
        since_snapshot = 0
        for shard in ready.tolist():
            takers = [c for c, at in self.cursor.items() if at < len(self.shards[c]) and self.shards[c][at] == shard]
            if not takers:
                continue
            if self.algorithm.streaming:
                self._consume(shard, takers)
            for c in takers:
                self.cursor[c] += 1
            since_snapshot += 1
            if since_snapshot >= self.algorithm.snapshot_every:
                self._snapshot()
                since_snapshot = 0
        if self._finish_parts() or since_snapshot:
            self._snapshot()

    def _consume(self, shard: int, takers: list[int]) -> None:
        from ddoq_ray.core.clvq import Clvq

        assert isinstance(self.algorithm, ClvqConfig)
        for chunk in self.log.done(shard).chunks:
            for c, latents, _ in self.log.read(chunk, takers):
                if c not in self.state:
                    self.state[c] = Clvq(
                        self.settings["ipc"],
                        latents.shape[1],
                        winner=self.algorithm.winner,
                        batch=self.algorithm.batch,
                        buffer=self.algorithm.buffer or None,
                        seed=self.settings["seed"],
                        class_id=c,
                    )
                self.state[c].update(latents)

    def _finish_parts(self) -> bool:
        """Write and free each part whose classes are all consumed."""
        complete = [
            part for part, classes in self.parts.items() if all(self.cursor[c] == len(self.shards[c]) for c in classes)
        ]
        for part in complete:
            classes = self.parts[part]
            self._publish(part, [b for c in classes if (b := self._finish_class(c)) is not None])
            del self.parts[part]
            for c in classes:
                self.state.pop(c, None)
                del self.cursor[c], self.shards[c]
        return bool(complete)

    def _class_latents(self, c: int) -> list[np.ndarray]:
        shards = [self.log.done(s) for s in self.shards[c]]
        return [x for done in shards for chunk in done.chunks for _, x, _ in self.log.read(chunk, [c])]

    def _finish_class(self, c: int) -> Codebook | None:
        n = sum(self.log.done(s).classes.get(c, 0) for s in self.shards[c])
        ipc = self.settings["ipc"]
        if n < ipc and self.settings["small_class"] == "error":
            raise ValueError(
                f"class {c} has {n} usable images, fewer than ipc={ipc} (the others are in quarantine); choose a "
                "smaller ipc, small_class=cap or small_class=drop"
            )
        if n == 0 or (n < ipc and self.settings["small_class"] == "drop"):
            return None
        pieces = self._class_latents(c)
        if self.algorithm.streaming:
            centroids, stream_counts = self.state[c].result()
        else:
            centroids, stream_counts = fit(
                np.concatenate(pieces), min(ipc, n), self.algorithm, self.settings["seed"], c
            )
        counts, total = np.zeros(len(centroids), np.int64), 0.0
        for x in pieces:
            labels, squared = assign(x, centroids)
            counts += np.bincount(labels, minlength=len(centroids))
            total += float(squared.sum())
        assert counts.sum() == n, (c, counts.sum(), n)
        return Codebook(c, centroids, counts, total / n, stream_counts)

    def _publish(self, part: int, books: list[Codebook]) -> None:
        shape, prior_id = tuple(self.settings["latent_shape"]), self.settings["prior_id"]
        schema = codebook_schema(shape, prior_id)
        dim = int(np.prod(shape))
        centroids = np.concatenate([b.centroids for b in books]) if books else np.empty((0, dim), np.float32)
        columns = [
            pa.array(np.repeat([b.class_id for b in books], [b.k for b in books]).astype(np.int32)),
            pa.array(np.concatenate([np.arange(b.k) for b in books] or [[]]).astype(np.int32)),
            fixed_binary(centroids.astype("<f4")),
            pa.array(np.concatenate([b.counts for b in books] or [[]]).astype(np.int64)),
            pa.array(np.concatenate([b.weights for b in books] or [[]]).astype(np.float64)),
            pa.array(np.repeat([b.distortion for b in books], [b.k for b in books]).astype(np.float64)),
            pa.array(np.concatenate([b.stream_counts for b in books] or [[]]).astype(np.int64)),
        ]
        out = io.BytesIO()
        pq.write_table(
            pa.Table.from_arrays(columns, schema=schema),
            out,
            compression="NONE",
            use_dictionary=False,
            write_statistics=False,
        )
        self.codebook.publish(part_name(part), out.getvalue())

    def _snapshot(self) -> None:
        arrays: dict[str, np.ndarray] = {"identity": np.asarray(self.settings["identity"])}
        for c, at in self.cursor.items():
            arrays[f"{c}/cursor"] = np.asarray(at)
            if c in self.state:
                arrays |= {f"{c}/state/{k}": np.asarray(v) for k, v in self.state[c].state().items()}
        out = io.BytesIO()
        np.savez(out, **arrays)  # type: ignore[arg-type]
        self.codebook.publish(self.snapshot_name, out.getvalue())

    def _restore(self) -> None:
        """Drop the parts that are published already; take up the open classes where the last snapshot left them."""
        from ddoq_ray.core.clvq import Clvq

        published = set(self.codebook.names("part-*.parquet"))
        for part in [p for p in self.parts if part_name(p) in published]:
            for c in self.parts.pop(part):
                del self.cursor[c], self.shards[c]
        for name in self.codebook.names("snapshots/*.npz"):
            with np.load(io.BytesIO(self.codebook.read(name)), allow_pickle=False) as saved:
                if str(saved["identity"]) != self.settings["identity"]:
                    raise ValueError(
                        f"snapshot {self.codebook.path(name)} belongs to another configuration; use another run_dir, "
                        "or overwrite=true"
                    )
                for c in self.cursor:  # a snapshot of a run with another num_shards may hold classes of mine
                    if f"{c}/cursor" in saved and int(saved[f"{c}/cursor"]) > self.cursor[c]:
                        self.cursor[c] = int(saved[f"{c}/cursor"])
                        prefix = f"{c}/state/"
                        state = {k.removeprefix(prefix): saved[k] for k in saved.files if k.startswith(prefix)}
                        if state:
                            self.state[c] = Clvq.from_state(state)


def part_name(part: int) -> str:
    return f"part-{part:05d}.parquet"


class Quantizers:
    """The driver's handle on a codebook's actors: it tells them which shards are done, and holds no latents."""

    def __init__(
        self,
        config: RunConfig,
        run: Folder,
        folder: str,
        algorithm: QuantizerConfig,
        data: Data,
        latents: Folder,
        networks: Networks,
    ) -> None:
        self.config, self.data, self.networks = config, data, networks
        self.codebook = run / folder / "codebook"
        self.artifact = Artifact(self.codebook, "quantize")
        # Named by how they were encoded, since quantizers start before the last latent is there.
        reused = Artifact(latents, "encode").require()["identity"] if config.latents.path else None
        made = reused or encode.identity(config, data, networks.prior_id)
        self.facts = identity(config, algorithm) | {"latents": digest_of(made)[:32]}
        self.start = time.time()
        self.done = np.zeros(len(data.train), np.uint8)
        self.actors: list[Any] = []
        self._calls: list[Any] = []
        if self.artifact.begin(self.facts, overwrite=config.overwrite) == "done":
            return
        dim = int(np.prod(networks.latent_shape))
        parts = dict(enumerate(part_classes(len(data.classes), config.ipc, dim)))
        self.num_parts = len(parts)
        num = min(algorithm.num_shards, len(parts))
        resources = config.cluster.quantizer
        settings = {
            "ipc": config.ipc,
            "seed": config.seed,
            "small_class": config.small_class,
            "threads": config.cluster.threads,
            "latent_shape": list(networks.latent_shape),
            "prior_id": networks.prior_id,
            "identity": digest_of(self.facts),
        }
        actor = Quantizer.options(
            num_cpus=resources.num_cpus, num_gpus=resources.num_gpus, scheduling_strategy="SPREAD"
        )
        for i in range(num):
            mine = {p: c for p, c in parts.items() if p % num == i}
            self.actors.append(actor.remote(self.codebook, latents, run, mine, algorithm, settings))
        self._calls = [None] * num

    def shard_done(self, shard: int) -> None:
        """A shard of the log is complete: tell each actor that is not still busy with the last news."""
        self.done[shard] = 1
        bitmap = np.packbits(self.done).tobytes()
        for i, actor in enumerate(self.actors):
            call = self._calls[i]
            if call is None or ray.wait([call], timeout=0)[0]:
                if call is not None:
                    ray.get(call)  # an error of our own code surfaces here, not at the end
                self._calls[i] = actor.advance.remote(bitmap)

    def finish(self, events: Events) -> dict[str, Any]:
        """Wait until every part is written; publish the manifest.

        Raises:
            ValueError: For a class below `ipc` after quarantine (unless `small_class` allows it), or a damaged log.
        """
        if self.actors:
            assert self.done.all(), "finish() before every shard is done"
            bitmap = np.packbits(self.done).tobytes()
            ray.get([call for call in self._calls if call is not None])  # an error of a last call surfaces as itself
            refs = [actor.advance.remote(bitmap) for actor in self.actors]
            with Progress("quantize", self.num_parts, "parts") as progress:
                waiting = list(refs)
                while waiting:
                    ray.wait(waiting, num_returns=1, timeout=1.0)
                    ready, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=0)
                    ray.get(ready)
                    progress.advance(len(self.codebook.names("part-*.parquet")) - progress.done)
            self._write_manifest(events, max(ray.get(refs)))
            self.close()
        return self.artifact.require()

    def close(self) -> None:
        for actor in self.actors:
            ray.kill(actor)
        self.actors = []

    def _write_manifest(self, events: Events, seconds: float) -> None:
        files = self.codebook.names("part-*.parquet")
        digest, size, counted, kept, centroids = [], 0, 0, set(), 0
        for name in files:
            data = self.codebook.read(name)
            digest.append(digest_of(data))
            size += len(data)
            table = pq.read_table(io.BytesIO(data), columns=["class_id", "count"])
            counted += int(table["count"].to_numpy().sum())
            centroids += table.num_rows
            kept |= set(table["class_id"].to_pylist())
        dropped = sorted(c.class_id for c in self.data.classes if c.class_id not in kept)
        self.codebook.remove("snapshots")
        self.artifact.finish(
            self.facts,
            seconds=round(seconds, 3),
            wall_seconds=round(time.time() - self.start, 3),
            items=counted,
            unit="latents",
            bytes=size,
            centroids=centroids,
            dropped_classes=dropped,
            digest=digest_of(digest),
            environment=self.networks.environment,
        )
        events.add("stage finished", stage="quantize", latents=counted, centroids=centroids, dropped=dropped)


def identity(config: RunConfig, algorithm: QuantizerConfig) -> dict[str, Any]:
    return {
        "ipc": config.ipc,
        "seed": config.seed,
        "small_class": config.small_class,
        "quantizer": algorithm.identity(),
    }


def read_part(codebook: Folder, part: str) -> pa.Table:
    """A part of a codebook as an Arrow table (schema `records.codebook_schema`)."""
    return pq.read_table(io.BytesIO(codebook.read(part)))


def latent_shape_of(table: pa.Table) -> tuple[int, ...]:
    return tuple(json.loads(table.schema.metadata[b"latent_shape"]))
