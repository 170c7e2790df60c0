"""Tasks that look at whole classes of a latent log: what each of them reads, and the memory it asks of Ray."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from ddoq_ray.core.sizing import GIB
from ddoq_ray.storage.latent_index import LatentIndex
from ddoq_ray.storage.latent_log import FILE_BYTES

PART = 0.25  # of a node's memory that the latents of one task may take
BASE_BYTES = 256 << 20  # of the worker's process
ROUND_BYTES = 128 << 20  # so that most tasks ask for the same: Ray keeps a queue for each kind of demand
UNKNOWN_BYTES = 2 * GIB  # of latents, where no node says what memory it has


@dataclass(frozen=True)
class Reading:
    """One task's reading of the log.

    Attributes:
        parts: Which of the parts that were asked for.
        shards: int32, the shards that hold their classes, ascending.
        options: What the task asks of Ray beside its CPU.
    """

    parts: tuple[int, ...]
    shards: npt.NDArray[np.int32]
    options: dict[str, Any]


def readings(
    index: LatentIndex, parts: Sequence[Collection[int]], dim: int, nodes: Sequence[float] | None = None
) -> list[Reading]:
    """The tasks for all of `parts`, which are lists of classes; a part without latents is in one too.

    Args:
        dim: Flattened latent dimension.
        nodes: Memory of every node in bytes; by default what those of the cluster say that have a CPU for a task.
    """
    if nodes is None:
        there = [n["Resources"] for n in ray.nodes() if n["Alive"]]
        nodes = [room.get("memory", 0.0) for room in there if room.get("CPU")]
    least = min((m for m in nodes if m), default=0.0)  # a task may come to any of them
    most = int(PART * least) if least else UNKNOWN_BYTES
    counts = index.counts
    made = []
    for group in index.passes(parts, 2 * dim, most):
        sizes = [int(counts[c]) for part in group for c in parts[part] if c < len(counts)]
        # In fp16, once more while a class's pieces are joined, that class in float32 and in float64, and one file.
        need = BASE_BYTES + 2 * FILE_BYTES + 2 * dim * sum(sizes) + 14 * dim * max(sizes, default=0)
        need += -need % ROUND_BYTES
        shards = index.holding([c for part in group for c in parts[part]])
        made.append(Reading(tuple(group), shards, {"memory": int(min(need, least))} if least else {}))
    return made
