"""A metadata table beside image files, as Hugging Face's imagefolder has it: file_name and a label."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from typing import Any

import fsspec

from ddoq_ray.records import ClassInfo
from ddoq_ray.sources.classes import class_list, numbered_classes, shown

METADATA_FILES = ("metadata.csv", "metadata.jsonl")


def labelled_names(table: str, label_column: str | None) -> dict[str, str | None]:
    """file_name -> label as text (None where it is empty).

    Raises:
        ValueError: When the table cannot be read, has no file_name, or which column is the label is ambiguous.
    """
    rows = _rows(table)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if "file_name" not in columns:
        raise ValueError(f"{table}: no column file_name (there: {shown(columns)}); it names each row's image")
    column = label_column or _label_column(table, [c for c in columns if c != "file_name"])
    if column not in columns:
        raise ValueError(f"{table}: no column dataset.label_column={column} (there: {shown(columns)})")
    labels: dict[str, str | None] = {}
    for row in rows:
        name, value = str(row.get("file_name") or ""), row.get(column)
        if isinstance(value, (list, dict, bool, float)):
            raise ValueError(f"{table}: {name} has {column}={value!r}; expected a class's name or whole number")
        label = None if value is None or str(value).strip() == "" else str(value).strip()
        if name in labels and labels[name] != label:
            raise ValueError(f"{table}: {name} is there twice, as {labels[name]} and as {label}; keep one")
        labels[name] = label
    return labels


def metadata_classes(
    labels: Mapping[str, set[str | None]], given: list[ClassInfo] | None, where: str
) -> tuple[list[ClassInfo], dict[str, int]]:
    """The class list, and label -> class_id, of tables by split.

    Raises:
        ValueError: When the classes are ambiguous, or a validation label has no training image.
    """
    train = {label for label in labels["train"] if label is not None}
    val = {label for label in labels.get("val", set()) if label is not None}
    if not train:
        raise ValueError(f"{where}: no row of its metadata has a label")
    if val - train:
        raise ValueError(
            f"{where}: training and validation have different classes: only in validation: {shown(sorted(val - train))}"
        )
    if all(label.isdecimal() for label in train) and {c.name for c in given or []} != train:
        if len({int(label) for label in train}) < len(train):
            raise ValueError(f"{where}: labels that are the same number written differently: {shown(sorted(train))}")
        classes = numbered_classes({int(label) for label in train}, None, given, where)
        return classes, {label: int(label) for label in train}
    classes = class_list(sorted(train), given, where)
    return classes, {c.name: c.class_id for c in classes}


def _label_column(table: str, others: list[str]) -> str:
    if "label" in others:
        return "label"
    if len(others) != 1:
        raise ValueError(
            f"{table}: which column is the label? Candidates: {shown(others) or 'none'}; "
            "say so by dataset.label_column=NAME"
        )
    return others[0]


def _rows(table: str) -> list[dict[str, Any]]:
    try:
        with fsspec.open(table, "rb") as f:
            text = f.read().decode("utf-8-sig")
        if table.endswith(".csv"):
            return list(csv.DictReader(io.StringIO(text, newline="")))
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise ValueError(f"{table}: cannot be read as {table.rpartition('.')[2]}: {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{table}: expected one JSON object a line")
    return rows
