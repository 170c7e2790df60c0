"""``ddoq-ray tune-decoder``: the decoder of a prior made to keep what a classifier sees; latents stay valid."""

from __future__ import annotations

from typing import Any

from ddoq_ray.commands.data_parallel import Train
from ddoq_ray.commands.training import classifiers, train
from ddoq_ray.config.network_training import TuneDecoderConfig
from ddoq_ray.models.training.data import Destination, Progress, TrainingSet
from ddoq_ray.models.training.decoder import Tuned, tune_decoder
from ddoq_ray.models.training.ranks import Ranks


def main(command: TuneDecoderConfig) -> None:
    """Tune, and save a copy of the prior.

    Raises:
        ValueError: For bad data, a prior of another kind, or a folder in the way.
    """
    train(command, "tune-decoder", prepared)


def prepared(command: TuneDecoderConfig) -> Train:
    """What tunes it."""
    source = Tuned(command.source, classifiers(command.perceptual, command.judge))
    out = Destination(command.out, overwrite=command.overwrite)

    def tuned(data: TrainingSet, ranks: Ranks, on_progress: Progress) -> dict[str, Any]:
        return tune_decoder(data, out, command.training, source=source, ranks=ranks, on_progress=on_progress)

    return tuned
