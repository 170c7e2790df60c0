"""synthesize: an elastic pool of decoder actors turns centroids into images, one image shard a unit.

The unit is a fixed list of (class_id, centroid_id) in fixed inner batches, and the noise of an image comes from a
generator keyed by (seed, class_id, centroid_id). So a shard is the same bytes whoever makes it, and a finished shard
is never made again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import ray
from ray.actor import ActorClass

from ddoq_ray.config import RunConfig
from ddoq_ray.config.methods import SPECS, MethodSpec
from ddoq_ray.config.schema import plain
from ddoq_ray.data.image_set import EXTENSIONS
from ddoq_ray.execution.run import Run
from ddoq_ray.stages.cells import own_set
from ddoq_ray.stages.step import Ask, ImageSetStep
from ddoq_ray.stages.synthesize.card import CardFacts, dataset_card, title_of
from ddoq_ray.stages.synthesize.constant_images import check_constant
from ddoq_ray.stages.synthesize.decoder import Decoder
from ddoq_ray.stages.synthesize.jobs import ImageJobs, Making, image_jobs, judge_of
from ddoq_ray.stages.synthesize.shard_pool import made_shards
from ddoq_ray.storage.artifact import Artifact, digest_of
from ddoq_ray.storage.json_rows import Rows, digest_of_each
from ddoq_ray.storage.layout import CARD, Place

OWN = "ddoq"  # the method of the run's own set: others that share it differ by its weights in the loss alone


@dataclass(frozen=True)
class Synthesize(ImageSetStep):
    """The images of a codebook.

    Attributes:
        at: Where the set is.
        method: Whose it is: which codebook it is made of, and how.
    """

    stage = name = "synthesize"

    at: Place
    method: MethodSpec = SPECS[OWN]

    def making(self, config: RunConfig) -> Making:
        """How the images are made of centroids."""
        of = self.method
        own = config.synthesizer if of.synthesizer is None else of.synthesizer(config.synthesizer)
        return Making(own, own_set(config) if of.quantizer is None else None, of.tiles)

    def settings(self, config: RunConfig) -> dict[str, Any]:
        workers = ("min_workers", "max_workers")
        making = self.making(config)
        own = making.settings
        idle = [k for k in ("guide_until", "guide_scale", "guide_pool") if own.start != "guided"]
        idle += ["strength"] if own.start in ("noise", "guided") else []
        idle += ["keep"] if own.candidates == 1 else []
        idle += ["retries"] if own.noiseless else []
        idle += ["quality"] if own.format == "png" else []
        idle += ["judge"]  # its content counts, not its path: see `inputs`
        options = {k: v for k, v in plain(own).items() if k not in (*workers, *idle)}
        options |= config.prior.sampling
        tiles = {"tiles": making.tiles} if making.tiles > 1 else {}
        return {"synthesizer": options, "seed": config.seed, "ipc": config.ipc} | tiles

    def inputs(self, run: Run) -> dict[str, Any]:
        book = self.making(run.config).book or self.at
        source = run.finished(Artifact(run.dir / book.codebook, "quantize"))
        asked = digest_of([(c.prior_label, c.prompt) for c in run.data.classes])[:32]
        made_by = {"codebook": source["digest"], "prior": run.networks.prior_id, "classes": asked}
        if judge_of(run.config) is None:
            return made_by
        outputs = digest_of([c.teacher_index for c in run.data.classes])[:32]
        return made_by | {"judge": run.networks.judge_id, "judge_outputs": outputs}

    def asks(self, config: RunConfig) -> list[Ask]:
        return [Ask.of(config, "decoder", "decoder", config.synthesizer.max_workers, "synthesizer.max_workers")]


def synthesize(parts: Sequence[tuple[Run, Sequence[Synthesize]]]) -> None:
    """`run` of all parts of a comparison; of parts whose decoders are the same, together."""
    alike: dict[str, list[tuple[Run, Synthesize]]] = {}
    for part, steps in parts:
        c, known = part.config, part.networks
        key = repr((known.prior_id, known.judge_id, judge_of(c), c.prior, c.synthesizer, c.seed, part.data.classes))
        alike.setdefault(digest_of(key), []).extend((part, step) for step in steps)
    for of in alike.values():
        run(of)


def run(of: Sequence[tuple[Run, Synthesize]]) -> None:
    """Synthesize the images of every codebook, each of its run, on one pool; shards that are published are kept."""
    start = time.time()
    facts = {step: step.identity(run) for run, step in of}
    todo = [
        (run, step)
        for run, step in of
        if step.artifact(run.dir).begin(facts[step], overwrite=run.config.overwrite) != "done"
    ]
    sets = {
        step: image_jobs(
            run.dir,
            step.at.root,
            run.config.synthesizer.shard_images,
            digest_of(facts[step]),
            step.making(run.config),
        )
        for run, step in todo
    }
    records = _synthesized(todo[0][0], list(sets.values())) if todo else []
    seconds = time.time() - start
    total = max(1, sum(jobs.images for jobs in sets.values()))
    for (run, step), jobs, shards in zip(todo, sets.values(), records, strict=True):
        share = jobs.images / total  # the sets share the workers
        _finish(run, step, facts[step], shards, seconds * share)


def _synthesized(run: Run, sets: Sequence[ImageJobs]) -> list[Rows]:
    """The records of each set's shards, once those that were not there are made."""
    resources = run.config.cluster.decoder
    listed = ray.put(run.data.classes)  # once, not with each worker: what an actor was made with stays in the driver

    def spawn() -> Any:
        actor = cast(ActorClass[Any], Decoder)  # mypy does not see what a decorator makes of a class
        # Two units: one is read, encoded and published while the other has the prior.
        options = actor.options(num_cpus=resources.num_cpus, num_gpus=resources.num_gpus, max_concurrency=2)
        return options.remote(run.config, run.dir, listed)

    return made_shards(run, "synthesize", "synthesize", sets, spawn, ahead=1)


def _finish(run: Run, step: Synthesize, facts: dict[str, Any], shards: Rows, seconds: float) -> None:
    images = sum(s["images"] for s in shards)
    constant = check_constant(step.at.root or "the run", shards, [c.prompt for c in run.data.classes])
    digest = digest_of_each(s["sha256"] for s in shards)
    (run.dir / step.place).publish(CARD, _card(run, step, shards, digest).encode())
    step.artifact(run.dir).finish(
        facts,
        seconds=round(seconds, 3),
        items=images,
        unit="images",
        bytes=sum(s["bytes"] for s in shards),
        shards=shards,
        **constant,
        digest=digest,
        environment=run.networks.environment,
    )
    run.events.add("stage finished", stage="synthesize", folder=step.at.root, images=images)


def _card(run: Run, step: Synthesize, shards: Rows, digest: str) -> str:
    config, networks = run.config, run.networks
    return dataset_card(
        CardFacts(
            name=config.dataset.title,
            method=step.at.method or OWN,
            prior=title_of(config.prior.given),
            prior_id=networks.prior_id,
            teacher=config.teacher.title if networks.teacher_id else None,
            ipc=config.ipc,
            images=sum(s["images"] for s in shards),
            shards=len(shards),
            side=config.synthesizer.image_size or networks.image_size,
            extension=EXTENSIONS[config.synthesizer.format],
            digest=digest,
            classes=[c.prompt for c in run.data.classes],
            seed=config.seed,
        )
    )
