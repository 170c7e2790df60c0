"""Chosen real images become an image set, in the format of synthesized ones, so that all that follows is shared.

First each data shard gives the pictures that were chosen of it to a file, its excerpt; then each image shard takes the
bytes of its images from excerpts. So every data shard is read once, as far as its chosen images go, and pictures pass
from file to file: neither the driver nor Ray's object store holds them. Both are units that a killed run keeps.
"""

from __future__ import annotations

import functools
import posixpath
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import ray
from PIL import Image

from ddoq_ray.core.mosaics import mosaic
from ddoq_ray.data.image_set import NewImage, write_images
from ddoq_ray.data.picked_samples import PassedOver, picked_pictures
from ddoq_ray.data.pictures import RefusedPicture, Resize, reframe
from ddoq_ray.data.samples import decode_rgb, encode_png
from ddoq_ray.execution.run import Run
from ddoq_ray.execution.workers import Progress, in_tasks
from ddoq_ray.stages.select.choice import Choice, Picks, Selection
from ddoq_ray.stages.select.excerpts import Excerpts, Pick, finished_excerpts, write_excerpt
from ddoq_ray.stages.synthesize.jobs import ClassRange, ImageUnit, Job
from ddoq_ray.stages.synthesize.shard_records import publish_record, published
from ddoq_ray.storage import layout
from ddoq_ray.storage.artifact import digest_of
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.latent_index import LatentIndex
from ddoq_ray.storage.layout import Place
from ddoq_ray.storage.quarantine import read_refusals

Where = dict[int, list[Pick]]  # data shard -> what was chosen of it


def where(index: LatentIndex, picks: Picks) -> Where:
    """The picked images of each data shard that holds some; linear in the picks, not in what the shards hold.

    >>> from ddoq_ray.storage.records import ClassCounts
    >>> log = LatentIndex.of([ClassCounts({0: 2}), ClassCounts({0: 3, 1: 1})])
    >>> found = where(log, {0: np.array([3, 0]), 1: np.array([0])})
    >>> {shard: [tuple(pick) for pick in picks] for shard, picks in found.items()}
    {1: [(0, 1, 0), (1, 0, 0)], 0: [(0, 0, 1)]}
    """
    found: Where = {}
    for c in sorted(picks):
        shards, rows = index.pairs(c)
        ends = np.cumsum(rows, dtype=np.int64)
        at = np.searchsorted(ends, picks[c], side="right")
        inside = picks[c] - (ends - rows)[at]
        for rank, (shard, position) in enumerate(zip(shards[at].tolist(), inside.tolist(), strict=True)):
            found.setdefault(shard, []).append(Pick(c, position, rank))
    return found


def publish(choice: Choice, chosen: Selection) -> list[dict[str, Any]]:
    """Publish the set of what was chosen, as far as it is not there, as image shards; their records, in order."""
    run, images = choice.run, choice.run.dir / choice.at.images
    jobs = _jobs(choice, chosen)
    there = published(run.dir, jobs)
    missing = [job for job in jobs if job.name not in there]
    if missing:
        found = where(choice.index, chosen.picks)
        _make_excerpts(choice, chosen, _needed(found, missing, chosen), images / layout.EXCERPTS)
        there |= _composed(choice, chosen, missing, found)
    return [there[job.name] for job in jobs]


def _jobs(choice: Choice, chosen: Selection) -> list[Job]:
    """The image shards of the set: ranges of classes, as those of a codebook are."""
    rows = [(c, k) for c, count in chosen.images.items() for k in range(count)]
    size = choice.run.config.synthesizer.shard_images
    jobs = []
    for number, first in enumerate(range(0, len(rows), size)):
        ranges: list[ClassRange] = []
        for c, k in rows[first : first + size]:
            if ranges and ranges[-1].class_id == c:
                ranges[-1] = ranges[-1]._replace(end=k + 1)
            else:
                ranges.append(ClassRange(c, k, k + 1))
        jobs.append(Job(choice.at.root, ImageUnit(number, tuple(ranges)), (), choice.identity))
    return jobs


def _needed(found: Where, missing: Sequence[Job], chosen: Selection) -> Where:
    """What the missing image shards are made of."""
    wanted = {(c, rank) for job in missing for c, k in job.unit.keys for rank in chosen.parts(c, k)}
    kept = {shard: [p for p in picks if (p.class_id, p.rank) in wanted] for shard, picks in found.items()}
    return {shard: picks for shard, picks in kept.items() if picks}


def _make_excerpts(choice: Choice, chosen: Selection, needed: Where, folder: Folder) -> None:
    """Make the excerpts that are not there."""
    run = choice.run
    made_from = {shard: digest_of([choice.identity, picks]) for shard, picks in needed.items()}
    there = finished_excerpts(folder, made_from)
    passed_over = not_encoded(run.latents)
    task = ray.remote(num_cpus=run.config.cluster.reader.num_cpus)(_extract)

    def submit(shard: int) -> Any:
        url, lost = run.data.url(run.data.train[shard]), passed_over.get(shard, PassedOver())
        source = (url, len(run.data.classes), lost, run.config.encoder.resize)
        return task.remote(folder, shard, made_from[shard], source, needed[shard], _crops(chosen, needed[shard]))

    with Progress(choice.method, len(needed), "shards") as progress:
        progress.already(len(there))
        jobs = [functools.partial(submit, shard) for shard in sorted(needed) if shard not in there]
        for _ in in_tasks(jobs, _at_once(run)):
            progress.advance()


