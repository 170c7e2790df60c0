"""What the training commands share: how they begin and end, and their progress."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

from ddoq_ray.commands.data_parallel import Job, Train, train_on_workers
from ddoq_ray.commands.training_images import Through, read_images
from ddoq_ray.config.network_training import TrainingCommand, TrainTeacherConfig
from ddoq_ray.execution.places import check_lasting
from ddoq_ray.execution.processors import slow_bfloat16
from ddoq_ray.execution.workers import Progress, say
from ddoq_ray.models.classifiers import load_classifier
from ddoq_ray.models.folders import check_free
from ddoq_ray.models.training.checkpoints import training_folder
from ddoq_ray.models.training.ranks import Alone
from ddoq_ray.models.training.seen_by import Classifiers


def classifiers(perceptual: str | None, judge: str | None) -> Classifiers:
    """The classifiers at these places."""
    return Classifiers(*(None if path is None else load_classifier(path) for path in (perceptual, judge)))


def train(command: TrainingCommand, name: str, prepare: Callable[[Any], Train], through: Through | None = None) -> None:
    """Read the images and train, showing progress.

    Args:
        command: its keys.
        name: of the command, for lines.
        prepare: loads what the command needs beside the images, and gives what trains. A function of a module: each
            worker calls it.
        through: as `read_images`.

    Raises:
        ValueError: a folder in the way, no GPU where one is asked for, or as `read_images` and what trains.
    """
    import torch

    check_lasting(command.out, "out")
    check_free(command.out, overwrite=command.overwrite)
    if command.device == "cuda" and command.workers == 1 and not torch.cuda.is_available():
        raise ValueError("device=cuda: torch sees no GPU here; leave it out, or train where there is one")
    torch.set_num_threads(command.threads)
    trained = prepare(command)
    read = read_images(command, through)
    data = read.open()
    say(f"{name} {len(data.images):,} images of {len(data.classes)} classes at {command.side} px")
    _say_slow(command, name)
    with StepBars() as bars:
        if command.workers > 1:
            facts = train_on_workers(name, Job(prepare, command, read), bars)
        else:
            facts = trained(data, Alone(command.device), bars)
    shutil.rmtree(training_folder(command.out), ignore_errors=True)
    say(f"{name} {command.out}: {facts}")


def _say_slow(command: Any, name: str) -> None:
    """One line where this processor is slower at the arithmetic that is asked for. Autoencoders have channels_last."""
    words = slow_bfloat16(channels_last=not isinstance(command, TrainTeacherConfig))
    if command.device == "cpu" and command.training.precision == "bfloat16" and words:
        say(f"{name} training.precision=bfloat16 on {words}")


class StepBars:
    """Progress of the training functions, which report (phase, step, steps, loss).

    A phase that ends by time has as many steps as its newest report expects.
    """

    def __init__(self) -> None:
        self.phase, self.seen = "", 0
        self.bar: Progress | None = None

    def __call__(self, phase: str, step: int, steps: int, loss: float | None) -> None:
        if phase != self.phase:
            self.close()
            unit = "images" if loss is None else "steps"
            self.phase, self.bar, self.seen = phase, Progress(phase[:10], steps, unit), 0
        assert self.bar is not None
        self.bar.expect(steps)
        self.bar.advance(step - self.seen, "" if loss is None else f"loss {loss:.4g}")
        self.seen = step

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def __enter__(self) -> StepBars:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
