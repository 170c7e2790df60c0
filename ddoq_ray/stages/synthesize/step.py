"""synthesize: an elastic pool of decoder actors turns centroids into images, one image shard a unit.

The unit is a fixed list of (class_id, centroid_id) in fixed inner batches, and the noise of an image comes from a
generator keyed by (seed, class_id, centroid_id). So a shard is the same bytes whoever makes it, and a finished shard
is never made again.
"""

from __future__ import annotations

import json
import posixpath
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from ddoq_ray.config import RunConfig
from ddoq_ray.config.schema import plain
from ddoq_ray.config.synthesizer import SynthesizerConfig
from ddoq_ray.data.image_set import read_images
from ddoq_ray.data.samples import encode_png, write_tar
from ddoq_ray.execution.networks import Networks
from ddoq_ray.execution.pool import run_elastic
from ddoq_ray.execution.workers import Events, Progress, device, pin_threads
from ddoq_ray.stages.prepare.step import Data
from ddoq_ray.stages.synthesize.constant_images import check_constant, constant_facts
from ddoq_ray.storage.artifact import Artifact, Folder, digest_of
from ddoq_ray.storage.codebook import part_files, read_layout, read_part
from ddoq_ray.storage.latent_log import noise_of
from ddoq_ray.storage.records import ClassInfo, ImageUnit, binary_rows


@dataclass(frozen=True)
class Job:
    """One unit of work for a decoder: an image shard of the set in `folder`, and the codebook parts it needs."""

    folder: str
    unit: ImageUnit
    parts: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.folder}/images/{self.unit.name}".lstrip("/")


def image_jobs(run_folder: Folder, folder: str, shard_images: int) -> list[Job]:
    """The image shards of a codebook: fixed lists of (class_id, centroid_id), with the parts that hold them."""
    codebook = run_folder / folder / "codebook"
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

    def __init__(
        self,
        prior_path: str,
        run_folder: Folder,
        synthesizer: SynthesizerConfig,
        seed: int,
        classes: list[ClassInfo],
        threads: int,
    ) -> None:
        from ddoq_ray.models.priors.load import load_prior
        from ddoq_ray.models.synthesis import Synthesizer

        pin_threads(threads)
        self.synthesizer = Synthesizer(load_prior(prior_path, device=device()), seed, synthesizer.batch)
        self.run_folder = run_folder
        self.options, self.seed, self.classes = synthesizer, seed, classes

    def run(self, job: Job) -> dict[str, Any]:
        """Make and publish one image shard; publishing it twice gives the same bytes."""
        from ddoq_ray.models.priors.base import Sampling

        unit, own = job.unit, self.options
        rows: dict[tuple[int, int], tuple[np.ndarray, float]] = {}
        for part in job.parts:
            table = read_part(self.run_folder / job.folder / "codebook", part)
            centroids = binary_rows(table["centroid"], "<f4")
            for i, key in enumerate(zip(table["class_id"].to_pylist(), table["centroid_id"].to_pylist(), strict=True)):
                rows[key] = (centroids[i], table["weight"][i].as_py())
        keys = list(zip(unit.class_ids, unit.centroid_ids, strict=True))
        # Centroids of noised latents are at the strength's level already.
        start = own.start if noise_of(self.run_folder / job.folder / "codebook") is None else "given"
        guidance = self.synthesizer.prior.guidance_of(own.guidance)
        pictures = self.synthesizer.pictures(
            np.stack([rows[key][0] for key in keys]),
            [self.classes[c] for c in unit.class_ids],
            unit.centroid_ids,
            Sampling(own.strength, own.steps, start, guidance),
        )
        members: list[tuple[str, bytes]] = []
        for (c, k), picture in zip(keys, pictures, strict=True):
            name = f"{c:05d}-{k:04d}"
            facts = {"centroid_id": k, "weight": rows[c, k][1], "prompt": self.classes[c].prompt, "seed": self.seed}
            members += [
                (f"{name}.png", encode_png(picture)),
                (f"{name}.cls", str(c).encode()),
                (f"{name}.json", json.dumps(facts).encode()),
            ]
        tar = write_tar(members)
        self.run_folder.publish(f"{job.name}.tar", tar)
        return _record(unit, tar) | constant_facts(zip(keys, pictures, strict=True))


