"""Shards of the user's own, read where they are: which are for training, what each holds, what is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import fsspec
import ray

from ddoq_ray.config import RunConfig
from ddoq_ray.config.dataset import DatasetConfig
from ddoq_ray.config.ineffective import WRITTEN
from ddoq_ray.data.collections.classes import SUBTRACT, begin_at_one, check_class_lists
from ddoq_ray.data.collections.unread_places import refuse_other_kind
from ddoq_ray.data.shard_index import Pictures, index_shard, shown, train_and_val, with_losses
from ddoq_ray.execution.workers import Progress, in_tasks
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.prepared import Data, Packed
from ddoq_ray.storage.quarantine import Refusal, publish_refusals
from ddoq_ray.storage.records import ClassInfo, ShardInfo
from ddoq_ray.storage.transport import retried

INDEXED_AT_ONCE = 256  # shards; enough for a large cluster, and Ray is not given 14,000 tasks at a time
COMPARED = 2_000_000  # validation pictures, at most, whose digests every task is given
CHECKED_AT_ONCE = 32  # requests for a shard's size; each is a wait


def survey_shards(config: RunConfig, classes: Sequence[ClassInfo]) -> Packed:
    """Training and validation shards, each with what it holds.

    Raises:
        ValueError: When the lists are wrong, when the class list does not fit the labels, or when more than
            `max_bad_fraction` of a split is damaged or outside the class list.
    """
    d = config.dataset
    for key in WRITTEN:
        if getattr(d, key) != getattr(DatasetConfig, key):
            raise ValueError(
                f"dataset.{key} has no effect on WebDataset shards that are read where they are; leave it out, or set "
                "dataset.resort=true to write them anew"
            )
    words: list[str] = []
    if d.val_path is not None:
        refuse_other_kind("dataset.val_path", d.val_path)
    train_urls, val_urls = train_and_val(str(d.path), d.val_path, words)
    if d.classes is None:
        check_class_lists([*train_urls, *val_urls], classes)
    told = [f"prepare    {line}" for line in words]
    seen: list[tuple[int, bytes]] = []
    unusable: dict[str, list[Unusable]] = {"path": [], "val_path": []}
    val = with_losses(index_all(val_urls, len(classes), collected=seen, unusable=unusable["val_path"]))
    same: list[str] = []
    known: dict[int, set[bytes]] = {}
    for size, digest in seen[:COMPARED]:
        known.setdefault(size, set()).add(digest)
    train = index_all(train_urls, len(classes), known=known or None, same=same, unusable=unusable["path"])
    train = with_losses(train)
    for key, path, found in (("path", d.path, train), ("val_path", d.val_path, val)):
        if path is not None and found and not sum(s.samples for s in found):
            _check_labels(f"dataset.{key}={path}", found, len(classes), 0.0)
            damaged = [s for s in found if s.damage]
            why = [f"{shown([s.path for s in damaged])}: {damaged[0].damage}"] if damaged else []
            why += _in_words(unusable[key])
            came = f" ({'; '.join(why)})" if why else ""
            raise ValueError(
                f"dataset.{key}={path}: no sample with an image and a label in {len(found)} shards{came}; expected "
                "members <key>.png (or jpg, ...) and <key>.cls with the label as a number"
            )
        _check_labels(f"dataset.{key}={path}", found, len(classes), config.max_bad_fraction)
        told += _check_damage(f"dataset.{key}={path}", found, config.max_bad_fraction)
        if unusable[key]:
            told.append(f"prepare    not usable: {'; '.join(_in_words(unusable[key]))}")
        told += _copies(found)
    packed = Packed(list(classes), train, val, told=told)
    packed.same = same_images(same, sum(s.samples for s in val), sum(s.samples for s in train))
    return packed


def same_images(keys: Sequence[str], val: int, train: int) -> dict[str, Any]:
    """Facts of pictures that both splits hold, byte for byte; empty without any.

    Raises:
        ValueError: When the whole training set is among the validation images.
    """
    if not keys:
        return {}
    if len(keys) >= train and val:
        raise ValueError(
            f"all {train} training images are among the validation images, byte for byte: a student would be scored on "
            "what was distilled; give dataset.val_path (or a val folder) of other images"
        )
    return {"images": len(keys), "of_training": train, "of_validation": val, "examples": sorted(keys)[:5]}


@dataclass(frozen=True)
class Unusable:
    """Samples of one shard that cannot be used for one reason; `first` is one of them."""

    shard: str
    count: int
    first: Refusal


def _in_words(unusable: Sequence[Unusable]) -> list[str]:
    """For each reason, the commonest first: how many samples, and which one of them."""
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for u in unusable:
        counts[u.first.kind] += u.count
        first.setdefault(u.first.kind, f"{u.first.name} of {shown([u.shard])}, {u.first.reason}")
    return [f"{n:,} samples, such as {first[kind]}" for kind, n in counts.most_common(4)]


def _copies(shards: Sequence[ShardInfo]) -> list[str]:
    """A line where shards have the same members and labels: sizes, times and names."""
    by_digest: dict[tuple[str, int], list[str]] = {}
    for s in shards:
        if s.samples:
            by_digest.setdefault((s.digest, s.bytes), []).append(s.path)
    alike = [paths for paths in by_digest.values() if len(paths) > 1]
    return [
        f"prepare    warning: {shown(paths)} look like copies of one shard: if they are, their images count "
        f"{len(paths)} times; keep one of them"
        for paths in alike[:4]
    ]


def index_all(
    urls: Sequence[str],
    num_classes: int,
    *,
    collected: list[tuple[int, bytes]] | None = None,
    known: dict[int, set[bytes]] | None = None,
    same: list[str] | None = None,
    unusable: list[Unusable] | None = None,
) -> list[ShardInfo]:
    """What each shard holds, in order.

    Args:
        collected: Takes (size, digest) of every picture.
        known: Such pictures by size; the keys of those that come again go to `same`.
        unusable: Takes what cannot be used, but for damage and labels outside the class list.
    """
    if not urls:
        return []
    shared = ray.put(known)
    jobs = [partial(_index.remote, url, num_classes, collected is not None, shared) for url in urls]
    found: dict[int, ShardInfo] = {}
    left_out: dict[int, list[Unusable]] = {}
    with Progress("prepare", len(jobs), "shards") as progress:
        for number, (info, pictures, again, left_out[number]) in in_tasks(jobs, INDEXED_AT_ONCE):
            found[number] = info
            if collected is not None:
                collected += pictures
            if same is not None:
                same += again
            progress.advance()
    if unusable is not None:
        unusable += [u for i in range(len(jobs)) for u in left_out[i]]
    return [found[i] for i in range(len(jobs))]


@ray.remote(num_cpus=0.5)
def _index(
    url: str, num_classes: int, collect: bool, known: dict[int, set[bytes]] | None
) -> tuple[ShardInfo, list[tuple[int, bytes]], list[str], list[Unusable]]:
    pictures = Pictures(known) if collect or known is not None else None
    first: dict[str, Refusal] = {}
    counts: Counter[str] = Counter()

    def refused(bad: Refusal) -> None:
        counts[bad.kind] += 1
        first.setdefault(bad.kind, bad)

    info = index_shard(url, num_classes, pictures, refused)
    left_out = [Unusable(url, n, first[kind]) for kind, n in counts.items()]
    return info, pictures.found if pictures else [], pictures.same if pictures else [], left_out


def _check_labels(asked: str, shards: Sequence[ShardInfo], num_classes: int, allowed: float) -> None:
    """A wild label among many is one bad sample; a class list that does not fit stops here, and so do labels from 1.

    Counting such samples into another class, or leaving them all out, is the silent mistake that ruins a set.
    """
    outside = [s.outside for s in shards if s.outside is not None]
    if not outside:
        return
    wild, seen = sum(o.samples for o in outside), sum(s.expected for s in shards)
    inside: Counter[int] = Counter()
    for s in shards:
        inside.update(s.images)
    least = min(min(o.least for o in outside), min(inside, default=10**18))
    largest = max(max(o.largest for o in outside), max(inside, default=-1))
    one_based = begin_at_one({least, largest}, num_classes)
    if wild <= allowed * seen and not one_based:
        return
    first = next(s for s in shards if s.outside is not None)
    hint = f" {SUBTRACT}." if one_based else ""
    assert first.outside is not None
    raise ValueError(
        f"{asked}: {wild:,} of {seen:,} labels are outside the class list (0 to {num_classes - 1}): the labels go from "
        f"{least} to {largest}; the first in {first.path} (label {first.outside.largest}).{hint} Check that "
        "dataset.classes belongs to these shards (one entry for each label)"
    )


def _check_damage(asked: str, shards: Sequence[ShardInfo], allowed: float) -> list[str]:
    """A line for each damaged shard (the first ones).

    Raises:
        ValueError: When they took more than `allowed` of the samples.
    """
    damaged = [s for s in shards if s.damage]
    if not damaged:
        return []
    lost, seen = sum(s.lost for s in damaged), sum(s.expected for s in shards)
    named = [f"{s.path}: {s.damage} (about {s.lost:,} samples lost)" for s in damaged[:8]]
    named += [f"and {len(damaged) - 8} more"] if len(damaged) > 8 else []
    if lost > allowed * seen:
        raise ValueError(
            f"{asked}: {len(damaged)} of {len(shards)} shards are damaged, which takes about {lost:,} of {seen:,} "
            f"samples ({lost / seen:.1%}), more than max_bad_fraction={allowed:g}:\n  "
            + "\n  ".join(named)
            + "\nBring them back whole, or allow more (max_bad_fraction)"
        )
    return [f"prepare    damaged: {line}" for line in named]


def publish_damage(data: Folder, packed: Packed) -> None:
    """Name the damaged shards in ``data/quarantine/shards.jsonl``."""
    damaged = [Refusal(s.path, s.damage, s.lost) for s in (*packed.train, *packed.val) if s.damage]
    publish_refusals(data / "quarantine", "shards.jsonl", damaged, "shard")


def check_unchanged(data: Data) -> None:
    """Refuse shards that have gone or grown since they were indexed: counts and positions would be wrong."""
    shards = (*data.train, *data.val)
    with ThreadPoolExecutor(CHECKED_AT_ONCE) as threads:
        for shard, size in zip(shards, threads.map(lambda s: _size(data.url(s)), shards), strict=True):
            if size != shard.bytes:
                now = "is gone" if size is None else f"has {size:,} bytes"
                raise ValueError(
                    f"{data.url(shard)} {now}, but had {shard.bytes:,} when {data.run.path('data')} was prepared; "
                    "bring it back, use another run_dir, or remove data/manifest.json of this one to index them again"
                )


def _size(url: str) -> int | None:
    fs, root = fsspec.core.url_to_fs(url)
    try:
        size = retried(url, lambda: fs.size(root))
    except FileNotFoundError:
        return None
    return None if size is None else int(size)
