"""``ddoq-ray train-teacher``: a classifier of one's own that labels views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ddoq_ray.commands.train_prior import StepBars
from ddoq_ray.commands.training_data import load_training_data
from ddoq_ray.config.compose import load_command
from ddoq_ray.config.dataset import DatasetConfig
from ddoq_ray.config.schema import option, require
from ddoq_ray.models.train_teacher import TeacherTraining, train_teacher
from ddoq_ray.runtime import say


@dataclass(frozen=True)
class TrainTeacherConfig:
    dataset: DatasetConfig = option(DatasetConfig, "the images to learn")
    out: str = option("teacher", "folder to write")
    image_size: int = option(16, "side of the images, in pixels")
    device: str = option("cpu", "cpu or cuda")
    threads: int = option(2, "torch threads")
    overwrite: bool = option(False, "replace the folder when it exists")
    training: TeacherTraining = option(TeacherTraining, "network, epochs, rates, views")

    def __post_init__(self) -> None:
        require(self.image_size >= 8, f"image_size={self.image_size}: expected 8 or more")


def main(overrides: Sequence[str]) -> None:
    """Train and save a classifier; its accuracy on the held-out images is printed and recorded.

    Raises:
        ValueError: For bad data, a folder in the way, or an invalid key.
    """
    import torch

    config = load_command(TrainTeacherConfig, overrides)
    torch.set_num_threads(config.threads)
    (images, class_ids), held_out, classes = load_training_data(config.dataset, config.image_size)
    say(f"train-teacher {len(images):,} images of {len(classes)} classes at {config.image_size} px")
    with StepBars() as bars:
        facts = train_teacher(
            images, class_ids, classes, config.out, config=config.training, held_out=held_out, device=config.device,
            on_progress=bars, overwrite=config.overwrite,
        )
    say(f"train-teacher {config.out}: {facts}")
