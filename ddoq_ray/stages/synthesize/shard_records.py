"""What is published of an image shard after it, so that a run that was cut off reads no finished shard whole."""

from __future__ import annotations

import contextlib
import posixpath
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ddoq_ray.data.image_set import read_images, shard_record
from ddoq_ray.execution.workers import say
from ddoq_ray.stages.synthesize.constant_images import constant_facts
from ddoq_ray.stages.synthesize.jobs import Job
from ddoq_ray.storage import layout
from ddoq_ray.storage.artifact import NotAsWritten, checked, with_check
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.layout import Place
from ddoq_ray.storage.transport import read_heads

RECORD_BYTES = 4096  # a record has some 400


def publish_record(run_dir: Folder, job: Job, record: dict[str, Any]) -> dict[str, Any]:
    """Publish the record of a shard that is there, and give it back."""
    images = run_dir / Place(job.folder).images
    images.publish_json(layout.image_record(job.unit.name), with_check(record | {"made_from": job.made_from}))
    return record


def published(run_dir: Folder, jobs: Sequence[Job]) -> dict[str, dict[str, Any]]:
    """The records of the image shards, by their jobs' names, that an earlier, cut-off run published.

    A set's folder is listed once, and its records are asked for together: to ask an object store for each of 20,000
    shards would take a quarter of an hour. A shard without a record, which is cut off between the two or older than
    records are, is read. One that its record does not fit is left out, so that it is made anew; this is said.
    """
    found = {}
    for folder in {job.folder: None for job in jobs}:
        images = run_dir / Place(folder).images
        sizes = images.sizes(layout.IMAGE_SHARDS)
        records = _records(images) if sizes else {}
        unfit = []
        for job in (j for j in jobs if j.folder == folder and f"{j.unit.name}.tar" in sizes):
            record = records.get(job.unit.name)
            if record is None:
                found[job.name] = publish_record(run_dir, job, _read(run_dir, job))
            elif (record.get("bytes"), record.pop("made_from", "")) == (sizes[f"{job.unit.name}.tar"], job.made_from):
                found[job.name] = record
            else:
                unfit.append(job.unit.name)
        if unfit:
            say(
                f"synthesize {len(unfit):,} of the image shards in {images.uri} are made anew, first {unfit[0]}: they "
                "are not what their records say"
            )
    return found


def _records(images: Folder) -> dict[str, dict[str, Any]]:
    """The records of a set by their shards' names; those that cannot be read are left out."""
    names = [posixpath.basename(n) for n in images.names(layout.image_record("*"))]
    heads = read_heads(images.path(layout.IMAGE_RECORDS), names, RECORD_BYTES)
    records = {}
    for name, head in zip(names, heads, strict=True):
        with contextlib.suppress(NotAsWritten):
            records[name.removesuffix(".json")] = checked(head)
    return records


def _read(run_dir: Folder, job: Job) -> dict[str, Any]:
    """The record of a published shard, by what is in it."""
    name, retried = f"{job.name}.tar", 0

    def pictures() -> Iterator[tuple[tuple[int, int], npt.NDArray[np.uint8]]]:
        nonlocal retried
        for image in read_images([run_dir.path(name)]):
            retried += image.attempt > 0
            yield (image.class_id, image.centroid_id), np.asarray(image.picture)

    facts = constant_facts(pictures())
    record = shard_record(job.unit.name, len(job.unit), run_dir.read(name))
    return record | facts | {"retried": retried}
