"""Metadata tables of image files, as Hugging Face's imagefolder has them: file_name and a label, perhaps a split."""

from __future__ import annotations

import csv
import io
import json
import math
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import unquote

from ddoq_ray.config.split_words import tokens
from ddoq_ray.data.collections.classes import class_list, numbered_classes, shown, text_of
from ddoq_ray.data.collections.listing import image_extension
from ddoq_ray.data.collections.splits import split_of
from ddoq_ray.data.picture_kinds import LFS_POINTER
from ddoq_ray.storage.records import ClassInfo
from ddoq_ray.storage.transport import read_file

TINY_IMAGENET = "val_annotations.txt"  # of its validation images: a name, a class and a box in each line
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_LABELS = ("label", "labels", "class", "class_name", "label_name", "category", "target")
SPLIT_COLUMNS = ("split", "set", "subset", "partition")
_FLAGS = {"0": False, "false": False, "no": False, "1": True, "true": True, "yes": True}
_NUMBER = re.compile(r"([+-]?[0-9]+)(\.0*)?")
_ROW_NUMBERS = re.compile(r"(Unnamed: [0-9]+)?")  # the name of such a column, as pandas writes and reads it
_NOTHING = ("", "nan", "<na>", "#n/a", "n/a")  # as tables write a value that is not there
_NOTHING_AMONG_NUMBERS = (*_NOTHING, "none", "null", "na")


@dataclass(frozen=True)
class Row:
    """One row: the image's name as written, its label (None: it has none), its split where the table has such."""

    name: str
    label: str | None
    split: str | None


def is_metadata(name: str) -> bool:
    return posixpath.basename(name).lower() in METADATA_FILES or name == TINY_IMAGENET  # which is of one split only


def labelled_rows(table: str, label_column: str | None) -> list[Row]:
    """The rows of a table.

    Raises:
        ValueError: When the table cannot be read, has no file_name, or which column is the label is ambiguous.
    """
    rows = _rows(table)
    if not rows:
        raise ValueError(f"{table} holds no row; expected one for each image, with file_name and label")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    names = [c for c in columns if re.sub(r"[\s_-]", "", str(c)).casefold() == "filename"]
    names = ["file_name"] if "file_name" in names else names
    if len(names) != 1:
        first = " of the first line" if table.lower().endswith(".csv") else ""
        raise ValueError(
            f"{table}: no column file_name (the columns{first}: {shown(columns)}); it names each row's image; rename "
            "that column so, or the table if it is none of the images' labels"
        )
    split = _split_column(table, rows, [c for c in columns if c not in (*names, label_column)])
    others = [c for c in columns if c not in (*names, split) and not _ROW_NUMBERS.fullmatch(str(c))]
    column = label_column or _label_column(table, others, rows)
    if column not in columns:
        raise ValueError(f"{table}: no column dataset.label_column={column} (there: {shown(columns)})")
    out = []
    for row in rows:
        name = str(row.get(names[0]) or "")
        if "\n" in name or "\n" in str(row.get(column) or ""):
            raise ValueError(
                f"{table}: a file_name or {column} of several lines, beginning {shown([name.split(chr(10))[0][:60]])}: "
                "a quote there is opened and not closed, and takes the rows behind it; close or remove it"
            )
        label = _label(table, name, column, row.get(column))
        out.append(Row(name, label, None if split is None else _split_meant(split, row[split])))
    return out


def _split_column(table: str, rows: list[dict[str, Any]], columns: Sequence[str]) -> str | None:
    """The column that says each image's split: by its name, else by its values.

    Raises:
        ValueError: When several could be it, or it has values that say no split.
    """
    named = next((c for c in columns if str(c).casefold() in SPLIT_COLUMNS and _is_split(table, rows, c)), None)
    if named is not None:
        return named
    found = []
    for column in columns:
        if str(column).casefold() not in _LABELS and _split_meant(column, rows[0].get(column)) is not None:
            meant = {_split_meant(column, row.get(column)) for row in rows}
            found += [column] if None not in meant and "train" in meant and len(meant) > 1 else []
    if len(found) > 1:
        raise ValueError(
            f"{table}: which column says each image's split? Candidates: {shown(found)}; rename it split, and the "
            "others so that they hold no split's word, or remove them"
        )
    return found[0] if found else None


def _split_meant(column: str, value: Any) -> str | None:
    """The split that a value means: by its own words, or as the answer to a column such as is_training."""
    text = str(value).strip()
    words = tokens(str(column))
    asked = split_of(" ".join(w for w in words if w != "is")) if "is" in words else None
    answer = _FLAGS.get(text.casefold().removesuffix(".0"))
    if asked is None or answer is None:
        return split_of(text)
    return asked if answer else "test" if asked == "train" else "train"


