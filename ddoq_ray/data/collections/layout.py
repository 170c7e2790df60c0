"""How a tree of images is laid out: which folders are splits, which are classes; asked about where it could be both."""

from __future__ import annotations

import posixpath
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import fsspec

from ddoq_ray.config.split_words import tokens
from ddoq_ray.data.collections.classes import shown, text_of
from ddoq_ray.data.collections.listing import image_extension
from ddoq_ray.data.collections.metadata import is_metadata
from ddoq_ray.data.collections.splits import split_of, splits_of
from ddoq_ray.data.collections.tree import top, walk

_ANY = frozenset((
    "image", "images", "img", "imgs", "photo", "photos", "picture", "pictures", "pics", "jpg", "jpeg", "png", "files",
    "data", "dataset",
))  # fmt: skip
_PARTS = _ANY | {"part", "parts", "batch", "chunk", "shard"}


@dataclass(frozen=True)
class Layout:
    """Where the images of each split are; `notes` for the owner."""

    train: str
    val: str | None
    notes: tuple[str, ...] = ()


def find_layout(root: str, val_path: str | None, named: Collection[str]) -> Layout:
    """The splits of a folder.

    Args:
        named: Names of the class list given: folders named so are classes, whatever the words.

    Raises:
        ValueError: When some folders read as splits and others as classes, or several could be the same split.
    """
    fs, place = fsspec.core.url_to_fs(root)
    if not fs.isdir(place):
        raise ValueError(f"dataset.path={root} does not exist, or is no folder; expected a folder of images")
    folders, files = top(root)
    splits = splits_of(folders)
    if not splits or (named and all(text_of(f) in named for f in splits)):
        _check_apart(root, val_path)
        return Layout(root, val_path)
    train = [f for f, split in splits.items() if split == "train"]
    others = [f for f in folders if f not in splits and has_image(posixpath.join(root, f))]
    held = [f for f, split in splits.items() if split != "train"]
    here = f"dataset.path={root}"
    if others:
        first = train[0] if train else "..."
        raise ValueError(
            f"{here}: {shown([*train, *held])} beside {shown(others)}: splits, or classes? Give dataset.path="
            f"{root}/{first} (and dataset.val_path) for splits; for a class named so, rename its folder, or give "
            "dataset.classes with the names of all"
        )
    if not train:
        raise ValueError(f"{here} has {shown(held)} but no train; give the training images' folder itself")
    if len(train) > 1:
        raise ValueError(
            f"{here}: {' or '.join(train)} could each be the training images; say which: "
            + " or ".join(f"dataset.path={root}/{name}" for name in train)
            + "; of parts of one set, make a folder train with links to the class folders of all"
        )
    if val_path is not None:
        held = []
    notes = []
    if len(held) > 1 and not any(map(is_metadata, files)):
        flat = [name for name in held if _unlabelled(posixpath.join(root, name))]
        if len(flat) == len(held) - 1:
            held = [name for name in held if name not in flat]
            notes.append(f"{shown(flat)} has no class folders and no metadata: it is not used")
    if len(held) > 1:
        raise ValueError(
            f"{here}: {' or '.join(held)} could each be the validation images; say which: "
            + " or ".join(f"dataset.val_path={root}/{name}" for name in held)
        )
    if held and splits[held[0]] == "test":
        notes.append(f"{held[0]} serves as validation, as there is no other beside {train[0]}")
    inside = posixpath.join(root, held[0]) if held else None
    place = posixpath.join(root, train[0])
    _check_apart(place, val_path)
    return Layout(place, val_path or inside, tuple(notes))


def _check_apart(train: str, val: str | None) -> None:
    """Refuse validation images that lie among the training images' folders, or the other way round.

    Raises:
        ValueError: When one folder is inside the other.
    """
    if val is not None and (f"{val}/".startswith(f"{train}/") or f"{train}/".startswith(f"{val}/")) and train != val:
        inner, outer = ("validation", "training") if len(val) > len(train) else ("training", "validation")
        raise ValueError(
            f"dataset.val_path={val} and the training images' folder {train}: the {inner} images lie inside the folder "
            f"of the {outer} images and would be taken for both; give folders beside each other"
        )


def _unlabelled(root: str) -> bool:
    """Whether a split's folder has images, and neither class folders nor a table that says their classes."""
    folders, files = top(root)
    if len(folders) == 1 and is_shelf(folders[0]) and not any(map(is_metadata, files)):
        folders, files = top(posixpath.join(root, folders[0]))
    return not folders and not any(map(is_metadata, files)) and any(image_extension(n) is not None for n in files)


def is_shelf(folder: str) -> bool:
    """Whether a folder is named as folders of any images are, such as images and photos: hardly a class."""
    return bool(tokens(folder)) and split_of(f"train {folder}") == "train"


def has_image(root: str) -> bool:
    return any(image_extension(name) is not None for _, _, files in walk(root) for name, _ in files)


