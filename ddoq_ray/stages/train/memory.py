"""Where a training worker keeps images: on its device, in the node's memory, or in a file on the node's disk.

The rule: on the device where they take at most half of what is free there; else in host memory where the copies of all
workers of the node take at most half of the memory that Ray sees there; else in one file a node, which its first worker
writes and all of them read. The worst place of any rank is that of all. The views are the same bits in each place.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from typing import Literal

from ddoq_ray.config.cluster import TrainerResources

GB = 10**9
PART = 0.5  # of what is free: beside the images are students, validation images, other actors

Where = Literal["device", "host", "file"]
PLACES: tuple[Where, ...] = ("device", "host", "file")


@dataclass(frozen=True)
class Room:
    """What a training worker finds on its node.

    Attributes:
        host: Bytes of memory that the node offers to all.
        device: Bytes that are free on its device; None where the device is the host.
        sharing: Training workers on the node.
        first: Whether this one writes what they share.
        scratch: A folder on the node's disk.
    """

    host: float = float("inf")
    device: float | None = None
    sharing: int = 1
    first: bool = True
    scratch: str = ""

    def place(self, nbytes: int) -> Where:
        """By the rule, for images of so many bytes."""
        if self.device is not None and nbytes <= PART * self.device:
            return "device"
        return "host" if nbytes * self.sharing <= PART * self.host else "file"

    def folder(self, nbytes: int) -> str:
        """The folder for a file of so many bytes.

        Raises:
            ValueError: The disk has no room for it.
        """
        folder = self.scratch or tempfile.gettempdir()
        os.makedirs(folder, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if nbytes > free:
            raise ValueError(
                f"images of {nbytes / GB:,.1f} GB fit neither the trainer's device nor half of the node's memory "
                f"({self.host / GB:,.1f} GB for {self.sharing} workers), and {folder} has {free / GB:,.1f} GB free; "
                "give a folder on a larger local disk as cluster.trainer.scratch, train on nodes with more memory, or "
                "leave `full` out of baselines"
            )
        return folder


def room_here(trainer: TrainerResources) -> Room:
    """What this worker of Ray Train finds; Ray's own figure of memory knows the limits of containers.

    Groups that train side by side may all be on this node.
    """
    import ray
    from ray.train import get_context

    node = ray.get_runtime_context().get_node_id()
    host = next((n["Resources"].get("memory", float("inf")) for n in ray.nodes() if n["NodeID"] == node), float("inf"))
    context = get_context()
    return Room(
        host=host,
        sharing=context.get_local_world_size() * trainer.groups,
        first=context.get_local_rank() == 0,
        scratch=trainer.scratch or "",
    )
