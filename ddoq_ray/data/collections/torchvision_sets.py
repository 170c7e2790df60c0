"""Datasets that torchvision knows by name: read from disk, downloaded where they are not there."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from http.client import HTTPException
from typing import Any

import numpy as np

from ddoq_ray.data.collections.classes import class_list, given_classes, numbered_classes, shown
from ddoq_ray.data.collections.folders import read_files
from ddoq_ray.data.collections.listing import (
    NO_LABEL,
    Listing,
    Picture,
    Source,
    Survey,
    absolute,
    sorted_listing,
)
from ddoq_ray.data.pictures import encode_png
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.quarantine import Refusal
from ddoq_ray.storage.records import ClassInfo

ARRAYS = ("CIFAR10", "CIFAR100", "FashionMNIST")  # pixels, which become PNG; the others are files, kept as they are
STALL_S = 60.0  # a download is given up when no byte has come for so long; torchvision would wait for ever
_IMAGENETTE = {"imagenette2": "full", "imagenette2-320": "320px", "imagenette2-160": "160px"}
_UNREADABLE = (RuntimeError, OSError, ValueError, AssertionError, LookupError, TypeError)  # of a set with a half file


class TorchvisionSet(Source):
    """One of torchvision's datasets; its test split, or its validation split where it has both, validates.

    The survey alone downloads and unpacks, since it is one task; what reads after it finds the files there.
    """

    def __init__(self, name: str, path: str | None, classes: str | None) -> None:
        self.name = name
        self.root = absolute(path or default_root())
        self.classes = classes
        if "://" in self.root:
            raise ValueError(f"dataset.path={path}: dataset.torchvision={name} needs a local folder, not a URL")

    def survey(self) -> Survey:
        sets = {split: self._load(split, download=True) for split in ("train", "val")}
        given = given_classes(self.classes, None)
        if self.name in ("Imagenette", "ImageNet"):
            self._check_folders(sets["train"].wnids, sets["val"].wnids)
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

    def _check_folders(self, train: Sequence[str], val: Sequence[str]) -> None:
        """Each split counts its own class folders: with one missing, its labels would mean other classes."""
        differ = sorted(set(train) ^ set(val))
        if differ:
            raise ValueError(
                f"dataset.torchvision={self.name}: {self.root} has class folders in one of train/ and val/ only "
                f"({shown(differ)}): unpacked in half? Remove both folders to have them unpacked anew"
            )

    def _listing(self, dataset: Any, ids: list[int]) -> Listing:
        if self.name in ARRAYS:
            targets = np.asarray(dataset.targets)
            rows = np.flatnonzero(targets >= 0)
            size = int(np.prod(dataset.data.shape[1:]))
            refused = [Refusal(f"{i:09d}", NO_LABEL) for i in np.flatnonzero(targets < 0)]
            labels = np.asarray(ids, np.int32)[targets[rows]]
            return Listing([f"{i:09d}" for i in rows], labels, np.full(len(rows), size, np.int64), refused)
        every = _files(dataset)
        files = [(path, label) for path, label in every if label >= 0]
        unlabelled = [Refusal(os.path.relpath(path, self.root), NO_LABEL) for path, label in every if label < 0]
        names = [os.path.relpath(path, self.root).replace(os.sep, "/") for path, _ in files]
        sizes = [os.path.getsize(path) if os.path.exists(path) else 0 for path, _ in files]
        return sorted_listing(names, [ids[label] for _, label in files], sizes, unlabelled)

    def read(self, split: str, names: Sequence[str], scratch: Folder) -> Iterator[Picture | Refusal]:
        if self.name in ARRAYS:
            pixels = np.asarray(self._load(split, download=False).data)
            for name in names:
                yield Picture(encode_png(pixels[int(name)]), "png")
            return
        if names and not os.path.isdir(os.path.join(self.root, names[0].partition("/")[0])):
            raise self._not_here("no such folder")
        yield from read_files(self.root, names)

    def _load(self, split: str, download: bool) -> Any:
        """torchvision's dataset: what is on disk, else, where wanted, what can be downloaded.

        Raises:
            ValueError: When it is neither, or there in half.
        """
        from torchvision import datasets

        known = getattr(datasets, self.name)
        options: dict[str, Any] = {"train": split == "train"} if self.name in ARRAYS else {"split": split}
        if self.name == "ImageNet":
            return self._imagenet(known, split)
        if self.name == "Imagenette":
            options["size"] = self._imagenette_size()
        try:
            return known(self.root, **options)
        except _UNREADABLE as error:
            missing = _words(error)
        if not download:
            raise self._not_here(missing)
        with contextlib.suppress(OSError):
            os.makedirs(self.root, exist_ok=True)  # where it cannot be made, the download says so
        with self._alone():
            with contextlib.suppress(*_UNREADABLE):
                return known(self.root, **options)  # another process has downloaded it meanwhile
            return self._download(known, options, missing)

    def _not_here(self, why: str) -> ValueError:
        return ValueError(
            f"dataset.torchvision={self.name}: not in dataset.path={self.root} ({why}), where the survey found it; on "
            "a cluster give a dataset.path that every node sees"
        )

    def _imagenet(self, known: Any, split: str) -> Any:
        """ImageNet, which torchvision unpacks from archives that the user has put there, and never downloads."""
        folder = os.path.join(self.root, split)
        with self._alone():
            there = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
            rest = [name for name in there if name.endswith((".tar", ".JPEG"))]
            if rest:
                raise ValueError(
                    f"dataset.torchvision=ImageNet: {folder} is unpacked in half: {shown(rest, 2)} lie outside the "
                    "class folders; remove the folder to have it unpacked anew"
                )
            try:
                return known(self.root, split=split)
            except (RuntimeError, OSError) as error:
                raise ValueError(
                    f"dataset.torchvision=ImageNet: not in dataset.path={self.root} ({_words(error)}); ImageNet cannot "
                    "be downloaded: put its archives there, or give the folder of class folders by dataset=imagefolder"
                ) from error

    def _download(self, known: Any, options: dict[str, Any], missing: str) -> Any:
        """Download and unpack beside the place where the set belongs, then move it there.

        torchvision takes a folder that was unpacked in half for the set; here a killed process leaves none.

        Raises:
            ValueError: When it cannot be had; says what was expected and what came.
        """
        here = f"dataset.torchvision={self.name}: not in dataset.path={self.root} ({missing})"
        archives = self._archives(known)
        for folder in {path.removesuffix(".tgz") for _, path, _ in archives if self.name == "Imagenette"}:
            if os.path.isdir(os.path.join(self.root, folder)):
                raise ValueError(
                    f"dataset.torchvision=Imagenette: {os.path.join(self.root, folder)} is not whole ({missing}); move "
                    "it away to have it downloaded"
                )
        aside = os.path.join(self.root, f".{self.name}.download")
        before = socket.getdefaulttimeout()
        try:
            shutil.rmtree(aside, ignore_errors=True)  # a killed process's
            for _, path, md5 in archives:  # what the user has put there need not be downloaded
                there, place = os.path.join(self.root, path), os.path.join(aside, path)
                if os.path.isfile(there) and _sum(there) == md5:
                    os.makedirs(os.path.dirname(place), exist_ok=True)
                    os.symlink(there, place)
            socket.setdefaulttimeout(STALL_S)
            known(aside, download=True, **options)
            _move(aside, self.root)
            return known(self.root, **options)
        except (HTTPException, *_UNREADABLE) as error:
            told = [f"cannot be downloaded ({_words(error)})", *self._differing(archives, aside)]
            raise ValueError(
                f"{here}, and it {'; '.join(told)}; try again, or put {shown([path for _, path, _ in archives])} there"
            ) from error
        finally:
            socket.setdefaulttimeout(before)
            shutil.rmtree(aside, ignore_errors=True)

    def _archives(self, known: Any) -> list[tuple[str, str, str]]:
        """(address, path below the root, MD5) of each file that torchvision downloads, in its order."""
        if self.name == "FashionMNIST":
            return [(known.mirrors[0] + name, f"FashionMNIST/raw/{name}", md5) for name, md5 in known.resources]
        if self.name == "Flowers102":
            address = known._download_url_prefix
            return [(address + name, f"flowers-102/{name}", md5) for name, md5 in known._file_dict.values()]
        if self.name == "Imagenette":
            address, md5 = known._ARCHIVES[self._imagenette_size()]
            return [(address, address.rpartition("/")[2], md5)]
        return [(known.url, known.filename, known.tgz_md5)]

    def _differing(self, archives: Sequence[tuple[str, str, str]], aside: str) -> list[str]:
        """In words: the first archive that was not had, and those of the user's own that are damaged."""
        told = []
        for address, path, md5 in archives:
            came = _state(os.path.join(aside, path))
            if came[1] != md5:
                gave = f"{came[0]:,} bytes of MD5 {came[1]}" if came[0] else "nothing"
                told.append(f"{address} gave {gave}, expected MD5 {md5}")
                break
        for _, path, md5 in archives:
            size, own = _state(os.path.join(self.root, path))
            if own not in (None, md5):
                told.append(f"{path} in dataset.path has {size:,} bytes of MD5 {own}, expected MD5 {md5}")
        return told

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time unpacks a set; in a folder without locks, or one that cannot be written, any do."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError, ImportError):
                import fcntl

                lock = stack.enter_context(open(os.path.join(self.root, f".{self.name}.lock"), "a"))
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _imagenette_size(self) -> str:
        """The size whose folder or archive is there, else the full one.

        Raises:
            ValueError: When several are there.
        """
        there = [
            n for n in _IMAGENETTE if any(os.path.exists(os.path.join(self.root, n + end)) for end in ("", ".tgz"))
        ]
        if len(there) > 1:
            raise ValueError(
                f"dataset.torchvision=Imagenette: {' and '.join(there)} are all in dataset.path={self.root}; keep one "
                f"there, or give one by dataset=imagefolder dataset.path={os.path.join(self.root, there[0])}"
            )
        return _IMAGENETTE[there[0]] if there else "full"


def _move(source: str, target: str) -> None:
    """What is in one folder into another, over what is there; a folder that is not there comes in one step.

    Folders come before files: Flowers102 counts as whole with its last file.
    """
    for entry in sorted(os.scandir(source), key=lambda e: (not e.is_dir(), e.name)):
        place = os.path.join(target, entry.name)
        if entry.is_dir() and os.path.isdir(place):
            _move(entry.path, place)
        elif not entry.is_symlink():
            os.replace(entry.path, place)


def _state(path: str) -> tuple[int, str | None]:
    """(bytes, MD5) of a file; (0, None) when there is none."""
    return (os.path.getsize(path), _sum(path)) if os.path.isfile(path) else (0, None)


def _sum(path: str) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _words(error: Exception) -> str:
    """An error in one line, without torchvision's advice to its programmers."""
    return " ".join(str(error).split()).partition(" You can use download=True")[0] or type(error).__name__


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
    return info if info.prompt in words else dataclasses.replace(info, prompt=words[0])
