"""The images folder is a standard WebDataset: three readers find the same images, labels and weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

import ddoq_ray
from ddoq_ray.data.image_set import EXTENSIONS, PictureFormat, encode_picture
from ddoq_ray.data.tar_writing import write_tar
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.layout import image_record, image_shard

# As stages/synthesize/step.py writes them: <class_id:05d>-<centroid_id:04d>.{png,cls,json}, here with a ragged class.
KEYS = [(c, k) for c, ipc in ((0, 4), (3, 2), (11, 4)) for k in range(ipc)]
IMAGES = np.random.default_rng(0).integers(0, 256, (len(KEYS), 16, 16, 3)).astype(np.uint8)
WEIGHTS = [0.1 + 0.2 * (k == 0) + 1e-17 * c for c, k in KEYS]


def sample(i: int, form: PictureFormat = "png") -> list[tuple[str, bytes]]:
    c, k = KEYS[i]
    name = f"{c:05d}-{k:04d}"
    facts = {"centroid_id": k, "weight": WEIGHTS[i], "prompt": f"a photo of {c}", "seed": 0}
    return [
        (f"{name}.{EXTENSIONS[form]}", encode_picture(IMAGES[i], form)), (f"{name}.cls", str(c).encode()),
        (f"{name}.json", json.dumps(facts).encode()),
    ]  # fmt: skip


def write_set(folder: Path, form: PictureFormat = "png") -> list[str]:
    """Two shards, with a record of each in the hidden folder."""
    for first in (0, 6):
        rows, name = range(first, min(first + 6, len(KEYS))), image_shard(first // 6)
        (folder / f"{name}.tar").write_bytes(write_tar([m for i in rows for m in sample(i, form)]))
        Folder(str(folder)).publish_json(image_record(name), {"name": name})
    return sorted(str(p) for p in folder.glob("*.tar"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("run") / "images"
    folder.mkdir()
    return write_set(folder)


def test_ddoq_ray_load(shards: list[str]) -> None:
    data = ddoq_ray.load(str(Path(shards[0]).parent.parent))
    assert len(data) == len(KEYS)
    ipc = {c: sum(c == other for other, _ in KEYS) for c, _ in KEYS}
    for i, (image, label, weight) in enumerate(data):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), IMAGES[i])
        assert (label, weight) == (KEYS[i][0], WEIGHTS[i] * ipc[label])


def test_webdataset_library(shards: list[str]) -> None:
    data = wds.WebDataset(shards, shardshuffle=False).decode("rgb8").to_tuple("__key__", "png", "cls", "json")
    rows = list(data)
    assert [key for key, *_ in rows] == [f"{c:05d}-{k:04d}" for c, k in KEYS]
    for i, (_, image, label, facts) in enumerate(rows):
        assert np.array_equal(image, IMAGES[i])
        assert (label, facts["centroid_id"], facts["weight"]) == (*KEYS[i], WEIGHTS[i])
        assert facts["prompt"] == f"a photo of {label}"


def test_hugging_face_datasets(shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    data = datasets.load_dataset("webdataset", data_files=shards, split="train", cache_dir=str(tmp_path))
    assert len(data) == len(KEYS)
    for i, row in enumerate(data):
        assert row["__key__"] == f"{KEYS[i][0]:05d}-{KEYS[i][1]:04d}"
        assert np.array_equal(np.asarray(row["png"]), IMAGES[i])
        assert (row["cls"], row["json"]["centroid_id"], row["json"]["weight"]) == (*KEYS[i], WEIGHTS[i])


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_other_formats_are_read_by_all_three(
    form: PictureFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    files, extension = write_set(tmp_path / "set", form), EXTENSIONS[form]
    ours = [image.permute(1, 2, 0).numpy() for image, _, _ in ddoq_ray.load(str(tmp_path / "set"))]
    theirs = wds.WebDataset(files, shardshuffle=False).decode("rgb8").to_tuple(extension, "cls")
    hub = datasets.load_dataset("webdataset", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    for i, ((image, label), row) in enumerate(zip(theirs, hub, strict=True)):
        assert np.array_equal(image, ours[i]) and np.array_equal(np.asarray(row[extension].convert("RGB")), ours[i])
        assert (label, row["cls"]) == (KEYS[i][0], KEYS[i][0])
    assert len(ours) == len(KEYS)
