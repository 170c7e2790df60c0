"""The images that a training command learns: read once into files beside its output, mapped from then on."""

from __future__ import annotations

import os
import platform
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ddoq_ray.config.dataset import PACKED, DatasetConfig
from ddoq_ray.config.ineffective import WRITTEN
from ddoq_ray.config.network_training import TrainingCommand
from ddoq_ray.config.schema import require
from ddoq_ray.data.collections import DIGIT_NAMES, digits
from ddoq_ray.data.collections.classes import check_class_lists
from ddoq_ray.data.image_file import ImageFile, Images
from ddoq_ray.data.samples import read_classes, read_samples, to_square
from ddoq_ray.data.shard_index import train_and_val
from ddoq_ray.execution.workers import say
from ddoq_ray.models.autoencoder import Autoencoder
from ddoq_ray.models.fidelity import BATCH, reconstructions
from ddoq_ray.models.training.checkpoints import CHECKPOINT, IMAGES, training_folder
from ddoq_ray.models.training.data import TrainingSet
from ddoq_ray.storage.quarantine import Refusal

Pictures = Iterable[tuple[int, npt.NDArray[np.uint8]]]
PREPARE_FIRST = (
    "write them by `ddoq-ray prepare dataset=... run_dir=RUN`, then give dataset.path=RUN/data/train (and "
    "dataset.val_path=RUN/data/val)"
)


@dataclass(frozen=True)
class ReadImages:
    """Images that were read: small and picklable.

    Attributes:
        classes: names in label order.
        train, held_out: their files.
    """

    classes: list[str]
    train: ImageFile
    held_out: ImageFile | None

    def open(self) -> TrainingSet:
        """The images, mapped.

        Raises:
            ValueError: They are not to be seen from here.
        """
        train, held_out = _opened(self.train), None if self.held_out is None else _opened(self.held_out)
        return TrainingSet.mapped(train, self.classes, held_out)


def _opened(file: ImageFile) -> Images:
    images = file.open()
    if images is None:
        raise ValueError(
            f"{file.pixels} is not to be seen from the node {platform.node()}: with several workers `out` must be on a "
            "disk that every node sees"
        )
    return images


@dataclass(frozen=True)
class Through:
    """An autoencoder that training images pass through, so that they are there twice: as they are, and as they return.

    Attributes:
        autoencoder: of images of the training's size.
        id: of its prior.
    """

    autoencoder: Autoencoder
    id: str

    def pictures(self, read: Pictures) -> Pictures:
        """The images that were read, some at a time, each time followed by what the autoencoder makes of them."""
        rest = iter(read)
        while some := list(islice(rest, BATCH)):
            yield from some
            again = reconstructions(self.autoencoder, np.stack([image for _, image in some]))
            yield from zip((class_id for class_id, _ in some), again, strict=True)


def read_images(command: TrainingCommand, through: Through | None = None) -> ReadImages:
    """Training images, and held-out ones where there are some: the digits' selection split, or dataset.val_path.

    They go to files in the training's folder; those that a stopped training left there are not read again.

    Args:
        command: which images, and at which size.
        through: what training images, not held-out ones, are there a second time by.

    Raises:
        ValueError: The data is missing, empty, or has no sample that can be used; or a stopped training of other
            images lies there.
    """
    dataset = command.dataset
    if dataset.kind in PACKED or dataset.resort:
        raise ValueError(f"dataset.source={dataset.kind}: this command reads shards; {PREPARE_FIRST}")
    for key in WRITTEN:
        if getattr(dataset, key) != getattr(DatasetConfig, key):
            raise ValueError(f"dataset.{key} has no effect here: this command reads shards as they are; leave it out")
    if dataset.path is None:
        splits = digits()
        train, held_out = (
            _in_file(command, name, {"digits": name}, partial(_grey, *splits[name], command.side), again)
            for name, again in (("train", through), ("selection", None))
        )
        return ReadImages(list(DIGIT_NAMES), train, held_out)
    told: list[str] = []
    try:
        shards, val_shards = train_and_val(dataset.path, dataset.val_path, told)
    except ValueError as error:
        raise ValueError(f"{error}; any other collection: {PREPARE_FIRST}") from None
    classes = read_classes(dataset.classes or posixpath.join(posixpath.dirname(shards[0]), "classes.json"))
    if dataset.classes is None:
        check_class_lists([*shards, *val_shards], classes)
    require(
        command.image_size is not None,
        "image_size is not given: the side in pixels at which these images are to be learnt, such as image_size=32",
    )
    for line in told:
        say(line)
    train = _of_shards(command, "train", shards, len(classes), "dataset.path", through)
    held = None
    if val_shards:
        key = "dataset.path" if dataset.val_path is None else "dataset.val_path"
        held = _of_shards(command, "selection", val_shards, len(classes), key)
    return ReadImages([c.name for c in classes], train, held)


