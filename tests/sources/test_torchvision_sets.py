"""torchvision's datasets, from small files in their own formats; what is not there and cannot be had is an error."""

from __future__ import annotations

import hashlib
import io
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddoq_ray.artifacts import Folder
from ddoq_ray.pictures import encode_png
from ddoq_ray.sources.listing import Picture
from ddoq_ray.sources.torchvision_sets import TorchvisionSet

SCRATCH = Folder("nowhere")


def pixels(picture: object) -> np.ndarray:
    assert isinstance(picture, Picture) and picture.extension == "png"
    return np.asarray(Image.open(io.BytesIO(picture.data)))


def test_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    root = tmp_path / "cifar-10-batches-py"
    root.mkdir()
    data = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    made = {"data_batch_1": {"data": data[:2], "labels": [9, 3]}, "data_batch_2": {"data": data[2:3], "labels": [0]},
            "test_batch": {"data": data[3:], "labels": [5]}, "batches.meta": {"label_names": names}}  # fmt: skip
    sums = {}
    for name, value in made.items():
        (root / name).write_bytes(pickle.dumps(value))
        sums[name] = hashlib.md5((root / name).read_bytes()).hexdigest()
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[n, sums[n]] for n in ("data_batch_1", "data_batch_2")])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(
        datasets.CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    )
    source = TorchvisionSet("CIFAR10", str(tmp_path), None)
    survey = source.survey()
    assert [c.name for c in survey.classes] == names
    assert survey.train.class_ids.tolist() == [9, 3, 0]
    assert survey.val is not None and survey.val.class_ids.tolist() == [5]
    got = [pixels(p) for p in source.read("train", survey.train.names[::-1], SCRATCH)]
    assert np.array_equal(np.stack(got)[::-1], data[:3].reshape(3, 3, 32, 32).transpose(0, 2, 3, 1))


def test_fashion_mnist(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    images = np.arange(3 * 16, dtype=np.uint8).reshape(3, 4, 4)
    for part, n in (("train", 3), ("t10k", 2)):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, n, 4, 4) + images[:n].tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, n) + bytes([9, 0, 3][:n]))
    source = TorchvisionSet("FashionMNIST", str(tmp_path), None)
    survey = source.survey()
    assert (len(survey.classes), survey.classes[9].name) == (10, "Ankle boot")
    assert (survey.train.class_ids.tolist(), survey.val.class_ids.tolist()) == ([9, 0, 3], [9, 0])  # type: ignore[union-attr]
    assert np.array_equal(np.stack([pixels(p) for p in source.read("train", survey.train.names, SCRATCH)]), images)


def test_imagenette_keeps_the_files_bytes(tmp_path: Path) -> None:
    from torchvision import datasets

    for split in ("train", "val"):
        for i, wnid in enumerate(datasets.Imagenette._WNID_TO_CLASS):
            folder = tmp_path / "imagenette2-160" / split / wnid
            folder.mkdir(parents=True)
            out = io.BytesIO()
            Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(out, "JPEG")
            (folder / f"{wnid}_{split}.JPEG").write_bytes(out.getvalue())
    source = TorchvisionSet("Imagenette", str(tmp_path), None)
    survey = source.survey()
    assert [(c.name, c.prompt) for c in survey.classes][:2] == [
        ("n01440764", "tench"), ("n02102040", "English springer"),
    ]  # fmt: skip
    assert survey.train.class_ids.tolist() == list(range(10))
    name = survey.train.names[3]
    assert name == "imagenette2-160/train/n03000684/n03000684_train.JPEG"
    assert list(source.read("train", [name], SCRATCH)) == [Picture((tmp_path / name).read_bytes(), "JPEG")]


def test_imagenet_takes_the_words_of_its_own_metadata(tmp_path: Path) -> None:
    import torch

    from ddoq_ray.sources.classes import _positions

    wnids = {w: ("words of", w) for w in ("n01440764", "n02102040")}
    torch.save((wnids, []), tmp_path / "meta.bin")
    for split in ("train", "val"):
        for wnid in wnids:
            (tmp_path / split / wnid).mkdir(parents=True)
            (tmp_path / split / wnid / "a.JPEG").write_bytes(encode_png(np.zeros((4, 4), np.uint8)))
    survey = TorchvisionSet("ImageNet", str(tmp_path), None).survey()
    assert [(c.name, c.prompt) for c in survey.classes] == [(w, "words of") for w in sorted(wnids)]
    assert set(wnids) <= set(_positions())
    assert survey.train.names == [f"train/{w}/a.JPEG" for w in sorted(wnids)]


def test_what_is_neither_there_nor_to_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"ImageNet: not in dataset.path.*cannot be downloaded.*dataset=imagefolder"):
        TorchvisionSet("ImageNet", str(tmp_path), None).survey()
    from torchvision import datasets

    # An address at which nobody listens, so that the test is the same with and without a network.
    archives = {"full": ("http://127.0.0.1:9/imagenette2.tgz", "0" * 32)}
    monkeypatch.setattr(datasets.Imagenette, "_ARCHIVES", archives)
    with pytest.raises(ValueError, match=r"Imagenette: not in dataset.path=.*cannot be downloaded .*put torchvision's"):
        TorchvisionSet("Imagenette", str(tmp_path), None).survey()
