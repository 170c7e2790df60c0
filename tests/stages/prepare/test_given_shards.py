"""Shards of the user's own: what is wrong with them is told before anything is spent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.collection_trees import picture, put

from ddoq_ray.config.compose import load_config
from ddoq_ray.data.collections.tars import Tars
from ddoq_ray.data.samples import read_classes
from ddoq_ray.data.tar_writing import write_tar
from ddoq_ray.stages.prepare.given_shards import survey_shards
from ddoq_ray.storage.prepared import Packed

CLASSES = ["cat", "dog"]


def shards(root: Path, label: str = "cls", first: int = 0, classes: list[str] = CLASSES) -> Path:
    """A shard of six samples, with the class list beside it."""
    members = []
    for i in range(first, first + 6):
        members += [(f"{i}.png", picture(value=i)), (f"{i}.{label}", str(i % 2).encode())]
    put(root / "s-0.tar", write_tar(members))
    put(root / "classes.json", json.dumps(classes).encode())
    return root


def surveyed(path: Path, *keys: str) -> Packed:
    config = load_config(["experiment=digits", f"dataset.path={path}", "run_dir=nowhere", *keys])
    listed = config.dataset.classes or str(path / "classes.json")
    return survey_shards(config, read_classes(listed))


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (
            "json",
            r"6 samples, such as 0 of s-0.tar, no label \(.cls\): .*, and its members are json, png",
        ),
        ("txt", r"6 samples, such as 0 of s-0.tar, no label \(.cls\): .*, and its members are png, txt"),
    ],
)
def test_shards_without_a_label_say_what_they_have(tmp_path: Path, ray_here: None, label: str, words: str) -> None:
    with pytest.raises(ValueError, match=rf"no sample with an image and a label in 1 shards \({words}"):
        surveyed(shards(tmp_path, label))


def test_what_cannot_be_used_of_some_is_told_with_the_rest(tmp_path: Path, ray_here: None) -> None:
    root = shards(tmp_path)
    put(root / "s-1.tar", write_tar([("a.avif", b"x"), ("a.cls", b"1"), ("b.png", picture()), ("b.cls", b"dog")]))
    told = surveyed(root).told
    assert any("1 samples, such as b of s-1.tar, label is not a number: 'dog'" in line for line in told)
    assert any("1 samples, such as a of s-1.tar, AVIF pictures are not read: convert them" in line for line in told)


def test_a_copy_of_a_shard_is_noticed(tmp_path: Path, ray_here: None) -> None:
    root = shards(tmp_path / "root")
    shutil.copy(root / "s-0.tar", root / "s-0 (1).tar")
    shutil.copy(shards(tmp_path / "other", first=6) / "s-0.tar", root / "s-1.tar")
    (line,) = surveyed(root).told
    assert "s-0 (1).tar, s-0.tar look like copies of one shard" in line and "count 2 times" in line


def test_one_label_is_one_class_in_all_folders(tmp_path: Path, ray_here: None) -> None:
    train, val = shards(tmp_path / "train"), shards(tmp_path / "val", first=6, classes=CLASSES[::-1])
    asked = f"dataset.val_path={val}"
    with pytest.raises(ValueError, match=r"val/classes.json says dog, cat, and .*train/classes.json cat, dog"):
        surveyed(train, asked)
    with pytest.raises(ValueError, match=r"the same label would be two classes"):
        Tars(str(train), str(val), None).survey()
    assert surveyed(train, asked, f"dataset.classes={train}/classes.json").val[0].samples == 6
    (val / "classes.json").unlink()
    assert surveyed(train, asked).val[0].samples == 6


def test_validation_images_that_are_no_shards(tmp_path: Path, ray_here: None) -> None:
    put(tmp_path / "val/cat/1.png")
    with pytest.raises(ValueError, match=r"val holds no \*.tar \(there: cat/\), but dataset.path holds shards"):
        surveyed(shards(tmp_path / "train"), f"dataset.val_path={tmp_path}/val")


def test_labels_from_one_are_refused_however_many_classes_hide_the_last(tmp_path: Path, ray_here: None) -> None:
    names = [f"class {i}" for i in range(150)]
    members = [m for i in range(1, 151) for m in ((f"{i}.png", picture(value=i)), (f"{i}.cls", str(i).encode()))]
    put(tmp_path / "s-0.tar", write_tar(members))
    put(tmp_path / "classes.json", json.dumps(names).encode())
    with pytest.raises(ValueError, match=r"labels go from 1 to 150.* They begin at 1: subtract one"):
        surveyed(tmp_path)
    with pytest.raises(ValueError, match=r"labels go from 1 to 150.* They begin at 1: subtract one"):
        Tars(str(tmp_path), None, None).survey()
