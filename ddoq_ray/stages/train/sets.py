"""What a training worker holds: one image set at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ddoq_ray.config import RunConfig
from ddoq_ray.storage import layout
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.quarantine import Refusal


@dataclass(frozen=True)
class Set:
    """An image set as a student sees it.

    Attributes:
        images: uint8 [N, 3, H, W], a tensor on the worker's device.
        class_ids: int64 [N].
        weights: float64 [N], companion weights; they sum to 1 within each class.
        refused: Real images that could not be read; those of a distilled set are an error.
    """

    images: Any
    class_ids: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float64]
    refused: int = 0


class Sets:
    """The image set of the current row, decoded once: rows of a set follow one another."""

    def __init__(self, run: Folder, config: RunConfig, num_classes: int, device: Any) -> None:
        self.run, self.config, self.num_classes, self.device = run, config, num_classes, device
        self._held: tuple[str | None, Set] | None = None

    def get(self, name: str | None, train_urls: Sequence[str]) -> Set:
        """The set in the folder `name`, or all the real images for None."""
        if self._held is None or self._held[0] != name:
            self._held = None  # the old one goes first
            self._held = (name, self._real(train_urls) if name is None else self._distilled(name))
        return self._held[1]

    @property
    def _side(self) -> int:
        return self.config.protocol.stored_side(self.config.student.image_size)

    def _distilled(self, name: str) -> Set:
        import torch

        from ddoq_ray.data.image_set import load_image_arrays

        images = self.run / name
        shards = [images.path(n) for n in images.names(layout.IMAGE_SHARDS)]
        arrays = load_image_arrays(shards, self.config.student.image_size, self._side)
        return Set(torch.from_numpy(arrays.images).to(self.device), arrays.class_ids, arrays.weights)

    def _real(self, urls: Sequence[str]) -> Set:
        import torch

        from ddoq_ray.data.samples import load_arrays

        bad: list[Refusal] = []
        resize = self.config.encoder.resize
        pixels, class_ids, _ = load_arrays(urls, self._side, self.num_classes, bad.append, resize=resize)
        if len(bad) > self.config.max_bad_fraction * (len(bad) + len(class_ids)):
            raise ValueError(
                f"{len(bad)} of {len(bad) + len(class_ids)} training images cannot be read for the row `full`, more "
                f"than max_bad_fraction={self.config.max_bad_fraction}; the first is {bad[0].name}: {bad[0].reason}"
            )
        per_class = np.bincount(class_ids, minlength=self.num_classes)
        return Set(torch.from_numpy(pixels).to(self.device), class_ids, 1.0 / per_class[class_ids], len(bad))
