"""given: a distilled set that another method made becomes an image set of this run, a row of its own in every table.

Pictures are copied as they are, where their form is one that image sets have, else stored as PNG; their pixels stay. So
released sets are judged with the same labels, students and seeds as all others, and another teacher or student needs no
new synthesis.
"""

from __future__ import annotations

import functools
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from PIL import Image

from ddoq_ray.config import RunConfig
from ddoq_ray.config.methods import MethodSpec
from ddoq_ray.data.collections.listing import Picture
from ddoq_ray.data.given_set import GivenSet, given_set
from ddoq_ray.data.image_set import NewImage, write_images
from ddoq_ray.data.pictures import RefusedPicture
from ddoq_ray.data.samples import decode_rgb, encode_png
from ddoq_ray.execution.run import Run
from ddoq_ray.execution.workers import Progress, in_tasks, say
from ddoq_ray.stages.step import Ask, ImageSetStep
from ddoq_ray.stages.synthesize.jobs import ClassRange, ImageUnit, Job
from ddoq_ray.stages.synthesize.shard_records import publish_record, published
from ddoq_ray.storage import layout
from ddoq_ray.storage.artifact import digest_of
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.layout import Place

AT_ONCE = 16  # tasks that copy, waiting or at work
KEPT = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}  # Pillow's words for the forms of pictures that sets have


@dataclass(frozen=True)
class Given(ImageSetStep):
    """The images of another method."""

    stage = "synthesize"
    name = "given"

    method: MethodSpec
    at: Place

    def settings(self, config: RunConfig) -> dict[str, Any]:
        return {
            "images": config.images.path,
            "ipc": config.ipc,
            "small_class": config.small_class,
            "shard_images": config.synthesizer.shard_images,
        }

    def inputs(self, run: Run) -> dict[str, Any]:
        return {"classes": digest_of([(c.name, c.prompt) for c in run.data.classes])[:32]}

    def asks(self, config: RunConfig) -> list[Ask]:
        return [Ask.of(config, "reader", "reader")]


def run(run: Run, step: Given) -> None:
    """Copy the set; shards that are published are kept.

    Raises:
        ValueError: It is missing, its classes or numbers of images are not the run's, or a picture cannot be read.
    """
    start = time.time()
    artifact = step.artifact(run.dir)
    facts = step.identity(run)
    if artifact.check(facts) == "done" and not run.config.overwrite:
        return
    # Before anything is begun: a wrong folder must not be in the way of the right one.
    path = str(run.config.images.path)
    classes = run.dir.path(f"{layout.DATA}/{layout.SOURCE_CLASSES}")
    look = functools.partial(ray.remote(num_cpus=1)(given_set).remote, path, run.data.classes, classes)
    found: GivenSet = next(in_tasks([look], 1))[1]
    check_counts(run.config, found.counts, [c.name for c in run.data.classes])
    if artifact.begin(facts, overwrite=run.config.overwrite) == "done":
        return
    how = "with weights of its own" if found.weighted else "all of a class with the same weight"
    say(f"{step.method.name:<10} {len(found.names):,} images of {len(found.counts):,} classes, {how}, from {path}")
    made = _copied(run, step, found, digest_of(facts))
    artifact.finish(
        facts,
        seconds=round(time.time() - start, 3),
        items=len(found.names),
        unit="images",
        bytes=sum(s["bytes"] for s in made),
        shards=made,
        weighted=found.weighted,
        digest=digest_of([s["sha256"] for s in made]),
    )
    run.events.add("stage finished", stage="given", folder=step.at.root, images=len(found.names))


def check_counts(config: RunConfig, counts: dict[int, int], names: Sequence[str]) -> None:
    """Whether the set is one of `ipc` images a class, of all classes.

    Raises:
        ValueError: With what there is.
    """
    most = max(counts.values())
    if most != config.ipc:
        raise ValueError(
            f"images.path={config.images.path} has up to {most} images of a class, and ipc={config.ipc}: a set is "
            f"compared with others of its size; give ipc={most}"
        )
    missing = [name for c, name in enumerate(names) if c not in counts]
    if missing and config.small_class != "drop":
        raise ValueError(
            f"images.path={config.images.path} has no image of {len(missing)} of the data's {len(names)} classes: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}; complete it, give data of its classes "
            "alone, or small_class=drop to compare sets without some"
        )


def _copied(run: Run, step: Given, found: GivenSet, identity: str) -> list[dict[str, Any]]:
    """The records of the image shards, in order."""
    scratch = run.dir / step.at.images / layout.EXCERPTS
    unpack = ray.remote(num_cpus=1)(_unpack)
    size = run.config.synthesizer.shard_images
    firsts = range(0, len(found.names), size)
    jobs = [Job(step.at.root, _unit(i, found, slice(a, a + size)), (), identity) for i, a in enumerate(firsts)]
    there = published(run.dir, jobs)
    left = [(job, slice(a, a + size)) for job, a in zip(jobs, firsts, strict=True) if job.name not in there]
    files = [functools.partial(unpack.remote, found.source, i, scratch) for i in range(len(found.source.containers()))]
    for _ in in_tasks(files if left else [], AT_ONCE):
        pass
    copy = ray.remote(num_cpus=run.config.cluster.reader.num_cpus)(_copy)

    def submit(job: Job, rows: slice) -> Any:
        ids, weights = found.class_ids[rows].tolist(), found.weights[rows].tolist()
        facts = [(w, run.data.classes[c].prompt) for w, c in zip(weights, ids, strict=True)]
        return copy.remote(run.dir, job, found.source, found.names[rows], facts, scratch)

    with Progress(step.method.name, len(found.names), "images") as progress:
        progress.already(sum(r["images"] for r in there.values()))
        for number, record in in_tasks([functools.partial(submit, *each) for each in left], AT_ONCE):
            there[left[number][0].name] = record
            progress.advance(record["images"])
    scratch.remove()
    return [there[job.name] for job in jobs]


def _unit(index: int, found: GivenSet, rows: slice) -> ImageUnit:
    """Some images, each known by its class and its place in it."""
    firsts = {c: int(np.searchsorted(found.class_ids, c)) for c in np.unique(found.class_ids[rows]).tolist()}
    ranges = []
    for c, first in firsts.items():
        end = int(np.searchsorted(found.class_ids, c, side="right"))
        ranges.append(ClassRange(c, max(rows.start, first) - first, min(rows.stop, end) - first))
    return ImageUnit(index, tuple(ranges))


def _unpack(source: Any, container: int, scratch: Folder) -> None:
    source.unpack(container, scratch)


def _copy(
    run_dir: Folder, job: Job, source: Any, names: list[str], facts: list[tuple[float, str]], scratch: Folder
) -> dict[str, Any]:
    """Publish one image shard.

    Raises:
        ValueError: A picture cannot be read; a set is used whole.
    """
    made = []
    read = source.read("train", names, scratch)
    for (c, k), name, picture, (weight, prompt) in zip(job.unit.keys, names, read, facts, strict=True):
        try:
            if not isinstance(picture, Picture):
                raise RefusedPicture(picture.reason)
            decoded = decode_rgb(picture.data)
        except RefusedPicture as error:
            raise ValueError(f"images.path: {name} cannot be read ({error}); a set is used whole: mend it") from None
        form = KEPT.get(str(Image.open(io.BytesIO(picture.data)).format))
        data = picture.data if form is not None else encode_png(np.asarray(decoded))
        made.append(NewImage(c, k, weight, prompt, 0, data, extension=form or "png"))
    images = run_dir / Place(job.folder).images
    return publish_record(run_dir, job, write_images(images, job.unit.name, made))
