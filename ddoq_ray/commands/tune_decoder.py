"""``ddoq-ray tune-decoder``: the decoder of a prior made to keep what a classifier sees; latents stay valid."""

from __future__ import annotations

from ddoq_ray.commands.training import classifiers, train
from ddoq_ray.config.network_training import TuneDecoderConfig
from ddoq_ray.models.training.decoder import Tuned, tune_decoder


def main(command: TuneDecoderConfig) -> None:
    """Tune, and save a copy of the prior.

    Raises:
        ValueError: For bad data, a prior of another kind, or a folder in the way.
    """
    seen_by = classifiers(command.perceptual, command.judge)
    train(command, tune_decoder, "tune-decoder", source=Tuned(command.source, seen_by))
