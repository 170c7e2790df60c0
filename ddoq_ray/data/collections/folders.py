"""A tree of image files: class folders (nested as deep as one likes), train/ and val/ trees, or metadata tables."""

from __future__ import annotations

import os
import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence

import fsspec

from ddoq_ray.config.split_words import FILLERS, SPLIT_WORDS, tokens
from ddoq_ray.data.collections.classes import class_list, escaped, given_classes, shown, text_of
from ddoq_ray.data.collections.contents import masks, not_images, unread_notes
from ddoq_ray.data.collections.layout import (
    Layout,
    check_depth,
    check_order,
    check_shelf,
    find_layout,
    is_shelf,
    no_class_folder,
)
from ddoq_ray.data.collections.listing import (
    LEFTOVER,
    MASK,
    NO_CLASS_IMAGE,
    NO_LABEL,
    Listing,
    Picture,
    Source,
    Survey,
    absolute,
    image_extension,
    sorted_listing,
)
from ddoq_ray.data.collections.metadata import is_metadata
from ddoq_ray.data.collections.table_labels import Tree, survey_tables
from ddoq_ray.data.collections.tree import Entry, top, walk
from ddoq_ray.data.collections.unread_places import table_hint, there_in
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.quarantine import Refusal
from ddoq_ray.storage.records import ClassInfo
from ddoq_ray.storage.transport import read_file

_LISTS = frozenset(("list", "lists", "label", "labels", "annotations", "anno", "class", "classes", "ids", "index"))


class ImageFolder(Source):
    """Files in class folders, or with metadata tables that have a label column (as Hugging Face's)."""

    def __init__(self, path: str, val_path: str | None, classes: str | None, label_column: str | None) -> None:
        self.root = absolute(path)
        self.val_path = None if val_path is None else absolute(val_path)
        self.classes = classes
        self.label_column = label_column

    def survey(self) -> Survey:
        given, layout = self._layout()
        trees = {"train": _tree(layout.train)}
        if layout.val is not None:
            trees["val"] = _tree(layout.val)
        above = [] if layout.train == self.root else [n for n in top(self.root)[1] if is_metadata(n)]
        if above or any(tree.tables for tree in trees.values()):
            survey = survey_tables(self.root, trees, above, self.label_column, given, self._around())
        elif self.label_column is not None:
            raise ValueError(f"{self.root}: dataset.label_column has no effect without a metadata.csv or .jsonl there")
        else:
            survey = self._survey_folders(trees, given)
        refused = [r for split in (survey.train, survey.val) if split is not None for r in split.refused]
        survey.notes += [*layout.notes, *unread_notes(refused)]
        return survey

    def _layout(self) -> tuple[list[ClassInfo] | None, Layout]:
        given = given_classes(self.classes, posixpath.join(self.root, "classes.json"))
        return given, find_layout(self.root, self.val_path, {c.name for c in given or []})

    def _around(self) -> list[str]:
        """Where a list of what WordNet ids mean may lie."""
        return [self.root] if "://" in self.root else [self.root, posixpath.dirname(self.root)]

    def _split_lists(self, root: str) -> list[str]:
        """A note where lists beside the class folders are named as splits: they may say which images to train on."""
        beside = "://" not in root and is_shelf(posixpath.basename(root))
        places = [root, posixpath.dirname(root)] if beside else [root]
        lists = [n for place in places for n in top(place)[1] if n.lower().endswith((".csv", ".tsv", ".txt", ".json"))]
        words = {name: set(tokens(name.rpartition(".")[0])) for name in lists}
        lists = [
            n for n in lists if SPLIT_WORDS.keys() & words[n] and words[n] <= SPLIT_WORDS.keys() | FILLERS | _LISTS
        ]
        if not lists:
            return []
        return [
            f"not read: {shown(lists, 4)}. All images of {root} are taken, but for those that dataset.heldout holds "
            "out; where such a list says which are for a test, write a metadata.csv with file_name, label and split"
        ]

    def _survey_folders(self, trees: dict[str, Tree], given: list[ClassInfo] | None) -> Survey:
        masked = [f"{tree.root}/{name}" for tree in trees.values() for name in _leave_out_masks(tree)]
        by_class = {split: _by_class(tree) for split, tree in trees.items()}
        root, (train, _) = trees["train"].root, by_class["train"]
        hint = table_hint(self.root)
        if not train:
            raise ValueError(f"dataset.path={root}: {no_class_folder(trees['train'].files, hint)}")
        usable = {split: _usable(tree, by_class[split][0]) for split, tree in trees.items()}
        if not usable["train"]:
            raise ValueError(
                f"dataset.path={root}: no image file in {len(train)} class folders{_why_none(trees['train'])}"
            )
        filled = sorted(usable["train"])
        for split, tree in trees.items():
            _refuse_one_folder_twice(tree.root, sorted(usable[split]))
        for split, tree in trees.items():
            names = [n for files in usable[split].values() for n in files]
            if len(usable[split]) == 1 and (given is None or text_of(filled[0]) not in {c.name for c in given}):
                check_depth(tree.root, names, "dataset.path" if split == "train" else "dataset.val_path", hint)
            check_order(tree.root, names)
            if len(usable[split]) > 1:
                check_shelf(tree.root, list(usable[split]), names, {c.name for c in given or []})
        notes = []
        if len(filled) == 1 and given is None:
            notes.append(
                f"there is one class, {escaped(filled[0])}: where its images are of several, expected is a folder for "
                "each, or a metadata.csv with file_name and label"
            )
        if masked:
            notes.append(f"{len(masked):,} images are masks of others by their names, and not used: {shown(masked, 2)}")
        if "val" in trees:
            _same_classes(trees, usable, {split: set(found[0]) for split, found in by_class.items()})
        for split, tree in trees.items():
            empty = sorted(set(by_class[split][0]) - set(usable[split]))
            if empty:
                notes.append(f"{len(empty):,} class folders of {tree.root} hold no image: {shown(empty)}")
        else:
            notes += self._split_lists(root)
        if given is None:
            notes += _nested(root, usable["train"])
        odd = [escaped(n) for n in filled if escaped(n) != n]
        if odd:
            notes.append(f"{len(odd):,} class folders have names that are no UTF-8; they are written {shown(odd)}")
        classes = class_list(_one_form(filled, root, notes), given, self.root, self._around())
        listings = {split: _listing(*by_class[split], trees[split], classes) for split in trees}
        return Survey(classes, listings["train"], listings.get("val"), notes)

    def read(self, split: str, names: Sequence[str], scratch: Folder) -> Iterator[Picture | Refusal]:
        _, layout = self._layout()
        root = layout.val if split == "val" and layout.val is not None else layout.train
        return read_files(root, names)


