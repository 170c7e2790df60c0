"""``ddoq-ray train-teacher``: a classifier of one's own that labels views."""

from __future__ import annotations

from typing import Any

from ddoq_ray.commands.data_parallel import Train
from ddoq_ray.commands.training import train
from ddoq_ray.commands.training_images import Through
from ddoq_ray.config.network_training import TrainTeacherConfig
from ddoq_ray.config.schema import require
from ddoq_ray.models.priors.load import load_prior
from ddoq_ray.models.training.data import Destination, Progress, TrainingSet
from ddoq_ray.models.training.ranks import Ranks
from ddoq_ray.models.training.teacher import train_teacher


def main(command: TrainTeacherConfig) -> None:
    """Train and save a teacher. Its accuracy on the held-out images is printed and recorded.

    Raises:
        ValueError: For bad data, or a folder in the way.
    """
    train(command, "train-teacher", prepared, _through(command))


def _through(command: TrainTeacherConfig) -> Through | None:
    if command.through is None:
        return None
    prior = load_prior(command.through)
    require(
        prior.image_size == command.side,
        f"through={command.through}: its images have {prior.image_size} px, and image_size={command.side}",
    )
    return Through(prior.autoencoder, prior.id)


def prepared(command: TrainTeacherConfig) -> Train:
    """What trains it."""
    through = {} if command.through is None else {"through": load_prior(command.through).id}
    out = Destination(command.out, overwrite=command.overwrite, extra=through)

    def trained(data: TrainingSet, ranks: Ranks, on_progress: Progress) -> dict[str, Any]:
        return train_teacher(data, out, command.training, ranks=ranks, on_progress=on_progress)

    return trained
