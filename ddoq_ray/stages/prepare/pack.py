"""prepare's work on collections that are no shards yet: Ray tasks write them as class-sorted tars, one task a shard.

The driver holds names, labels and counts. What goes into which shard follows from the listing, the seed and the
shard's limits alone, so that names and bytes are the same for any number of workers; a shard is done when its record
is there and was made from the same plan, so that a killed run goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import ray

from ddoq_ray.config import RunConfig
from ddoq_ray.core.rng import philox
from ddoq_ray.data.collections import survey_of
from ddoq_ray.data.collections.listing import HARMLESS, Listing, Source, Survey, extension_of, no_image
from ddoq_ray.data.shard_index import index_shard, picture_digest
from ddoq_ray.data.tar_writing import add_member, tar_to
from ddoq_ray.execution.workers import Progress, in_tasks, twice_the_room
from ddoq_ray.stages.prepare.given_shards import same_images
from ddoq_ray.storage import layout
from ddoq_ray.storage.artifact import NotAsWritten, checked, digest_of, with_check
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.prepared import Packed
from ddoq_ray.storage.quarantine import Refusal, publish_refusals, refused_kinds
from ddoq_ray.storage.records import ClassInfo, ShardInfo

Rows = npt.NDArray[np.int64]
SCRATCH = "scratch"  # below data/: containers unpacked, removed at the end
SHARDS = 32  # of a collection, at least: each is read by one reader at a time,
FEWEST = 500  # samples; smaller shards are not worth a file
MEMBER_BYTES = 2 * tarfile.BLOCKSIZE + tarfile.BLOCKSIZE  # of a sample, beside its image: two headers and the label


@dataclass(frozen=True)
class Plan:
    """Which samples go into which shard, in order.

    Attributes:
        split: Whose shards: train or val.
        origin: The split of the source that its samples are in; held-out images are training ones there.
        shards: Rows of the listing, one array a shard.
    """

    split: str
    origin: str
    listing: Listing
    shards: list[Rows]


def class_order(listing: Listing, seed: int, split: str) -> list[Rows]:
    """The rows of each class, shuffled by (seed, split, class): CLVQ takes samples to be independent."""
    by_class = np.argsort(listing.class_ids, kind="stable").astype(np.int64)
    class_ids, starts = np.unique(listing.class_ids[by_class], return_index=True)
    parts = np.split(by_class, starts[1:])
    return [
        rows[philox("prepare", seed, split, int(c)).permutation(len(rows))]
        for c, rows in zip(class_ids, parts, strict=True)
    ]


def hold_out(
    order: Sequence[Rows], heldout: float, classes: Sequence[ClassInfo], class_ids: Sequence[int]
) -> tuple[list[Rows], list[Rows]]:
    """(rows to train on, rows held out) of each class: a part below 1, or a number from 1 on.

    Raises:
        ValueError: When a class would be left without a training image, or none at all would be held out.
    """
    counts = [int(heldout) if heldout >= 1 else round(heldout * len(rows)) for rows in order]
    short = [f"{classes[c].name} ({len(r)})" for c, r, n in zip(class_ids, order, counts, strict=True) if n >= len(r)]
    if short:
        raise ValueError(
            f"dataset.heldout={heldout:g} leaves no training image in {len(short)} classes: "
            f"{', '.join(short[:5])}{', ...' if len(short) > 5 else ''}; choose less"
        )
    if not sum(counts):
        raise ValueError(f"dataset.heldout={heldout:g} holds out no image of any class; choose more")
    pairs = list(zip(order, counts, strict=True))
    return [rows[n:] for rows, n in pairs], [rows[:n] for rows, n in pairs]


def cut(order: Sequence[Rows], sizes: npt.NDArray[np.int64], samples: int, max_bytes: int) -> list[Rows]:
    """Class after class, cut into shards of at most so many samples and bytes, and at least one sample.

    >>> [s.tolist() for s in cut([np.array([0, 2]), np.array([1, 3])], np.array([10, 10, 5000, 10]), 3, 9000)]
    [[0, 2], [1, 3]]
    """
    rows = np.concatenate(list(order)) if order else np.empty(0, np.int64)
    ends = np.cumsum(sizes[rows] + MEMBER_BYTES)
    shards, start, before = [], 0, 0
    while start < len(rows):
        fits = int(np.searchsorted(ends, before + max_bytes, side="right"))
        end = max(start + 1, min(fits, start + samples))
        shards.append(rows[start:end])
        start, before = end, int(ends[end - 1])
    return shards


def samples_in_a_shard(images: int, most: int) -> int:
    """Samples in a shard of a split of so many images: `most`, or fewer so that several readers find work.

    >>> [samples_in_a_shard(n, 10_000) for n in (100, 17_000, 50_000, 14_000_000)]
    [500, 532, 1563, 10000]
    """
    return min(most, max(FEWEST, -(-images // SHARDS)))


def make_plans(config: RunConfig, survey: Survey) -> list[Plan]:
    """The plan of the training and, where there are such, of the validation shards.

    Raises:
        ValueError: When images should be held out of a source that has validation images.
    """
    d = config.dataset
    order = class_order(survey.train, config.seed, "train")
    plans = []

    def cut_up(order: Sequence[Rows], listing: Listing) -> list[Rows]:
        samples = samples_in_a_shard(sum(map(len, order)), d.shard_samples)
        return cut(order, listing.sizes, samples, d.shard_mb * 1_000_000)

    if d.heldout:
        if survey.val is not None:
            raise ValueError(
                f"dataset.heldout={d.heldout:g}: the source has {len(survey.val.names):,} validation images of its "
                "own; leave heldout out, or give the training images' folder alone"
            )
        class_ids = np.unique(survey.train.class_ids).tolist()
        order, held = hold_out(order, d.heldout, survey.classes, class_ids)
        plans.append(Plan("val", "train", survey.train, cut_up(held, survey.train)))
    elif survey.val is not None:
        held = class_order(survey.val, config.seed, "val")
        plans.append(Plan("val", "val", survey.val, cut_up(held, survey.val)))
    return [Plan("train", "train", survey.train, cut_up(order, survey.train)), *plans]


def survey_source(source: Source, asked: str) -> Survey:
    """The survey, made by a worker: some libraries cannot list a collection without reading it.

    Args:
        asked: The key and the place, for an error.

    Raises:
        ValueError: When the collection is missing, empty or ambiguous.
    """
    return next(in_tasks([lambda: _survey.remote(source, asked)], 1))[1]


def pack(config: RunConfig, source: Source, survey: Survey, plans: Sequence[Plan], run: Folder) -> Packed:
    """Write the planned shards that are not there yet.

    Raises:
        ValueError: When more than `max_bad_fraction` of the images are refused.
    """
    data = run / layout.DATA
    resources = {"num_cpus": config.cluster.reader.num_cpus}
    at_once = twice_the_room(resources["num_cpus"])
    shared = ray.put(source)

    def open_job(container: int) -> Callable[[], Any]:
        return lambda: _unpack.options(**resources).remote(shared, container, data / SCRATCH)

    containers = source.containers()
    if containers:
        with Progress("prepare", len(containers), "files") as progress:
            for _ in in_tasks([open_job(i) for i in range(len(containers))], at_once):
                progress.advance()

    refused: Counter[str] = Counter()
    listed: dict[str, list[ShardInfo]] = {"train": [], "val": []}
    same: list[str] = []
    known: dict[int, set[bytes]] = {}

    def submit(plan: Plan, index: int, seen: Any) -> Any:
        task = ShardTask.of(plan, index, len(survey.classes))
        return _pack_shard.options(**resources).remote(shared, task, data, seen)

    with Progress("prepare", sum(len(plan.shards) for plan in plans), "shards") as progress:
        for plan in sorted(plans, key=lambda plan: plan.split, reverse=True):  # val first: what must not come again
            seen = ray.put(known)
            jobs = [functools.partial(submit, plan, i, seen) for i in range(len(plan.shards))]
            infos: list[Any] = [None] * len(jobs)
            for number, (info, why, pictures, again) in in_tasks(jobs, at_once):
                infos[number] = info
                refused.update(why)
                same += again
                if plan.split == "val":
                    for size, digest in pictures:
                        known.setdefault(size, set()).add(digest)
                progress.advance(bytes=info.bytes, quarantined=sum(why.values()))
            listed[plan.split] = infos
    _remove_others(data, plans)
    unlisted = [r for split in (survey.train, survey.val) if split is not None for r in split.refused]
    _publish_refused(data / layout.QUARANTINE, "listing", unlisted)
    packed = Packed(survey.classes, listed["train"], listed["val"], refused_kinds(unlisted), refused)
    images = {split: sum(s.samples for s in shards) for split, shards in listed.items()}
    packed.same = same_images(same, images["val"], images["train"])
    _check_refused(config, packed, data)
    data.remove(SCRATCH)
    return packed


@dataclass(frozen=True)
class ShardTask:
    """One shard to write."""

    split: str
    origin: str
    index: int
    names: list[str]
    class_ids: npt.NDArray[np.int32]
    rows: Rows
    num_classes: int

    @staticmethod
    def of(plan: Plan, index: int, num_classes: int) -> ShardTask:
        rows = plan.shards[index]
        names = [plan.listing.names[i] for i in rows]
        return ShardTask(plan.split, plan.origin, index, names, plan.listing.class_ids[rows], rows, num_classes)

    @property
    def name(self) -> str:
        return f"{self.split}-{self.index:06d}"

    @property
    def digest(self) -> str:
        return digest_of([self.split, self.names, self.class_ids.tolist(), self.rows.tolist(), self.num_classes])


Written = tuple[ShardInfo, dict[str, int], list[tuple[int, bytes]], list[str]]


def write_shard(
    source: Source, task: ShardTask, data: Folder, known: Mapping[int, set[bytes]] | None = None
) -> Written:
    """Write one shard and its record, unless both are there.

    Args:
        known: Pictures of the validation images: size -> digests.

    Returns:
        What it holds, its refused images by reason, (size, digest) of its pictures where it is a validation shard, and
        the names of those that are `known`.
    """
    tar_name, record_name = f"{task.split}/{task.name}.tar", f"{layout.PACK_RECORDS}/{task.name}.json"
    digest = task.digest
    if data.exists(record_name) and data.exists(tar_name):
        with contextlib.suppress(NotAsWritten):  # then both are made anew
            record = checked(data.read(record_name))
            fs, path = fsspec.core.url_to_fs(data.path(tar_name))
            if record["plan"] == digest and fs.size(path) == record["shard"]["bytes"]:
                return _written(record)
    refused: list[Refusal] = []
    digests: list[tuple[int, bytes]] = []
    same: list[str] = []
    origins: list[list[str]] = []
    pictures = source.read(task.origin, task.names, data / SCRATCH)
    with data.writing(tar_name) as f, tar_to(f) as tar:
        for name, class_id, row, picture in zip(task.names, task.class_ids, task.rows, pictures, strict=True):
            reason = picture.reason if isinstance(picture, Refusal) else no_image(picture)
            if isinstance(picture, Refusal) or reason is not None:
                refused.append(Refusal(name, str(reason)))
                continue
            key = f"{task.split}-{row:08d}"
            add_member(tar, f"{key}.{extension_of(picture)}", picture.data)
            add_member(tar, f"{key}.cls", str(class_id).encode())
            origins.append([key, name])
            size, seen = len(picture.data), picture_digest(picture.data)
            if task.split == "val":
                digests.append((size, seen))
            elif known and seen in known.get(size, ()):
                same.append(name)
    indexed = index_shard(data.path(tar_name), task.num_classes)
    info = dataclasses.replace(indexed, path=f"data/{tar_name}", sha256=data.digest(tar_name)[0])
    assert info.samples == len(origins), (task.name, info.samples, len(origins))
    _publish_refused(data / layout.QUARANTINE, task.name, refused)
    record = {
        "plan": digest,
        "shard": info.to_json(),
        "refused": [{"name": r.name, "reason": r.reason} for r in refused],
        "origins": origins,
        "pictures": [[size, digest.hex()] for size, digest in digests],
        "same": same,
    }
    data.publish(record_name, json.dumps(with_check(record)).encode())
    return _written(record)


def _written(record: dict[str, Any]) -> Written:
    why = dict(Counter(r["reason"].partition(":")[0] for r in record["refused"]))
    pictures = [(size, bytes.fromhex(digest)) for size, digest in record.get("pictures", [])]
    return ShardInfo.from_json(record["shard"]), why, pictures, record.get("same", [])


def _publish_refused(quarantine: Folder, name: str, refused: Sequence[Refusal]) -> None:
    publish_refusals(quarantine, f"{name}.jsonl", refused, "name")
    if not refused:
        quarantine.remove(f"{name}.jsonl")  # of an earlier try


def _remove_others(data: Folder, plans: Sequence[Plan]) -> None:
    """Shards of an earlier, cut-off run from a source that held more then."""
    for split in ("train", "val"):
        planned = sum(len(p.shards) for p in plans if p.split == split)
        for pattern in (f"{split}/{split}-*.tar", f"records/{split}-*.json", f"quarantine/{split}-*.jsonl"):
            for name in data.names(pattern):
                if int(name.rpartition("-")[2].partition(".")[0]) >= planned:
                    data.remove(name)


def _check_refused(config: RunConfig, packed: Packed, data: Folder) -> None:
    # A file that is no image, or has no label, is none that was lost.
    images = packed.refused + Counter({k: n for k, n in packed.unlisted.items() if k not in HARMLESS})
    bad, good = sum(images.values()), sum(s.samples for s in (*packed.train, *packed.val))
    told = ", ".join(f"{reason}: {n:,}" for reason, n in images.most_common(5))
    where = f"each is named in {data.path('quarantine')}"
    if not sum(s.samples for s in packed.train):
        raise ValueError(f"dataset.path={config.dataset.path}: no usable training image ({told}); {where}")
    if bad > config.max_bad_fraction * (bad + good):
        raise ValueError(
            f"{bad:,} of {bad + good:,} images ({bad / (bad + good):.1%}) are refused ({told}), more than "
            f"max_bad_fraction={config.max_bad_fraction:g}; {where}; mend the source, or allow more"
        )


@ray.remote(num_cpus=1)
def _survey(source: Source, asked: str) -> Survey:
    return survey_of(source, asked)


@ray.remote(num_cpus=1)
def _unpack(source: Source, container: int, scratch: Folder) -> None:
    source.unpack(container, scratch)


@ray.remote(num_cpus=1)
def _pack_shard(source: Source, task: ShardTask, data: Folder, known: Mapping[int, set[bytes]]) -> Written:
    return write_shard(source, task, data, known)
