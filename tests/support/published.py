"""The bytes that a plan says of the published experiments, without their data and networks."""

from __future__ import annotations

import numpy as np

from ddoq_ray import pipeline
from ddoq_ray.config.compose import load_config
from ddoq_ray.execution.networks import Networks
from ddoq_ray.stages.sizes import Sizes
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.prepared import Data
from ddoq_ray.storage.records import ClassCounts, ClassInfo, ShardInfo

# experiment -> training images, classes, validation images; latent shape, side in pixels
SHAPES = {
    "imagenet-1k-sd": (1_281_167, 1_000, 50_000, (4, 64, 64), 512),
    "imagenet-1k-dit": (1_281_167, 1_000, 50_000, (4, 32, 32), 256),
    "imagenet-21k-p": (11_060_223, 10_450, 522_500, (4, 64, 64), 512),
}


def evenly(images: int, classes: int) -> tuple[ShardInfo, ...]:
    """A shard a class, all alike but for the rest."""
    counts = np.full(classes, images // classes)
    counts[: images % classes] += 1
    return tuple(ShardInfo(f"/{c}.tar", n, 1, ClassCounts({c: n}), "") for c, n in enumerate(counts.tolist()))


def sizes_of(experiment: str, ipc: int) -> Sizes:
    """Of the experiment on data and networks of its published shapes."""
    images, classes, val, shape, side = SHAPES[experiment]
    keys = [f"experiment={experiment}", "dataset.path=/a/*.tar", "dataset.val_path=/b/*.tar", f"ipc={ipc}"]
    config = load_config(keys)
    listed = tuple(ClassInfo(c, str(c), str(c)) for c in range(classes))
    data = Data(Folder("/none"), listed, evenly(images, classes), evenly(val, classes))
    known = Networks("p", shape, side, None, classes, "t", "resnet18", None, classes, 512, {})
    return Sizes(config, data, known)


def planned(experiment: str, ipc: int) -> tuple[dict[str, float], float]:
    """(GB by kind of step, GB of one set's labels as logits)."""
    sizes, made = sizes_of(experiment, ipc), dict[str, float]()
    for step in pipeline.steps(sizes.config):
        made[step.name] = made.get(step.name, 0.0) + sizes.of(step) / 1e9
    return made, sizes.labels(sizes.codec_bytes["logits"]) / 1e9
