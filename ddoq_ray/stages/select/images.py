"""Chosen real images become an image set, in the format of synthesized ones, so that all that follows is shared.

Images pass from the tasks that read shards to those that write image shards; the driver holds positions only.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from typing import Any

import numpy as np
import ray

from ddoq_ray.data.image_set import NewImage, write_images
from ddoq_ray.data.pictures import Resize, reframe
from ddoq_ray.data.samples import encode_png, read_samples
from ddoq_ray.execution.run import Run
from ddoq_ray.stages.select.choice import Picks
from ddoq_ray.storage import layout
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.latent_index import LatentIndex
from ddoq_ray.storage.quarantine import read_refusals

Key = tuple[int, int]  # class_id, rank of the image in its class
Where = dict[int, list[tuple[int, int, int]]]  # data shard -> (class_id, position there, rank in the class's picks)


def where(index: LatentIndex, picks: Picks) -> Where:
    """The picked images of each data shard that holds some; linear in the picks, not in what the shards hold.

    >>> from ddoq_ray.storage.records import ClassCounts
    >>> log = LatentIndex.of([ClassCounts({0: 2}), ClassCounts({0: 3, 1: 1})])
    >>> where(log, {0: np.array([3, 0]), 1: np.array([0])})
    {1: [(0, 1, 0), (1, 0, 0)], 0: [(0, 0, 1)]}
    """
    found: Where = {}
    for c in sorted(picks):
        shards, rows = index.pairs(c)
        ends = np.cumsum(rows, dtype=np.int64)
        at = np.searchsorted(ends, picks[c], side="right")
        inside = picks[c] - (ends - rows)[at]
        for rank, (shard, position) in enumerate(zip(shards[at].tolist(), inside.tolist(), strict=True)):
            found.setdefault(shard, []).append((c, position, rank))
    return found


def publish(run: Run, images: Folder, found: Where, picks: Picks, draw_index: int) -> list[dict[str, Any]]:
    """Publish the picked images, which are at `found`, as image shards; their records, in order."""
    config, data = run.config, run.data
    keys = [(c, rank) for c in sorted(picks) for rank in range(len(picks[c]))]
    size = config.synthesizer.shard_images
    image_shard = {key: at // size for at, key in enumerate(keys)}
    extract = ray.remote(num_cpus=config.cluster.reader.num_cpus)(_extract)
    compose = ray.remote(num_cpus=config.cluster.reader.num_cpus)(_compose)
    passed_over = not_encoded(run.latents)
    parts: dict[int, list[Any]] = {}  # image shard -> references to the images that it takes of each data shard
    for shard in sorted(found):
        rows: dict[int, list[tuple[int, int, int]]] = {}
        for c, position, rank in found[shard]:
            rows.setdefault(image_shard[c, rank], []).append((c, position, rank))
        places = sorted(rows)
        url, lost = data.url(data.train[shard]), passed_over.get(shard, frozenset())
        refs = extract.options(num_returns=len(places)).remote(
            url, len(data.classes), [rows[place] for place in places], config.encoder.resize, lost
        )
        for place, ref in zip(places, refs if len(places) > 1 else [refs], strict=True):
            parts.setdefault(place, []).append(ref)
    records = []
    for place in sorted(parts):
        mine = keys[place * size : (place + 1) * size]
        facts = {c: (len(picks[c]), data.classes[c].prompt) for c, _ in mine}
        records.append(compose.remote(images, place, mine, facts, draw_index, *parts[place]))
    return ray.get(records)


def not_encoded(latents: Folder) -> dict[int, frozenset[str]]:
    """Shard -> keys of its pictures that can be read but have no latent: the log's positions pass them over."""
    quarantine = Folder(posixpath.dirname(latents.uri)) / layout.QUARANTINE
    found: dict[int, set[str]] = {}
    for name, refusal in read_refusals(quarantine, "shard-*.latents-*.jsonl"):
        found.setdefault(layout.shard_index(name.partition(".")[0]), set()).add(refusal.name)
    return {shard: frozenset(keys) for shard, keys in found.items()}


def _extract(
    url: str,
    num_classes: int,
    groups: list[list[tuple[int, int, int]]],
    resize: Resize,
    passed_over: frozenset[str] = frozenset(),
) -> Any:
    """PNGs of the wanted images of one shard, by their class_id and their position among the shard's usable ones.

    Args:
        groups: For each image shard that takes some: (class_id, position, rank).
        resize: Pictures are cut or padded as those that were encoded, at their own resolution.
        passed_over: Keys that are not counted.

    Returns:
        For each group (class_id, rank) -> PNG; of a single group its dict alone, as Ray's num_returns wants it.
    """
    wanted = {(c, position): (g, rank) for g, group in enumerate(groups) for c, position, rank in group}
    seen: Counter[int] = Counter()
    found: list[dict[Key, bytes]] = [{} for _ in groups]
    for sample in read_samples(url, num_classes, lambda bad: None):  # the encode stage has named each bad one
        if sample.key in passed_over:
            continue
        key = (sample.class_id, seen[sample.class_id])
        seen[sample.class_id] += 1
        if key in wanted:
            group, rank = wanted.pop(key)
            found[group][sample.class_id, rank] = encode_png(np.asarray(reframe(sample.image, resize)))
            if not wanted:
                break
    if wanted:  # positions are those of the images that encode could read
        c, position = min(wanted)
        raise ValueError(
            f"{url}: image {position} of class {c} cannot be found, of those that were encoded; the shard was changed "
            "or damaged since. Bring it back, or use another run_dir"
        )
    return found if len(groups) > 1 else found[0]


def _compose(
    images: Folder, place: int, keys: list[Key], facts: dict[int, tuple[int, str]], seed: int, *found: dict[Key, bytes]
) -> dict[str, Any]:
    """Publish one image shard; `facts`: class_id -> (images of the class in the set, prompt)."""
    png = {key: data for part in found for key, data in part.items()}
    made = (NewImage(c, rank, 1 / facts[c][0], facts[c][1], seed, png[c, rank]) for c, rank in keys)
    return write_images(images, layout.image_shard(place), made)
