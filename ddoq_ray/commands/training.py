"""What the training commands share: the images they read (whole, in one process), their progress."""

from __future__ import annotations

import posixpath
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from ddoq_ray.config.dataset import PACKED
from ddoq_ray.config.network_training import TrainingCommand, TrainPriorConfig, TrainTeacherConfig, TuneDecoderConfig
from ddoq_ray.config.schema import require
from ddoq_ray.data.collections import DIGIT_NAMES, digits
from ddoq_ray.data.samples import list_shards, load_arrays, read_classes, to_square
from ddoq_ray.execution.places import check_lasting
from ddoq_ray.execution.workers import Progress, say
from ddoq_ray.models.classifiers import load_classifier
from ddoq_ray.models.training.data import Destination, TrainingSet
from ddoq_ray.models.training.seen_by import Classifiers
from ddoq_ray.storage.quarantine import Refusal

Split = tuple[np.ndarray, np.ndarray]
PREPARE_FIRST = (
    "write them by `ddoq-ray prepare dataset=... run_dir=RUN`, then give dataset.path=RUN/data/train (and "
    "dataset.val_path=RUN/data/val)"
)


def classifiers(perceptual: str | None, judge: str | None) -> Classifiers:
    """The classifiers at these places."""
    return Classifiers(*(None if path is None else load_classifier(path) for path in (perceptual, judge)))


def train(
    command: TrainPriorConfig | TrainTeacherConfig | TuneDecoderConfig,
    function: Callable[..., dict[str, Any]],
    name: str,
    **options: Any,
) -> None:
    """Read the images and train with `function` (train_prior, tune_decoder or train_teacher), showing progress.

    Args:
        command: with its `training`.
        function: takes a TrainingSet, a Destination, `command.training`, device and on_progress.
        name: of the command, for lines.
        options: what else the function takes; `run_by` goes to the Destination.
    """
    import torch

    check_lasting(command.out, "out")
    torch.set_num_threads(command.threads)
    data = load_training_data(command)
    out = Destination(command.out, overwrite=command.overwrite, run_by=options.pop("run_by", {}))
    say(f"{name} {len(data.images):,} images of {len(data.classes)} classes at {command.side} px")
    with StepBars() as bars:
        facts = function(data, out, command.training, device=command.device, on_progress=bars, **options)
    say(f"{name} {command.out}: {facts}")


def load_training_data(command: TrainingCommand) -> TrainingSet:
    """Training images, and held-out ones where there are some: the digits' selection split, or dataset.val_path.

    Raises:
        ValueError: When the data is missing, empty, or has samples that cannot be used.
    """
    dataset = command.dataset
    if dataset.kind in PACKED or dataset.resort:
        raise ValueError(f"dataset.source={dataset.kind}: this command reads shards; {PREPARE_FIRST}")
    if dataset.path is None:
        splits = digits()
        train, held_out = (_grey(*splits[name], command.side) for name in ("train", "selection"))
        return TrainingSet(*train, list(DIGIT_NAMES), held_out)
    try:
        shards = list_shards(dataset.path)
    except ValueError as error:
        raise ValueError(f"{error}; any other collection: {PREPARE_FIRST}") from None
    classes = read_classes(dataset.classes or posixpath.join(posixpath.dirname(shards[0]), "classes.json"))
    require(
        command.image_size is not None,
        "image_size is not given: the side in pixels at which these images are to be learnt, such as image_size=32",
    )
    train = _read(shards, command, len(classes), "dataset.path")
    held = None
    if dataset.val_path is not None:
        val_shards = list_shards(dataset.val_path, key="dataset.val_path")
        held = _read(val_shards, command, len(classes), "dataset.val_path")
    return TrainingSet(*train, [c.name for c in classes], held)


def _grey(images: np.ndarray, class_ids: np.ndarray, size: int) -> Split:
    squares = [to_square(Image.fromarray(i).convert("RGB"), size).transpose(2, 0, 1) for i in images]
    return np.stack(squares), class_ids


def _read(shards: list[str], command: TrainingCommand, num_classes: int, key: str) -> Split:
    bad: list[Refusal] = []
    images, class_ids, _ = load_arrays(shards, command.side, num_classes, bad.append, command.resize)
    if not len(images):
        why = f"the first refused one is {bad[0].name}: {bad[0].reason}" if bad else "they hold no members"
        raise ValueError(f"{key}: no usable sample in {len(shards)} shards; {why}")
    if bad:
        say(f"{key}: {len(bad)} samples refused, the first one {bad[0].name}: {bad[0].reason}")
    return images, class_ids


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
