"""What the prior's autoencoder loses of what the teacher needs, on real validation images, before anything is made.

Every synthesized image comes out of the decoder: what a reconstruction of a real image lacks, no start, guidance or
number of candidates brings back. Sharpness does not show it, and PSNR hides it.
"""

from __future__ import annotations

from typing import Any

from ddoq_ray.config import RunConfig
from ddoq_ray.execution.workers import say
from ddoq_ray.stages.evaluate.validation import Validation

LEAST = 64  # images, whatever they cost: fewer say little
PIXELS = {"cpu": 512 * 64**2, "cuda": 512 * 256**2}  # about as much as is encoded and decoded in seconds


def sample_of(validation: Validation, images: int, shards: int = 16) -> Validation:
    """Some of the validation images: of shards that lie evenly among all, and of each only its first ones."""
    count = min(shards, len(validation.urls))
    at = [i * len(validation.urls) // count for i in range(count)]
    few = -(-images // max(count, 1))
    return Validation(
        tuple(validation.urls[i] for i in at),
        tuple(min(few, validation.samples[i]) for i in at),
        validation.num_classes,
        validation.crop,
    )


def say_kept(config: RunConfig, facts: dict[str, Any]) -> None:
    """What the check found, in a line; a second one where too much is lost."""
    real, again = facts["top1_real_pct"], facts["top1_reconstructed_pct"]
    say(
        f"label      autoencoder: the teacher's top-1 is {again:.1f} % on reconstructions of {facts['images']:,} real "
        f"validation images, {real:.1f} % on the images themselves ({facts['psnr_db']:.1f} dB)"
    )
    least = config.teacher.min_kept
    if again < least * real:
        say(
            f"label      this autoencoder loses what the teacher needs: {100 * again / real:.0f} % of its top-1 is"
            f" left, less than teacher.min_kept={least:g} asks for, and every synthesized image passes through it. "
            "Take a prior whose autoencoder is made for images of this size, or train one with the teacher's features "
            "(`ddoq-ray train-prior ... perceptual=TEACHER`); more latent channels or less compression help most"
        )
