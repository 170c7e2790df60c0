"""What a network is trained on, and where it goes.

Shape suffixes: N images, S image size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ddoq_ray.data.image_file import Images, image_key, order_of

# Called with (phase, step, steps, loss) now and then; the phases latents and judge have images for steps, and no loss.
Progress = Callable[[str, int, int, float | None], None]


@dataclass(frozen=True)
class TrainingSet:
    """Labelled images.

    Attributes:
        images: uint8 [N, 3, S, S].
        class_ids: int64 [N], labels 0 .. len(classes) - 1.
        classes: names in label order.
        held_out: (images, class_ids) that are only looked at when all is done; nothing is chosen by them.
        known_order: what `order` gives, where it was made as the images were read.
    """

    images: npt.NDArray[Any]
    class_ids: npt.NDArray[Any]
    classes: Sequence[str]
    held_out: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None = None
    known_order: tuple[npt.NDArray[np.int64], str] | None = None

    @classmethod
    def mapped(cls, images: Images, classes: Sequence[str], held_out: Images | None) -> TrainingSet:
        """Images that lie in files."""
        held = None if held_out is None else (held_out.images, held_out.class_ids)
        return cls(images.images, images.class_ids, classes, held, (images.order, images.digest))

    def check(self) -> None:
        """Raise a ValueError for images and labels that do not fit."""
        _check(self.images, self.class_ids, self.classes)
        if self.held_out is not None:
            _check(*self.held_out, self.classes)

    def order(self) -> tuple[npt.NDArray[np.int64], str]:
        """(rows int64 [N] by class, then by content, a digest): the shards' order plays no part in a training."""
        if self.known_order is not None:
            return self.known_order
        return order_of(self.class_ids, b"".join(image_key(image) for image in self.images))


def _check(images: npt.NDArray[Any], class_ids: npt.NDArray[Any], classes: Sequence[str]) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3] or images.dtype != np.uint8:
        raise ValueError(f"training: expected images uint8 [N, 3, S, S], got {images.dtype} {images.shape}")
    if class_ids.shape != images.shape[:1] or not np.issubdtype(class_ids.dtype, np.integer):
        raise ValueError(f"training: expected {len(images)} integer labels, got {class_ids.dtype} {class_ids.shape}")
    if len(images) == 0:
        raise ValueError("training: expected at least one image, got none")
    if class_ids.min() < 0 or class_ids.max() >= len(classes):
        raise ValueError(
            f"training: labels must lie in 0 .. {len(classes) - 1}, got {class_ids.min()} .. {class_ids.max()}"
        )


@dataclass(frozen=True)
class Destination:
    """Where a network goes.

    Attributes:
        folder: to write, whole or not at all.
        overwrite: replace an existing one.
        extra: kept in its JSON file beside what is said of the training, such as the data's name.
        run_by: settings of a run that belong to a prior, as groups of keys, kept in its JSON file.
    """

    folder: str | os.PathLike[str]
    overwrite: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)
    run_by: Mapping[str, Any] = field(default_factory=dict)
