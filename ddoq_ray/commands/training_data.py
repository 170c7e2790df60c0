"""The labelled images that the training commands read, whole, in one process."""

from __future__ import annotations

import posixpath

import numpy as np
from PIL import Image

from ddoq_ray.config.dataset import DatasetConfig
from ddoq_ray.runtime import say
from ddoq_ray.samples import BadSample, list_shards, load_arrays, read_classes, to_square
from ddoq_ray.sources import DIGIT_NAMES, digits

Split = tuple[np.ndarray, np.ndarray]


def load_training_data(dataset: DatasetConfig, image_size: int) -> tuple[Split, Split | None, list[str]]:
    """(training images and class_ids, held-out ones or None, class names).

    Images are uint8 [N, 3, image_size, image_size]. Held out are the digits' selection split, or dataset.val_path.

    Raises:
        ValueError: When the data is missing, empty, or has samples that cannot be used.
    """
    if dataset.path is None:
        splits = digits()
        train, held_out = (_grey(*splits[name], image_size) for name in ("train", "selection"))
        return train, held_out, list(DIGIT_NAMES)
    shards = list_shards(dataset.path)
    classes = read_classes(dataset.classes or posixpath.join(posixpath.dirname(shards[0]), "classes.json"))
    train = _read(shards, image_size, len(classes), "dataset.path")
    held = None
    if dataset.val_path is not None:
        val_shards = list_shards(dataset.val_path, key="dataset.val_path")
        held = _read(val_shards, image_size, len(classes), "dataset.val_path")
    return train, held, [c.name for c in classes]


def _grey(images: np.ndarray, class_ids: np.ndarray, size: int) -> Split:
    squares = [to_square(Image.fromarray(i).convert("RGB"), size).transpose(2, 0, 1) for i in images]
    return np.stack(squares), class_ids


def _read(shards: list[str], size: int, num_classes: int, key: str) -> Split:
    bad: list[BadSample] = []
    images, class_ids, _ = load_arrays(shards, size, num_classes, bad.append)
    if not len(images):
        why = f"the first refused one is {bad[0].key}: {bad[0].reason}" if bad else "they hold no members"
        raise ValueError(f"{key}: no usable sample in {len(shards)} shards; {why}")
    if bad:
        say(f"{key}: {len(bad)} samples refused, the first one {bad[0].key}: {bad[0].reason}")
    return images, class_ids