def no_class_folder(files: Collection[str], hint: str = "") -> str:
    """What to say of a folder without a folder in it: its images may lie there by themselves."""
    flat = sorted(name for name in files if "/" not in name and image_extension(name) is not None)
    there = f"{len(flat):,} images directly in it ({shown(flat, 3)}), and " if flat else ""
    return (
        f"{there}no class folder; expected <class>/<image files>, train/ and val/ trees of such folders, or a "
        f"metadata.csv with file_name and a label{hint}"
    )


def check_depth(root: str, images: Sequence[str], key: str = "dataset.path", hint: str = "") -> None:
    """Ask about a single class folder: its folders may be the classes, or splits, or there are no classes at all.

    Args:
        images: All image files below the root, relative to it; those of one class folder alone.
        hint: Words on what may be the table of images that lie in one folder.

    Raises:
        ValueError: When it holds folders of images, or is named as folders of any images are.
    """
    inner: list[str] = []
    level = images
    while True:
        heads = {name.partition("/")[0] for name in level if "/" in name}
        if len(heads) != 1 or any("/" not in name for name in level):
            break
        inner.append(heads.pop())
        level = [name.partition("/")[2] for name in level]
    below = sorted({name.partition("/")[0] for name in level if "/" in name})
    if below and not any("/" not in name for name in level):
        place = posixpath.join(root, *inner)
        raise ValueError(
            f"{key}={root} holds one folder with images, {'/'.join(inner)}, and that holds {shown(below)}: give "
            f"{key}={place} where these are classes or splits; where {inner[0]} is one class, give dataset.classes "
            "with its name"
        )
    if len(inner) > 1:
        raise ValueError(
            f"{key}={root} holds one folder with images, {'/'.join(inner)}: give "
            f"{key}={posixpath.join(root, *inner[:-1])} where {inner[-1]} is the only class; where {inner[0]} is it, "
            "give dataset.classes with its name"
        )
    if inner and is_shelf(inner[0]):
        raise ValueError(
            f"{key}={root}: all images are in one folder, {inner[0]}: expected a folder for each class, or a "
            f"metadata.csv with file_name and label{hint}; where {inner[0]} is one class, give dataset.classes "
            "with its name"
        )


def check_shelf(root: str, classes: Collection[str], images: Sequence[str], named: Collection[str]) -> None:
    """Ask about folders that hardly are classes: of any images, of parts of a collection, of a copy of the others.

    Args:
        named: Names of the class list given: what it names is a class.

    Raises:
        ValueError: When what they hold rather than they look like the classes.
    """
    where = f"dataset.path={root}"
    asked = [folder for folder in classes if text_of(folder) not in named]
    kinds = {tuple(tokens(folder)) for folder in asked}
    if len(asked) == len(classes) and len(kinds) == 1 and _PARTS.intersection(*kinds):
        raise ValueError(
            f"{where}: its folders {shown(sorted(asked))} are named as parts of one collection, not as classes: "
            "expected a folder for each class, or all images with a metadata.csv that has file_name and label beside "
            "these folders. Where they hold the class folders, make a folder for each class with the images (or links) "
            "of all; where they are classes, give dataset.classes with their names"
        )
    inner: dict[str, set[str]] = {}  # the folders in each class folder; "" where it has images itself
    for place in {name.rpartition("/")[0] for name in images}:
        folder, _, rest = place.partition("/")
        inner.setdefault(folder, set()).add(rest.partition("/")[0])
    for folder in asked:
        inside = inner.get(folder, set()) - {""}
        again = sorted(inside.intersection(classes))
        if again and len(again) >= min(2, len(classes) - 1):
            raise ValueError(
                f"{where}: {folder} holds {shown(again)}, which are folders beside it too: a copy of the collection in "
                f"itself? Move it away, or give dataset.path={root}/{folder}; where it is a class, give "
                "dataset.classes with the names of all"
            )
        if not is_shelf(folder):
            continue
        if not inside and _ANY.issuperset(tokens(folder)):
            raise ValueError(
                f"{where}: {folder} is beside {shown(sorted(set(classes) - {folder}))}, and its images are in no class "
                "folder: expected a folder for each class, or a metadata.csv with file_name and label; where "
                f"{folder} is a class, give dataset.classes with the names of all"
            )
        heads = sorted(inside)
        if len(heads) > 1 and "" not in inner[folder]:
            raise ValueError(
                f"{where}: {folder} is beside {shown(sorted(set(classes) - {folder}))}, and holds "
                f"{shown(heads)}: give dataset.path={root}/{folder} where these are the classes; where {folder} is "
                "one, give dataset.classes with the names of all"
            )


def check_order(root: str, images: Sequence[str]) -> None:
    """Refuse classes that hold splits: those held out would be trained on.

    Raises:
        ValueError: When both a training and a held-out folder are found directly below classes.
    """
    found: dict[str, str] = {}
    for folder in dict.fromkeys(name.rpartition("/")[0] for name in images):
        parts = folder.split("/")
        if len(parts) > 1 and (split := split_of(parts[1])) is not None:
            found.setdefault("train" if split == "train" else "held", "/".join(parts[:2]))
    if len(found) > 1:
        raise ValueError(
            f"{root}: the class folders hold splits ({found['train']}, {found['held']}), whose images would all be "
            "trained on; expected train/<class>/ and val/<class>/, or a metadata.csv with file_name, label and split"
        )