def read_files(root: str, names: Sequence[str]) -> Iterator[Picture | Refusal]:
    """The files with these names below a root, with the bytes that they have."""
    for name in names:
        try:
            data = read_file(posixpath.join(root, name))
        except OSError as error:
            yield Refusal(name, f"unreadable: {error.strerror or type(error).__name__}")
        else:
            yield Picture(data, image_extension(name))


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


def _tree(root: str) -> Tree:
    files, folders = list_files(root)
    tables = [name for name, _ in files if is_metadata(name)]
    others = [f for f in files if f[0] != "classes.json" and f[0] not in tables]
    return Tree(root, dict(others), folders, not_images(root, others), tables)


def _leave_out_masks(tree: Tree) -> list[str]:
    found = masks([name for name in tree.files if name not in tree.no_image])
    tree.no_image |= dict.fromkeys(found, MASK)
    return found


def _why_none(tree: Tree) -> str:
    """What the files of a tree are, of which none is an image that is read."""
    counts = Counter(why for name, why in tree.no_image.items() if why != LEFTOVER)
    return ": " + "; ".join(f"{n:,} files: {why}" for why, n in counts.most_common(3)) if counts else ""


def _by_class(tree: Tree) -> tuple[dict[str, list[Entry]], list[Entry]]:
    """(class folder -> its files, files in no class folder); a folder named -1 holds images without a label."""
    names = {f.split("/")[0] for f in tree.folders}
    classes: dict[str, list[Entry]] = {name: [] for name in sorted(names) if name != "-1"}
    stray = []
    for name, size in tree.files.items():
        folder, slash, _ = name.partition("/")
        if slash and folder in classes:
            classes[folder].append((name, size))
        else:
            stray.append((name, size))
    return classes, stray


def _usable(tree: Tree, folders: dict[str, list[Entry]]) -> dict[str, list[str]]:
    """Class folder -> its images, of those that have any."""
    images = {f: [n for n, _ in files if n not in tree.no_image] for f, files in folders.items()}
    return {f: names for f, names in images.items() if names}