def _in_file(
    command: TrainingCommand,
    name: str,
    source: Mapping[str, Any],
    pictures: Callable[[], Pictures],
    through: Through | None = None,
) -> ImageFile:
    folder = training_folder(command.out).absolute()  # workers may stand elsewhere
    source = {**source, **({} if through is None else {"through": through.id})}
    file = ImageFile(folder / IMAGES / name, {**source, "side": command.side, "resize": command.resize})
    if name == "train" and (folder / CHECKPOINT).exists() and file.of_another_source() and not command.overwrite:
        raise ValueError(
            f"{folder} holds an unfinished training of other images (its dataset keys, image_size or resize differ, or "
            "a shard has changed); give the settings it was begun with to go on, or overwrite=true to begin anew"
        )
    if file.open() is None:
        file.write(pictures() if through is None else through.pictures(pictures()), command.side)
    return file


def _grey(images: np.ndarray, class_ids: np.ndarray, size: int) -> Pictures:
    for image, class_id in zip(images, class_ids, strict=True):
        yield int(class_id), to_square(Image.fromarray(image).convert("RGB"), size).transpose(2, 0, 1)


def _of_shards(
    command: TrainingCommand,
    name: str,
    shards: list[str],
    num_classes: int,
    key: str,
    through: Through | None = None,
) -> ImageFile:
    # Of a store's shards names must do: asking for thousands of sizes takes minutes.
    sizes = [os.path.getsize(shard) if os.path.exists(shard) else None for shard in shards]
    source = {"shards": shards, "bytes": sizes, "classes": num_classes}
    return _in_file(command, name, source, lambda: _read(shards, command, num_classes, key), through)


def _read(shards: list[str], command: TrainingCommand, num_classes: int, key: str) -> Iterator[tuple[int, np.ndarray]]:
    """Every usable sample, one by one.

    Raises:
        ValueError: When there is none, or more than `max_bad_fraction` of them cannot be used.
    """
    used = bad = 0
    first: Refusal | None = None

    def refuse(refusal: Refusal) -> None:
        nonlocal bad, first
        bad, first = bad + refusal.samples, first or refusal

    for shard in shards:
        for sample in read_samples(shard, num_classes, refuse):
            used += 1
            yield sample.class_id, to_square(sample.image, command.side, command.resize).transpose(2, 0, 1)
    if not used:
        why = "they hold no members" if first is None else f"the first refused one is {first.name}: {first.reason}"
        raise ValueError(f"{key}: no usable sample in {len(shards)} shards; {why}")
    if first is None:
        return
    refused = f"{key}: {bad:,} of {used + bad:,} samples refused, the first one {first.name}: {first.reason}"
    if bad > command.max_bad_fraction * (used + bad):
        raise ValueError(
            f"{refused}; that is more than max_bad_fraction={command.max_bad_fraction:g}: give the class list of these "
            "images (dataset.classes) and whole shards, or allow more (max_bad_fraction)"
        )
    say(refused)
