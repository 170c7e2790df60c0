"""One seat for studies of small images: data, a prior's latents and codebooks, students under one protocol.

It calls the classes of `models/` that the stages call, in one process and without Ray: what is measured is what ships.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from ddoq_ray.config.cluster import TrainerResources
from ddoq_ray.config.compose import load_config
from ddoq_ray.config.training import ProtocolConfig, StudentConfig
from ddoq_ray.core.gram_kmeans import gram_kmeans
from ddoq_ray.core.losses import image_weights
from ddoq_ray.core.rng import philox
from ddoq_ray.data.samples import load_arrays
from ddoq_ray.models.accuracy import top1_top5
from ddoq_ray.models.classifiers import Classifier
from ddoq_ray.models.encoding import Encoding, LatentEncoder
from ddoq_ray.models.priors.base import Prior
from ddoq_ray.models.protocol_views import view_spec
from ddoq_ray.models.training.images import Resident, Views
from ddoq_ray.models.training.student import StudentTraining, TeacherTargets, build_student, learning_rate
from ddoq_ray.storage.records import ClassInfo
from studies.assets import ASSETS, CIFAR10

SIZE = 32
BATCHES = {1: 10, 10: 50, 50: 100}
CLASSES = [ClassInfo(i, name, name, teacher_index=i, prior_label=i) for i, name in enumerate(CIFAR10)]
UInt8 = npt.NDArray[np.uint8]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Split:
    """uint8 [N, 3, 32, 32] and int64 [N]."""

    images: UInt8
    class_ids: Int64


def read(*shards: str) -> Split:
    """Images of CIFAR-10 shards, by their names."""
    images, class_ids, _ = load_arrays([str(ASSETS / "cifar10-wds" / f"{s}.tar") for s in shards], SIZE, len(CIFAR10))
    return Split(images, class_ids)


def cifar10() -> tuple[Split, Split, Split]:
    """(train: 20,000 images, selection: 2,000 test images, reported: the other 3,000)."""
    train = read(*(f"train-{i:06d}" for i in range(20)))
    return train, read("test-000000", "test-000001"), read("test-000002", "test-000003", "test-000004")


@dataclass(frozen=True)
class Distilled:
    """An image set: uint8 [n, 3, 32, 32], int64 [n], and companion weights that sum to 1 in a class."""

    images: UInt8
    class_ids: Int64
    weights: npt.NDArray[np.float64]


def even(images: UInt8, class_ids: Int64) -> Distilled:
    """All images of a class count the same."""
    return Distilled(images, class_ids, 1.0 / np.bincount(class_ids)[class_ids])


@dataclass
class Codebooks:
    """The latents of the training images under one prior, kept in a folder, and codebooks of them.

    Attributes:
        prior: encodes.
        train: the images.
        folder: keeps what was computed, by the prior's id.
    """

    prior: Prior
    train: Split
    folder: Path
    _made: dict[int, dict[int, tuple[Float32, npt.NDArray[np.float64], float, Int64]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        file = self.folder / f"latents-{self.prior.id}.npy"
        if not file.exists():
            encoder = LatentEncoder(self.prior.autoencoder, Encoding(self.prior.latent_shape, 100))
            pixels = np.ascontiguousarray(self.train.images.transpose(0, 2, 3, 1))
            parts = [encoder.encode(pixels[i : i + 1000], [str(i)] * len(pixels[i : i + 1000]))
                     for i in range(0, len(pixels), 1000)]  # fmt: skip
            write_whole(file, lambda f: np.save(f, np.concatenate(parts)))
        self.latents = np.load(file, mmap_mode="r")

    def of(self, ipc: int, seed: int = 0) -> dict[int, tuple[Float32, npt.NDArray[np.float64], float, Int64]]:
        """class_id -> (centroids [K, D], weights [K], distortion, rows int64 [K] of the images nearest to them)."""
        if ipc not in self._made:
            self._made[ipc] = {}
            for c in range(len(CIFAR10)):
                rows = np.flatnonzero(self.train.class_ids == c)
                z = np.asarray(self.latents[rows], np.float32)
                centroids, counts = gram_kmeans(z, ipc, seed=seed, class_id=c)
                squared = np.square(z).sum(1)[:, None] - 2 * z @ centroids.T + np.square(centroids).sum(1)[None]
                distortion = float(squared.min(1).mean())
                self._made[ipc][c] = (centroids, counts / counts.sum(), distortion, rows[squared.argmin(0)])
        return self._made[ipc]


def write_whole(file: Path, write: Any) -> None:
    """Write a file so that it is there whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    work = file.with_suffix(".tmp")
    with work.open("wb") as f:
        write(f)
    os.replace(work, file)


def chosen(train: Split, ipc: int, seed: int) -> Int64:
    """Rows of `ipc` random images of each class."""
    rows = [np.flatnonzero(train.class_ids == c) for c in range(len(CIFAR10))]
    return np.concatenate([r[philox("study", seed, c).permutation(len(r))[:ipc]] for c, r in enumerate(rows)])


def protocol(ipc: int, epochs: int | None = None) -> ProtocolConfig:
    """configs/protocol/rded.yaml at an IPC, with crops of half the area or more and a cosine that comes to 0."""
    keys = ["dataset.path=x", "dataset.val_path=y", "prior=autoencoder", "prior.path=x", "teacher.path=x",
            "student=convnet3", "student.image_size=32", "protocol=rded"]  # fmt: skip
    made = replace(load_config(keys).protocol, batch=BATCHES[ipc], min_scale=0.5, cosine_span=1.0)
    return made if epochs is None else replace(made, epochs=epochs)


class QuickTeacher(TeacherTargets):
    """In bfloat16, where the students are: half the time, and less than a seed's difference."""

    def __call__(self, views: Views) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().__call__(views).float()


def top1(
    distilled: Distilled, teacher: Classifier, on: Split, rule: ProtocolConfig, seed: int,
    precision: Literal["float32", "bfloat16"] = "bfloat16",
) -> float:  # fmt: skip
    """Top-1 in % of a ConvNet-3 that learnt a distilled set from the teacher's soft labels."""
    student = StudentConfig("convnet3", SIZE)
    model = build_student(student, len(CIFAR10), seed)
    fused: Any = torch.compile(model, dynamic=False)  # a third of the time; the graphs of one student serve all
    weights = image_weights(distilled.weights, distilled.class_ids)
    training = StudentTraining(
        model, fused, Resident(torch.from_numpy(distilled.images)), torch.from_numpy(weights.astype(np.float32)), rule,
        view_spec(rule, SIZE), seed, view_seed=0, how=TrainerResources(precision=precision),
    )  # fmt: skip
    targets = QuickTeacher(teacher) if precision == "bfloat16" else TeacherTargets(teacher)
    epochs = rule.epochs or 1
    for epoch in range(epochs):
        training.train_epoch(learning_rate(rule, epoch, epochs), targets)
    return float(top1_top5(model.eval(), torch.from_numpy(on.images), torch.from_numpy(on.class_ids))[0])
