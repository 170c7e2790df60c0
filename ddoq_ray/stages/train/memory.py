"""What the row `full` needs of memory, refused before anything starts: it holds all the real images, whole."""

from __future__ import annotations

from collections.abc import Sequence

import ray

from ddoq_ray.config import RunConfig
from ddoq_ray.stages.prepare.step import Data

GB = 10**9
PART = 0.5  # of a node's memory that the images may take: beside them are students, validation images, other actors


def full_bytes(config: RunConfig, images: int) -> int:
    """Bytes of one training worker's copy of all the real images, at the side at which they are kept."""
    side = config.protocol.stored_side(config.student.image_size)
    return images * 3 * side * side


def check_full(config: RunConfig, data: Data, memory: Sequence[float] | None = None) -> None:
    """Refuse the row `full` where its images do not fit the memory of the nodes that train.

    Args:
        memory: Bytes that each node offers; by default those of the cluster that can take a training worker.

    Raises:
        ValueError: With what is needed, what is there, and the keys to change.
    """
    if "full" not in config.methods:
        return
    nodes = _nodes(config) if memory is None else list(memory)
    if not nodes:
        return  # nothing that could train is there yet; a cluster that grows will be asked by Ray
    workers = config.cluster.trainer.workers
    on_one = -(-workers // len(nodes))  # workers on a node, at least on the fullest
    images = sum(shard.samples for shard in data.train)
    need, room = full_bytes(config, images) * on_one, PART * min(nodes)
    if need > room:
        side = config.protocol.stored_side(config.student.image_size)
        copies = f", {on_one} copies on a node" if on_one > 1 else ""
        raise ValueError(
            f"the row `full` trains on all {images:,} real images, and holds them in memory: {need / GB:,.1f} GB "
            f"({images:,} x 3 x {side} x {side} bytes{copies}). A node offers {min(nodes) / GB:,.1f} GB, of which "
            f"{room / GB:,.1f} GB may go to them. Leave `full` out (baselines=[ddoq-sqrt,d4m,random]), or train it on "
            "nodes with more memory"
        )


def _nodes(config: RunConfig) -> list[float]:
    """Memory of the nodes that a training worker fits."""
    wanted = {"CPU": config.cluster.trainer.num_cpus, "GPU": config.cluster.trainer.num_gpus}
    resources = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    return [r["memory"] for r in resources if "memory" in r and all(r.get(k, 0.0) >= v for k, v in wanted.items())]
