"""A teacher's training: stopped and taken up, by time, with mixed images."""

from __future__ import annotations

import dataclasses
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddoq_ray.config.network_training import TeacherTraining
from ddoq_ray.data.image_file import ImageFile
from ddoq_ray.models.accuracy import top1_top5
from ddoq_ray.models.classifiers import build_classifier, load_classifier
from ddoq_ray.models.training import teacher as teachers
from ddoq_ray.models.training.checkpoints import Checkpoints
from ddoq_ray.models.training.data import Destination, TrainingSet
from ddoq_ray.models.training.ranks import Alone, Part

CLASSES = ["dark", "light"]


class Stopped(Exception):
    """Raised in the middle of a training."""


def data(n: int = 32, size: int = 8) -> tuple[np.ndarray, np.ndarray]:
    ids = np.arange(n, dtype=np.int64) % 2
    images = np.random.default_rng(0).integers(0, 150, (n, 3, size, size)) + 100 * ids[:, None, None, None]
    return images.astype(np.uint8), ids


def train_teacher(images: np.ndarray, class_ids: np.ndarray, classes: list[str], out: Path, **how: Any) -> Any:
    return teachers.train_teacher(TrainingSet(images, class_ids, classes), Destination(out), **how)


def test_a_stopped_teacher_training_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    """Dropout, augmentations and averages included: what a step draws depends on its number alone."""
    images, ids = data(24, 32)
    config = TeacherTraining(
        arch="mobilenet_v2", epochs=4, batch=8, ema=0.5, mixup=0.3, cutmix=True, augment="randaugment",
        checkpoint_every=5,
    )  # fmt: skip
    train_teacher(images, ids, CLASSES, tmp_path / "whole", config=config)
    save, saved = Checkpoints.save, []

    def stop(self, state):
        save(self, state)
        saved.append(state)
        if len(saved) == 2:
            raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", stop)
        with pytest.raises(Stopped):
            train_teacher(images, ids, CLASSES, tmp_path / "cut", config=config)
    with pytest.raises(ValueError, match=r"unfinished training.*\(options differ\)"):
        train_teacher(images, ids, CLASSES, tmp_path / "cut", config=TeacherTraining(epochs=4))
    torch.rand(100)
    train_teacher(images[::-1], ids[::-1], CLASSES, tmp_path / "cut", config=config)  # shards may come in any order
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1] and sorted(p.name for p in tmp_path.iterdir()) == ["cut", "whole"]


def test_images_in_files_are_not_held_to_be_learnt_or_to_be_scored(tmp_path):
    peaks = []
    for n in (1024, 8192):  # of 3,072 bytes
        images, ids = data(n, 32)
        files = [ImageFile(tmp_path / f"{n}-{split}", {}) for split in ("train", "held-out")]
        for file in files:
            file.write(zip(ids.tolist(), images, strict=True), 32)
        found = TrainingSet.mapped(files[0].open(), CLASSES, files[1].open())
        del images
        tracemalloc.start()
        try:
            config = TeacherTraining(arch="convnet3-w8", minutes=1e-6)
            record = teachers.train_teacher(found, Destination(tmp_path / f"t{n}"), config)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        assert record["held_out_images"] == n
        assert (
            record["held_out_accuracy"]
            == top1_top5(
                load_classifier(tmp_path / f"t{n}"),
                *map(torch.from_numpy, (np.array(found.held_out[0]), found.held_out[1])),
            )[0]
        )
    assert (peaks[1] - peaks[0]) / 7168 < 100, peaks  # bytes an image: rows of a pass


@pytest.mark.parametrize("left", [b"", b"PK\x03\x04 half of a file", b"not a checkpoint at all"])
def test_a_damaged_checkpoint_is_named_and_may_be_begun_anew(tmp_path, left):
    images, ids = data()
    place = tmp_path / "t.training/checkpoint.pt"
    place.parent.mkdir()
    place.write_bytes(left)
    config = TeacherTraining(arch="convnet3-w8", epochs=1)
    with pytest.raises(ValueError, match=r"t\.training/checkpoint\.pt is damaged.*overwrite=true"):
        train_teacher(images, ids, CLASSES, tmp_path / "t", config=config)
    teachers.train_teacher(TrainingSet(images, ids, CLASSES), Destination(tmp_path / "t", overwrite=True), config)
    assert not place.exists()


def test_a_teacher_by_time_says_how_many_steps_it_took(tmp_path):
    images, ids = data()
    config = TeacherTraining(arch="convnet3-w8", epochs=10_000_000, minutes=1 / 600)
    record = train_teacher(images, ids, CLASSES, tmp_path / "t", config=config)
    assert 1 <= record["steps"] < 10_000 and load_classifier(tmp_path / "t").classes == CLASSES


def test_mixed_views_have_mixed_classes(tmp_path):
    """MixUp (Zhang et al., ICLR 2018): one weight from Beta(alpha, alpha) a batch, of pixels and classes alike."""
    images, ids = data(6)
    plain = TeacherTraining(arch="convnet3-w8", min_scale=1.0, flip=False)
    mixed = dataclasses.replace(plain, mixup=1.0)
    batches = []
    for config in (plain, mixed):
        model = build_classifier("convnet3-w8", 2, 8)
        of = teachers._Training(model, TrainingSet(images, ids, CLASSES), config)
        batches.append(of._batch(np.arange(6), 3, Part(6, Alone())))
    (pixels, own), (blended, shares) = batches
    assert own.argmax(1).tolist() == ids.tolist()
    weight = next(v for v in shares.flatten().tolist() if 0.01 < v < 0.99)
    assert torch.allclose(shares.sum(1), torch.ones(6))
    fitting = (weight, 1 - weight)
    for i in range(6):
        pairs = [(j, w) for j in range(6) for w in fitting]
        found = [(j, w) for j, w in pairs if torch.allclose(blended[i], w * pixels[i] + (1 - w) * pixels[j], atol=1e-5)]
        assert any(torch.allclose(shares[i], w * own[i] + (1 - w) * own[j], atol=1e-5) for j, w in found)


@pytest.mark.parametrize("how", [{}, {"cutmix": True, "mixup": 0.4, "augment": "randaugment"}])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_a_ranks_views_are_its_rows_of_the_whole_batch(how: dict[str, Any], world: int) -> None:
    """Partners are of all the batch, and each image's augmentation is its own: bit for bit, with shares of classes."""
    images, ids = data(20)
    of = teachers._Training(
        build_classifier("convnet3-w8", 2, 8), TrainingSet(images, ids, CLASSES), TeacherTraining(**how)
    )
    rows = np.random.default_rng(1).permutation(20)[:11]
    pixels, shares = of._batch(rows, 7, Part(11, Alone()))
    assert shares.sum(1) == pytest.approx(1) and (not how or len(shares.unique()) > 2)
    for rank in range(world):
        mine, parts = of._batch(rows, 7, Part(11, Alone(rank=rank, world=world)))
        assert torch.equal(mine, pixels[rank::world]) and torch.equal(parts, shares[rank::world])


def test_workers_without_two_images_each_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"workers=4: a step has 7 images \(training.batch=7, 32 in all\).*2 a worker"):
        train_teacher(*data(), CLASSES, tmp_path / "t", config=TeacherTraining(batch=7), ranks=Alone(world=4))