def _is_split(table: str, rows: list[dict[str, Any]], column: str) -> bool:
    """Whether a column that is named so says each image's split.

    Raises:
        ValueError: When it does for some rows only, or by numbers: the others would be trained on.
    """
    values = ["" if row.get(column) is None else str(row[column]) for row in rows]
    others = [value for value in values if split_of(value) is None]
    numbers = len(set(values)) > 1 and all(_NUMBER.fullmatch(value) for value in values)
    if (others and len(others) < len(values)) or numbers:
        raise ValueError(
            f"{table}: {len(others):,} of {len(values):,} rows have a {column} that is no split ("
            f"{shown(sorted({v or 'nothing' for v in others}), 4)}); expected train, val or test in each; mend these "
            "rows, or rename the column where it means something else"
        )
    return not others


def _label(table: str, name: str, column: str, value: Any) -> str | None:
    if isinstance(value, float):
        if math.isnan(value):
            return None
        if math.isinf(value) or value != int(value):
            raise ValueError(f"{table}: {name} has {column}={value!r}; expected a class's name or whole number")
        value = int(value)
    if isinstance(value, (list, dict)) or re.fullmatch(r"\[.*\]|\{.*\}", str(value).strip()):
        raise ValueError(f"{table}: {name} has {column}={value!r}; expected a class's name or whole number")
    return None if value is None else text_of(str(value).strip())


def usable_labels(labels: Iterable[str | None], where: str) -> dict[str | None, str | None]:
    """Label as written -> label; None for what means that there is none: nothing, NaN, -1.

    Where all are numbers, 3.0 is 3: so tables write them that have a gap somewhere.

    Raises:
        ValueError: When some are numbers with a fraction and all are numbers.
    """
    texts = {label for label in labels if label is not None}
    given = {t for t in texts if t.casefold() not in _NOTHING_AMONG_NUMBERS}
    numbers = {t: m for t in given if (m := _NUMBER.fullmatch(t)) is not None}
    if len(numbers) < len(given):
        broken = sorted(t for t in given if t not in numbers and not re.fullmatch(r"[+-]?[0-9]*\.[0-9]+", t))
        if not broken:
            raise ValueError(
                f"{where}: labels such as {sorted(set(given) - set(numbers))[0]}; expected names or whole numbers"
            )
        return {None: None} | {t: None if t == "-1" or t.casefold() in _NOTHING else t for t in texts}
    return {None: None} | dict.fromkeys(texts) | {t: None if int(m[1]) == -1 else m[1] for t, m in numbers.items()}


def metadata_classes(
    labels: Mapping[str, set[str | None]],
    given: list[ClassInfo] | None,
    where: str,
    words_in: Sequence[str] = (),
) -> tuple[list[ClassInfo], dict[str, int]]:
    """The class list, and label -> class_id, of usable labels by split.

    Args:
        words_in: Folders where a list of what WordNet ids mean may lie.

    Raises:
        ValueError: When the classes are ambiguous, or a validation label has no training image.
    """
    train = {label for label in labels["train"] if label is not None}
    val = {label for label in labels.get("val", set()) if label is not None}
    if not train:
        raise ValueError(f"{where}: no training image of it has a label")
    if val - train:
        raise ValueError(
            f"{where}: training and validation have different classes: only in validation: {shown(sorted(val - train))}"
        )
    _refuse_joined(train, given, where)
    if all(_NUMBER.fullmatch(label) for label in train) and {c.name for c in given or []} != train:
        if len({int(label) for label in train}) < len(train):
            raise ValueError(f"{where}: labels that are the same number written differently: {shown(sorted(train))}")
        classes = numbered_classes({int(label) for label in train}, None, given, where)
        return classes, {label: int(label) for label in train}
    classes = class_list(sorted(train), given, where, words_in)
    return classes, {c.name: c.class_id for c in classes}


def _refuse_joined(labels: set[str], given: list[ClassInfo] | None, where: str) -> None:
    """Refuse several labels of one image, written as one: each combination would be a class.

    Raises:
        ValueError: With such a label.
    """
    named = {c.name for c in given or []}
    for label in sorted(labels - named):
        ways = [[part.strip() for part in re.split(mark, label)] for mark in (r"[|;,]", r"\s+")]
        parts = next((parts for parts in ways if len(parts) > 1 and all(part in labels for part in parts)), None)
        if parts is not None:
            raise ValueError(
                f"{where}: {shown([label])} is several labels of one image, as {shown(parts)} are labels too; an image "
                "has one: keep one of them, or leave such rows out; where it is a class, name all classes by "
                "dataset.classes"
            )


def nearly_unique(values: Iterable[object]) -> bool:
    """Whether values look like captions or numbers of rows rather than labels: hardly any comes twice."""
    values = [str(v) for v in values]
    return len(values) >= 12 and len(set(values)) > 0.5 * len(values)


