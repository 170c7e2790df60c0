"""An image set as teachers see it: decoded once, kept by Ray, and mapped by all actors of a node, not held by each."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray

from ddoq_ray.data.image_set import load_image_arrays
from ddoq_ray.execution.workers import on_a_working_node
from ddoq_ray.storage import layout
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.layout import image_tar
from ddoq_ray.storage.manifests import ImageShard


class SharedImages:
    """The pixels of an image set, uint8 [N, 3, H, W], in Ray's object store.

    They are decoded when the first unit that needs them is sent to a worker, since a run may have many sets, and kept
    until `release`. What is sent is the reference; Ray decodes them again should their node be lost.
    """

    def __init__(self, decode: Callable[[], Any] | None, ref: Any = None) -> None:
        self._decode, self._ref = decode, ref

    def __reduce__(self) -> tuple[Any, ...]:
        if self._ref is None:
            assert self._decode is not None
            self._ref = self._decode()
        return SharedImages, (None, self._ref)

    def array(self) -> np.ndarray:
        """The pixels, where they were sent to: read-only memory that all processes of the node share."""
        pixels: np.ndarray = ray.get(self._ref)
        return pixels

    def release(self) -> None:
        """Let Ray drop them."""
        self._ref = None


def shared_images(images: Folder, shards: Sequence[ImageShard], size: int, side: int) -> SharedImages:
    """The set of a folder.

    Args:
        shards: Of its manifest.
        size, side: As `load_image_arrays` has them.
    """
    # No CPU: teachers may hold all there are, and wait for this. Again however often nodes are lost that hold it.
    task = ray.remote(num_cpus=0, max_retries=-1)(decoded)
    return SharedImages(lambda: task.options(**on_a_working_node()).remote(images, list(shards), size, side))


def decoded(images: Folder, shards: Sequence[ImageShard], size: int, side: int) -> np.ndarray:
    """The pixels, from tars that have the digests of the manifest; decoded into a mapped file, not into memory.

    Raises:
        ValueError: A tar is gone or has other bytes, or a picture cannot be read.
    """
    for shard in shards:
        check_shard(images, shard)
    tars = [images.path(image_tar(shard["name"])) for shard in shards]
    return np.asarray(load_image_arrays(tars, size, side, _mapped).images)


def check_shard(images: Folder, shard: ImageShard) -> None:
    """Read every byte of an image shard.

    Raises:
        ValueError: It is gone, or has other bytes than were written.
    """
    path = images.path(image_tar(shard["name"]))
    mend = f"bring it back, or remove it and {images.path(layout.MANIFEST)} and run the stage again that made it"
    try:
        digest, size = images.digest(image_tar(shard["name"]))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing, with {shard['images']} images; {mend}") from None
    if digest != shard["sha256"]:
        raise ValueError(
            f"{path} is damaged: it has {size:,} bytes of the {shard['bytes']:,} that were written, or others; {mend}"
        )


def _mapped(shape: tuple[int, ...]) -> np.ndarray:
    with tempfile.TemporaryFile() as f:  # its room is given back with the array
        return np.memmap(f, np.uint8, "w+", shape=shape)
