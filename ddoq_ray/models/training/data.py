"""What a network is trained on, and where it goes.

Shape suffixes: N images, S image size.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

# Called with (phase, step, steps, loss) now and then.
Progress = Callable[[str, int, int, float], None]


@dataclass(frozen=True)
class TrainingSet:
    """Labelled images.

    Attributes:
        images: uint8 [N, 3, S, S].
        class_ids: int64 [N], labels 0 .. len(classes) - 1.
        classes: names in label order.
        held_out: (images, class_ids) that are only looked at when all is done; nothing is chosen by them.
    """

    images: npt.NDArray[Any]
    class_ids: npt.NDArray[Any]
    classes: Sequence[str]
    held_out: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None = None

    def check(self) -> None:
        """Raise a ValueError for images and labels that do not fit."""
        _check(self.images, self.class_ids, self.classes)
        if self.held_out is not None:
            _check(*self.held_out, self.classes)

    def order(self) -> tuple[npt.NDArray[np.int64], str]:
        """(rows int64 [N] by class, then by content, a digest): the shards' order plays no part in a training."""
        keys = [
            (int(c), hashlib.blake2b(x.tobytes(), digest_size=16).digest())
            for c, x in zip(self.class_ids, self.images, strict=True)
        ]
        rows = sorted(range(len(keys)), key=keys.__getitem__)
        digest = hashlib.blake2b(digest_size=8)
        for row in rows:
            digest.update(keys[row][0].to_bytes(8, "little") + keys[row][1])
        return np.asarray(rows, dtype=np.int64), digest.hexdigest()


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
