"""Collections that are nearly what is expected: each is read as its owner means it, or refused with the way out."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from support.collection_trees import found, picture, put, rows_of, survey, table, tree

from ddoq_ray.config.dataset import DatasetConfig
from ddoq_ray.data.collections import open_source, places_of, survey_of
from ddoq_ray.data.samples import read_classes
from ddoq_ray.data.tar_writing import write_tar

CLASSES = ("cat", "dog")


def idx(path: Path, array: np.ndarray) -> None:
    put(path, bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes())


@pytest.mark.parametrize(
    "url",
    [
        "foo://bar/x",
        "memory://",
        "http://127.0.0.1:9/x.tar",
        "http://127.0.0.1:9/photos",
        "ftp://no.such.host.invalid/x",
    ],
)
def test_a_place_that_cannot_be_reached_is_told(url: str) -> None:
    with pytest.raises(ValueError, match=url):
        open_source(DatasetConfig(path=url))
    for source in ("imagefolder", "parquet"):  # named, so that nothing has looked there before
        with pytest.raises(ValueError, match=url):
            opened = open_source(DatasetConfig(path=url, source=source))
            assert opened is not None
            survey_of(opened, f"dataset.path={url}")


def test_validation_images_that_cannot_be_reached_are_told(tmp_path: Path) -> None:
    dataset = DatasetConfig(path=str(tree(tmp_path, "cat/1.png", "dog/1.png")), val_path="http://127.0.0.1:9/val")
    opened = open_source(dataset)
    assert opened is not None
    with pytest.raises(ValueError, match=r"dataset.val_path=http://127.0.0.1:9/val cannot be looked at: Client"):
        survey_of(opened, places_of(dataset))


def test_a_class_list_of_an_unknown_protocol() -> None:
    with pytest.raises(ValueError, match=r"cannot read the class list foo://bar: .*dataset.classes"):
        read_classes("foo://bar")


@pytest.mark.parametrize(
    "form", ["{0}-images-idx3-ubyte", "{0}-images.idx3-ubyte", "{0}-images-idx3-ubyte/{0}-images-idx3-ubyte"]
)
def test_idx_files_as_archives_name_them(tmp_path: Path, form: str) -> None:
    for split, n in (("train", 6), ("t10k", 4)):
        idx(tmp_path / form.format(split), np.zeros((n, 4, 4), np.uint8))
        idx(
            tmp_path / form.format(split).replace("images", "labels").replace("idx3", "idx1"),
            np.arange(n, dtype="u1") % 2,
        )
    assert found(survey(tmp_path)) == (["0", "1"], 6, 4)


def test_idx_files_further_down_are_pointed_at(tmp_path: Path) -> None:
    put(tmp_path / "MNIST/raw/train-images-idx3-ubyte", b"x")
    put(tmp_path / "MNIST/raw/train-images-idx3-ubyte.gz", b"x")
    with pytest.raises(ValueError, match=rf"give dataset.path={tmp_path}/MNIST/raw"):
        survey(tmp_path)


def test_a_table_file_is_read_once_by_whatever_names(tmp_path: Path) -> None:
    pq.write_table(rows_of([0, 1] * 3), tmp_path / "train-0.parquet")
    (tmp_path / "train-1.parquet").symlink_to("train-0.parquet")
    assert found(survey(tmp_path)) == (["0", "1"], 6, None)
    assert found(survey(f"{tmp_path}/{{train-0,train-*}}.parquet", source="parquet")) == (["0", "1"], 6, None)


def test_labels_of_a_type_that_is_not_read_are_not_replaced_by_another_column(tmp_path: Path) -> None:
    listed = tmp_path / "classes.json"
    put(listed, json.dumps([str(i) for i in range(10)]).encode())
    for label in ([[0, 1]] * 4, [{"id": 0}] * 4):
        pq.write_table(rows_of(label, {"width": [8, 8, 9, 9]}), tmp_path / "train-0.parquet")
        with pytest.raises(ValueError, match=r"which column is the label\? Candidates: none .*label of (list|struct)<"):
            survey(tmp_path)
        assert found(survey(tmp_path, label_column="width", classes=str(listed)))[1] == 4


def test_numbers_in_tables_of_two_folders_are_by_one_class_list(tmp_path: Path) -> None:
    for part, names in (("train", CLASSES), ("val", CLASSES[::-1])):
        put(tmp_path / part / "classes.json", json.dumps(names).encode())
        pq.write_table(rows_of([0, 1] * 3), tmp_path / part / "0.parquet")
    val = str(tmp_path / "val")
    with pytest.raises(ValueError, match=r"val/classes.json says dog, cat, and .*train/classes.json cat, dog"):
        survey(tmp_path / "train", val_path=val)
    assert found(survey(tmp_path / "train", val_path=val, classes=f"{val}/classes.json")) == (["dog", "cat"], 6, 6)
    pq.write_table(rows_of(list(CLASSES) * 3), tmp_path / "val/0.parquet")
    pq.write_table(rows_of(list(CLASSES) * 3), tmp_path / "train/0.parquet")  # names are classes by themselves
    assert found(survey(tmp_path / "train", val_path=val)) == (["cat", "dog"], 6, 6)


@pytest.mark.parametrize(
    ("files", "given"),
    [
        (("train/s-0.tar", "val/s-0.tar"), "dataset.path='{0}/train' dataset.val_path='{0}/val'"),
        (("a/s-0.tar", "b/s-0.tar"), "dataset.path='{0}/a'"),
        (("s-0.tar.gz",), "dataset.path='{0}/*.tar.gz'"),
        (("S-0.TAR",), "dataset.path='{0}/*.TAR'"),
    ],
)
def test_shards_that_are_not_where_they_are_looked_for(tmp_path: Path, files: tuple[str, ...], given: str) -> None:
    for file in files:
        put(tmp_path / file, write_tar([("a.png", picture()), ("a.cls", b"0")]))
    with pytest.raises(ValueError) as error:
        open_source(DatasetConfig(path=str(tmp_path)))
    assert given.format(tmp_path) in str(error.value)


def test_patterns_of_folders_and_files_that_are_no_tars(tmp_path: Path) -> None:
    tree(tmp_path, *(f"{part}/{c}/1.png" for part in ("a", "b") for c in CLASSES))
    for pattern in ("*", "{a,b}"):
        with pytest.raises(ValueError, match=rf"names folders without \*.tar, such as {tmp_path}/a;"):
            open_source(DatasetConfig(path=f"{tmp_path}/{pattern}"))
    put(tmp_path / "x.data", b"PK\3\4" + bytes(60))
    fsspec.filesystem("memory").pipe("/odd/photos.zip", b"PK")
    for path, words in (
        (tmp_path / "x.data", "a zip archive; expected class folders"),
        ("/dev/null", "a device"),
        ("memory://odd/photos.zip", "is an archive, not shards"),
    ):
        with pytest.raises(ValueError, match=words):
            open_source(DatasetConfig(path=str(path)))


def test_images_of_which_none_is_read_say_what_they_are(tmp_path: Path) -> None:
    for c in CLASSES:
        put(tmp_path / c / "1.HEIC", b"\0\0\0\x18ftypheic" + bytes(50))
    with pytest.raises(ValueError, match=r"no image file in 2 class folders: 2 files: HEIC pictures are not read"):
        survey(tmp_path)


def test_validation_images_of_another_kind_are_told(tmp_path: Path) -> None:
    tree(tmp_path / "train", *(f"{c}/1.png" for c in CLASSES))
    put(tmp_path / "val/v-0.tar", b"x")
    with pytest.raises(ValueError, match=r"there: v-0.tar\), and .*train holds images in class folders"):
        survey(tmp_path / "train", val_path=str(tmp_path / "val"))


def test_one_class_folder_by_two_names(tmp_path: Path) -> None:
    tree(tmp_path / "a", *(f"{c}/1.png" for c in CLASSES))
    os.symlink("cat", tmp_path / "a/kitty")
    with pytest.raises(ValueError, match=r"class folders cat and kitty are one folder, by a link"):
        survey(tmp_path / "a")
    tree(tmp_path / "b", "cat/1.png")
    os.symlink(tmp_path / "a/dog", tmp_path / "b/dog")  # from elsewhere: a class like any other
    assert found(survey(tmp_path / "b")) == (["cat", "dog"], 2, None)


def test_folders_that_may_be_the_classes_are_noted(tmp_path: Path) -> None:
    tree(tmp_path, *(f"fold{i}/{c}/{i}.png" for i in range(3) for c in CLASSES))
    s = survey(tmp_path)
    assert [c.name for c in s.classes] == ["fold0", "fold1", "fold2"]
    assert any("each holds cat, dog" in note for note in s.notes)
    tree(tmp_path, "fold0/owl/1.png")  # no longer the same in each: kinds of a class
    assert any("which hold 7 folders with images (fold0/cat, fold0/dog, fold0/owl" in n for n in survey(tmp_path).notes)
    tree(tmp_path / "one", *(f"{c}/images/{i}.png" for c in CLASSES for i in range(2)))
    assert not survey(tmp_path / "one").notes


ROWS = [(f"{i}.png", CLASSES[i % 2]) for i in range(6)]


@pytest.mark.parametrize(
    ("rows", "head"),
    [
        ([("{}|{}", r) for r in ROWS], "file_name|label"),
        ([("{},{}," + "x" * 200_000, r) for r in ROWS], "file_name,label,caption"),
        ([("7,{},{}", r) for r in ROWS], ",file_name,breed"),
        ([("7,{},{}", r) for r in ROWS], "\r\n\nUnnamed: 0,file_name,breed"),
    ],
)
def test_tables_of_other_marks_and_long_captions(tmp_path: Path, rows: list[Any], head: str) -> None:
    tree(tmp_path, *(name for name, _ in ROWS))
    (tmp_path / "metadata.csv").write_text("\n".join([head, *(form.format(*r) for form, r in rows)]))
    assert found(survey(tmp_path)) == (["cat", "dog"], 6, None)


def test_a_quote_that_is_not_closed_takes_no_rows(tmp_path: Path) -> None:
    tree(tmp_path, *(name for name, _ in ROWS))
    table(tmp_path, [*ROWS[:3], ('"3.png', "dog"), *ROWS[4:]])
    with pytest.raises(ValueError, match=r"beginning 3.png,dog: a quote there is opened and not closed"):
        survey(tmp_path)


@pytest.mark.parametrize("joined", ["cat|dog", '"cat, dog"', "dog;cat"])
def test_several_labels_of_an_image_are_no_class(tmp_path: Path, joined: str) -> None:
    tree(tmp_path, *(name for name, _ in ROWS))
    table(tmp_path, [("0.png", joined), *ROWS[1:], ("0.png", joined)])
    with pytest.raises(ValueError, match=r"is several labels of one image"):
        survey(tmp_path)
    names = ["cat", joined.strip('"'), "dog"]
    put(tmp_path / "classes.json", json.dumps(names).encode())
    assert [c.name for c in survey(tmp_path).classes] == names