Crops = tuple[int, list[tuple[int, int, int, int]]]  # side of a tile, and the box of each pick


def _crops(chosen: Selection, picks: Sequence[Pick]) -> Crops | None:
    if chosen.mosaic is None:
        return None
    boxes = [tuple(chosen.mosaic.boxes[p.class_id][p.rank].tolist()) for p in picks]
    return chosen.mosaic.side // chosen.mosaic.factor, boxes


# What it reads (the shard's place, classes, refusals, how pictures are cut) goes as one.
def _extract(
    folder: Folder,
    shard: int,
    made_from: str,
    source: tuple[str, int, PassedOver, Resize],
    picks: list[Pick],
    crops: Crops | None,
) -> int:
    """Publish the pictures that were chosen of one data shard, as PNG; publishing them again gives the same bytes."""
    url, num_classes, passed_over, resize = source
    at = {(p.class_id, p.position): i for i, p in enumerate(picks)}

    def pictures() -> Iterator[tuple[Pick, bytes]]:
        for position, data in picked_pictures(url, num_classes, at, passed_over):
            i = at[position]
            try:
                picture = decode_rgb(data)
            except RefusedPicture as error:
                raise ValueError(
                    f"{url}: image {position[1]} of class {position[0]} was encoded, and cannot be read any more "
                    f"({error}); bring the shard back, or use another run_dir"
                ) from None
            if crops is None:
                yield picks[i], encode_png(np.asarray(reframe(picture, resize)))
            else:
                side, boxes = crops
                yield picks[i], encode_png(cropped(picture, boxes[i], side))

    return write_excerpt(folder, shard, made_from, pictures())


def cropped(picture: Image.Image, box: tuple[int, int, int, int], side: int) -> np.ndarray:
    """uint8 [side, side, 3] of a box of a picture; resampled bilinearly, antialiased, as RDED resizes its crops."""
    # Cut first: `resize` with a box would let pixels beside it into its border.
    return np.asarray(picture.crop(box).resize((side, side), Image.Resampling.BILINEAR))


def _composed(choice: Choice, chosen: Selection, missing: Sequence[Job], found: Where) -> dict[str, dict[str, Any]]:
    """The records of the missing image shards, once they are made."""
    run = choice.run
    shard_of = {(p.class_id, p.rank): shard for shard, picks in found.items() for p in picks}
    task = ray.remote(num_cpus=run.config.cluster.reader.num_cpus)(_compose)
    shape = None if chosen.mosaic is None else (chosen.mosaic.factor, chosen.mosaic.side)

    def submit(job: Job) -> Any:
        parts = [[(shard_of[c, rank], c, rank) for rank in chosen.parts(c, k)] for c, k in job.unit.keys]
        facts = [(chosen.weight(c, k), run.data.classes[c].prompt) for c, k in job.unit.keys]
        return task.remote(run.dir, job, choice.draw, facts, parts, shape)

    records: dict[str, dict[str, Any]] = {}
    with Progress(choice.method, sum(len(job.unit) for job in missing), "images") as progress:
        for number, record in in_tasks([functools.partial(submit, job) for job in missing], _at_once(run)):
            records[missing[number].name] = record
            progress.advance(record["images"])
    return records


def _compose(
    run_dir: Folder,
    job: Job,
    seed: int,
    facts: list[tuple[float, str]],
    parts: list[list[tuple[int, int, int]]],
    shape: tuple[int, int] | None,
) -> dict[str, Any]:
    """Publish one image shard.

    Args:
        facts: Weight and prompt of each image.
        parts: Of each image the pictures that it is made of: shard, class_id, rank.
        shape: Tiles along an edge and side of an image, where images are mosaics.
    """
    images = run_dir / Place(job.folder).images
    excerpts = Excerpts(images / layout.EXCERPTS)
    made = []
    for (c, k), (weight, prompt), own in zip(job.unit.keys, facts, parts, strict=True):
        files = [excerpts.picture(*part) for part in own]
        data = files[0] if shape is None else encode_png(mosaic([np.asarray(decode_rgb(f)) for f in files], *shape))
        made.append(NewImage(c, k, weight, prompt, seed, data))
    return publish_record(run_dir, job, write_images(images, job.unit.name, made))


def _at_once(run: Run) -> int:
    return 2 * max(1, int(ray.cluster_resources().get("CPU", 1) / max(0.25, run.config.cluster.reader.num_cpus)))


def not_encoded(latents: Folder) -> dict[int, PassedOver]:
    """Shard -> its samples that have a label and a picture and yet no latent: the log's positions pass them over."""
    quarantine = Folder(posixpath.dirname(latents.uri)) / layout.QUARANTINE
    offsets: dict[int, set[int]] = {}
    keys: dict[int, set[str]] = {}
    for name, refusal in read_refusals(quarantine, "shard-*.jsonl"):
        shard = layout.shard_index(name.partition(".")[0])
        if ".latents-" in name:
            keys.setdefault(shard, set()).add(refusal.name)
        elif refusal.offset is not None:
            offsets.setdefault(shard, set()).add(refusal.offset)
    both = offsets.keys() | keys.keys()
    return {s: PassedOver(frozenset(offsets.get(s, ())), frozenset(keys.get(s, ()))) for s in both}
