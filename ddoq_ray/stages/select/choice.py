"""What a way to choose real images is given, and what it gives back.

The module of a method has one function, ``choose(choice) -> Selection``. One that looks at whole classes of latents
gives its task to `of_class_latents`; one that asks the teacher gives its units to `scoring.scored`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from ddoq_ray.config import RunConfig
from ddoq_ray.execution.class_tasks import Reading, readings
from ddoq_ray.execution.run import Run
from ddoq_ray.execution.workers import Progress
from ddoq_ray.storage.latent_index import LatentIndex
from ddoq_ray.storage.layout import Place

Picks = dict[int, npt.NDArray[np.int64]]  # class_id -> positions among its usable images, in the log's order


@dataclass(frozen=True)
class Mosaic:
    """Images that are put together of crops: image i of K has crop (i + j K) mod M in tile j, row by row.

    Attributes:
        factor: Tiles along an edge.
        side: Of an image, in pixels.
        images: class_id -> K.
        boxes: class_id -> int64 [M, 4], left, upper, right, lower pixel of each pick's crop.
    """

    factor: int
    side: int
    images: dict[int, int]
    boxes: dict[int, npt.NDArray[np.int64]]

    def parts(self, class_id: int, image: int) -> list[int]:
        """The ranks of the crops of an image, tile by tile."""
        images, crops = self.images[class_id], len(self.boxes[class_id])
        return [(image + tile * images) % crops for tile in range(self.factor**2)]


@dataclass(frozen=True)
class Selection:
    """What was chosen.

    Attributes:
        picks: The real images.
        weights: class_id -> float64, masses of its images that sum to 1; a class that is not in it weighs all alike.
        mosaic: How images are put together of crops of the picks; None: each pick is an image.
    """

    picks: Picks
    weights: dict[int, npt.NDArray[np.float64]] = field(default_factory=dict)
    mosaic: Mosaic | None = None

    @property
    def images(self) -> dict[int, int]:
        """class_id -> images of the set, ascending."""
        made = self.mosaic.images if self.mosaic is not None else {c: len(p) for c, p in self.picks.items()}
        return dict(sorted(made.items()))

    def parts(self, class_id: int, image: int) -> list[int]:
        """The ranks of the picks that an image is made of."""
        return [image] if self.mosaic is None else self.mosaic.parts(class_id, image)

    def weight(self, class_id: int, image: int) -> float:
        own = self.weights.get(class_id)
        return 1 / self.images[class_id] if own is None else float(own[image])


@dataclass(frozen=True)
class Choice:
    """What is to be chosen from.

    Attributes:
        method: The method's name.
        index: Which shards of the latent log hold which classes.
        counts: class_id -> usable images, of every class.
        at: Where the method's parts are.
        draw: Which draw of a method that draws anew for each seed.
        identity: Digest of what the set follows from.
    """

    run: Run
    method: str
    index: LatentIndex
    counts: dict[int, int]
    at: Place
    draw: int
    identity: str

    @property
    def wanted(self) -> dict[int, int]:
        """class_id -> images to choose."""
        return wanted_images(self.run.config, self.counts)


def wanted_images(config: RunConfig, counts: dict[int, int]) -> dict[int, int]:
    """class_id -> images to choose: ipc, or all of a smaller class, or none of it (small_class=drop)."""
    kept = {c: n for c, n in sorted(counts.items()) if n > 0 and (n >= config.ipc or config.small_class != "drop")}
    return {c: min(config.ipc, n) for c, n in kept.items()}


def of_class_latents(
    choice: Choice, classes: Sequence[Collection[int]], dim: int, submit: Callable[[Reading], Any]
) -> Selection:
    """What tasks chose that each read the latents of some classes.

    Args:
        classes: Parts, as lists of classes, that a task takes whole.
        dim: Flattened latent dimension.
        submit: Starts the task of a reading; its result is Picks.
    """
    refs = [(len(reading.parts), submit(reading)) for reading in readings(choice.index, classes, dim)]
    picks: Picks = {}
    with Progress(choice.method, sum(parts for parts, _ in refs), "codebook parts") as progress:
        for parts, ref in refs:
            picks |= ray.get(ref)
            progress.advance(parts)
    return Selection(picks)
