"""synthesize: an elastic pool of decoder actors turns centroids into images, one image shard a unit.

The unit is a fixed list of (class_id, centroid_id) in fixed inner batches, and the noise of an image comes from a
generator keyed by (seed, class_id, centroid_id). So a shard is the same bytes whoever makes it, and a finished shard
is never made again.
"""

from __future__ import annotations

import posixpath
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
from ray.actor import ActorClass

from ddoq_ray.config import RunConfig
from ddoq_ray.config.schema import plain
from ddoq_ray.core.rescaling import rescaled
from ddoq_ray.data.image_set import NewImage, read_images, shard_record, write_images
from ddoq_ray.data.samples import encode_png
from ddoq_ray.execution.pool import Elastic, run_elastic
from ddoq_ray.execution.run import Run
from ddoq_ray.execution.workers import Progress, device, pin_threads
from ddoq_ray.stages.step import Ask, Step
from ddoq_ray.stages.synthesize.constant_images import check_constant, constant_facts
from ddoq_ray.storage.artifact import Artifact, digest_of
from ddoq_ray.storage.codebook import part_files, read_layout, read_part
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.latent_log import noise_of
from ddoq_ray.storage.layout import IMAGE_SHARDS, Place
from ddoq_ray.storage.records import ClassInfo, ImageUnit, binary_rows

if TYPE_CHECKING:
    from ddoq_ray.models.priors.base import Sampling


@dataclass(frozen=True)
class Job:
    """One unit of work for a decoder: an image shard of the set in `folder`, and the codebook parts it needs."""

    folder: str
    unit: ImageUnit
    parts: tuple[str, ...]

    @property
    def name(self) -> str:
        return posixpath.join(Place(self.folder).images, self.unit.name)


