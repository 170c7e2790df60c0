"""``ddoq-ray train-prior``: a small latent diffusion prior of one's own, in diffusers' folder format."""

from __future__ import annotations

from typing import Any

from ddoq_ray.commands.data_parallel import Train
from ddoq_ray.commands.training import classifiers, train
from ddoq_ray.config.compose import load_config
from ddoq_ray.config.network_training import DIGITS_SIDE, TrainPriorConfig
from ddoq_ray.config.presets import BROUGHT
from ddoq_ray.models.priors.base import PUBLISHED_GUIDANCE
from ddoq_ray.models.training.data import Destination, Progress, TrainingSet
from ddoq_ray.models.training.prior import train_prior
from ddoq_ray.models.training.ranks import Ranks


def main(command: TrainPriorConfig) -> None:
    """Train and save a prior.

    Raises:
        ValueError: For bad data, or a folder in the way.
    """
    train(command, "train-prior", prepared)


def prepared(command: TrainPriorConfig) -> Train:
    """What trains it."""
    seen_by = classifiers(command.perceptual, command.judge)
    out = Destination(command.out, overwrite=command.overwrite, run_by=run_by(command))

    def trained(data: TrainingSet, ranks: Ranks, on_progress: Progress) -> dict[str, Any]:
        return train_prior(data, out, command.training, seen_by=seen_by, ranks=ranks, on_progress=on_progress)

    return trained


def run_by(command: TrainPriorConfig) -> dict[str, Any]:
    """What a run of this prior takes, when its path is given, unless other keys are: `ddoq_prior.json` holds it.

    Digits take what was measured for them; for other images nothing was: D4M's strength, and guidance only where
    labels were dropped, since the null label has learnt nothing otherwise.
    """
    digits = command.dataset.path is None and command.side == DIGITS_SIDE
    config = load_config([] if digits else ["prior=own", "prior.path=trained"])
    made = {group: {key: getattr(getattr(config, group), key) for key in keys} for group, keys in BROUGHT.items()}
    if made["synthesizer"]["guidance"] is None:
        made["synthesizer"]["guidance"] = PUBLISHED_GUIDANCE if command.training.label_dropout else 1.0
    made["encoder"]["resize"] = command.resize
    return made
