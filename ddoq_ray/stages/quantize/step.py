"""quantize: actors, sharded over classes, pull the latent log while encoders still run.

Order matters only within a class: each class has its own cursor over the shards that hold it and takes them in
order, whatever the order of their completion (`worker`). So the codebook is the same bytes under any number
of actors, any order of arrival, any death.

Classes are written in parts (fixed ranges of class ids, which do not depend on the number of actors). When the last
shard of a part's last class is consumed, each class of the part gets its exact assignment pass over the log, the part
is published, and its state is freed.

What an actor may hold is planned, checked and asked of Ray first (`memory`).
"""

from __future__ import annotations

import time
import uuid
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import numpy as np
import ray
from ray.actor import ActorClass

from ddoq_ray.config import RunConfig
from ddoq_ray.config.methods import MethodSpec
from ddoq_ray.config.quantizer import ClvqConfig, QuantizerConfig
from ddoq_ray.core.noising import NoiseLevel
from ddoq_ray.core.pooling import Pooling
from ddoq_ray.execution.networks import Networks
from ddoq_ray.execution.run import Run
from ddoq_ray.execution.workers import Progress, say
from ddoq_ray.stages.encode import step as encode
from ddoq_ray.stages.encode.stream import file_rows
from ddoq_ray.stages.quantize.class_quantizers import Settings
from ddoq_ray.stages.quantize.memory import ActorDemand, Census, log_readings, plan_memory, together
from ddoq_ray.stages.quantize.worker import Quantizer
from ddoq_ray.stages.step import Ask, Step
from ddoq_ray.storage import layout
from ddoq_ray.storage.artifact import digest_of
from ddoq_ray.storage.codebook import part_classes, read_record
from ddoq_ray.storage.latent_log import LatentLog
from ddoq_ray.storage.layout import Place
from ddoq_ray.storage.manifests import CodebookManifest
from ddoq_ray.storage.records import CodebookWarning

WARNINGS_SHOWN = 5
READINGS_SAID = 8  # of the whole log: more are told before they are begun


@dataclass(frozen=True)
class Quantize(Step):
    """A codebook: the run's own, or that of a method with a quantizer of its own.

    Attributes:
        method: Whose it is.
        at: Where that method's parts are.
    """

    stage = name = "quantize"
    at_once = True

    method: MethodSpec
    at: Place

    @property
    def place(self) -> str:
        return self.at.codebook

    def algorithm(self, config: RunConfig) -> QuantizerConfig:
        assert self.method.quantizer is not None, self.method.name
        return self.method.quantizer(config.quantizer)

    def sized(self, config: RunConfig) -> RunConfig:
        """The configuration whose `ipc` is the number of this codebook's centroids: an image may be made of several."""
        return config if self.method.tiles == 1 else replace(config, ipc=config.ipc * self.method.tiles)

    def settings(self, config: RunConfig) -> dict[str, Any]:
        return {
            "ipc": config.ipc * self.method.tiles,
            "seed": config.seed,
            "small_class": config.small_class,
            "quantizer": self.algorithm(config).identity(),
        }

    def inputs(self, run: Run) -> dict[str, Any]:
        """The log is named by how it is encoded, since quantizers start before its last latent is there."""
        noise = noise_level(run.config, self.algorithm(run.config), run.networks)
        log = {"latents": digest_of(encode.log_identity(run))[:32]}
        return log | ({"noise": asdict(noise)} if noise is not None else {})

    def asks(self, config: RunConfig) -> list[Ask]:
        return [Ask.of(config, "quantizer", "quantizer", config.quantizer.num_shards, "quantizer.num_shards")]


def actors_parts(algorithm: QuantizerConfig, num_classes: int, ipc: int, dim: int) -> list[dict[int, list[int]]]:
    """For each actor its parts: part -> class ids."""
    parts = dict(enumerate(part_classes(num_classes, ipc, dim)))
    num = min(algorithm.num_shards, len(parts))
    return [{p: c for p, c in parts.items() if p % num == i} for i in range(num)]


