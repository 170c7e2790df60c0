"""A tree of image files: class folders (nested as deep as one likes), train/ and val/ trees, or a metadata table."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Sequence
from functools import partial

import fsspec

from ddoq_ray.artifacts import Folder
from ddoq_ray.records import ClassInfo
from ddoq_ray.sources.classes import class_list, given_classes, shown
from ddoq_ray.sources.listing import (
    NO_EXTENSION,
    Listing,
    Picture,
    Refused,
    Source,
    Survey,
    absolute,
    image_extension,
    sorted_listing,
)
from ddoq_ray.sources.metadata import METADATA_FILES, labelled_names, metadata_classes
from ddoq_ray.sources.tree import Entry, top, walk
from ddoq_ray.transport import retried

HELD_OUT_NAMES = ("val", "valid", "validation", "test")
_NOT_SAMPLES = ("classes.json", *METADATA_FILES)


class ImageFolder(Source):
    """Files in class folders, or beside a metadata.csv or metadata.jsonl with a label column (as Hugging Face's)."""

    def __init__(self, path: str, val_path: str | None, classes: str | None, label_column: str | None) -> None:
        self.root = absolute(path)
        self.val_path = None if val_path is None else absolute(val_path)
        self.classes = classes
        self.label_column = label_column

    def survey(self) -> Survey:
        given = given_classes(self.classes, posixpath.join(self.root, "classes.json"))
        roots = self.splits()
        tables = {split: find_metadata(root) for split, root in roots.items() if root is not None}
        if any(tables.values()):
            return self._survey_tables(roots, tables, given)
        if self.label_column is not None:
            raise ValueError(f"{self.root}: dataset.label_column has no effect without a metadata.csv or .jsonl there")
        found = {split: list_files(root) for split, root in roots.items() if root is not None}
        by_class = {split: _by_class(files, folders) for split, (files, folders) in found.items()}
        train, _ = by_class["train"]
        if not train:
            raise ValueError(
                f"dataset.path={roots['train']}: no class folder in it; expected <class>/<image files>, train/ and "
                "val/ trees of such folders, or a metadata.csv with file_name and a label"
            )
        filled = sorted(name for name, files in train.items() if any(image_extension(f) for f, _ in files))
        if not filled:
            raise ValueError(f"dataset.path={roots['train']}: no image file in {len(train)} class folders")
        if "val" in by_class:
            _same_classes(roots, sorted(train), sorted(by_class["val"][0]))
        classes = class_list(filled, given, self.root)
        listings = {split: _listing(files, stray, classes) for split, (files, stray) in by_class.items()}
        return Survey(classes, listings["train"], listings.get("val"))

    def splits(self) -> dict[str, str | None]:
        """Where the training and the validation images are.

        Raises:
            ValueError: When some folders read as splits and others as classes, or two could be the validation images.
        """
        fs, root = fsspec.core.url_to_fs(self.root)
        if not fs.isdir(root):
            raise ValueError(f"dataset.path={self.root} does not exist, or is no folder; expected a folder of images")
        folders, _ = top(self.root)
        held = [f for f in folders if f.lower() in HELD_OUT_NAMES]
        others = [f for f in folders if f not in held and f != "train"]
        if "train" not in folders and (not held or others):
            return {"train": self.root, "val": self.val_path}
        here = f"dataset.path={self.root}"
        if "train" not in folders:
            raise ValueError(f"{here} has {shown(held)} but no train; give the training images' folder itself")
        if others:
            raise ValueError(
                f"{here}: {shown(['train', *held])} beside {shown(others)}: splits, or classes? Give dataset.path="
                f"{self.root}/train (and dataset.val_path) for splits; for a class named so, rename its folder"
            )
        if self.val_path is not None:
            held = []
        if len(held) > 1:
            raise ValueError(
                f"{here}: {' or '.join(held)} could each be the validation images; say which: "
                + " or ".join(f"dataset.val_path={self.root}/{name}" for name in held)
            )
        inside = posixpath.join(self.root, held[0]) if held else None
        return {"train": posixpath.join(self.root, "train"), "val": self.val_path or inside}

    def _survey_tables(
        self, roots: dict[str, str | None], tables: dict[str, str | None], given: list[ClassInfo] | None
    ) -> Survey:
        missing = [str(roots[split]) for split, table in tables.items() if table is None]
        if missing:
            raise ValueError(
                f"{shown(missing)} has no {' or '.join(METADATA_FILES)}, but the other split has one; give each its own"
            )
        rows = {split: labelled_names(str(table), self.label_column) for split, table in tables.items()}
        classes, class_ids = metadata_classes({s: set(r.values()) for s, r in rows.items()}, given, self.root)
        listings = {}
        for split in tables:
            files = dict(list_files(str(roots[split]))[0])
            names, ids, sizes, refused = [], [], [], []
            for name, label in rows[split].items():
                if name not in files:
                    refused.append(Refused(name, "named in the metadata, but not there"))
                elif image_extension(name) is None:
                    refused.append(Refused(name, NO_EXTENSION))
                elif label is None or label not in class_ids:
                    reason = "no label in the metadata" if label is None else "its class has no training image"
                    refused.append(Refused(name, reason))
                else:
                    names.append(name)
                    ids.append(class_ids[label])
                    sizes.append(files[name])
            left = sorted(set(files) - set(rows[split]) - set(_NOT_SAMPLES))
            refused += [Refused(n, "not named in the metadata" if image_extension(n) else NO_EXTENSION) for n in left]
            listings[split] = sorted_listing(names, ids, sizes, refused)
        if not listings["train"].names:
            raise ValueError(f"dataset.path={roots['train']}: no labelled image in its metadata")
        return Survey(classes, listings["train"], listings.get("val"))

    def read(self, split: str, names: Sequence[str], scratch: Folder) -> Iterator[Picture | Refused]:
        return read_files(str(self.splits()[split]), names)


def read_files(root: str, names: Sequence[str]) -> Iterator[Picture | Refused]:
    """The files with these names below a root, with the bytes that they have."""
    fs, place = fsspec.core.url_to_fs(root)
    for name in names:
        path = posixpath.join(place, name)
        try:
            data = fs.cat_file(path) if "://" not in root else retried(f"{root}/{name}", partial(fs.cat_file, path))
        except OSError as error:
            yield Refused(name, f"unreadable: {error.strerror or type(error).__name__}")
        else:
            yield Picture(data, image_extension(name))


def find_metadata(root: str) -> str | None:
    """The metadata table of a folder, if it has one.

    Raises:
        ValueError: When it has two.
    """
    fs, place = fsspec.core.url_to_fs(root)
    there = [name for name in METADATA_FILES if fs.exists(posixpath.join(place, name))]
    if len(there) > 1:
        raise ValueError(f"{root}: {' and '.join(there)} both there; which one holds the labels? Keep one")
    return posixpath.join(root, there[0]) if there else None


def list_files(root: str) -> tuple[list[Entry], list[str]]:
    """Every file below a root with its size, and every folder; names relative to the root.

    Raises:
        ValueError: When the root is no folder.
    """
    fs, place = fsspec.core.url_to_fs(root)
    if not fs.isdir(place):
        raise ValueError(f"{root} does not exist, or is no folder; expected a folder of images")
    files: list[Entry] = []
    folders: list[str] = []
    for here, _, entries in walk(root):
        if here:
            folders.append(here)
        files += [(posixpath.join(here, name), size) for name, size in entries]
    return files, folders


def _by_class(files: list[Entry], folders: list[str]) -> tuple[dict[str, list[Entry]], list[Entry]]:
    """(class folder -> its files, files in no class folder). Hidden folders are no classes."""
    names = {f.split("/")[0] for f in folders} | {f.split("/")[0] for f, _ in files if "/" in f}
    classes: dict[str, list[Entry]] = {name: [] for name in sorted(names) if not name.startswith(".")}
    stray = []
    for name, size in files:
        folder, slash, _ = name.partition("/")
        if slash and folder in classes:
            classes[folder].append((name, size))
        else:
            stray.append((name, size))
    return classes, stray


def _listing(folders: dict[str, list[Entry]], stray: list[Entry], classes: list[ClassInfo]) -> Listing:
    class_ids = {c.name: c.class_id for c in classes}
    names, ids, sizes = [], [], []
    refused = [
        Refused(name, "image outside a class folder" if image_extension(name) else NO_EXTENSION)
        for name, _ in stray
        if name not in _NOT_SAMPLES
    ]
    for folder, files in folders.items():
        if not any(image_extension(name) for name, _ in files):
            refused.append(Refused(f"{folder}/", "class folder without an image"))
        for name, size in files:
            if image_extension(name) is None:
                refused.append(Refused(name, NO_EXTENSION))
            elif any(part.startswith(".") for part in name.split("/")):  # a file manager's thumbnails and the like
                refused.append(Refused(name, "hidden file"))
            elif folder not in class_ids:
                refused.append(Refused(name, "its class has no training image"))
            else:
                names.append(name)
                ids.append(class_ids[folder])
                sizes.append(size)
    return sorted_listing(names, ids, sizes, refused)


def _same_classes(roots: dict[str, str | None], train: list[str], val: list[str]) -> None:
    only_train, only_val = sorted(set(train) - set(val)), sorted(set(val) - set(train))
    if only_train or only_val:
        raise ValueError(
            f"{roots['train']} and {roots['val']} have different classes: only in training: "
            f"{shown(only_train) or 'none'}; only in validation: {shown(only_val) or 'none'}; give both the same class "
            "folders"
        )
