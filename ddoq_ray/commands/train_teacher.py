"""``ddoq-ray train-teacher``: a classifier of one's own that labels views."""

from __future__ import annotations

from typing import Any

from ddoq_ray.commands.data_parallel import Train
from ddoq_ray.commands.training import train
from ddoq_ray.config.network_training import TrainTeacherConfig
from ddoq_ray.models.training.data import Destination, Progress, TrainingSet
from ddoq_ray.models.training.ranks import Ranks
from ddoq_ray.models.training.teacher import train_teacher


def main(command: TrainTeacherConfig) -> None:
    """Train and save a teacher. Its accuracy on the held-out images is printed and recorded.

    Raises:
        ValueError: For bad data, or a folder in the way.
    """
    train(command, "train-teacher", prepared)


def prepared(command: TrainTeacherConfig) -> Train:
    """What trains it."""
    out = Destination(command.out, overwrite=command.overwrite)

    def trained(data: TrainingSet, ranks: Ranks, on_progress: Progress) -> dict[str, Any]:
        return train_teacher(data, out, command.training, ranks=ranks, on_progress=on_progress)

    return trained
