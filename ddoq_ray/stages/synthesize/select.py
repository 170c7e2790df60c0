"""Baselines made of real images: written in the same format as synthesized ones, so that all that follows is shared.

`random` draws anew for each student; `herding` and `medoids` choose once, in latent space, from the run's latents.
All weigh their images alike, as these baselines are used elsewhere: so a row tells what the choice of images is worth,
and `medoids` beside `ddoq-uniform` what synthesizing from the same centroids adds. (The Voronoi masses of the centroids
would not be those of the medoids: an image is not where its centroid is.)

Images pass from the tasks that read shards to those that write image shards; the driver holds positions only.
"""

from __future__ import annotations

import posixpath
import time
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from ddoq_ray.config import RunConfig
from ddoq_ray.core.rng import philox
from ddoq_ray.data.image_set import NewImage, write_images
from ddoq_ray.data.pictures import Resize, reframe
from ddoq_ray.data.samples import encode_png, read_samples
from ddoq_ray.execution.class_tasks import Reading, readings
from ddoq_ray.execution.workers import Events, Progress
from ddoq_ray.stages.prepare.step import Data
from ddoq_ray.storage.artifact import Artifact, digest_of
from ddoq_ray.storage.class_latents import class_latents
from ddoq_ray.storage.codebook import ClassRows, part_classes, parts_with_classes
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.latent_index import LatentIndex, latent_index
from ddoq_ray.storage.latent_log import noise_of
from ddoq_ray.storage.quarantine import read_refusals
from ddoq_ray.storage.records import binary_rows

METHODS = ("random", "herding", "medoids")

Picks = dict[int, npt.NDArray[np.int64]]  # class_id -> positions among its usable images, in the log's order
Key = tuple[int, int]  # class_id, rank of the image in its class
Where = dict[int, list[tuple[int, int, int]]]  # data shard -> (class_id, position there, rank in the class's picks)


def draw(config: RunConfig, counts: dict[int, int], draw_index: int) -> Picks:
    """For each class the positions, among its usable images in the log's order, of a random draw without repeats."""
    picks = {}
    for class_id, size in wanted_images(config, counts).items():
        rng = philox(config.seed, "random", draw_index, class_id)
        picks[class_id] = np.sort(rng.choice(counts[class_id], size=size, replace=False))
    return picks


def wanted_images(config: RunConfig, counts: dict[int, int]) -> dict[int, int]:
    """class_id -> images to choose: ipc, or all of a smaller class, or none of it (small_class=drop)."""
    kept = {c: n for c, n in sorted(counts.items()) if n > 0 and (n >= config.ipc or config.small_class != "drop")}
    return {c: min(config.ipc, n) for c, n in kept.items()}


def run(
    config: RunConfig,
    run_folder: Folder,
    folder: str,
    data: Data,
    latents: Folder,
    events: Events,
    draw_index: int = 0,
    *,
    method: str = "random",
) -> dict[str, Any]:
    """Choose `ipc` real images a class by `method` and publish them as an image set.

    Args:
        folder: Where the set goes, relative to the run directory.
        latents: The latent log that the run uses; `random` reads only how many of each class are usable.
        draw_index: Keys the draw of `random`; without meaning for the others.
        method: One of METHODS. `medoids` takes the run's own codebook.

    Raises:
        ValueError: When the latents or the codebook that the method needs are not there.
    """
    start = time.time()
    artifact = Artifact(run_folder / folder / "images", "synthesize")
    facts = identity(config, run_folder, data, latents, draw_index, method)
    if artifact.begin(facts, overwrite=config.overwrite) == "done":
        return artifact.require()
    index = latent_index(latents, len(data.train))
    usable = index.counts.tolist()
    counts = {c.class_id: usable[c.class_id] if c.class_id < len(usable) else 0 for c in data.classes}
    if method == "random":
        picks = draw(config, counts, draw_index)
    else:
        picks = _choose(config, run_folder, data, latents, index, counts, method)
    shards = _write(config, artifact.folder, data, latents, where(index, picks), picks, draw_index)
    manifest = artifact.finish(
        facts,
        seconds=round(time.time() - start, 3),
        items=sum(s["images"] for s in shards),
        unit="images",
        bytes=sum(s["bytes"] for s in shards),
        shards=shards,
        digest=digest_of([s["sha256"] for s in shards]),
    )
    events.add("stage finished", stage="select", folder=folder, images=manifest["items"])
    return manifest


