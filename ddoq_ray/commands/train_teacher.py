"""``ddoq-ray train-teacher``: a classifier of one's own that labels views."""

from __future__ import annotations

from ddoq_ray.commands.training import train
from ddoq_ray.config.network_training import TrainTeacherConfig
from ddoq_ray.models.training.teacher import train_teacher


def main(command: TrainTeacherConfig) -> None:
    """Train and save a teacher. Its accuracy on the held-out images is printed and recorded.

    Raises:
        ValueError: For bad data, or a folder in the way.
    """
    train(command, train_teacher, "train-teacher")
