"""`herding`: images whose mean latent follows their class's mean, chosen greedily (Welling, 2009)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from ddoq_ray.execution.class_tasks import Reading
from ddoq_ray.stages.select.choice import Choice, Picks, Selection, of_class_latents
from ddoq_ray.storage.class_latents import class_latents
from ddoq_ray.storage.codebook import part_classes
from ddoq_ray.storage.folder import Folder


def choose(choice: Choice) -> Selection:
    run, wanted = choice.run, choice.wanted
    dim = int(np.prod(run.networks.latent_shape))
    parts = part_classes(len(run.data.classes), run.config.ipc, dim)
    classes = [[c for c in part if c in wanted] for part in parts]

    def submit(reading: Reading) -> Any:
        mine = {c: wanted[c] for part in reading.parts for c in classes[part]}
        return _herding.options(**reading.options).remote(run.latents, reading.shards, mine)

    return of_class_latents(choice, classes, dim, submit)


@ray.remote(num_cpus=0.5)
def _herding(latents: Folder, shards: npt.NDArray[np.int32], wanted: dict[int, int]) -> Picks:
    from ddoq_ray.core.baselines import herding  # in the worker only: it brings faiss and scikit-learn

    return {c: herding(x, wanted[c]) for c, x in class_latents(latents, shards, wanted)}
