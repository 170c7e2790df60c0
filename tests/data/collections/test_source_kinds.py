"""Which kind of collection a path is: found out where it is plain, asked for where it is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddoq_ray.config.dataset import DatasetConfig
from ddoq_ray.data.collections import kind_of, open_source


def kind(path: Path | str, **options: object) -> str:
    return kind_of(DatasetConfig(path=str(path), **options))  # type: ignore[arg-type]


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_plain_kinds(tmp_path: Path) -> None:
    for expected, names in (
        ("webdataset", ["a-0.tar", "a-1.tar", "classes.json"]),
        ("parquet", ["data/train-0.parquet"]),
        ("idx", ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"]),
        ("imagefolder", ["cat/a.jpg"]),
        ("imagefolder", ["cat/deep/a.JPEG", "dog/b.txt"]),
        ("imagefolder", ["train/cat/a.jpg", "val/cat/a.jpg"]),
        ("imagefolder", ["metadata.csv", "a.png"]),
        ("torchvision", ["cifar-10-batches-py/data_batch_1"]),
        ("webdataset", ["nothing.txt"]),  # whose reader says what it expected
    ):
        root = touch(tmp_path / f"{expected}-{len(list(tmp_path.iterdir()))}", *names)
        assert kind(root) == expected, names
        assert kind(root, source="digits") == expected  # the default group, with a path
    assert kind(tmp_path / "nowhere") == "webdataset"
    assert kind("shards/{0..3}.tar") == kind("x.tar") == kind("a*") == "webdataset"
    assert kind("data/*.parquet") == "parquet"
    assert kind(tmp_path / "nowhere", source="imagefolder") == "imagefolder"
    assert kind_of(DatasetConfig(source="digits")) == "digits"


def test_two_kinds_in_one_folder(tmp_path: Path) -> None:
    root = touch(tmp_path, "a.tar", "cat/a.jpg")
    with pytest.raises(ValueError, match=r"source=webdataset \(1 .*a.tar\) or dataset.source=imagefolder \(cat/a"):
        kind(root)
    assert kind(root, source="imagefolder") == "imagefolder"


def test_torchvisions_files_want_a_name(tmp_path: Path) -> None:
    root = touch(tmp_path, "cifar-10-batches-py/x")
    with pytest.raises(ValueError, match=r"dataset=torchvision dataset\.torchvision=CIFAR10"):
        open_source(DatasetConfig(path=str(root)))
