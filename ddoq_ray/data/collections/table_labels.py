"""A tree of images whose labels are in metadata tables: beside the images, or above the splits."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass

from ddoq_ray.data.collections.classes import escaped, shown, text_of
from ddoq_ray.data.collections.listing import NO_LABEL_IN_TABLE, OTHER_SPLIT, Listing, Survey, sorted_listing
from ddoq_ray.data.collections.metadata import Names, Row, labelled_rows, metadata_classes, usable_labels
from ddoq_ray.storage.quarantine import Refusal
from ddoq_ray.storage.records import ClassInfo

NOT_THERE = "named in the metadata, but not there"


@dataclass
class Tree:
    """The files of one split.

    Attributes:
        files: name relative to the root -> bytes; tables and the class list left out.
        no_image: name -> why it is no image that is read.
        tables: Metadata tables below the root.
    """

    root: str
    files: dict[str, int]
    folders: list[str]
    no_image: dict[str, str]
    tables: list[str]


@dataclass
class _Labels:
    """What tables say of one tree's files."""

    rows: dict[str, Row]
    absent: list[str]


def survey_tables(
    root: str,
    trees: dict[str, Tree],
    above: Sequence[str],
    label_column: str | None,
    given: list[ClassInfo] | None,
    words_in: Sequence[str] = (),
) -> Survey:
    """Classes and listings by the tables of the trees and those directly in `root`, above its splits.

    A split without a table has its class folders for labels.

    Args:
        words_in: Folders where a list of what WordNet ids mean may lie.

    Raises:
        ValueError: When tables are ambiguous or contradict each other, or a split has neither table nor class folders.
    """
    found = _read_all(root, trees, above, label_column)
    notes: list[str] = []
    parts = _by_split(root, trees, found, notes)
    meant = usable_labels({r.label for rows in parts.values() for r in rows.values()}, root)
    labels = {split: {meant[r.label] for r in rows.values()} for split, rows in parts.items()}
    if "val" in labels and labels["val"] == {None}:
        notes[:] = ["no validation image has a label: they cannot be used to measure (dataset.heldout holds some out)"]
    classes, class_ids = metadata_classes(labels, given, root, words_in)
    listings: dict[str, Listing] = {}
    for split, rows in parts.items():
        tree = trees.get(split, trees["train"])
        names, ids, sizes, refused = [], [], [], []
        for name, row in rows.items():
            label = meant[row.label]
            if name in tree.no_image:
                refused.append(Refusal(name, tree.no_image[name]))
            elif label is None:
                refused.append(Refusal(name, NO_LABEL_IN_TABLE))
            else:
                names.append(name)
                ids.append(class_ids[label])
                sizes.append(tree.files[name])
        if split in trees:
            refused += [Refusal(name, NOT_THERE) for name in found[split].absent]
            refused += [
                Refusal(n, tree.no_image.get(n, "not named in the metadata"))
                for n in tree.files
                if n not in found[split].rows
            ]
            if split == "train":
                kept = {n for part in parts.values() for n in part}
                refused += [Refusal(n, OTHER_SPLIT) for n in found["train"].rows if n not in kept]
        listings[split] = sorted_listing(names, ids, sizes, refused)
    train, val = listings["train"], listings.get("val")
    if not train.names:
        raise ValueError(f"dataset.path={trees['train'].root}: no labelled image in its metadata")
    if val is not None and not val.names:
        train.refused, val = [*train.refused, *val.refused], None
    return Survey(classes, train, val, notes)


def _read_all(root: str, trees: dict[str, Tree], above: Sequence[str], label_column: str | None) -> dict[str, _Labels]:
    """What the tables say of each split, and of a split that none speaks of its class folders.

    Raises:
        ValueError: When a split has neither.
    """
    found = {split: _read(tree, label_column) for split, tree in trees.items()}
    for table in above:
        _read_above(root, table, trees, found, label_column)
    for split, tree in trees.items():
        _check_there(tree, found[split])
        if not found[split].rows and not found[split].absent:
            found[split].rows = _by_folder(tree)
    missing = [tree.root for split, tree in trees.items() if not found[split].rows and not found[split].absent]
    if missing:
        raise ValueError(
            f"{shown(missing)} has neither class folders nor a metadata.csv or metadata.jsonl, but the other split has "
            "one; give each its own, or one above both with the splits in its file names; what has no labels, as a "
            "contest's test images, is to be moved away (dataset.heldout=0.1 holds training images out)"
        )
    return found


