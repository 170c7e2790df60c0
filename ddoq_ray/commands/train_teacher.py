"""``ddoq-ray train-teacher``: a classifier of one's own that labels views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ddoq_ray.commands.training import Split, train
from ddoq_ray.config.network_training import TrainTeacherConfig
from ddoq_ray.models.training.teacher import Destination, TeacherData, train_teacher


def main(command: TrainTeacherConfig) -> None:
    """Train and save a teacher. Its accuracy on the held-out images is printed and recorded.

    Raises:
        ValueError: For bad data, or a folder in the way.
    """
    train(command, _learn, "train-teacher", config=command.training, held_out=None)


def _learn(
    images: np.ndarray, class_ids: np.ndarray, classes: Sequence[str], out: str, *, held_out: Split | None, **how: Any
) -> dict[str, Any]:
    """`train_teacher`, called as `train` calls what it trains with."""
    data = TeacherData(images, class_ids, classes, held_out)
    return train_teacher(data, Destination(out, overwrite=how.pop("overwrite")), **how)
