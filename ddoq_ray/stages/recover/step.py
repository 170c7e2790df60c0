"""recover: an elastic pool of actors finds images in the teacher by gradients (SRe2L, CDA).

The unit is an image shard: one image of each of `recovery.batch` classes, which are optimized together, as published,
since they share the statistics that the batch norms are to see. Its noise is keyed by its first image; so a shard is
the same bytes whoever makes it, and a finished shard is never made again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from ray.actor import ActorClass

from ddoq_ray.config import RunConfig
from ddoq_ray.config.methods import MethodSpec
from ddoq_ray.config.schema import plain
from ddoq_ray.execution.run import Run
from ddoq_ray.stages.recover.worker import Recoverer
from ddoq_ray.stages.select.choice import wanted_images
from ddoq_ray.stages.step import Ask, ImageSetStep
from ddoq_ray.stages.synthesize.jobs import ClassRange, ImageUnit, Job
from ddoq_ray.stages.synthesize.shard_pool import made_shards
from ddoq_ray.storage.artifact import digest_of
from ddoq_ray.storage.json_rows import Rows, digest_of_each
from ddoq_ray.storage.layout import Place


@dataclass(frozen=True)
class Recover(ImageSetStep):
    """The images that a method finds in the teacher."""

    stage = "synthesize"
    name = "recover"

    method: MethodSpec
    at: Place

    def settings(self, config: RunConfig) -> dict[str, Any]:
        return {
            "recovery": plain(config.recovery) | {"curriculum": self.method.curriculum},
            "seed": config.seed,
            "ipc": config.ipc,
            "small_class": config.small_class,
        }

    def inputs(self, run: Run) -> dict[str, Any]:
        counts = wanted_images(run.config, run.data.counts)
        outputs = digest_of([c.teacher_index for c in run.data.classes])[:32]
        names = digest_of([c.prompt for c in run.data.classes])[:32]
        return {
            "teacher": run.networks.scorer_id,
            "teacher_outputs": outputs,
            "classes": names,
            "images": digest_of(sorted(counts.items()))[:32],
        }

    def asks(self, config: RunConfig) -> list[Ask]:
        return [
            Ask.of(config, "decoder", "recovering actor", config.synthesizer.max_workers, "synthesizer.max_workers")
        ]


def recovery_jobs(at: Place, images: Mapping[int, int], batch: int, identity: str = "") -> list[Job]:
    """The image shards of a set: image after image of every class, so many classes at a time.

    >>> [job.unit.keys for job in recovery_jobs(Place(), {0: 2, 1: 1, 2: 2}, 2)]
    [[(0, 0), (1, 0)], [(2, 0)], [(0, 1), (2, 1)]]
    """
    jobs: list[Job] = []
    for k in range(max(images.values(), default=0)):
        classes = [c for c in sorted(images) if images[c] > k]
        for first in range(0, len(classes), batch):
            ranges = tuple(ClassRange(c, k, k + 1) for c in classes[first : first + batch])
            jobs.append(Job(at.root, ImageUnit(len(jobs), ranges), (), identity))
    return jobs


def run(run: Run, step: Recover) -> None:
    """Recover the images; shards that are published are kept."""
    start = time.time()
    artifact, facts = step.artifact(run.dir), step.identity(run)
    if artifact.begin(facts, overwrite=run.config.overwrite) == "done":
        return
    images = wanted_images(run.config, run.data.counts)
    jobs = recovery_jobs(step.at, images, run.config.recovery.batch, digest_of(facts))
    shards = _recovered(run, step, jobs, images)
    total = sum(s["images"] for s in shards)
    artifact.finish(
        facts,
        seconds=round(time.time() - start, 3),
        items=total,
        unit="images",
        bytes=sum(s["bytes"] for s in shards),
        shards=shards,
        digest=digest_of_each(s["sha256"] for s in shards),
        environment=run.networks.environment,
    )
    run.events.add("stage finished", stage="recover", folder=step.at.root, images=total)


def _recovered(run: Run, step: Recover, jobs: Sequence[Job], images: Mapping[int, int]) -> Rows:
    """The records of all jobs, once the shards that were not there are made."""
    resources = run.config.cluster.decoder

    def spawn() -> Any:
        actor = cast(ActorClass[Any], Recoverer)  # mypy does not see what a decorator makes of a class
        options = actor.options(num_cpus=resources.num_cpus, num_gpus=resources.num_gpus)
        return options.remote(run.config, run.dir, run.data.classes, dict(images), step.method.curriculum)

    return made_shards(run, "recover", step.method.name, [jobs], spawn)[0]
