"""What a way to choose real images is given, and what it gives back.

The module of a method has one function, ``choose(choice) -> Picks``. One that looks at whole classes of latents gives
its task to `of_class_latents`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from ddoq_ray.config import RunConfig
from ddoq_ray.execution.class_tasks import Reading, readings
from ddoq_ray.execution.run import Run
from ddoq_ray.execution.workers import Progress
from ddoq_ray.storage.latent_index import LatentIndex

Picks = dict[int, npt.NDArray[np.int64]]  # class_id -> positions among its usable images, in the log's order


@dataclass(frozen=True)
class Choice:
    """What is to be chosen from.

    Attributes:
        method: The method's name.
        index: Which shards of the latent log hold which classes.
        counts: class_id -> usable images, of every class.
        draw: Which draw of a method that draws anew for each seed.
    """

    run: Run
    method: str
    index: LatentIndex
    counts: dict[int, int]
    draw: int

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
) -> Picks:
    """Picks of tasks that each read the latents of some classes.

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
    return picks