def identity(
    config: RunConfig, run_folder: Folder, data: Data, latents: Folder, draw_index: int, method: str
) -> dict[str, Any]:
    """What an image set of real images depends on: the draw, or the latents and the codebook, and the files' size."""
    assert method in METHODS, method
    facts = {
        method: draw_index,
        "seed": config.seed,
        "ipc": config.ipc,
        "data": data.digest,
        "resize": config.encoder.resize,
        "shard_images": config.synthesizer.shard_images,
    }
    if method != "random" or config.small_class != "error":
        facts["small_class"] = config.small_class  # which classes are drawn from, and how many images
    if method != "random":
        facts |= {"latents": Artifact(latents, "encode").require()["digest"]}
    if method == "medoids":
        facts["codebook"] = Artifact(run_folder / "codebook", "quantize").require()["digest"]
    return facts


def _choose(
    config: RunConfig,
    run_folder: Folder,
    data: Data,
    latents: Folder,
    index: LatentIndex,
    counts: dict[int, int],
    method: str,
) -> Picks:
    """The picks of `herding` or `medoids`, from tasks for the classes of one codebook part or of several."""
    if method == "herding":
        wanted = wanted_images(config, counts)
        dim = int(np.prod(Artifact(latents, "encode").require()["latent_shape"]))
        classes = [[c for c in part if c in wanted] for part in part_classes(len(data.classes), config.ipc, dim)]

        def submit(reading: Reading) -> Any:
            mine = {c: wanted[c] for part in reading.parts for c in classes[part]}
            return _herding.options(**reading.options).remote(latents, reading.shards, mine)
    else:
        codebook = run_folder / "codebook"
        names, classes, dim = parts_with_classes(codebook)

        def submit(reading: Reading) -> Any:
            mine = {names[part]: classes[part] for part in reading.parts}
            return _medoids.options(**reading.options).remote(latents, reading.shards, codebook, mine)

    refs = [(len(reading.parts), submit(reading)) for reading in readings(index, classes, dim)]
    picks: Picks = {}
    with Progress(method, sum(parts for parts, _ in refs), "codebook parts") as progress:
        for parts, ref in refs:
            picks |= ray.get(ref)
            progress.advance(parts)
    return picks


@ray.remote(num_cpus=0.5)
def _herding(latents: Folder, shards: npt.NDArray[np.int32], wanted: dict[int, int]) -> Picks:
    from ddoq_ray.core.baselines import herding

    return {c: herding(x, wanted[c]) for c, x in class_latents(latents, shards, wanted)}


@ray.remote(num_cpus=0.5)
def _medoids(latents: Folder, shards: npt.NDArray[np.int32], codebook: Folder, parts: dict[str, list[int]]) -> Picks:
    from ddoq_ray.core.baselines import medoids

    books = ClassRows(codebook, parts)
    found = class_latents(latents, shards, [c for classes in parts.values() for c in classes], noise_of(codebook))
    return {c: medoids(x, binary_rows(books.of(c)["centroid"], "<f4")) for c, x in found}


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


def _write(
    config: RunConfig, images: Folder, data: Data, latents: Folder, found: Where, picks: Picks, draw_index: int
) -> list[dict[str, Any]]:
    """Publish the picked images as image shards; their records, in order."""
    keys = [(c, rank) for c in sorted(picks) for rank in range(len(picks[c]))]
    size = config.synthesizer.shard_images
    image_shard = {key: at // size for at, key in enumerate(keys)}
    extract = ray.remote(num_cpus=config.cluster.reader.num_cpus)(_extract)
    compose = ray.remote(num_cpus=config.cluster.reader.num_cpus)(_compose)
    passed_over = not_encoded(latents)
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
    quarantine = Folder(posixpath.dirname(latents.uri)) / "quarantine"
    found: dict[int, set[str]] = {}
    for name, refusal in read_refusals(quarantine, "shard-*.latents-*.jsonl"):
        found.setdefault(int(name.partition(".")[0].removeprefix("shard-")), set()).add(refusal.name)
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
    return write_images(images, f"images-{place:06d}", made)
