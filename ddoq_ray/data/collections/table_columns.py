"""One Parquet or Arrow file of rows: its columns of images and labels, and what is in them."""

from __future__ import annotations

import contextlib
import json
import math
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ddoq_ray.data.collections.classes import shown, text_of
from ddoq_ray.data.collections.metadata import SPLIT_COLUMNS, nearly_unique
from ddoq_ray.data.collections.splits import split_of
from ddoq_ray.data.picture_kinds import LFS_POINTER
from ddoq_ray.storage.transport import open_file, read_file

_LABELS = ("label", "labels", "class", "class_name", "category", "target", "y", "cls")
Label = int | str | None


@dataclass(frozen=True)
class Columns:
    """The names of the columns that are read, and the names of the labels where the file has them."""

    image: str
    label: str | None
    names: tuple[str, ...] | None


def schema_of(file: str) -> tuple[pa.Schema, dict[str, Any]]:
    """(schema, features as Hugging Face writes them, or nothing) of a file.

    Raises:
        ValueError: When it is no such file.
    """
    with _opened(file) as f:
        schema = _arrow(f).schema if file.lower().endswith(".arrow") else pq.read_schema(f)
    features: dict[str, Any] = {}
    if schema.metadata and b"huggingface" in schema.metadata:
        features = _features(schema.metadata[b"huggingface"], "info", "features")
    if not features and file.lower().endswith(".arrow"):
        info = posixpath.join(posixpath.dirname(file), "dataset_info.json")
        with contextlib.suppress(FileNotFoundError):
            features = _features(read_file(info), "features")
    return schema, features


