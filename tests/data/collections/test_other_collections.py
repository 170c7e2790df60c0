"""Collections of other shapes than are read: each says what is there and what to do, and none loses a sample unseen."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.collection_trees import found, picture, put, rows_of, survey, tree

from ddoq_ray.config.dataset import DatasetConfig
from ddoq_ray.data.collections import kind_of
from ddoq_ray.data.collections.listing import Picture, no_image
from ddoq_ray.data.samples import read_classes

CAT_DOG = [f"{c}/{i}.png" for c in ("cat", "dog") for i in range(3)]


def told(path: Path | str) -> str:
    """The words that a folder ends in."""
    with pytest.raises(ValueError) as caught:
        survey(path)
    return str(caught.value)


def test_a_folder_without_a_collection_says_what_is_there(tmp_path: Path) -> None:
    flat = tree(tmp_path / "flat", "cat.0.png", "dog.0.png", "train.csv")
    assert "holds 2 images in no class folder (such as cat.0.png)" in told(flat) and "is train.csv its table" in told(
        flat
    )
    put(tmp_path / "zips/cat/cat.zip", b"PK\3\4")
    assert "holds archives (cat/cat.zip)" in told(tmp_path / "zips")
    (tmp_path / "empty/cat").mkdir(parents=True)
    assert "there: cat/" in told(tmp_path / "empty") and "expected class folders" in told(tmp_path / "empty")
    put(tmp_path / "one.png")
    assert "is one image" in told(tmp_path / "one.png")
    put(tmp_path / "labels.csv", b"file_name,label\n")
    assert "name it metadata.csv" in told(tmp_path / "labels.csv")


def test_tars_of_one_class_each_are_archives(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        put(tmp_path / f"{name}.JPEG", picture("JPEG"))
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            tar.add(tmp_path / f"{name}.JPEG", f"{name}_0.JPEG")
        os.unlink(tmp_path / f"{name}.JPEG")
    assert "cat.tar is an archive" in told(tmp_path) and "folder of the class's name" in told(tmp_path)
    put(tmp_path / "classes.json", b'["cat", "dog"]')
    assert kind_of(DatasetConfig(path=str(tmp_path))) == "webdataset"


def test_held_out_images_without_classes(tmp_path: Path) -> None:
    both = tree(tmp_path / "both", *(f"train/{n}" for n in CAT_DOG), *(f"val/{n}" for n in CAT_DOG), "test/1.png")
    s = survey(both)
    assert found(s) == (["cat", "dog"], 6, 6) and any("test has no class folders" in note for note in s.notes)
    flat = tree(tmp_path / "flat", *(f"train/{n}" for n in CAT_DOG), "val/1.png", "val/2.png")
    words = told(flat)
    assert "val holds 2 images in no class folder" in words and f"dataset.path={flat}/train dataset.heldout" in words
    inside = tree(tmp_path / "inside", *CAT_DOG, *(f"kept/{n}" for n in CAT_DOG))
    for path, val in ((inside, inside / "kept"), (inside / "kept", inside)):
        with pytest.raises(ValueError, match="lie inside the folder"):
            survey(path, val_path=str(val))


def test_a_picture_that_is_cut_off_is_not_of_an_unknown_format() -> None:
    for kind in ("JPEG", "PNG"):
        assert f"begins as {kind}" in str(no_image(Picture(picture(kind)[:20], "jpg")))
    assert no_image(Picture(b"404: Not Found", "jpg")) == "not an image in a known format"


def test_a_class_without_a_name_or_a_prompt(tmp_path: Path) -> None:
    put(tmp_path / "c.json", b'[{"name": "cat", "prompt": null}]')
    assert read_classes(str(tmp_path / "c.json"))[0].prompt == "cat"
    for row in ('{"name": null}', '{"name": "a", "prompt": ["a"]}', '{"name": 3}'):
        put(tmp_path / "c.json", f"[{row}]".encode())
        with pytest.raises(ValueError, match=r"class 0 has .*; expected a text"):
            read_classes(str(tmp_path / "c.json"))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("metadata.csv", "", "holds no row"),
        ("metadata.csv", "file_name,label\n", "holds no row"),
        ("metadata.csv", "images/0.png,cat\nimages/1.png,dog\n", "columns of the first line: images/0.png, cat"),
        ("metadata.csv", "version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("metadata.csv", "file_name,label\nimages/caf\xe9.png,cat\n", "save it as UTF-8"),
        ("metadata.csv", "file_name,label\n../0.png,cat\n../1.png,dog\n", "none of the 2 images .*images/0.png is"),
        ("metadata.csv", "file_name,label,split\nimages/0.png,a,train\nimages/1.png,a,foo\n", "no split .foo"),
        ("metadata.csv", "file_name,label,split\nimages/0.png,a,train\nimages/1.png,a,\n", "no split .nothing"),
        ("metadata.jsonl", '{"file_name": "images/0.png", "label": 0}\n{"file_name": \n', "line 2 is"),
        ("metadata.jsonl", '[{"file_name": "images/0.png", "label": 0}]', "line 1 is.*one JSON object a line"),
        ("metadata.parquet", "PAR1xxxx", "not a parquet file, or is damaged"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_meant(tmp_path: Path, name: str, text: str, words: str) -> None:
    tree(tmp_path, "images/0.png", "images/1.png")
    put(tmp_path / name, b"")
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=words):
        survey(tmp_path)


def test_files_that_lead_nowhere_are_told(tmp_path: Path) -> None:
    for name in ("metadata.csv", "train-0.parquet"):
        root = tree(tmp_path / name, "images/0.png") if name == "metadata.csv" else tmp_path / name
        root.mkdir(exist_ok=True)
        (root / name).symlink_to("nowhere")
        assert "cannot be read: No such file" in told(root)


def rows(path: Path, labels: list[object], column: str = "label") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": picture(value=i), "path": f"{i}.png"} for i in range(len(labels))]
    pq.write_table(pa.table({"image": images, column: labels}), path)
    return path.parent


def test_parquet_labels_that_are_none(tmp_path: Path) -> None:
    assert "is id the label" in told(rows(tmp_path / "id/train-0.parquet", list(range(12)), "id"))
    assert len(survey(rows(tmp_path / "few/train-0.parquet", list(range(12)), "labels")).classes) == 12
    rows(tmp_path / "two/train-0.parquet", [0, 1] * 3)
    assert "numbers here and names there" in told(rows(tmp_path / "two/train-1.parquet", ["cat", "dog"] * 3))


def test_columns_of_shards_that_became_a_table(tmp_path: Path) -> None:
    """webdataset's `cls` is the label; its `__key__` and `__url__` are none."""
    hub = {"__key__": ["a", "b", "c"], "__url__": ["x"] * 3}
    pq.write_table(rows_of([0, 1, 0], hub).rename_columns(["png", "cls", *hub]), tmp_path / "train-0.parquet")
    assert len(survey(tmp_path).train.names) == 3


def test_parts_that_are_not_there(tmp_path: Path) -> None:
    s = survey(rows(tmp_path / "part/train-00000-of-00002.parquet", [0, 1] * 3))
    assert any("1 of 2 files" in note for note in s.notes)
    root = rows(tmp_path / "saved/data-00000-of-00002.parquet", [0, 1])
    files = [{"filename": f"data-0000{i}-of-00002.parquet"} for i in range(2)]
    put(root / "state.json", json.dumps({"_data_files": files}).encode())
    assert "names 1 files that are not there (data-00001-of-00002.parquet)" in told(root)
    put(root / "state.json", json.dumps({"_data_files": files[:1], "_indices_files": files[:1]}).encode())
    assert "flatten_indices" in told(root)
