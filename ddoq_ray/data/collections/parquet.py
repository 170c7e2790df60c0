"""Parquet and Arrow files with an image's bytes and a label in each row, as Hugging Face datasets are stored."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from itertools import islice

import numpy as np

from ddoq_ray.data.collections.classes import (
    check_class_lists,
    check_first_label,
    given_classes,
    numbered_classes,
    shown,
)
from ddoq_ray.data.collections.containers import Containers, row_names
from ddoq_ray.data.collections.listing import NO_LABEL, Listing, Survey, harmless, image_extension
from ddoq_ray.data.collections.metadata import metadata_classes, usable_labels
from ddoq_ray.data.collections.table_columns import Columns, Label, columns_of, read_images, read_labels, read_splits
from ddoq_ray.data.collections.table_files import by_split, list_tables, part_notes
from ddoq_ray.storage.quarantine import Refusal
from ddoq_ray.storage.records import ClassInfo

FIT = 0.95  # of the rows must have labels of the class list, or it is another's


class Parquet(Containers):
    """Rows of (image bytes, label); the labels' names from the files' own metadata where they are there."""

    def __init__(
        self,
        path: str,
        val_path: str | None,
        classes: str | None,
        label_column: str | None,
        image_column: str | None = None,
    ) -> None:
        files, below = list_tables(path, "dataset.path")
        self.notes: list[str] = []
        if val_path is not None:
            self.train, self.val = files, list_tables(val_path, "dataset.val_path")[0]
        else:
            self.train, self.val, self.notes = by_split(files, below, path)
        self.notes += part_notes(self.containers())
        self.path = path
        self.classes = classes
        self.label_column = label_column
        self.image_column = image_column

    def containers(self) -> list[str]:
        return [*self.train, *self.val]

    def survey(self) -> Survey:
        first = self._columns(self.train[0])
        for file in self.containers()[1:]:
            other = self._columns(file, unlabelled=file in self.val)
            if other != first and other != Columns(first.image, None, None):
                raise ValueError(f"{file} has other columns or class names than {self.train[0]}: {other}, {first}")
        self._check_images(self.train[0], first.image)
        beside = posixpath.join(posixpath.dirname(self.train[0]), "classes.json")
        # Its own names come first: a list beside the files is only looked for where they have none.
        given = given_classes(self.classes, None if first.names else beside)
        known = first.names is not None or self.label_column is not None or first.label == "label"
        rows = {"train": self._rows(self.train, 0, known)}
        if self.val:
            rows["val"] = self._rows(self.val, len(self.train), known)
        elif apart := self._apart(rows["train"]):
            rows = apart
        if not any(label is not None for _, label, _ in rows["train"]):
            raise ValueError(f"dataset.path={self.path}: no labelled row in {len(self.train)} parquet files")
        classes, class_ids = self._classes(rows, first, given)
        listings = {split: _listing(part, class_ids, len(classes)) for split, part in rows.items()}
        train, val, notes = listings["train"], listings.get("val"), list(self.notes)
        if val is not None and not val.names:
            notes = [
                *part_notes(self.train),
                f"none of {len(val.refused):,} validation rows has a label: they cannot be used to measure",
            ]
            train.refused, val = [*train.refused, *val.refused], None
        self._check_fit(listings, classes)
        return Survey(classes, train, val, notes)

    def _check_images(self, file: str, column: str) -> None:
        """Refuse files whose first rows all name a picture elsewhere: they were written without the pictures."""
        first = list(islice(read_images(file, column), 16))
        if first and all(isinstance(row, dict) and not row.get("bytes") and row.get("path") for row in first):
            raise ValueError(
                f"{file}: its images are not in it, only their paths, such as {first[0]['path']}: give the folder of "
                "the images, or write the files anew with the images in them (datasets' save_to_disk does)"
            )

    def _rows(self, files: list[str], offset: int, known: bool) -> list[tuple[str, Label, int]]:
        rows: list[tuple[str, Label, int]] = []
        for container, file in enumerate(files, offset):
            indices, labels, size = read_labels(file, self._columns(file, unlabelled=True), known)
            names = row_names(container, range(len(indices)))
            rows += [(name, labels[i], size) for name, i in zip(names, indices.tolist(), strict=True)]
        return rows

    def _apart(self, rows: list[tuple[str, Label, int]]) -> dict[str, list[tuple[str, Label, int]]]:
        """The rows by split where a column says which to train on and which not; nothing where none does.

        Raises:
            ValueError: When it says so in some files only.
        """
        found = [read_splits(file) for file in self.train]
        splits = [split for part in found if part is not None for split in part]
        held = [split for split in ("val", "test") if split in splits]
        if not held or "train" not in splits:
            return {}
        if None in found:
            raise ValueError(
                f"{self.train[found.index(None)]} has no column that says each row's split, and other files have one: "
                "are they of one collection? Give the files of one kind (dataset.path=PATTERN)"
            )
        others = " and others are not used" if len(held) > 1 else ""
        self.notes.append(f"the files' column of splits holds {held[0]} rows: they serve as validation{others}")
        return {
            name: [row for row, split in zip(rows, splits, strict=True) if split == of]
            for name, of in (("train", "train"), ("val", held[0]))
        }

    def _classes(
        self, rows: dict[str, list[tuple[str, Label, int]]], columns: Columns, given: list[ClassInfo] | None
    ) -> tuple[list[ClassInfo], dict[Label, int]]:
        """The class list, and label -> class_id."""
        labels = {split: {label for _, label, _ in part} for split, part in rows.items()}
        every = set().union(*labels.values()) - {None}
        texts_too = [label for label in every if isinstance(label, str)]
        if texts_too and len(texts_too) < len(every):
            raise ValueError(
                f"{self.path}: labels are numbers here and names there (such as {shown(sorted(texts_too), 3)}): "
                "are they of one collection? Give the files of one kind (dataset.path=PATTERN), or write them alike"
            )
        if all(isinstance(label, int) for label in every):
            numbers = {int(label) for label in every if label is not None}
            names = columns.names
            if names is None and given is not None and self.classes is None:
                check_class_lists(self.containers(), given)
            count = len(names) if names is not None else len(given) if given is not None else None
            inside = {n for n in numbers if n >= 0 and (count is None or n < count)}
            classes = numbered_classes(inside, names, given, self.path)
            return classes, {n: n for n in inside}
        texts = {split: {None if v is None else str(v) for v in part} for split, part in labels.items()}
        meant = usable_labels(set().union(*texts.values()), self.path)
        used = {split: {meant[t] for t in part} for split, part in texts.items()}
        classes, by_text = metadata_classes(used, given, self.path)
        return classes, {v: by_text[m] for v in every if (m := meant[str(v)]) is not None}

    def _check_fit(self, listings: dict[str, Listing], classes: list[ClassInfo]) -> None:
        """A class list that does not fit stops; a few wild labels are for max_bad_fraction to judge."""
        for listing in listings.values():
            wild = [r.reason.rpartition(": ")[2] for r in listing.refused if not harmless(r)]
            check_first_label({*map(int, wild), *listing.class_ids.tolist()}, len(classes), self.path)
            if len(wild) > (1 - FIT) * (len(wild) + len(listing.names)):
                raise ValueError(
                    f"{self.path}: labels {shown(sorted(set(wild)))} are outside the class list (0 to "
                    f"{len(classes) - 1}) in {len(wild):,} rows; check that the list belongs to the files"
                )

    def images(self, container: int) -> Iterator[tuple[bytes, str]]:
        file = self.containers()[container]
        for row in read_images(file, self._columns(file, unlabelled=True).image):
            if not isinstance(row, dict):
                yield row or b"", ""
            else:
                yield row.get("bytes") or b"", image_extension(row.get("path") or "") or ""

    def _columns(self, file: str, *, unlabelled: bool = False) -> Columns:
        return columns_of(file, self.image_column, self.label_column, unlabelled=unlabelled)


def _listing(rows: list[tuple[str, Label, int]], class_ids: dict[Label, int], num_classes: int) -> Listing:
    names, ids, sizes, refused = [], [], [], []
    for name, label, size in rows:
        if label in class_ids:
            names.append(name)
            ids.append(class_ids[label])
            sizes.append(size)
        elif label is None or not isinstance(label, int):
            refused.append(Refusal(name, NO_LABEL))
        else:
            refused.append(Refusal(name, f"label is outside the class list (0 to {num_classes - 1}): {label}"))
    return Listing(names, np.asarray(ids, np.int32), np.asarray(sizes, np.int64), refused)