def image_jobs(run_folder: Folder, folder: str, shard_images: int) -> list[Job]:
    """The image shards of a codebook: fixed lists of (class_id, centroid_id), with the parts that hold them."""
    codebook = run_folder / Place(folder).codebook
    class_ids: list[int] = []
    centroid_ids: list[int] = []
    parts: list[str] = []
    for name in part_files(codebook):
        table = read_layout(codebook, name)
        class_ids += table["class_id"].to_pylist()
        centroid_ids += table["centroid_id"].to_pylist()
        parts += [name] * table.num_rows
    jobs = []
    for first in range(0, len(class_ids), shard_images):
        rows = slice(first, first + shard_images)
        unit = ImageUnit(first // shard_images, tuple(class_ids[rows]), tuple(centroid_ids[rows]))
        jobs.append(Job(folder, unit, tuple(sorted(set(parts[rows])))))
    return jobs


@ray.remote
class Decoder:
    """Holds the prior and makes image shards."""

    def __init__(self, config: RunConfig, run_folder: Folder, classes: Sequence[ClassInfo]) -> None:
        from ddoq_ray.models.candidates import Candidates
        from ddoq_ray.models.classifiers import load_classifier
        from ddoq_ray.models.priors.load import load_prior
        from ddoq_ray.models.synthesis import Synthesizer

        pin_threads(config.cluster.threads)
        how, judge, candidates = config.synthesizer, judge_of(config), None
        if judge is not None:
            candidates = Candidates(how.candidates, load_classifier(judge, device()), how.keep)
        prior = load_prior(config.prior.given, device=device(), **config.prior.loading, **how.loading)
        self.synthesizer = Synthesizer(prior, config.seed, how.batch, candidates, how.image_size)
        self.run_folder = run_folder
        self.how, self.seed, self.classes = how, config.seed, classes

    def run(self, job: Job) -> dict[str, Any]:
        """Make and publish one image shard; publishing it twice gives the same bytes."""
        from ddoq_ray.models.synthesis import Asked

        unit = job.unit
        codebook = self.run_folder / Place(job.folder).codebook
        books = {c: book for part in job.parts for c, book in class_books(read_part(codebook, part)).items()}
        centroids = {c: book.spread() if self.how.rescale else book.centroids for c, book in books.items()}
        asked = Asked(
            np.stack([centroids[c][k] for c, k in unit.keys]),
            [self.classes[c] for c in unit.class_ids],
            unit.centroid_ids,
        )
        made = self.synthesizer.pictures(asked, self._sampling(codebook), {c: b.centroids for c, b in books.items()})
        images = [
            NewImage(c, k, float(books[c].weights[k]), self.classes[c].prompt, self.seed, encode_png(picture), facts)
            for (c, k), picture, facts in zip(unit.keys, made.pictures, made.facts, strict=True)
        ]
        record = write_images(self.run_folder / job.folder / "images", unit.name, images)
        return record | constant_facts(zip(unit.keys, made.pictures, strict=True))

    def _sampling(self, codebook: Folder) -> Sampling:
        from ddoq_ray.models.priors.base import Sampling

        own = self.how
        # Centroids of noised latents are at the strength's level already.
        start = own.start if noise_of(codebook) is None else "given"
        how = Sampling(own.strength, own.steps, start, self.synthesizer.prior.guidance_of(own.guidance))
        if start != "guided":
            return how
        return replace(how, guide_until=own.guide_until, guide_scale=own.guide_scale, guide_pool=own.guide_pool)


@dataclass(frozen=True)
class ClassBook:
    """All centroids of a class: float32 [K, D], their weights float64 [K], and the class's distortion."""

    centroids: npt.NDArray[np.float32]
    weights: npt.NDArray[np.float64]
    distortion: float

    def spread(self) -> npt.NDArray[np.float32]:
        return rescaled(self.centroids, self.weights, self.distortion)


def class_books(part: pa.Table) -> dict[int, ClassBook]:
    """The classes of a part of a codebook, whose rows are sorted by class and centroid."""
    class_ids = part["class_id"].to_numpy()
    centroids, weights = binary_rows(part["centroid"], "<f4"), part["weight"].to_numpy()
    distortions = part["distortion"].to_numpy()
    found, starts = np.unique(class_ids, return_index=True)
    ends = [*starts[1:].tolist(), len(class_ids)]
    return {
        int(c): ClassBook(centroids[a:b], weights[a:b], float(distortions[a]))
        for c, a, b in zip(found, starts.tolist(), ends, strict=True)
    }


@dataclass(frozen=True)
class Synthesize(Step):
    """The images of a codebook."""

    stage = name = "synthesize"

    at: Place

    @property
    def place(self) -> str:
        return self.at.images

    def settings(self, config: RunConfig) -> dict[str, Any]:
        workers = ("min_workers", "max_workers")
        own = config.synthesizer
        idle = [k for k in ("guide_until", "guide_scale", "guide_pool") if own.start != "guided"]
        idle += ["strength"] if own.start in ("noise", "guided") else []
        idle += ["keep"] if own.candidates == 1 else []
        idle += ["judge"]  # its content counts, not its path: see `inputs`
        options = {k: v for k, v in plain(own).items() if k not in (*workers, *idle)}
        options |= config.prior.sampling
        return {"synthesizer": options, "seed": config.seed, "ipc": config.ipc}

    def inputs(self, run: Run) -> dict[str, Any]:
        source = run.finished(Artifact(run.dir / self.at.codebook, "quantize"))
        asked = digest_of([(c.prior_label, c.prompt) for c in run.data.classes])[:32]
        made_by = {"codebook": source["digest"], "prior": run.networks.prior_id, "classes": asked}
        if judge_of(run.config) is None:
            return made_by
        outputs = digest_of([c.teacher_index for c in run.data.classes])[:32]
        return made_by | {"judge": run.networks.judge_id, "judge_outputs": outputs}

    def asks(self, config: RunConfig) -> list[Ask]:
        return [Ask.of(config, "decoder", "decoder", config.synthesizer.max_workers, "synthesizer.max_workers")]


def judge_of(config: RunConfig) -> str | None:
    """The path of the classifier that chooses among candidates; None where there is one image of each centroid."""
    return (config.synthesizer.judge or config.teacher.path) if config.synthesizer.candidates > 1 else None


def run(run: Run, steps: Sequence[Synthesize]) -> None:
    """Synthesize the images of every codebook on one pool; shards that are published are kept."""
    start = time.time()
    config, classes = run.config, run.data.classes
    facts = {step: step.identity(run) for step in steps}
    todo = [s for s in steps if s.artifact(run.dir).begin(facts[s], overwrite=config.overwrite) != "done"]
    jobs = [job for s in todo for job in image_jobs(run.dir, s.at.root, config.synthesizer.shard_images)]
    shards = _synthesized(run, jobs, classes) if todo else {}
    seconds = time.time() - start
    total = max(1, sum(s["images"] for s in shards.values()))
    for step in todo:
        ordered = [shards[j.name] for j in jobs if j.folder == step.at.root]
        share = sum(s["images"] for s in ordered) / total  # the sets share the workers
        _finish(run, step, facts[step], ordered, seconds * share)


def _synthesized(run: Run, jobs: Sequence[Job], classes: Sequence[ClassInfo]) -> dict[str, dict[str, Any]]:
    """The records of all jobs, by their names, once the shards that were not there are made."""
    config, resources = run.config, run.config.cluster.decoder
    shards = _published(run.dir, jobs)

    def spawn() -> Any:
        actor = cast(ActorClass[Any], Decoder)  # mypy does not see what a decorator makes of a class
        options = actor.options(num_cpus=resources.num_cpus, num_gpus=resources.num_gpus)
        return options.remote(config, run.dir, classes)

    with Progress("synthesize", sum(len(j.unit.class_ids) for j in jobs), "images") as progress:
        progress.already(sum(s["images"] for s in shards.values()))
        for job, result in run_elastic(
            spawn,
            [job for job in jobs if job.name not in shards],
            Elastic.of(
                config.cluster,
                "synthesize",
                "decoder",
                min_workers=config.synthesizer.min_workers,
                max_workers=config.synthesizer.max_workers,
            ),
            name=lambda job: job.name,
            on_event=lambda event, **f: run.events.add(event, stage="synthesize", **f),
            progress=progress,
        ):
            shards[job.name] = result
            progress.advance(result["images"])
    return shards


def _finish(run: Run, step: Synthesize, facts: dict[str, Any], shards: list[dict[str, Any]], seconds: float) -> None:
    images = sum(s["images"] for s in shards)
    constant = check_constant(step.at.root or "the run", shards, [c.prompt for c in run.data.classes])
    step.artifact(run.dir).finish(
        facts,
        seconds=round(seconds, 3),
        items=images,
        unit="images",
        bytes=sum(s["bytes"] for s in shards),
        shards=shards,
        **constant,
        digest=digest_of([s["sha256"] for s in shards]),
        environment=run.networks.environment,
    )
    run.events.add("stage finished", stage="synthesize", folder=step.at.root, images=images)


def _published(run_folder: Folder, jobs: Sequence[Job]) -> dict[str, dict[str, Any]]:
    """The records of the image shards, by their jobs' names, that an earlier, cut-off run published.

    A set's folder is listed once: to ask an object store for each of 20,000 shards would take a quarter of an hour.
    """
    there = {
        posixpath.join(images, name)
        for images in {Place(job.folder).images for job in jobs}
        for name in (run_folder / images).names(IMAGE_SHARDS)
    }
    return {job.name: _again(run_folder, job) for job in jobs if f"{job.name}.tar" in there}


def _again(run_folder: Folder, job: Job) -> dict[str, Any]:
    """The record of a published shard, by what is in it."""
    name = f"{job.name}.tar"
    pictures = (((i.class_id, i.centroid_id), np.asarray(i.picture)) for i in read_images([run_folder.path(name)]))
    record = shard_record(job.unit.name, len(job.unit.class_ids), run_folder.read(name))
    return record | constant_facts(pictures)