def identity(config: RunConfig) -> dict[str, Any]:
    workers = ("min_workers", "max_workers")
    options = {k: v for k, v in plain(config.synthesizer).items() if k not in workers}
    if options["start"] == "noise":
        options.pop("strength")
    return {"synthesizer": options, "seed": config.seed, "ipc": config.ipc}


def run(
    config: RunConfig, run_folder: Folder, folders: list[str], data: Data, events: Events, networks: Networks
) -> list[dict[str, Any]]:
    """Synthesize the images of every codebook in `folders` on one pool; shards that are published are kept.

    Args:
        folders: Places relative to the run directory; "" is the run's own.
    """
    start = time.time()
    artifacts = {f: Artifact(run_folder / f / "images", "synthesize") for f in folders}
    facts = {}
    for f in folders:
        source = Artifact(run_folder / f / "codebook", "quantize").require()
        asked = digest_of([(c.prior_label, c.prompt) for c in data.classes])[:32]
        facts[f] = identity(config) | {"codebook": source["digest"], "prior": networks.prior_id, "classes": asked}
    todo = [f for f in folders if artifacts[f].begin(facts[f], overwrite=config.overwrite) != "done"]
    jobs = [job for f in todo for job in image_jobs(run_folder, f, config.synthesizer.shard_images)]
    shards = _published(run_folder, jobs)
    resources = config.cluster.decoder

    def spawn() -> Any:
        return Decoder.options(num_cpus=resources.num_cpus, num_gpus=resources.num_gpus).remote(
            config.prior.given,
            run_folder,
            config.synthesizer,
            config.seed,
            list(data.classes),
            config.cluster.threads,
        )

    if todo:
        with Progress("synthesize", sum(len(j.unit.class_ids) for j in jobs), "images") as progress:
            progress.advance(sum(s["images"] for s in shards.values()))
            for job, result in run_elastic(
                spawn,
                [job for job in jobs if job.name not in shards],
                min_workers=config.synthesizer.min_workers,
                max_workers=config.synthesizer.max_workers,
                name=lambda job: job.name,
                on_event=lambda event, **f: events.add(event, stage="synthesize", **f),
            ):
                shards[job.name] = result
                progress.advance(result["images"])
    seconds = time.time() - start
    for f in todo:
        ordered = [shards[j.name] for j in jobs if j.folder == f]
        images = sum(s["images"] for s in ordered)
        constant = check_constant(f or "the run", ordered, [c.prompt for c in data.classes])
        artifacts[f].finish(
            facts[f],
            # The sets share the workers; a set's share of the time is its share of the images.
            seconds=round(seconds * images / max(1, sum(s["images"] for s in shards.values())), 3),
            items=images,
            unit="images",
            bytes=sum(s["bytes"] for s in ordered),
            shards=ordered,
            **constant,
            digest=digest_of([s["sha256"] for s in ordered]),
            environment=networks.environment,
        )
        events.add("stage finished", stage="synthesize", folder=f, images=images)
    return [artifacts[f].require() for f in folders]


def _published(run_folder: Folder, jobs: list[Job]) -> dict[str, dict[str, Any]]:
    """The records of the image shards, by their jobs' names, that an earlier, cut-off run published.

    A set's folder is listed once: to ask an object store for each of 20,000 shards would take a quarter of an hour.
    """
    there = {
        posixpath.join(folder, name)
        for folder in {job.folder for job in jobs}
        for name in (run_folder / folder).names("images/images-*.tar")
    }
    return {job.name: _again(run_folder, job) for job in jobs if f"{job.name}.tar" in there}


def _again(run_folder: Folder, job: Job) -> dict[str, Any]:
    """The record of a published shard, by what is in it."""
    name = f"{job.name}.tar"
    pictures = (((i.class_id, i.centroid_id), np.asarray(i.picture)) for i in read_images([run_folder.path(name)]))
    return _record(job.unit, run_folder.read(name)) | constant_facts(pictures)


def _record(unit: ImageUnit, tar: bytes) -> dict[str, Any]:
    return {"name": unit.name, "images": len(unit.class_ids), "bytes": len(tar), "sha256": digest_of(tar)}
