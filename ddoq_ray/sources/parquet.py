"""Parquet files with the bytes of an image and a label in each row, as Hugging Face datasets are stored."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import braceexpand
import fsspec
import numpy as np

from ddoq_ray.sources.classes import given_classes, numbered_classes, shown
from ddoq_ray.sources.containers import Containers, row_names
from ddoq_ray.sources.listing import Listing, Refused, Survey, absolute, image_extension

_VALIDATION = ("validation", "valid", "val", "test")


@dataclass(frozen=True)
class _Columns:
    image: str
    label: str
    names: tuple[str, ...] | None


class Parquet(Containers):
    """Rows of (image bytes, label); the labels' names from the files' own metadata where they are there."""

    def __init__(self, path: str, val_path: str | None, classes: str | None, label_column: str | None) -> None:
        files = list_parquet(path, "dataset.path")
        if val_path is not None:
            self.train, self.val = files, list_parquet(val_path, "dataset.val_path")
        else:
            self.train, self.val = _by_split(files, path)
        self.path = path
        self.classes = classes
        self.label_column = label_column

    def containers(self) -> list[str]:
        return [*self.train, *self.val]

    def survey(self) -> Survey:
        first = self._columns(self.train[0])
        for file in self.containers()[1:]:
            if (other := self._columns(file)) != first:
                raise ValueError(f"{file} has other columns or class names than {self.train[0]}: {other}, {first}")
        beside = posixpath.join(posixpath.dirname(self.train[0]), "classes.json")
        # Its own names come first: a list beside the files is only looked for where they have none.
        given = given_classes(self.classes, None if first.names else beside)
        train = self._listing(self.train, 0, first)
        val = self._listing(self.val, len(self.train), first) if self.val else None
        if not train.names:
            raise ValueError(f"dataset.path={self.path}: no labelled row in {len(self.train)} parquet files")
        labels = {int(c) for split in (train, val) if split is not None for c in np.unique(split.class_ids)}
        return Survey(numbered_classes(labels, first.names, given, self.path), train, val)

    def _listing(self, files: list[str], offset: int, columns: _Columns) -> Listing:
        import pyarrow as pa
        import pyarrow.parquet as pq

        names: list[str] = []
        labels, sizes, refused = [], [], []
        for container, file in enumerate(files, offset):
            with fsspec.open(file, "rb") as f:
                parquet = pq.ParquetFile(f)
                column = parquet.read(columns=[columns.label]).column(columns.label)
                given = column.cast(pa.int64()).fill_null(-1).to_numpy()
                size = _image_bytes(parquet, columns.image)
            good = np.flatnonzero(given >= 0)
            refused += [Refused(n, "no label") for n in row_names(container, np.flatnonzero(given < 0).tolist())]
            names += row_names(container, good.tolist())
            labels.append(given[good].astype(np.int32))
            sizes.append(np.full(len(good), size, np.int64))
        return Listing(names, np.concatenate(labels), np.concatenate(sizes), refused)

    def images(self, container: int) -> Iterator[tuple[bytes, str]]:
        import pyarrow.parquet as pq

        file = self.containers()[container]
        image = self._columns(file).image
        with fsspec.open(file, "rb") as f:
            for batch in pq.ParquetFile(f).iter_batches(batch_size=64, columns=[image]):
                for value in batch.column(0):
                    row = value.as_py()
                    if not isinstance(row, dict):
                        yield row or b"", ""
                    else:
                        yield row.get("bytes") or b"", image_extension(row.get("path") or "") or ""

    def _columns(self, file: str) -> _Columns:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with fsspec.open(file, "rb") as f:
                schema = pq.read_schema(f)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{file} is not a parquet file: {error}") from error
        features: dict[str, Any] = {}
        if schema.metadata and b"huggingface" in schema.metadata:
            features = json.loads(schema.metadata[b"huggingface"]).get("info", {}).get("features", {})
        kinds = {name: f.get("_type") for name, f in features.items() if isinstance(f, dict)}
        images = [f.name for f in schema if kinds.get(f.name) == "Image"] or [
            f.name for f in schema if _holds_bytes(f.type)
        ]
        if len(images) != 1:
            raise ValueError(
                f"{file}: which column is the image? Candidates: {shown(images) or 'none'}; expected one column of "
                "struct{bytes, path} or binary; leave the others out of the files"
            )
        labels = [f.name for f in schema if kinds.get(f.name) == "ClassLabel"] or [
            f.name for f in schema if pa.types.is_integer(f.type)
        ]
        if self.label_column is not None:
            if self.label_column not in schema.names or not pa.types.is_integer(schema.field(self.label_column).type):
                raise ValueError(
                    f"{file}: no whole-number column dataset.label_column={self.label_column}; candidates: "
                    f"{shown(labels) or 'none'}"
                )
            labels = [self.label_column]
        if len(labels) != 1:
            raise ValueError(
                f"{file}: which column is the label? Candidates: {shown(labels) or 'none'} (whole numbers); say so by "
                "dataset.label_column=NAME"
            )
        names = features.get(labels[0], {}).get("names")
        return _Columns(images[0], labels[0], tuple(map(str, names)) if names else None)


def list_parquet(path: str, key: str) -> list[str]:
    """The parquet files of a folder (or its data/ folder), a glob or a brace pattern, sorted by name.

    Raises:
        ValueError: When there are none.
    """
    found: list[str] = []
    for pattern in braceexpand.braceexpand(path):
        where = pattern if any(ch in pattern for ch in "*?[") else absolute(pattern)
        fs, root = fsspec.core.url_to_fs(where)
        if any(ch in root for ch in "*?["):
            names = sorted(fs.glob(root))
        elif fs.isdir(root):
            names = sorted(fs.glob(f"{root}/*.parquet")) or sorted(fs.glob(f"{root}/data/*.parquet"))
        else:
            names = [root] if fs.exists(root) else []
        if not names:
            raise ValueError(f"{key}={path}: {where} holds no parquet file; expected *.parquet")
        found += [str(fs.unstrip_protocol(n)) if "://" in where else str(n) for n in names]
    return found


def _by_split(files: list[str], path: str) -> tuple[list[str], list[str]]:
    """Training and validation files by the words that their names start with, as on the hub."""
    words: dict[str, list[str]] = {}
    for file in files:
        name = posixpath.basename(file).lower()
        start = next((w for w in ("train", *_VALIDATION) if name.startswith((f"{w}-", f"{w}.", f"{w}_"))), "")
        words.setdefault(start, []).append(file)
    if "train" not in words:
        if any(words.get(w) for w in _VALIDATION):
            raise ValueError(
                f"dataset.path={path}: {shown([posixpath.basename(f) for f in files])}: no file of it is named "
                "train-*; give the training files by a pattern"
            )
        return files, []
    held = [w for w in words if w in _VALIDATION]
    if "" in words or len(held) > 1:
        candidates = [f"{word or 'others'} ({len(named)})" for word, named in words.items()]
        raise ValueError(
            f"dataset.path={path}: which files are for training, which for validation? There are {shown(candidates)}; "
            "give each by a pattern: "
            "dataset.path='.../train-*' dataset.val_path='.../validation-*'"
        )
    return words["train"], words[held[0]] if held else []


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _image_bytes(parquet: Any, column: str) -> int:
    """Bytes of a row's image, on average: to tell each one's would be to read them all."""
    meta, total = parquet.metadata, 0
    for group in range(meta.num_row_groups):
        for i in range(meta.num_columns):
            chunk = meta.row_group(group).column(i)
            if chunk.path_in_schema.split(".")[0] == column:
                total += chunk.total_uncompressed_size
    return max(1, total // max(1, meta.num_rows))