@contextlib.contextmanager
def _opened(file: str) -> Iterator[Any]:
    """A file, whose reader's errors become the user's: it is another kind of file, or damaged."""
    try:
        there = open_file(file)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}; bring it back, or move it away") from error
    with there as f:
        pointer = f.read(len(LFS_POINTER)) == LFS_POINTER
        f.seek(0)
        if pointer:
            raise ValueError(f"{file} is a pointer of Git LFS, not the file itself: get it by git lfs pull")
        try:
            yield f
        except (pa.ArrowInvalid, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's, or the store's
            kind = "an Arrow" if file.lower().endswith(".arrow") else "a parquet"
            raise ValueError(f"{file} is not {kind} file, or is damaged: {error}; get it anew") from error


def _features(text: bytes, *path: str) -> dict[str, Any]:
    """What Hugging Face's JSON says of the columns; nothing where it is something else, as other programs write it."""
    found: Any = None
    with contextlib.suppress(ValueError):
        found = json.loads(text)
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def columns_of(file: str, image_column: str | None, label_column: str | None, *, unlabelled: bool = False) -> Columns:
    """Which columns of a file are read.

    Args:
        unlabelled: A file without a label column is accepted.

    Raises:
        ValueError: When which column is the image or the label is ambiguous.
    """
    schema, features = schema_of(file)
    kinds = {name: f.get("_type") for name, f in features.items() if isinstance(f, dict)}
    fields = {f.name: _value_type(f.type) for f in schema}
    images = [n for n in fields if kinds.get(n) == "Image"] or [n for n, kind in fields.items() if _holds_bytes(kind)]
    if image_column is not None:
        if image_column not in fields or not _holds_bytes(fields[image_column]):
            raise ValueError(
                f"{file}: no column of images dataset.image_column={image_column}; candidates: "
                f"{shown(images) or 'none'}"
            )
        images = [image_column]
    if len(images) != 1:
        raise ValueError(
            f"{file}: which column is the image? Candidates: {shown(images)}; say which by dataset.image_column=NAME"
            if images
            else f"{file}: no column holds images as bytes (there: "
            f"{shown([f'{name} of {kind}' for name, kind in fields.items()])}); expected a column of "
            "struct{bytes, path} or binary with each image's file (JPEG, PNG): write one"
        )
    able = [n for n, kind in fields.items() if _may_be_label(kind) and not n.startswith("__")]
    labels = [n for n in fields if kinds.get(n) == "ClassLabel"]
    others = [[n for n in able if not pa.types.is_floating(fields[n])], able]
    if any(n.lower() in _LABELS for n in fields if n not in (*able, images[0])):
        others = []  # the labels are there, of a type that is not read: no other column stands for them
    for choice in (["label"], _LABELS, *others):
        labels = labels or [n for n in able if n.lower() in choice or n in choice]
    if label_column is not None and not (unlabelled and label_column not in fields):
        if label_column not in able:
            raise ValueError(
                f"{file}: no column of numbers or names dataset.label_column={label_column}; candidates: "
                f"{shown(able) or 'none'}"
            )
        labels = [label_column]
    if unlabelled and (not labels or (label_column is not None and label_column not in fields)):
        return Columns(images[0], None, None)
    if len(labels) != 1:
        raise ValueError(
            f"{file}: which column is the label? Candidates: {shown(labels) or 'none'} (numbers or names; there: "
            f"{shown([f'{name} of {kind}' for name, kind in fields.items() if name != images[0]]) or 'no other'}); say "
            "so by dataset.label_column=NAME"
        )
    names = features[labels[0]].get("names") if labels[0] in kinds else None
    return Columns(images[0], labels[0], tuple(map(text_of, map(str, names))) if names else None)


def read_labels(file: str, columns: Columns, given: bool) -> tuple[npt.NDArray[np.int64], list[Label], int]:
    """(for each row the place of its label, the distinct labels as numbers or text, bytes of an image on average).

    Args:
        given: The column was named, or is known to be one of labels: it is not asked whether it looks like one.

    Raises:
        ValueError: When values are no labels.
    """
    with _opened(file) as f:
        if file.lower().endswith(".arrow"):
            parts, size, rows = [], 0, 0
            for batch in _arrow_batches(f):
                rows, size = rows + batch.num_rows, size + batch.column(columns.image).nbytes
                if columns.label is not None:
                    parts.append(batch.column(columns.label))
            column = pa.chunked_array(parts) if parts else None
        else:
            parquet = pq.ParquetFile(f)
            rows, size = parquet.metadata.num_rows, _image_bytes(parquet, columns.image)
            column = None if columns.label is None else parquet.read(columns=[columns.label]).column(columns.label)
    average = max(1, size // max(1, rows))
    if column is None:
        return np.zeros(rows, np.int64), [None], average
    column = column.cast(_value_type(column.type)) if pa.types.is_dictionary(column.type) else column
    encoded = pc.dictionary_encode(column, null_encoding="encode").combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = pa.concat_arrays(encoded.chunks) if encoded.num_chunks else pa.DictionaryArray.from_arrays([], [])
    values = encoded.dictionary.to_pylist()
    named = str(columns.label).lower() in _LABELS and pa.types.is_integer(column.type)  # few rows of many classes
    if not given and not named and nearly_unique(column.to_pylist()):
        raise ValueError(
            f"{file}: is {columns.label} the label? Hardly any value of it comes twice; say which column is, by "
            "dataset.label_column=NAME"
        )
    indices = encoded.indices.fill_null(len(values)).to_numpy(zero_copy_only=False).astype(np.int64)
    return indices, [*(_label(v, file, str(columns.label)) for v in values), None], average


def read_splits(file: str) -> list[str | None] | None:
    """The split of each row, where a column says it; None where none does.

    Raises:
        ValueError: When it says so of some rows only, or by numbers.
    """
    schema, _ = schema_of(file)
    names = [f.name for f in schema if f.name.casefold() in SPLIT_COLUMNS and _may_be_label(_value_type(f.type))]
    for name in names:
        with _opened(file) as f:
            if file.lower().endswith(".arrow"):
                values = [value for batch in _arrow_batches(f) for value in batch.column(name).to_pylist()]
            else:
                values = pq.ParquetFile(f).read(columns=[name]).column(name).to_pylist()
        meant = {value: split_of(str(value)) for value in set(values)}
        odd = sorted(str(value) for value, split in meant.items() if split is None)
        if len(meant) > 1 and odd and (len(odd) < len(meant) or all(isinstance(value, int) for value in meant)):
            raise ValueError(
                f"{file}: the column {name} holds {shown(odd, 4)}, which is no split; expected train, val or test in "
                "each row, or a file for each split (train-*.parquet, test-*.parquet); mend these rows, or rename the "
                "column where it means something else"
            )
        if not odd:
            return [meant[value] for value in values]
    return None


def read_images(file: str, image: str) -> Iterator[Any]:
    """The values of the column of images, row by row."""
    with _opened(file) as f:
        if file.lower().endswith(".arrow"):
            for batch in _arrow_batches(f):
                for value in batch.column(image):
                    yield value.as_py()
            return
        for batch in pq.ParquetFile(f).iter_batches(batch_size=64, columns=[image]):
            for value in batch.column(0):
                yield value.as_py()


def _label(value: Any, file: str, column: str) -> Label:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, (bool, str)):
        return text_of(str(value).strip())
    if not math.isfinite(value) or value != int(value):
        raise ValueError(f"{file}: {column} holds {value}; expected whole numbers or names")
    return None if int(value) == -1 else int(value)


def _arrow(f: Any) -> Any:
    """A reader of Arrow's stream format, which save_to_disk writes, or of its file format."""
    head = f.read(6)
    f.seek(0)
    return pa.ipc.open_file(f) if head == b"ARROW1" else pa.ipc.open_stream(f)


def _arrow_batches(f: Any) -> Iterator[pa.RecordBatch]:
    reader = _arrow(f)
    if isinstance(reader, pa.ipc.RecordBatchStreamReader):
        yield from reader
    else:
        for i in range(reader.num_record_batches):
            yield reader.get_batch(i)


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _may_be_label(kind: pa.DataType) -> bool:
    types = pa.types
    text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    number = types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)
    return text or number or types.is_boolean(kind)


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _image_bytes(parquet: Any, column: str) -> int:
    """Bytes of the images: to tell each one's would be to read them all."""
    meta, total = parquet.metadata, 0
    for group in range(meta.num_row_groups):
        for i in range(meta.num_columns):
            chunk = meta.row_group(group).column(i)
            if chunk.path_in_schema.split(".")[0] == column:
                total += chunk.total_uncompressed_size
    return total
