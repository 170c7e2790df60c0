"""Stored soft labels: files of a range of epochs of a range of images, written and read here, each with its record.

A file holds rows (image_id, epoch, packed label), a row group for some thousand labels of one epoch. Its record is
published after it, with a digest of each row group and of the footer, of the views that were labelled, and of what the
labels are made from: so a file is known to be there without being opened, is read group by group, and nothing is taken
for what it is not. Beside labels of the `features` codec lies the teacher's linear head, by which they are decoded.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ddoq_ray.storage import layout
from ddoq_ray.storage.artifact import Artifact, NotAsWritten, checked, digest_of, with_check
from ddoq_ray.storage.fitting_facts import misfit_of
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.label_grid import LabelFile, LabelGrid
from ddoq_ray.storage.parquet import row_group_writer
from ddoq_ray.storage.records import binary_rows, fixed_binary, label_schema
from ddoq_ray.storage.row_groups import MAGIC, DamagedGroup, file_digests, metadata_of, read_groups, span_of

AT_ONCE = 8  # records that are read

# Of an epoch and of images first to end - 1: their labels uint8 [n, nbytes], and the bytes of their views' parameters.
Answer = Callable[[int, int, int], tuple[npt.NDArray[np.uint8], bytes]]


@dataclass(frozen=True)
class LabelRecord:
    """``labels-*.json``, published after its file: without it the file is not finished.

    Attributes:
        made_from: Digest of all that the labels follow from (the identity of their artifact).
        bytes: Size of the file.
        groups: sha256 of each row group.
        footer: [first byte, sha256] of what follows them.
        views: Of each epoch, sha256 of the parameters of the views that were labelled (`ViewParams.packed`).
        stored: [N, H, W], the images that the views were cut from, in pixels.
    """

    made_from: str
    bytes: int
    groups: list[str]
    footer: list[Any]
    views: list[str]
    stored: list[int]


@dataclass(frozen=True)
class Making:
    """What a label file is written by, beside its labels.

    Attributes:
        grid: All files of the set.
        codec: What packed the labels.
        made_from: See `LabelRecord`.
        stored: See `LabelRecord`.
    """

    grid: LabelGrid
    codec: str
    made_from: str
    stored: tuple[int, int, int]


def write_labels(labels: Folder, file: LabelFile, making: Making, answer: Answer) -> int:
    """Publish a file and its record, from answers that are asked for one row group at a time; its size in bytes."""
    grid, views = making.grid, []
    schema = label_schema(making.codec, grid.nbytes)
    counting = ("image_id", "epoch")
    with labels.writing(file.name) as f, row_group_writer(f.name, schema, counting) as writer:
        for epoch in range(file.first_epoch, file.end_epoch):
            digest = hashlib.sha256()
            for first, end in grid.groups(file):
                rows, parameters = answer(epoch, first, end)
                digest.update(parameters)
                columns = [pa.array(np.arange(first, end)), pa.array(np.full(end - first, epoch, np.int32))]
                table = pa.Table.from_arrays([*columns, fixed_binary(rows)], schema=schema)
                writer.write_table(table, row_group_size=len(table))
            views.append(digest.hexdigest())
        writer.close()
        groups, footer = file_digests(f.name)
        size = os.path.getsize(f.name)
    row = asdict(LabelRecord(making.made_from, size, groups, footer, views, list(making.stored)))
    labels.publish_json(file.record, with_check(row))
    return size


def read_record(labels: Folder, file: LabelFile) -> LabelRecord:
    """The record of a finished file.

    Raises:
        ValueError: It is gone or damaged.
    """
    try:
        row = checked(labels.read(file.record), strict=True)
        if told := misfit_of(LabelRecord, row):
            raise _damaged(labels, file.record, file, told)
        return LabelRecord(**row)
    except FileNotFoundError:
        raise _missing(labels, file.record, file) from None
    except (NotAsWritten, TypeError):
        raise _damaged(labels, file.record, file, "it is not as it was written") from None


def finished_files(labels: Folder, grid: LabelGrid, made_from: str) -> dict[int, LabelRecord]:
    """index -> record of the files that are there, whole in size and made from what they should be; two listings."""
    sizes = labels.sizes(layout.LABEL_FILES)
    records = set(labels.names(layout.LABEL_RECORDS))
    published = [file for file in grid.all() if file.name in sizes and file.record in records]
    with ThreadPoolExecutor(AT_ONCE) as threads:
        there = lambda file: _finished(labels, file, made_from, sizes[file.name])
        found = zip(published, threads.map(there, published), strict=True)
        return {file.index: record for file, record in found if record is not None}


def finished_file(labels: Folder, file: LabelFile, made_from: str) -> LabelRecord | None:
    """The record of a file that is there as `finished_files` has it, asked for by its name; None where it is not.

    On NFS a listing may be half a minute old, while a name that was never asked for is looked up.
    """
    try:
        return _finished(labels, file, made_from, labels.size(file.name))
    except FileNotFoundError:
        return None


def _finished(labels: Folder, file: LabelFile, made_from: str, size: int) -> LabelRecord | None:
    try:
        record = read_record(labels, file)
    except ValueError:
        return None  # made anew
    return record if record.made_from == made_from and record.bytes == size else None


class OpenLabels:
    """A label file whose row groups are read one by one, each checked against its digest."""

    def __init__(self, labels: Folder, grid: LabelGrid, file: LabelFile, made_from: str) -> None:
        """Open it: its record, its size and its footer.

        Raises:
            ValueError: The file or its record is gone or damaged, or was made from something else.
        """
        self.labels, self.grid, self.file = labels, grid, file
        self.record = read_record(labels, file)
        if self.record.made_from != made_from:
            raise ValueError(
                f"{labels.path(file.name)} holds labels of another teacher, other views or another image set than "
                f"those of {labels.path(layout.MANIFEST)}; {_mend(labels, file)}"
            )
        epochs = file.end_epoch - file.first_epoch
        groups, views = len(self.record.groups), len(self.record.views)
        if (groups, views) != (epochs * len(grid.groups(file)), epochs):
            raise _damaged(labels, file.record, file, f"it speaks of {groups} row groups and {views} epochs")
        try:
            size = labels.size(file.name)
        except FileNotFoundError:
            raise _missing(labels, file.name, file) from None
        if size != self.record.bytes:
            raise self._damaged(f"it has {size:,} bytes of the {self.record.bytes:,} that were written")
        start, digest = self.record.footer
        footer = labels.read_range(file.name, start, size)
        if digest_of(footer) != digest:
            raise self._damaged("its end has other bytes than were written")
        self._metadata = metadata_of(footer)

    def epoch(self, epoch: int) -> Iterator[npt.NDArray[np.uint8]]:
        """uint8 [n, nbytes], the labels of an epoch in image order, a row group at a time.

        Raises:
            ValueError: A group has other bytes than were written.
        """
        parts = self.grid.groups(self.file)
        start = (epoch - self.file.first_epoch) * len(parts)
        for group, (first, end) in enumerate(parts, start):
            table = self._group(group)
            here = np.array_equal(table["image_id"].to_numpy(), np.arange(first, end))
            if not here or (table["epoch"].to_numpy() != epoch).any():
                raise self._damaged(f"it does not hold images {first} to {end - 1} of epoch {epoch} where it should")
            yield binary_rows(table["label"], "u1")

    def check(self) -> None:
        """Read every byte of it; Raises as `epoch`."""
        with self.labels.reading(self.file.name) as f:
            if f.read(len(MAGIC)) != MAGIC:
                raise self._damaged("its first bytes are not those of Parquet")
            for group, digest in enumerate(self.record.groups):
                start, end = span_of(self._metadata, [group])
                if digest_of(f.read(end - start)) != digest:
                    raise self._damaged(f"its row group {group} has other bytes than were written")

    def _group(self, group: int) -> pa.Table:
        data = self.labels.read_range(self.file.name, *span_of(self._metadata, [group]))
        try:
            return read_groups(self._metadata, [group], data, [self.record.groups[group]])
        except DamagedGroup as error:
            raise self._damaged(str(error)) from None

    def _damaged(self, how: str) -> ValueError:
        return _damaged(self.labels, self.file.name, self.file, how)


class LabelStore:
    """The finished labels of an image set.

    Attributes:
        manifest: Of their artifact.
        grid: Their files.
    """

    def __init__(self, labels: Folder) -> None:
        """Read the manifest.

        Raises:
            ValueError: They are not finished, or nothing is stored (`labels.mode=online`).
        """
        self.folder, self.manifest = labels, Artifact(labels, "label").require()
        if "grid" not in self.manifest:
            raise ValueError(
                f"{labels.uri} stores no labels (labels.mode={self.manifest['codec']}): the teacher is asked"
            )
        self.grid = LabelGrid.recorded(self.manifest["grid"])
        self._open: dict[int, OpenLabels] = {}  # of the last epoch that was read: the next one is often in them too

    def pieces(self, epoch: int) -> Iterator[npt.NDArray[np.uint8]]:
        """uint8 [n, nbytes], all labels of an epoch in image order, some megabytes at a time.

        Raises:
            ValueError: There are none of that epoch; or a file is gone, damaged or of other labels.
        """
        files = self.grid.of_epoch(epoch)
        self._open = {f.index: self._open[f.index] for f in files if f.index in self._open}
        for file in files:
            if file.index not in self._open:
                self._open[file.index] = self.open(file)
            yield from self._open[file.index].epoch(epoch)

    def read(self, epoch: int) -> npt.NDArray[np.uint8]:
        """uint8 [N, nbytes]: the labels of an epoch in image order, all in memory; Raises as `pieces`."""
        rows = np.empty((self.grid.images, self.grid.nbytes), np.uint8)
        at = 0
        for piece in self.pieces(epoch):
            rows[at : at + len(piece)] = piece
            at += len(piece)
        assert at == len(rows)
        return rows

    def check_images(self, images: str) -> None:
        """Refuse labels of another image set.

        Args:
            images: Digest of the one there is.

        Raises:
            ValueError: With both digests.
        """
        labelled = self.manifest["identity"]["images"]
        if labelled != images:
            raise ValueError(
                f"{self.folder.uri} holds labels of another image set ({labelled[:16]}) than the one beside it "
                f"({images[:16]}): bring that set back, or label this one (stages=[label], with overwrite=true)"
            )

    def open(self, file: LabelFile) -> OpenLabels:
        return OpenLabels(self.folder, self.grid, file, self.manifest["identity_digest"])


def check_file(labels: Folder, file: LabelFile, making: tuple[LabelGrid, str]) -> None:
    """Read every byte of a file of (grid, made_from); Raises as `OpenLabels`."""
    grid, made_from = making
    OpenLabels(labels, grid, file, made_from).check()


def _mend(labels: Folder, file: LabelFile) -> str:
    return (
        f"remove {labels.path(file.record)} and {labels.path(layout.MANIFEST)} and run the label stage again, which "
        "makes this file anew and keeps the others"
    )


def _missing(labels: Folder, name: str, file: LabelFile) -> ValueError:
    return ValueError(f"{labels.path(name)} is missing, with the labels of {file}; {_mend(labels, file)}")


def _damaged(labels: Folder, name: str, file: LabelFile, how: str) -> ValueError:
    return ValueError(f"{labels.path(name)} is damaged: {how} (labels of {file}); {_mend(labels, file)}")