def _read(tree: Tree, label_column: str | None) -> _Labels:
    labels = _Labels({}, [])
    names = Names(tree.files)
    folders: dict[str, str] = {}
    for table in tree.tables:
        folder = posixpath.dirname(table)
        if folders.setdefault(folder, table) != table:
            raise ValueError(
                f"{posixpath.join(tree.root, folder)}: {posixpath.basename(folders[folder])} and "
                f"{posixpath.basename(table)} both there; which one holds the labels? Keep one"
            )
    for table in tree.tables:
        folder = posixpath.dirname(table)
        path = posixpath.join(tree.root, table)
        for row in labelled_rows(path, label_column):
            name = names.find(row.name, folder)
            if name is None:
                labels.absent.append(posixpath.join(folder, row.name))
            else:
                _add(labels, name, row, path)
    return labels


def _by_folder(tree: Tree) -> dict[str, Row]:
    """What the class folders of a tree without a table say."""
    images = [name for name in tree.files if "/" in name and name not in tree.no_image]
    return {name: Row(name, text_of(name.partition("/")[0]), None) for name in images}


def _check_there(tree: Tree, labels: _Labels) -> None:
    """Refuse tables that name none of the images: their names are meant from another folder.

    Raises:
        ValueError: With a name, and where an image of that name lies.
    """
    if labels.absent and not labels.rows:
        name = labels.absent[0]
        same = posixpath.basename(name.replace("\\", "/"))
        there = next(
            (
                n
                for n in tree.files
                if posixpath.basename(n) == same or posixpath.basename(n)[: len(same) + 1] == f"{same}."
            ),
            None,
        )
        hint = f" ({there} is)" if there is not None else ""
        raise ValueError(
            f"{tree.root}: none of the {len(labels.absent):,} images that its metadata names is there, such as "
            f"{escaped(name)}{hint}; mend the names, which are relative to the table's folder, with their endings, or "
            "bring the images back"
        )


def _read_above(
    root: str, table: str, trees: dict[str, Tree], found: dict[str, _Labels], label_column: str | None
) -> None:
    """A table above the splits: the first part of its file names says which split an image is in."""
    below = {split: tree.root for split, tree in trees.items() if tree.root.startswith(f"{root}/")}
    inside = {f"{place.removeprefix(root).strip('/')}/": split for split, place in below.items()}
    names = Names(prefix + name for prefix, split in inside.items() for name in trees[split].files)
    path = posixpath.join(root, table)
    for row in labelled_rows(path, label_column):
        name = names.find(row.name, "")
        if name is None:
            found["train"].absent.append(row.name)
            continue
        prefix = next(p for p in inside if name.startswith(p))
        _add(found[inside[prefix]], name.removeprefix(prefix), row, path)


def _add(labels: _Labels, name: str, row: Row, table: str) -> None:
    before = labels.rows.get(name)
    if before is not None and before.label != row.label:
        raise ValueError(f"{table}: {name} is there twice, as {before.label} and as {row.label}; keep one")
    labels.rows[name] = row


def _by_split(
    root: str, trees: dict[str, Tree], found: dict[str, _Labels], notes: list[str]
) -> dict[str, dict[str, Row]]:
    """Split -> its rows: by the folders where these are splits, else by the tables' own column of splits.

    Raises:
        ValueError: When a table says another split than the folder.
    """
    if "val" in trees:
        for split, labels in found.items():
            wrong = [n for n, r in labels.rows.items() if r.split and (r.split == "train") != (split == "train")]
            if wrong:
                raise ValueError(
                    f"{trees[split].root}: {len(wrong):,} images are in the {split} folder, but of another split by "
                    f"the metadata ({shown(wrong, 3)}); mend the table, or leave its column of splits out"
                )
        return {split: labels.rows for split, labels in found.items()}
    rows = found["train"].rows
    held = [s for s in ("val", "test") if any(r.split == s for r in rows.values())]
    if not held:
        return {"train": rows}
    if held == ["test"]:
        notes.append("the test images serve as validation, as the metadata has no other beside train")
    elif len(held) > 1:
        notes.append("the metadata has validation and test images: the test's are not used")
    train = {n: r for n, r in rows.items() if r.split in (None, "train")}
    if not train:
        raise ValueError(f"{root}: its metadata has no training image, only {' and '.join(held)}")
    return {"train": train, "val": {n: r for n, r in rows.items() if r.split == held[0]}}