class Quantizers:
    """The driver's handle on a codebook's actors: it tells them which shards are done, and holds no latents."""

    def __init__(self, run: Run, step: Quantize) -> None:
        self.run, self.step = run, step
        self.artifact = step.artifact(run.dir)
        self.codebook = self.artifact.folder
        self.facts = step.identity(run)
        self.started = time.time()
        self.done = np.zeros(len(run.data.train), np.uint8)
        self.actors: list[Any] = []
        self._calls: list[Any] = []
        self._told: set[str] = set()  # records of parts that are counted
        self.needs: list[int] = []
        self._arguments: list[tuple[Any, ...]] = []

    def plan(self) -> None:
        """Begin the codebook, unless it is finished, and plan its actors: parts of the classes, and memory.

        Raises:
            ValueError: The folder holds the codebook of another configuration.
        """
        run, config = self.run, self.step.sized(self.run.config)
        if self.artifact.begin(self.facts, overwrite=config.overwrite) == "done":
            return
        algorithm = self.step.algorithm(config)
        pooling = Pooling(tuple(run.networks.latent_shape), algorithm.pool)
        dim = int(np.prod(pooling.shape))
        self.parts = actors_parts(algorithm, len(run.data.classes), config.ipc, dim)
        self.num_parts = sum(map(len, self.parts))
        rows = file_rows(config, run.networks)
        if config.latents.path and run.data.train:  # cut by another run: its first shard shows how
            rows = max(c.rows for c in LatentLog(run.latents).done(0).chunks)
        census = Census(run.data)
        self.needs = plan_memory(config, algorithm, census, pooling, rows, self.parts)
        if not isinstance(algorithm, ClvqConfig):
            _say_readings(algorithm, log_readings(census, pooling, self.parts))
        settings = Settings(
            ipc=config.ipc,
            seed=config.seed,
            small_class=config.small_class,
            threads=config.cluster.threads,
            latent_shape=tuple(run.networks.latent_shape),
            prior_id=run.networks.latents_id,
            identity=digest_of(self.facts),
            num_actors=len(self.parts),
            together=together(config),
            noise=noise_level(config, algorithm, run.networks),
            pool=algorithm.pool,
            driver=uuid.uuid4().hex,
        )
        self._arguments = [
            (self.codebook, run.latents, run.dir / layout.DATA, mine, algorithm, replace(settings, need=need))
            for mine, need in zip(self.parts, self.needs, strict=True)
        ]

    @property
    def demands(self) -> list[ActorDemand]:
        """What each actor asks of Ray and holds until the codebook is finished; none when it is already."""
        resources = self.run.config.cluster.quantizer
        return [ActorDemand(resources.num_cpus, resources.num_gpus, need) for need in self.needs]

    def launch(self) -> None:
        """Start the actors, if there is anything left for them to do."""
        quantizer = cast(ActorClass[Any], Quantizer)  # mypy does not see what a decorator makes of a class
        for demand, arguments in zip(self.demands, self._arguments, strict=True):
            actor = quantizer.options(**asdict(demand), scheduling_strategy="SPREAD")
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

    def finish(self) -> CodebookManifest:
        """Wait until every part is written; publish the manifest.

        Raises:
            ValueError: For a class below `ipc` after quarantine (unless `small_class` allows it), a damaged log, or an
                actor that died three times without getting on.
        """
        if self.actors:
            assert self.done.all(), "finish() before every shard is done"
            bitmap = np.packbits(self.done).tobytes()
            with Progress("quantize", self.num_parts, "parts") as progress:
                self._told = set()
                # A last call may still have much to do, and its error must surface as itself.
                self._wait([call for call in self._calls if call is not None], progress)
                seconds = max(self._wait([actor.advance.remote(bitmap) for actor in self.actors], progress))
            for path in sorted({path for actor in self.actors for path in ray.get(actor.left_out.remote())}):
                say(f"quantize   {path} was damaged and left out; its classes were read from the latents anew")
                self.run.events.add("snapshot left out", path=path)
            self._write_manifest(seconds)
            self.close()
        manifest: CodebookManifest = self.run.finished(self.artifact)
        return manifest

    def _wait(self, calls: list[Any], progress: Progress) -> list[float]:
        """What the calls give, with the parts that appear meanwhile shown."""
        waiting = list(calls)
        while waiting:
            ray.wait(waiting, num_returns=1, timeout=1.0)
            ready, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=0)
            ray.get(ready)
            self._look(progress)
        return ray.get(calls)

    def _look(self, progress: Progress) -> None:
        """Count the parts that have appeared."""
        progress.advance(0)
        for name in set(self.codebook.names(layout.CODEBOOK_RECORDS)) - self._told:
            record = read_record(self.codebook, layout.record_part(name))
            progress.advance(bytes=record.bytes)
            if record.distortion is not None:
                progress.average("distortion", float(record.distortion), record.latents)
            self._told.add(name)

    def close(self) -> None:
        for actor in self.actors:
            ray.kill(actor)
        self.actors = []

    def _write_manifest(self, seconds: float) -> None:
        records = [read_record(self.codebook, p) for p in range(self.num_parts)]
        algorithms: Counter[str] = Counter()
        for record in records:
            algorithms.update(record.algorithms)
        notes = [note for record in records for note in record.warnings]
        dropped = [c for record in records for c in record.dropped]
        latents, centroids = sum(r.latents for r in records), sum(r.centroids for r in records)
        self.codebook.remove(layout.SNAPSHOTS)
        self.artifact.finish(
            self.facts,
            seconds=round(seconds, 3),
            wall_seconds=round(time.time() - self.started, 3),
            items=latents,
            unit="latents",
            bytes=sum(r.bytes for r in records),
            parts=len(records),
            centroids=centroids,
            classes_by_algorithm=dict(sorted(algorithms.items())),
            dropped_classes=dropped,
            warnings=notes,
            digest=digest_of([r.digest for r in records]),
            environment=self.run.networks.environment,
        )
        for note in notes[:WARNINGS_SHOWN]:
            warnings.warn(note, CodebookWarning, stacklevel=2)
        if len(notes) > WARNINGS_SHOWN:
            more = f"{len(notes) - WARNINGS_SHOWN} more classes: see warnings in {self.codebook.path(layout.MANIFEST)}"
            warnings.warn(more, CodebookWarning, stacklevel=2)
        if set(algorithms) - {self.facts["quantizer"]["name"]}:
            self.run.events.add("classes too large for the Gram space", classes_by_algorithm=algorithms)
        self.run.events.add("stage finished", stage="quantize", latents=latents, centroids=centroids, dropped=dropped)


def _say_readings(algorithm: QuantizerConfig, times: float) -> None:
    """A line where an exact algorithm will read the log more often than a user would expect."""
    if times > READINGS_SAID:
        say(
            f"quantize   {algorithm.name} wants whole classes, and the shards hold them mixed: it will read all "
            f"latents about {times:,.0f} times; quantizer=clvq reads them twice, and dataset.resort=true sorts the "
            "shards first"
        )


def noise_level(config: RunConfig, algorithm: QuantizerConfig, networks: Networks) -> NoiseLevel | None:
    """The level to which this codebook's latents are noised as they are read; None for clean ones."""
    if not algorithm.noise_level:
        return None
    assert networks.noise_scales is not None, "the inquiry knows the run's own quantizer.noise_level"
    return NoiseLevel(*networks.noise_scales, seed=config.seed)
