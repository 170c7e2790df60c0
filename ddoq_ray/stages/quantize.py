"""quantize: actors, sharded over classes, pull the latent log while encoders still run.

Order matters only within a class: each class has its own cursor over the shards that hold it and takes them in
order, whatever the order of their completion (`quantize_worker`). So the codebook is the same bytes under any number
of actors, any order of arrival, any death.

Classes are written in parts (fixed ranges of class ids, which do not depend on the number of actors). When the last
shard of a part's last class is consumed, each class of the part gets its exact assignment pass over the log, the part
is published, and its state is freed.

Memory of an actor, checked before it starts and asked of Ray (`plan_memory`):

    400 MiB + 12 bytes x (class, shard) pairs + 8 D x rows of the largest chunk file + working set + 192 MiB

    streaming:  sum over the open classes of 4 D max(min(n, buffer), min(n, K)) + 24 K + 6 KiB, where they are most
                (a class is open from its first shard to the last shard of its part; in a class-mixed log all are),
                and one class's seeding
    exact:      512 MiB of latents, or the largest class; and the largest of 8 n D + 12 n^2 that its algorithm gets

The last 192 MiB are a part on its way to its file.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from ddoq_ray.artifacts import Artifact, Folder, digest_of
from ddoq_ray.config import RunConfig
from ddoq_ray.config.quantizer import ClvqConfig, GramConfig, QuantizerConfig
from ddoq_ray.core.clvq import Clvq
from ddoq_ray.core.sizing import GIB, clvq_bytes, clvq_seeding_bytes, exact_algorithm, gram_bytes
from ddoq_ray.records import CodebookWarning
from ddoq_ray.runtime import Events, Progress
from ddoq_ray.stages import encode
from ddoq_ray.stages.networks import Networks
from ddoq_ray.stages.prepare import Data
from ddoq_ray.stages.quantize_worker import READ_BYTES, Quantizer, Settings, record_name

PART_BYTES = 64 << 20  # of centroids in one file: 21,841 classes must not mean 21,841 files
BASE_BYTES = 400 << 20  # of a worker process that has done nothing yet
WARNINGS_SHOWN = 5


def part_classes(num_classes: int, ipc: int, dim: int) -> list[list[int]]:
    """Class ids of each codebook part: at least 16 parts where there are classes for them, none above 64 MB."""
    size = max(1, min(-(-num_classes // 16), PART_BYTES // max(1, 4 * ipc * dim)))
    return [list(range(first, min(first + size, num_classes))) for first in range(0, num_classes, size)]


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
        self.needs: list[int] = []
        self._arguments: list[tuple[Any, ...]] = []
        if self.artifact.begin(self.facts, overwrite=config.overwrite) == "done":
            return
        dim = int(np.prod(networks.latent_shape))
        parts = dict(enumerate(part_classes(len(data.classes), config.ipc, dim)))
        num = min(algorithm.num_shards, len(parts))
        self.num_parts = len(parts)
        self.parts = [{p: c for p, c in parts.items() if p % num == i} for i in range(num)]
        self.needs = plan_memory(config, algorithm, data, networks, self.parts)
        settings = Settings(
            ipc=config.ipc,
            seed=config.seed,
            small_class=config.small_class,
            threads=config.cluster.threads,
            latent_shape=tuple(networks.latent_shape),
            prior_id=networks.prior_id,
            identity=digest_of(self.facts),
            num_actors=num,
        )
        self._arguments = [(self.codebook, latents, run / "data", mine, algorithm, settings) for mine in self.parts]

    def launch(self) -> None:
        """Start the actors, if there is anything left for them to do."""
        resources = self.config.cluster.quantizer
        for need, arguments in zip(self.needs, self._arguments, strict=True):
            actor = Quantizer.options(
                num_cpus=resources.num_cpus,
                num_gpus=resources.num_gpus,
                memory=need,
                scheduling_strategy="SPREAD",
            )
            self.actors.append(actor.remote(*arguments))
        self._calls = [None] * len(self.actors)

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
                    progress.advance(len(self.codebook.names("part-*.json")) - progress.done)
            self._write_manifest(events, max(ray.get(refs)))
            self.close()
        return self.artifact.require()

    def close(self) -> None:
        for actor in self.actors:
            ray.kill(actor)
        self.actors = []

    def _write_manifest(self, events: Events, seconds: float) -> None:
        records = [self.codebook.read_json(record_name(p)) for p in range(self.num_parts)]
        algorithms: dict[str, int] = {}
        for record in records:
            for name, classes in record["algorithms"].items():
                algorithms[name] = algorithms.get(name, 0) + classes
        notes = [note for record in records for note in record["warnings"]]
        dropped = [c for record in records for c in record["dropped"]]
        latents, centroids = sum(r["latents"] for r in records), sum(r["centroids"] for r in records)
        self.codebook.remove("snapshots")
        self.artifact.finish(
            self.facts,
            seconds=round(seconds, 3),
            wall_seconds=round(time.time() - self.start, 3),
            items=latents,
            unit="latents",
            bytes=sum(r["bytes"] for r in records),
            centroids=centroids,
            classes_by_algorithm=dict(sorted(algorithms.items())),
            dropped_classes=dropped,
            warnings=notes,
            digest=digest_of([r["digest"] for r in records]),
            environment=self.networks.environment,
        )
        for note in notes[:WARNINGS_SHOWN]:
            warnings.warn(note, CodebookWarning, stacklevel=2)
        if len(notes) > WARNINGS_SHOWN:
            more = f"{len(notes) - WARNINGS_SHOWN} more classes: see warnings in {self.codebook.path('manifest.json')}"
            warnings.warn(more, CodebookWarning, stacklevel=2)
        if set(algorithms) - {self.facts["quantizer"]["name"]}:
            events.add("classes too large for the Gram space", classes_by_algorithm=algorithms)
        events.add("stage finished", stage="quantize", latents=latents, centroids=centroids, dropped=dropped)


def plan_memory(
    config: RunConfig,
    algorithm: QuantizerConfig,
    data: Data,
    networks: Networks,
    actors: Sequence[dict[int, list[int]]],
) -> list[int]:
    """Bytes that each actor needs where it needs most, by the formula above.

    Args:
        actors: For each actor its parts: part -> class ids.
    """
    dim = int(np.prod(networks.latent_shape))
    chunk = (
        8 * dim * min(encode.chunk_rows(config, networks.image_size), max((s.samples for s in data.train), default=0))
    )
    file = min(3 * PART_BYTES, 3 * max(4 * config.ipc * dim * len(c) for parts in actors for c in parts.values()))
    census = _Census(data, actors, ahead=2 * config.encoder.workers)
    needs = []
    for parts in actors:
        mine = np.array(sorted(c for classes in parts.values() for c in classes), np.int64)
        if isinstance(algorithm, ClvqConfig):
            buffer = algorithm.buffer or Clvq.default_buffer(config.ipc)
            opened = clvq_bytes(census.images[mine], config.ipc, dim, buffer) * (census.pairs[mine] > 0)
            work = census.peak(mine, opened) + clvq_seeding_bytes(config.ipc, dim, buffer)
        else:
            latents = 2.0 * dim * census.images[mine]
            work = min(latents.sum(), max(READ_BYTES, latents.max(initial=0)))
            work += max((_class_bytes(algorithm, int(n), dim) for n in np.unique(census.images[mine])), default=0.0)
        needs.append(int(BASE_BYTES + 12 * census.pairs[mine].sum() + chunk + work + file))
    return needs


def _class_bytes(algorithm: QuantizerConfig, n: int, dim: int) -> float:
    """Working memory of an exact algorithm for one class of n images."""
    if not isinstance(algorithm, GramConfig):
        return 16.0 * n * dim  # scikit-learn and faiss copy what they get
    limits = {"max_gram_bytes": algorithm.max_gram_gb * GIB, "max_class_bytes": algorithm.max_class_gb * GIB}
    kind = exact_algorithm(n, dim, **limits)
    return float(gram_bytes(n, dim)) if kind == "gram" else 8.0 * n * dim if kind == "faiss" else 0.0


class _Census:
    """Where in the order of the shards each class is open.

    Attributes:
        images: int64 [C], labelled images of each class.
        pairs: int64 [C], shards that hold it.
    """

    def __init__(self, data: Data, actors: Sequence[dict[int, list[int]]], ahead: int) -> None:
        """`ahead`: how many shards encoders may be ahead of the oldest unfinished one."""
        num_classes, shards = len(data.classes), len(data.train)
        parts = {p: classes for mine in actors for p, classes in mine.items()}
        part_of = np.empty(num_classes, np.int64)
        for part, classes in parts.items():
            part_of[classes] = part
        self.images, self.pairs = np.zeros(num_classes, np.int64), np.zeros(num_classes, np.int64)
        self.first, last = np.full(num_classes, shards), np.zeros(num_classes, np.int64)
        own, held = np.zeros(len(parts)), np.zeros(len(parts))  # samples of a part, and of the shards that hold any
        for index, shard in enumerate(data.train):
            ids = shard.images.class_ids
            self.images[ids] += shard.images.counts
            self.pairs[ids] += 1
            self.first[ids] = np.minimum(self.first[ids], index)
            last[ids] = index
            own += np.bincount(part_of[ids], weights=shard.images.counts, minlength=len(parts))
            held[np.unique(part_of[ids])] += shard.samples
        end = np.zeros(len(parts), np.int64)
        np.maximum.at(end, part_of, last)
        end[2 * len(actors) * own < held] = shards  # it waits for a pass over the log that serves others too
        self.last = np.minimum(end[part_of] + ahead, shards)
        self.shards = shards

    def peak(self, classes: npt.NDArray[np.int64], size: npt.NDArray[np.float64]) -> float:
        """Largest sum of `size` over those of `classes` that are open at one time."""
        change = np.zeros(self.shards + 2)
        np.add.at(change, self.first[classes], size)
        np.add.at(change, self.last[classes] + 1, -size)
        return float(np.cumsum(change).max())


def check_memory(quantizers: Sequence[Quantizers]) -> None:
    """Refuse before anything starts what the cluster's nodes cannot hold, naming the formula.

    Raises:
        ValueError: When the actors of all codebooks do not fit the memory of the nodes that are there.
    """
    needs = sorted((need for q in quantizers for need in q.needs), reverse=True)
    nodes = [n for n in ray.nodes() if n["Alive"]]
    free = sorted((n["Resources"].get("memory", 0.0) for n in nodes), reverse=True)
    for need in needs:
        at = next((i for i, room in enumerate(free) if room >= need), None)
        if at is None:
            whole = ", ".join(f"{n['Resources'].get('memory', 0.0) / GIB:.1f}" for n in nodes)
            raise ValueError(
                f"{len(needs)} quantizer actors need {', '.join(f'{n / GIB:.1f}' for n in needs[:8])}"
                f"{', ...' if len(needs) > 8 else ''} GiB of memory, and the nodes offer {whole} GiB. An actor needs "
                "400 MiB + one chunk + (clvq) 4 x D x max(buffer, ipc) bytes for each class that is open at one time "
                "- all of its classes when the shards are class-mixed - or (exact algorithms) 512 MiB of latents and "
                "one class. Choose more quantizer.num_shards on more nodes, class-sorted shards, quantizer.buffer=ipc, "
                "or a smaller ipc"
            )
        free[at] -= need


def identity(config: RunConfig, algorithm: QuantizerConfig) -> dict[str, Any]:
    return {
        "ipc": config.ipc,
        "seed": config.seed,
        "small_class": config.small_class,
        "quantizer": algorithm.identity(),
    }


def read_part(codebook: Folder, part: str) -> pa.Table:
    """A part of a codebook as an Arrow table (schema `records.codebook_schema`)."""
    return pq.read_table(pa.BufferReader(codebook.read(part)))


def latent_shape_of(table: pa.Table) -> tuple[int, ...]:
    return tuple(json.loads(table.schema.metadata[b"latent_shape"]))