def _refuse_one_folder_twice(root: str, folders: Sequence[str]) -> None:
    """Refuse class folders of which one is a link to another: each image would be of two classes.

    Raises:
        ValueError: With both names.
    """
    if "://" in root:
        return
    real: dict[str, str] = {}
    for folder in folders:
        other = real.setdefault(os.path.realpath(os.path.join(root, folder)), folder)
        if other != folder:
            raise ValueError(
                f"{root}: the class folders {escaped(other)} and {escaped(folder)} are one folder, by a link: its "
                "images would be of two classes; remove the name that is not meant"
            )


def _nested(root: str, usable: dict[str, list[str]]) -> list[str]:
    """A note where all images lie in folders of class folders: these may be the classes."""
    inner = [{posixpath.dirname(name).partition("/")[2] for name in names} for names in usable.values()]
    deep = all(name.count("/") > 1 for names in usable.values() for name in names)
    if not deep or len(inner) < 2 or all(len(heads) < 2 for heads in inner):
        return []
    if any(heads != inner[0] for heads in inner):
        places = sorted(f"{folder}/{head}" for folder, heads in zip(usable, inner, strict=True) for head in heads)
        return [
            f"the classes are the folders of {root} ({shown(sorted(usable), 4)}), which hold {len(places):,} folders "
            f"with images ({shown(places, 4)}): where these are the classes, give a folder that holds them, or links "
            "to them, side by side"
        ]
    return [
        f"the classes are the folders of {root} ({shown(sorted(usable), 4)}); each holds {shown(sorted(inner[0]), 4)}: "
        "where these are the classes, put the images of each together in one folder of its name"
    ]


def _one_form(folders: list[str], root: str, notes: list[str]) -> list[str]:
    """The names of classes: folders whose names are one text in two Unicode forms are one class."""
    names: dict[str, list[str]] = {}
    for folder in folders:
        names.setdefault(text_of(folder), []).append(folder)
    notes += [
        f"{len(same)} folders of {root} are one class, {name}: they differ in the Unicode form of their names only"
        for name, same in names.items()
        if len(same) > 1
    ]
    return sorted(names)


def _listing(folders: dict[str, list[Entry]], stray: list[Entry], tree: Tree, classes: list[ClassInfo]) -> Listing:
    class_ids = {c.name: c.class_id for c in classes}
    names, ids, sizes, refused = [], [], [], []
    for name, _ in stray:
        outside = NO_LABEL if name.startswith("-1/") else "image outside a class folder"
        refused.append(Refusal(name, tree.no_image.get(name, outside)))
    for folder, files in folders.items():
        label = text_of(folder)
        if all(name in tree.no_image for name, _ in files):
            refused.append(Refusal(f"{folder}/", NO_CLASS_IMAGE))
        for name, size in files:
            if name in tree.no_image:
                refused.append(Refusal(name, tree.no_image[name]))
            elif label not in class_ids:
                refused.append(Refusal(name, "its class has no training image"))
            else:
                names.append(name)
                ids.append(class_ids[label])
                sizes.append(size)
    return sorted_listing(names, ids, sizes, refused)


def _same_classes(trees: dict[str, Tree], usable: dict[str, dict[str, list[str]]], there: dict[str, set[str]]) -> None:
    """Refuse validation images that are not of the training images' classes, or none of them at all."""
    folders = {split: {text_of(f) for f in names} for split, names in there.items()}
    filled = {split: {text_of(f) for f in names} for split, names in usable.items()}
    train, val = trees["train"].root, trees["val"].root
    stray = [name for name in trees["val"].files if name not in trees["val"].no_image]
    if not filled["val"] and stray:
        raise ValueError(
            f"{val} holds {len(stray):,} images in no class folder (such as {escaped(stray[0])}), so they cannot be "
            f"used to measure: expected {val}/<class>/ with the names of {train}, or a metadata.csv with file_name and "
            "label beside them; without their classes, move them away, or give the training folder itself, and hold "
            f"some training images out (dataset.path={train} dataset.heldout=0.1)"
        )
    if not filled["val"]:
        raise ValueError(
            f"{val} holds no image in {len(folders['val'])} class folders ({there_in(val)}), and {train} holds images "
            "in class folders: fill it, or move it away and hold some training images out (dataset.heldout=0.1), or "
            "give another dataset.val_path"
        )
    only_train = sorted(filled["train"] - folders["val"])
    only_val = sorted((filled["val"] | folders["val"] - folders["train"]) - filled["train"])
    if only_train or only_val:
        raise ValueError(
            f"{train} and {val} have different classes: only in training: "
            f"{shown(only_train) or 'none'}; only in validation: {shown(only_val) or 'none'}; give both the same class "
            "folders"
        )