def _label_column(table: str, others: list[str], rows: list[dict[str, Any]]) -> str:
    named = [c for c in others if str(c).casefold() in _LABELS]
    if "label" in others:
        return "label"
    if len(named) == 1:
        return named[0]
    if len(others) != 1 or nearly_unique(row.get(others[0]) for row in rows):
        raise ValueError(
            f"{table}: which column is the label? Candidates: {shown(others) or 'none'}; "
            "say so by dataset.label_column=NAME, or move the table away to have the folders as classes"
        )
    return others[0]


class Names:
    """The files of a tree, found by what tables call them.

    Other slashes, cases and Unicode forms and absolute paths find a file; so does an image's name without its ending or
    its folder, where no other image has it.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._exact = set(names)
        self._folded: dict[str, str | None] = {}
        for name in self._exact:
            key = _fold(name)
            self._folded[key] = None if key in self._folded else name  # two that differ only so are not told apart

    def find(self, name: str, below: str) -> str | None:
        """The file that a table in the folder `below` calls `name`; None when there is none, or more than one."""
        whole = posixpath.join(below, name)
        if whole in self._exact:
            return whole
        plain = name.strip().replace("\\", "/")
        if "://" in plain:
            plain = unquote(plain.partition("://")[2])
            plain = plain if plain.startswith("/") else f"/{plain}"
        far = plain.startswith("/") or re.match(r"[A-Za-z]:/", plain) is not None
        parts = [p for p in posixpath.normpath(plain).split("/") if p]
        if not far and below and parts[:1] == [posixpath.basename(below)] and len(parts) > 1:
            far = True  # written from one folder further up
        for start in range(len(parts) if far else 1):
            found = self._one(posixpath.normpath(posixpath.join(below, *parts[start:])))
            if found is not None:
                return found
        for start in range(len(parts) if far else 1):
            found = self._short.get(_fold(posixpath.normpath(posixpath.join(below, *parts[start:]))))
            if found is not None:
                return found
        return self._short.get(_fold(parts[0])) if len(parts) == 1 else None

    @cached_property
    def _short(self) -> dict[str, str | None]:
        """Images by their names without ending, folder or both; made where a name is not found as it is."""
        found: dict[str, str | None] = {}
        for name in self._exact:
            if image_extension(name) is not None:
                key = _fold(name)
                stem = posixpath.splitext(key)[0]
                for short in {stem, posixpath.basename(key), posixpath.basename(stem)} - {key}:
                    found[short] = None if short in found else name
        return found

    def _one(self, name: str) -> str | None:
        return name if name in self._exact else self._folded.get(_fold(name))


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _rows(table: str) -> list[dict[str, Any]]:
    kind = table.rpartition(".")[2].lower()
    try:
        data = read_file(table)
    except OSError as error:
        raise ValueError(f"{table} cannot be read: {error.strerror or error}; mend it, or move it away") from error
    if data.startswith(LFS_POINTER):
        raise ValueError(f"{table} is a pointer of Git LFS, not the file itself: get it by git lfs pull")
    if kind == "parquet":
        import pyarrow.parquet as pq

        try:
            return pq.read_table(io.BytesIO(data)).to_pylist()
        except (ValueError, OSError) as error:  # both are Arrow's, too
            raise ValueError(f"{table} is not a parquet file, or is damaged: {error}; get it anew") from error
    try:
        if posixpath.basename(table).lower() == TINY_IMAGENET:
            lines = [line.split("\t") for line in data.decode().splitlines() if line.strip()]
            return [{"file_name": parts[0], "label": parts[1] if len(parts) > 1 else None} for parts in lines]
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        if kind == "csv":
            text = text.lstrip("\r\n")
            first = text.partition("\n")[0]
            mark = max(",;\t|", key=first.count)  # spreadsheets of many countries write another than the comma
            return [{k: v for k, v in row.items() if k is not None} for row in _csv(text, mark)]
    except UnicodeDecodeError as error:
        raise ValueError(f"{table}: cannot be read as {kind}: {error}; save it as UTF-8") from error
    except csv.Error as error:
        raise ValueError(f"{table}: cannot be read as {kind}: {error}; write it anew") from error
    rows = []
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if line.strip():
            row = _json(line)
            if not isinstance(row, dict):
                raise ValueError(
                    f"{table}: cannot be read as jsonl: line {number} is {shown([line.strip()[:60]])}; expected one "
                    'JSON object a line, such as {"file_name": "a.png", "label": "cat"}'
                )
            rows.append(row)
    return rows


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _csv(text: str, mark: str) -> list[dict[str, Any]]:
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # beside the label may be a caption of any length
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=mark, skipinitialspace=True)
    if reader.fieldnames is not None:
        reader.fieldnames = [str(name).strip() for name in reader.fieldnames]
    return list(reader)
