"""`random`: drawn without repeats, anew for each student."""

from __future__ import annotations

import numpy as np

from ddoq_ray.config import RunConfig
from ddoq_ray.core.rng import philox
from ddoq_ray.stages.select.choice import Choice, Picks, Selection, wanted_images


def choose(choice: Choice) -> Selection:
    return Selection(draw(choice.run.config, choice.counts, choice.draw))


def draw(config: RunConfig, counts: dict[int, int], draw_index: int) -> Picks:
    """For each class the positions, among its usable images in the log's order, of a random draw without repeats."""
    picks = {}
    for class_id, size in wanted_images(config, counts).items():
        rng = philox(config.seed, "random", draw_index, class_id)
        picks[class_id] = np.sort(rng.choice(counts[class_id], size=size, replace=False))
    return picks
