"""``ddoq-ray train-prior``: a small latent diffusion prior of one's own, in diffusers' folder format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ddoq_ray.commands.training import DIGITS_SIDE, TrainingCommand, train
from ddoq_ray.config.compose import load_command, load_config
from ddoq_ray.config.presets import BROUGHT
from ddoq_ray.config.schema import option
from ddoq_ray.models.priors.base import PUBLISHED_GUIDANCE
from ddoq_ray.models.training.prior import PriorTraining, train_prior


@dataclass(frozen=True)
class TrainPriorConfig(TrainingCommand):
    training: PriorTraining = option(PriorTraining, "networks, steps, rates")


def main(overrides: Sequence[str]) -> None:
    """Train and save a prior.

    Raises:
        ValueError: For bad data, a folder in the way, or an invalid key.
    """
    command = load_command(TrainPriorConfig, overrides)
    train(command, train_prior, "train-prior", config=command.training, run_by=run_by(command))


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
