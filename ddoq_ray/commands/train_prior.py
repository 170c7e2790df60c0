"""``ddoq-ray train-prior``: a small latent diffusion prior of one's own, in diffusers' folder format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ddoq_ray.commands.training_data import load_training_data
from ddoq_ray.config.compose import load_command
from ddoq_ray.config.dataset import DatasetConfig
from ddoq_ray.config.schema import option, require
from ddoq_ray.models.train_prior import PriorTraining, train_prior
from ddoq_ray.runtime import Progress, say


@dataclass(frozen=True)
class TrainPriorConfig:
    dataset: DatasetConfig = option(DatasetConfig, "the images to learn")
    out: str = option("prior", "folder to write")
    image_size: int = option(16, "side of the images, in pixels")
    device: str = option("cpu", "cpu or cuda")
    threads: int = option(2, "torch threads")
    overwrite: bool = option(False, "replace the folder when it exists")
    training: PriorTraining = option(PriorTraining, "networks, steps, rates")

    def __post_init__(self) -> None:
        require(self.image_size >= 8, f"image_size={self.image_size}: expected 8 or more")


def main(overrides: Sequence[str]) -> None:
    """Train and save a prior.

    Raises:
        ValueError: For bad data, a folder in the way, or an invalid key.
    """
    import torch

    config = load_command(TrainPriorConfig, overrides)
    torch.set_num_threads(config.threads)
    (images, class_ids), _, classes = load_training_data(config.dataset, config.image_size)
    say(f"train-prior {len(images):,} images of {len(classes)} classes at {config.image_size} px")
    with StepBars() as bars:
        facts = train_prior(
            images, class_ids, classes, config.out, config=config.training, device=config.device,
            on_progress=bars, overwrite=config.overwrite,
        )
    say(f"train-prior {config.out}: {facts}")


class StepBars:
    """Progress of the training functions, which report (phase, step, steps, loss)."""

    def __init__(self) -> None:
        self.phase, self.seen = "", 0
        self.bar: Progress | None = None

    def __call__(self, phase: str, step: int, steps: int, loss: float) -> None:
        if phase != self.phase:
            self.close()
            self.phase, self.bar, self.seen = phase, Progress(phase[:10], steps, "steps"), 0
        assert self.bar is not None
        self.bar.advance(step - self.seen, f"loss {loss:.4g}")
        self.seen = step

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def __enter__(self) -> StepBars:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
