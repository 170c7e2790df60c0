"""Parquet files with image bytes: columns, names and splits found out, or the candidates shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ddoq_ray.data.collections.listing import Picture
from ddoq_ray.data.collections.parquet import Parquet
from ddoq_ray.data.pictures import encode_png
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.quarantine import Refusal

IMAGES = [encode_png(np.full((4, 4), i, np.uint8)) for i in range(6)]


def write(path: Path, columns: dict[str, Any], features: dict[str, Any] | None = None, rows: int = 1000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=rows)
    return path


def structs(images: list[bytes | None], names: list[str | None] | None = None) -> list[dict[str, Any]]:
    return [{"bytes": b, "path": p} for b, p in zip(images, names or [None] * len(images), strict=True)]


def source(path: Path, val: Path | None = None, column: str | None = None, classes: Path | None = None) -> Parquet:
    return Parquet(str(path), val and str(val), classes and str(classes), column)


def refused(path: Path, *words: str, **options: Any) -> None:
    with pytest.raises(ValueError) as error:
        source(path, **options).survey()
    assert all(w in str(error.value) for w in words), str(error.value)


CLASSES = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["ox", "ant", "bee"]}}


def test_names_from_the_files_own_metadata(tmp_path: Path) -> None:
    write(
        tmp_path / "data/train-00000-of-00002.parquet",
        {"image": structs(IMAGES[:3], ["a.PNG", None, "x/b.png"]), "label": [2, 0, -1]},
        CLASSES,
        rows=2,
    )
    write(
        tmp_path / "data/train-00001-of-00002.parquet", {"image": structs([IMAGES[3], None]), "label": [1, 1]}, CLASSES
    )
    write(tmp_path / "data/validation-00000-of-00001.parquet",
          {"image": structs(IMAGES[5:]), "label": [0]}, CLASSES)  # fmt: skip
    given = source(tmp_path)
    survey = given.survey()
    assert [(c.class_id, c.name) for c in survey.classes] == [(0, "ox"), (1, "ant"), (2, "bee")]
    assert survey.train.class_ids.tolist() == [2, 0, 1, 1]
    assert [r.reason for r in survey.train.refused] == ["no label"]
    assert survey.val is not None and survey.val.class_ids.tolist() == [0]
    scratch = Folder(str(tmp_path / "scratch"))
    for i in (2, 0, 1, 1):  # any order, and twice
        given.unpack(i, scratch)
    names = [*survey.train.names[::-1], *survey.val.names]
    assert list(given.read("train", names, scratch)) == [
        Refusal(survey.train.names[3], "no image bytes"), Picture(IMAGES[3]), Picture(IMAGES[1]),
        Picture(IMAGES[0], "PNG"), Picture(IMAGES[5]),
    ]  # fmt: skip


def test_plain_files(tmp_path: Path) -> None:
    file = write(tmp_path / "x.parquet", {"bytes": IMAGES[:2], "y": pa.array([1, 0], pa.uint8())})
    assert [c.name for c in source(file).survey().classes] == ["0", "1"]
    (tmp_path / "classes.json").write_text('["ox", "ant"]')
    assert [c.name for c in source(tmp_path / "*.parquet").survey().classes] == ["ox", "ant"]
    survey = source(file, file).survey()
    assert survey.val is not None and survey.val.names == ["000001#000000000", "000001#000000001"]
    assert sum(survey.train.sizes) > 0


def test_what_is_ambiguous_or_missing(tmp_path: Path) -> None:
    images = structs(IMAGES[:2])
    two = write(tmp_path / "a/two.parquet", {"image": images, "fine": [0, 1], "coarse": [0, 0]})
    refused(two, "fine, coarse", "dataset.label_column=NAME")
    assert source(two, column="fine").survey().train.class_ids.tolist() == [0, 1]
    refused(two, "dataset.label_column=image", "fine, coarse", column="image")
    refused(write(tmp_path / "b/x.parquet", {"image": images}), "which column is the label", "none")
    refused(
        write(tmp_path / "c/x.parquet", {"a": images, "b": images, "y": [0, 1]}), "which column is the image", "a, b"
    )
    refused(write(tmp_path / "d/x.parquet", {"image": images, "y": [1, 2]}), "labels 1, 2", "dataset.classes")
    refused(write(tmp_path / "e/x.parquet", {"image": images, "label": [0, 3]}, CLASSES), "labels 3", "0 to 2")
    other = CLASSES | {"label": {"_type": "ClassLabel", "names": ["ant", "ox"]}}
    write(tmp_path / "f/x.parquet", {"image": images, "label": [0, 1]}, CLASSES)
    write(tmp_path / "f/y.parquet", {"image": images, "label": [0, 1]}, other)
    refused(tmp_path / "f", "other columns or class names")
    for name in ("train-0", "validation-0", "test-0"):
        write(tmp_path / f"g/{name}.parquet", {"image": images, "y": [0, 1]})
    refused(tmp_path / "g", "train (1)", "validation (1)", "test (1)", "dataset.val_path")
    assert source(tmp_path / "g", tmp_path / "g/test-0.parquet").survey().val is not None
    refused(write(tmp_path / "h/test-0.parquet", {"image": images, "y": [0, 1]}).parent, "train-*")
    refused(tmp_path / "none", "no parquet file")
    (tmp_path / "bad.parquet").write_bytes(b"not parquet at all")
    refused(tmp_path / "bad.parquet", "not a parquet file")
    refused(
        write(tmp_path / "i/x.parquet", {"image": images, "y": pa.array([None, None], pa.int64())}), "no labelled row"
    )


def test_labels_from_one_are_refused_however_many_classes_hide_the_last(tmp_path: Path) -> None:
    listed = tmp_path / "classes.json"
    listed.write_text(json.dumps([f"class {i}" for i in range(150)]))
    write(tmp_path / "train.parquet", {"image": structs([IMAGES[0]] * 300), "label": [i % 150 + 1 for i in range(300)]})
    refused(tmp_path, "labels go from 1 to 150", "class list from 0 to 149", "subtract one", classes=listed)
    listed.unlink()
    refused(tmp_path, "expected 0 to C - 1 without a gap. They begin at 1: subtract one")
