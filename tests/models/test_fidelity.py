"""What a classifier sees of a prior's images, on autoencoders whose answer is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddoq_ray.data.collections import DIGIT_NAMES, digits
from ddoq_ray.models.classifiers import load_classifier
from ddoq_ray.models.fidelity import (
    answers,
    generate,
    judge_autoencoder,
    judge_samples,
    psnr,
    reconstructions,
)
from ddoq_ray.models.folders import resolve_folder
from ddoq_ray.models.priors.base import Sampling
from ddoq_ray.models.priors.load import load_prior
from ddoq_ray.storage.records import ClassInfo
from studies.assets import CIFAR10, write_cifar10_teacher
from studies.small_images import read


class Blurring:
    """Stands where an autoencoder does: it keeps the mean of each image and nothing else, or everything."""

    def __init__(self, blur: bool) -> None:
        self.blur = blur

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3), keepdim=True).expand_as(images) if self.blur else images

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents


def some_digits(n: int = 120) -> tuple[np.ndarray, np.ndarray]:
    images, class_ids = digits()["selection"]
    grey = np.repeat(np.asarray(images[:n])[:, None], 3, 1)
    x = torch.from_numpy(grey).float()
    return torch.nn.functional.interpolate(x, size=16).to(torch.uint8).numpy(), np.asarray(class_ids[:n], np.int64)


def test_a_lossless_autoencoder_keeps_all_and_a_mean_nothing() -> None:
    judge = load_classifier("shipped:digits-teacher")
    images, class_ids = some_digits()
    whole: Any = judge_autoencoder(Blurring(False), judge, images, class_ids)  # type: ignore[arg-type]
    assert whole["top1_reconstructed_pct"] == whole["top1_real_pct"] and whole["psnr_db"] > 60
    nothing: Any = judge_autoencoder(Blurring(True), judge, images, class_ids)  # type: ignore[arg-type]
    assert nothing["top1_reconstructed_pct"] < 40 < whole["top1_real_pct"] and nothing["psnr_db"] < 20


def test_psnr_of_a_known_error() -> None:
    zero = np.zeros((2, 3, 4, 4), np.uint8)
    one = zero.copy()
    one[:] = 51  # a fifth of the peak: 20 log10(5)
    assert psnr(zero, one) == pytest.approx(20 * np.log10(5), abs=1e-4)


def test_samples_of_the_shipped_prior_look_like_their_classes() -> None:
    prior, judge = load_prior("shipped:digits-prior"), load_classifier("shipped:digits-teacher")
    class_ids = np.arange(40) % 10
    classes = [ClassInfo(int(c), DIGIT_NAMES[c], DIGIT_NAMES[c], int(c), int(c)) for c in class_ids]
    made = generate(prior, classes, Sampling(1.0, 10, "noise"), seed=0)
    assert made.shape == (40, 3, 16, 16)
    alone = generate(prior, classes[:7], Sampling(1.0, 10, "noise"), seed=0)
    assert np.abs(made[:7].astype(int) - alone).max() <= 1
    images, _ = some_digits(200)
    facts = judge_samples(made, images, judge, class_ids)
    rng = np.random.default_rng(0)
    noise = judge_samples(rng.integers(0, 256, made.shape).astype(np.uint8), images, judge, class_ids)
    assert facts["class_consistency_pct"] > 60 > noise["class_consistency_pct"]
    assert facts["frechet"] < noise["frechet"]
    assert reconstructions(prior.autoencoder, made[:3]).shape == (3, 3, 16, 16)
    assert answers(judge, made)[1].shape == (40, judge.head.in_features)


def test_the_shipped_cifar10_prior_makes_images() -> None:
    prior = load_prior("shipped:cifar10-prior")
    assert (prior.latent_shape, prior.image_size, prior.has_null) == ((16, 8, 8), 32, True)
    classes = [ClassInfo(c, name, name, c, c) for c, name in enumerate(prior.classes[:2])]
    made = generate(prior, classes, Sampling(1.0, 4, "noise", guidance=3.0), seed=0)
    assert made.shape == (2, 3, 32, 32) and made.std() > 20
    folder = resolve_folder("shipped:cifar10-prior", "prior")
    teacher = load_classifier("shipped:cifar10-teacher")
    assert teacher.classes == list(prior.classes) == list(CIFAR10) and teacher.image_size == 32
    folders = [folder, resolve_folder("shipped:cifar10-teacher", "teacher")]
    assert sum(file.stat().st_size for at in folders for file in at.rglob("*") if file.is_file()) < 16e6


@pytest.mark.assets
def test_the_shipped_cifar10_prior_keeps_what_a_classifier_sees(tmp_path: Path) -> None:
    """By a ResNet-56, whose answers the last tuning of its decoder kept, and by the teacher in the package."""
    prior, judge = load_prior("shipped:cifar10-prior"), load_classifier(write_cifar10_teacher(56, tmp_path / "judge"))
    real = read("test-000000")
    kept = judge_autoencoder(prior.autoencoder, judge, real.images[:400], real.class_ids[:400])
    assert kept["top1_reconstructed_pct"] > 80
    teacher = judge_autoencoder(
        prior.autoencoder, load_classifier("shipped:cifar10-teacher"), real.images[:400], real.class_ids[:400]
    )
    assert teacher["top1_reconstructed_pct"] > teacher["top1_real_pct"] - 6 > 70
    class_ids = np.arange(60) % 10
    classes = [ClassInfo(int(c), CIFAR10[c], CIFAR10[c], int(c), int(c)) for c in class_ids]
    made = generate(prior, classes, Sampling(1.0, 25, "noise", guidance=3.0), seed=0)
    assert judge_samples(made, real.images, judge, class_ids)["class_consistency_pct"] > 65
