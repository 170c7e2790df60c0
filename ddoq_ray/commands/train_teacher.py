"""``ddoq-ray train-teacher``: a classifier of one's own that labels views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ddoq_ray.commands.training import TrainingCommand, train
from ddoq_ray.config.compose import load_command
from ddoq_ray.config.schema import option
from ddoq_ray.models.training.teacher import TeacherTraining, train_teacher


@dataclass(frozen=True)
class TrainTeacherConfig(TrainingCommand):
    training: TeacherTraining = option(TeacherTraining, "network, epochs, rates, views")


def main(overrides: Sequence[str]) -> None:
    """Train and save a teacher. Its accuracy on the held-out images is printed and recorded.

    Raises:
        ValueError: For bad data, a folder in the way, or an invalid key.
    """
    command = load_command(TrainTeacherConfig, overrides)
    train(command, train_teacher, "train-teacher", config=command.training, held_out=None)
