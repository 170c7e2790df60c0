"""Datasets that torchvision knows by name: read from disk, downloaded where they are not there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.error import URLError

import numpy as np

from ddoq_ray.artifacts import Folder
from ddoq_ray.pictures import encode_png
from ddoq_ray.records import ClassInfo
from ddoq_ray.sources.classes import class_list, given_classes, numbered_classes
from ddoq_ray.sources.folders import read_files
from ddoq_ray.sources.listing import Listing, Picture, Refused, Source, Survey, absolute, sorted_listing

ARRAYS = ("CIFAR10", "CIFAR100", "FashionMNIST")  # pixels, which become PNG; the others are files, kept as they are
_IMAGENETTE = {"imagenette2": "full", "imagenette2-320": "320px", "imagenette2-160": "160px"}


class TorchvisionSet(Source):
    """One of torchvision's datasets; its test split, or its validation split where it has both, validates."""

    def __init__(self, name: str, path: str | None, classes: str | None) -> None:
        self.name = name
        self.root = absolute(path or default_root())
        self.classes = classes

    def survey(self) -> Survey:
        sets = {split: self._load(split) for split in ("train", "val")}
        given = given_classes(self.classes, None)
        if self.name in ("Imagenette", "ImageNet"):
            classes = class_list(sets["train"].wnids, given, self.name)
            by_name = {c.name: c.class_id for c in classes}
            ids = [by_name[wnid] for wnid in sets["train"].wnids]  # the set's own label -> class_id
        else:
            names = [str(name) for name in sets["train"].classes]
            classes, ids = numbered_classes(set(range(len(names))), names, given, self.name), list(range(len(names)))
        if self.name == "ImageNet" and given is None:
            classes = [_with_word(c, w) for c, w in zip(classes, sets["train"].classes, strict=True)]
        listings = {split: self._listing(dataset, ids) for split, dataset in sets.items()}
        return Survey(classes, listings["train"], listings["val"])

    def _listing(self, dataset: Any, ids: list[int]) -> Listing:
        if self.name in ARRAYS:
            labels = np.asarray(ids, np.int32)[np.asarray(dataset.targets)]
            size = int(np.prod(dataset.data.shape[1:]))
            return Listing([f"{i:09d}" for i in range(len(labels))], labels, np.full(len(labels), size, np.int64))
        files = _files(dataset)
        names = [os.path.relpath(path, self.root).replace(os.sep, "/") for path, _ in files]
        sizes = [os.path.getsize(path) if os.path.exists(path) else 0 for path, _ in files]
        return sorted_listing(names, [ids[label] for _, label in files], sizes, [])

    def read(self, split: str, names: Sequence[str], scratch: Folder) -> Iterator[Picture | Refused]:
        if self.name not in ARRAYS:
            yield from read_files(self.root, names)
            return
        pixels = np.asarray(self._load(split).data)
        for name in names:
            yield Picture(encode_png(pixels[int(name)]), "png")

    def _load(self, split: str) -> Any:
        """torchvision's dataset: what is on disk, else what can be downloaded.

        Raises:
            ValueError: When it is neither.
        """
        from torchvision import datasets

        known = getattr(datasets, self.name)
        options: dict[str, Any] = {"train": split == "train"} if self.name in ARRAYS else {"split": split}
        if self.name == "Imagenette":
            options["size"] = self._imagenette_size()
        try:
            return known(self.root, **options)
        except (RuntimeError, FileNotFoundError) as error:
            missing = error
        if self.name == "ImageNet":
            raise ValueError(
                f"dataset.torchvision=ImageNet: not in dataset.path={self.root} ({missing}); ImageNet cannot be "
                "downloaded: put its archives there, or give the folder of class folders by dataset=imagefolder"
            )
        try:
            os.makedirs(self.root, exist_ok=True)
            return known(self.root, download=True, **options)
        except (URLError, OSError, RuntimeError) as error:
            raise ValueError(
                f"dataset.torchvision={self.name}: not in dataset.path={self.root}, and it cannot be downloaded "
                f"({error}); put torchvision's files there"
            ) from error

    def _imagenette_size(self) -> str:
        there = [size for folder, size in _IMAGENETTE.items() if os.path.isdir(os.path.join(self.root, folder))]
        return there[0] if len(there) == 1 else "full"


def default_root() -> str:
    """Beside torch's other downloads (TORCH_HOME, else the user's cache)."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(os.environ.get("TORCH_HOME") or os.path.join(cache, "torch"), "datasets")


def found_there(folders: Sequence[str]) -> list[str]:
    """Names of the sets whose folders are among these."""
    marks = {"cifar-10-batches-py": "CIFAR10", "cifar-100-python": "CIFAR100", "FashionMNIST": "FashionMNIST"}
    marks |= {"flowers-102": "Flowers102"} | dict.fromkeys(_IMAGENETTE, "Imagenette")
    return sorted({marks[f] for f in folders if f in marks})


def _files(dataset: Any) -> list[tuple[str, int]]:
    """(path, label) of a set of files; torchvision has no public name for them that all of them share."""
    if hasattr(dataset, "_image_files"):
        return list(zip(map(str, dataset._image_files), dataset._labels, strict=True))
    samples = dataset._samples if hasattr(dataset, "_samples") else dataset.samples
    return [(str(path), int(label)) for path, label in samples]


def _with_word(info: ClassInfo, words: Sequence[str]) -> ClassInfo:
    """ImageNet's own list of words for an id decides over the list of categories where they differ."""
    return info if info.prompt in words else ClassInfo(info.class_id, info.name, words[0], info.class_id, info.class_id)
