"""Baselines made of real images: written in the same format as synthesized ones, so that all that follows is shared."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import ray

from ddoq_ray.artifacts import Artifact, Folder, digest_of
from ddoq_ray.config import RunConfig
from ddoq_ray.core.rng import philox
from ddoq_ray.runtime import Events
from ddoq_ray.samples import encode_png, read_samples, write_tar
from ddoq_ray.stages.latent_log import LatentLog
from ddoq_ray.stages.prepare import Data


def draw(config: RunConfig, counts: dict[int, int], draw_index: int) -> dict[int, np.ndarray]:
    """For each class the positions, among its usable images in the log's order, of a random draw without repeats."""
    picks = {}
    for class_id, n in sorted(counts.items()):
        if n == 0 or (n < config.ipc and config.small_class == "drop"):
            continue
        rng = philox(config.seed, "random", draw_index, class_id)
        picks[class_id] = np.sort(rng.choice(n, size=min(config.ipc, n), replace=False))
    return picks


def run(
    config: RunConfig, run_folder: Folder, folder: str, data: Data, latents: Folder, events: Events, draw_index: int
) -> dict[str, Any]:
    """Draw `ipc` real images a class anew (each draw has its own key) and publish them as an image set."""
    start = time.time()
    artifact = Artifact(run_folder / folder / "images", "synthesize")
    facts = {"random": draw_index, "seed": config.seed, "ipc": config.ipc, "data": data.digest}
    if artifact.begin(facts, overwrite=config.overwrite) == "done":
        return artifact.require()
    log = LatentLog(latents)
    counts: dict[int, int] = {}
    wanted: dict[int, list[tuple[int, int, int]]] = {}  # shard -> (class_id, position in the shard's class, rank)
    totals = {c.class_id: 0 for c in data.classes}
    for shard in range(len(data.train)):
        for c, n in log.done(shard).classes.items():
            totals[c] += n
    picks = draw(config, totals, draw_index)
    for shard in range(len(data.train)):
        for c, n in log.done(shard).classes.items():
            before = counts.get(c, 0)
            counts[c] = before + n
            for rank, position in enumerate(picks.get(c, np.empty(0, np.int64)).tolist()):
                if before <= position < before + n:
                    wanted.setdefault(shard, []).append((c, position - before, rank))
    task = ray.remote(num_cpus=config.cluster.reader.num_cpus)(_extract)
    refs = [task.remote(data.url(data.train[s]), len(data.classes), rows) for s, rows in sorted(wanted.items())]
    found = {key: png for part in ray.get(refs) for key, png in part.items()}
    shards = []
    ordered = sorted(found)
    for first in range(0, len(ordered), config.synthesizer.shard_images):
        members = []
        for c, rank in ordered[first : first + config.synthesizer.shard_images]:
            name = f"{c:05d}-{rank:04d}"
            prompt = data.classes[c].prompt
            info = {"centroid_id": rank, "weight": 1 / len(picks[c]), "prompt": prompt, "seed": draw_index}
            members += [
                (f"{name}.png", found[c, rank]),
                (f"{name}.cls", str(c).encode()),
                (f"{name}.json", json.dumps(info).encode()),
            ]
        tar = write_tar(members)
        name = f"images-{len(shards):06d}"
        artifact.folder.publish(f"{name}.tar", tar)
        shards.append({"name": name, "images": len(members) // 3, "bytes": len(tar), "sha256": digest_of(tar)})
    manifest = artifact.finish(
        facts,
        seconds=round(time.time() - start, 3),
        items=len(ordered),
        unit="images",
        bytes=sum(s["bytes"] for s in shards),
        shards=shards,
        digest=digest_of([s["sha256"] for s in shards]),
    )
    events.add("stage finished", stage="select", folder=folder, images=len(ordered))
    return manifest


def _extract(url: str, num_classes: int, rows: list[tuple[int, int, int]]) -> dict[tuple[int, int], bytes]:
    """(class_id, rank) -> PNG of the wanted images of one shard, by their position among the shard's usable ones."""
    wanted = {(c, position): rank for c, position, rank in rows}
    seen = dict.fromkeys(range(num_classes), 0)
    found = {}
    for sample in read_samples(url, num_classes, lambda bad: None):
        key = (sample.class_id, seen[sample.class_id])
        seen[sample.class_id] += 1
        if key in wanted:
            found[sample.class_id, wanted[key]] = encode_png(np.asarray(sample.image))
    return found
