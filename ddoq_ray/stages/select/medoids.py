"""`medoids`: the real images whose latents are nearest to the centroids of the run's own codebook.

All weigh alike, as these baselines are used elsewhere. (The Voronoi masses of the centroids would not be those of the
medoids: an image is not where its centroid is.) Beside `ddoq-uniform` it tells what synthesis from the same centroids
adds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from ddoq_ray.execution.class_tasks import Reading
from ddoq_ray.stages.cells import own_set
from ddoq_ray.stages.select.choice import Choice, Picks, Selection, of_class_latents
from ddoq_ray.storage.class_latents import class_latents
from ddoq_ray.storage.codebook import ClassRows, parts_with_classes
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.latent_log import noise_of
from ddoq_ray.storage.records import binary_rows


def choose(choice: Choice) -> Selection:
    run = choice.run
    codebook = run.dir / own_set(run.config).codebook
    names, classes, dim = parts_with_classes(codebook)

    def submit(reading: Reading) -> Any:
        mine = {names[part]: classes[part] for part in reading.parts}
        return _medoids.options(**reading.options).remote(run.latents, reading.shards, codebook, mine)

    return of_class_latents(choice, classes, dim, submit)


@ray.remote(num_cpus=0.5)
def _medoids(latents: Folder, shards: npt.NDArray[np.int32], codebook: Folder, parts: dict[str, list[int]]) -> Picks:
    from ddoq_ray.core.baselines import medoids  # in the worker only: it brings faiss and scikit-learn

    books = ClassRows(codebook, parts)
    found = class_latents(latents, shards, [c for classes in parts.values() for c in classes], noise_of(codebook))
    return {c: medoids(x, binary_rows(books.of(c)["centroid"], "<f4")) for c, x in found}
