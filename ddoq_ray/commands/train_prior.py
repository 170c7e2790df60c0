"""``ddoq-ray train-prior``: a small latent diffusion prior of one's own, in diffusers' folder format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ddoq_ray.commands.training import TrainingCommand, train
from ddoq_ray.config.compose import load_command
from ddoq_ray.config.schema import option
from ddoq_ray.models.train_prior import PriorTraining, train_prior


@dataclass(frozen=True)
class TrainPriorConfig(TrainingCommand):
    training: PriorTraining = option(PriorTraining, "networks, steps, rates")


def main(overrides: Sequence[str]) -> None:
    """Train and save a prior.

    Raises:
        ValueError: For bad data, a folder in the way, or an invalid key.
    """
    command = load_command(TrainPriorConfig, overrides)
    train(command, train_prior, "train-prior", config=command.training)
