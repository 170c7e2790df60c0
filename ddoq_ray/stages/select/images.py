"""Chosen real images become an image set, in the format of synthesized ones, so that all that follows is shared.

First each data shard gives the pictures that were chosen of it to a file, its excerpt; then each image shard takes the
bytes of its images from excerpts. So every data shard is read once, as far as its chosen images go, and pictures pass
from file to file: neither the driver nor Ray's object store holds them. Both are units that a killed run keeps.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
import ray
from PIL import Image

from ddoq_ray.core.mosaics import mosaic
from ddoq_ray.data.image_set import NewImage, write_images
from ddoq_ray.data.picked_samples import PassedOver, picked_pictures
from ddoq_ray.data.pictures import RefusedPicture, Resize, reframe
from ddoq_ray.data.samples import decode_rgb, encode_png
from ddoq_ray.execution.workers import Progress, in_tasks, twice_the_room
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


@dataclass(frozen=True)
class Unmade:
    """A set that is to be made, as far as it is not there.

    Attributes:
        missing: Image shards that are not there.
        found: Where all that was chosen is.
    """

    choice: Choice
    chosen: Selection
    missing: Sequence[Job]
    found: Where

    @property
    def excerpts(self) -> Folder:
        return self.choice.run.dir / self.choice.at.images / layout.EXCERPTS

    @cached_property
    def shard_of(self) -> dict[tuple[int, int], int]:
        """(class_id, rank) -> the data shard that holds what was chosen."""
        return {(p.class_id, p.rank): shard for shard, picks in self.found.items() for p in picks}

    def needed(self) -> Where:
        """What the missing image shards are made of."""
        wanted = {(c, rank) for job in self.missing for c, k in job.unit.keys for rank in self.chosen.parts(c, k)}
        kept = {shard: [p for p in picks if (p.class_id, p.rank) in wanted] for shard, picks in self.found.items()}
        return {shard: picks for shard, picks in kept.items() if picks}


def publish(sets: Sequence[tuple[Choice, Selection]]) -> list[list[dict[str, Any]]]:
    """Publish sets of one method, as far as they are not there, as image shards; the records of each, in order.

    Sets are made together: each by itself would leave workers idle twice, at its last data shard and its last image.
    """
    jobs = [_jobs(choice, chosen) for choice, chosen in sets]
    there: dict[str, dict[str, Any]] = {}
    todo = []
    for (choice, chosen), wanted in zip(sets, jobs, strict=True):
        records = published(choice.run.dir, wanted)
        missing = [job for job in wanted if job.name not in records]
        if missing:
            todo.append(Unmade(choice, chosen, missing, where(choice.index, chosen.picks)))
        there |= records
    if todo:
        _make_excerpts(todo)
        there |= _composed(todo)
    return [[there[job.name] for job in wanted] for wanted in jobs]


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


def _make_excerpts(sets: Sequence[Unmade]) -> None:
    """Make the excerpts that are not there."""
    jobs: list[Callable[[], Any]] = []
    count = 0
    passed_over = cache(not_encoded)
    for unmade in sets:
        needed = unmade.needed()
        made_from = {shard: digest_of([unmade.choice.identity, picks]) for shard, picks in needed.items()}
        there = finished_excerpts(unmade.excerpts, made_from)
        lost = passed_over(unmade.choice.run.latents)
        left = sorted(needed.keys() - there)
        jobs += [partial(_submit_excerpt, unmade, s, made_from[s], needed[s], lost.get(s, PassedOver())) for s in left]
        count += len(needed)
    choice = sets[0].choice
    with Progress(choice.method, count, "shards") as progress:
        progress.already(count - len(jobs))
        for _ in in_tasks(jobs, twice_the_room(choice.run.config.cluster.reader.num_cpus)):
            progress.advance()


def _submit_excerpt(unmade: Unmade, shard: int, made_from: str, picks: list[Pick], lost: PassedOver) -> Any:
    run = unmade.choice.run
    source = (run.data.url(run.data.train[shard]), len(run.data.classes), lost, run.config.encoder.resize)
    task = ray.remote(num_cpus=run.config.cluster.reader.num_cpus)(_extract)
    return task.remote(unmade.excerpts, shard, made_from, source, picks, _crops(unmade.chosen, picks))


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


def _composed(sets: Sequence[Unmade]) -> dict[str, dict[str, Any]]:
    """The records of the missing image shards, by their names, once they are made."""
    choice = sets[0].choice
    jobs = [(unmade, job) for unmade in sets for job in unmade.missing]
    records: dict[str, dict[str, Any]] = {}
    with Progress(choice.method, sum(len(job.unit) for _, job in jobs), "images") as progress:
        submits = [partial(_submit_shard, unmade, job) for unmade, job in jobs]
        for number, record in in_tasks(submits, twice_the_room(choice.run.config.cluster.reader.num_cpus)):
            records[jobs[number][1].name] = record
            progress.advance(record["images"])
    return records


def _submit_shard(unmade: Unmade, job: Job) -> Any:
    chosen, run = unmade.chosen, unmade.choice.run
    parts = [[(unmade.shard_of[c, rank], c, rank) for rank in chosen.parts(c, k)] for c, k in job.unit.keys]
    facts = [(chosen.weight(c, k), run.data.classes[c].prompt) for c, k in job.unit.keys]
    shape = None if chosen.mosaic is None else (chosen.mosaic.factor, chosen.mosaic.side)
    task = ray.remote(num_cpus=run.config.cluster.reader.num_cpus)(_compose)
    return task.remote(run.dir, job, unmade.choice.draw, facts, parts, shape)


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
