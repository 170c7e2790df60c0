"""A distilled dataset on disk, read back: images, labels and weights.

The folder is a plain WebDataset (``<class_id>-<centroid_id>.{png,cls,json}``), so that the webdataset library and
Hugging Face datasets read it too; this module is the short way.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np

from ddoq_ray.artifacts import Folder
from ddoq_ray.samples import decode_rgb, list_shards, to_square


@dataclass(frozen=True)
class DistilledImage:
    """One image of a distilled set; `weight` is the mass of its Voronoi cell and sums to 1 in a class."""

    key: str
    class_id: int
    centroid_id: int
    weight: float
    prompt: str
    data: bytes


def read_images(shards: list[str]) -> Iterator[DistilledImage]:
    """The images of image shards, in order.

    Raises:
        ValueError: When a shard is not one that `synthesize` (or a baseline) wrote.
    """
    for shard in shards:
        try:
            yield from _read_shard(shard)
        except tarfile.ReadError as error:
            raise ValueError(f"{shard}: {error}; expected a whole tar of images, made by synthesize") from error


def _read_shard(shard: str) -> Iterator[DistilledImage]:
    with fsspec.open(shard, "rb") as f, tarfile.open(fileobj=f, mode="r:") as tar:
        members: dict[str, bytes] = {}
        key = ""
        for info in tar:
            stem, _, extension = info.name.partition(".")
            if stem != key and members:
                yield _image(shard, key, members)
                members = {}
            key = stem
            member = tar.extractfile(info)
            members[extension] = member.read() if member else b""
        if members:
            yield _image(shard, key, members)


def _image(shard: str, key: str, members: dict[str, bytes]) -> DistilledImage:
    picture = next((members[e] for e in members if e not in ("cls", "json")), None)
    if picture is None or "json" not in members or "cls" not in members:
        raise ValueError(
            f"{shard}: sample {key} has {sorted(members)}; a distilled sample has an image, a .cls and a .json"
        )
    facts = json.loads(members["json"])
    if "centroid_id" not in facts or "weight" not in facts:
        raise ValueError(f"{shard}: {key}.json has {sorted(facts)}; a distilled sample has centroid_id and weight")
    return DistilledImage(
        key, int(members["cls"]), int(facts["centroid_id"]), float(facts["weight"]), facts.get("prompt", ""), picture
    )


@dataclass(frozen=True)
class ImageArrays:
    """An image set in memory.

    Attributes:
        images: uint8 [N, 3, S, S].
        class_ids: int64 [N].
        weights: float64 [N], companion weights; they sum to 1 within each class.
    """

    images: np.ndarray
    class_ids: np.ndarray
    weights: np.ndarray


def load_image_arrays(shards: list[str], size: int) -> ImageArrays:
    """Decode a distilled set once, at the size that its reader works at."""
    images, class_ids, weights = [], [], []
    for item in read_images(shards):
        images.append(to_square(decode_rgb(item.data), size).transpose(2, 0, 1))
        class_ids.append(item.class_id)
        weights.append(item.weight)
    if not images:
        raise ValueError(f"no image in {shards[:3]}; expected image shards made by synthesize")
    return ImageArrays(np.stack(images), np.asarray(class_ids, np.int64), np.asarray(weights, np.float64))


class DistilledDataset:
    """A torch map-style dataset of (image, label, weight).

    `image` is a uint8 tensor [3, H, W] (or what `transform` makes of the PIL picture), `label` the class_id,
    `weight` K times the mass of the image's Voronoi cell: mean 1 in a class, ready to multiply a loss
    (Algorithm 4, line 3).
    """

    def __init__(self, shards: list[str], transform: Callable[[Any], Any] | None = None) -> None:
        self.items = list(read_images(shards))
        self.transform = transform
        per_class: dict[int, int] = {}
        for item in self.items:
            per_class[item.class_id] = per_class.get(item.class_id, 0) + 1
        self.ipc = per_class

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Any, int, float]:
        import torch

        item = self.items[index]
        picture = decode_rgb(item.data)
        image = self.transform(picture) if self.transform else torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        return image, item.class_id, item.weight * self.ipc[item.class_id]


def load(path: str, transform: Callable[[Any], Any] | None = None) -> DistilledDataset:
    """Load a distilled dataset.

    Args:
        path: A run directory, its images/ folder, or a glob of image shards; local or a URL.
        transform: Applied to each PIL picture; by default it becomes a uint8 tensor [3, H, W].

    Raises:
        ValueError: When there are no image shards.
    """
    folder = Folder(path)
    if folder.names("images/*.tar"):
        path = folder.path("images")
    return DistilledDataset(list_shards(path, key="path"), transform)
