"""What a prior keeps of real images, and how near its own images come to them, as a classifier sees both.

Shape suffixes: N images, S image size, C classes, d features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddoq_ray.core.frechet import frechet_distance
from ddoq_ray.core.rng import philox
from ddoq_ray.models.autoencoder import Autoencoder
from ddoq_ray.models.classifiers import Classifier
from ddoq_ray.models.priors.base import Prior, Sampling
from ddoq_ray.storage.records import ClassInfo

BATCH = 100
UInt8 = npt.NDArray[np.uint8]


@torch.inference_mode()
def reconstructions(autoencoder: Autoencoder, images: UInt8) -> UInt8:
    """Images uint8 [N, 3, S, S] encoded and decoded again."""
    made = []
    for x in torch.from_numpy(np.ascontiguousarray(images)).split(BATCH):
        pixels = autoencoder.decode(autoencoder.encode(x.float() / 127.5 - 1))
        made.append(((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())
    return np.concatenate(made)


@torch.inference_mode()
def answers(judge: Classifier, images: UInt8) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """(logits float32 [N, C], features float32 [N, d]) of images uint8 [N, 3, S, S], resized to the judge's size."""
    logits, features = [], []
    for x in torch.from_numpy(np.ascontiguousarray(images)).split(BATCH):
        f = judge.features(_sized(x.to(judge.mean.device).float() / 255, judge.image_size))
        logits.append(judge.head(f).float().cpu().numpy())
        features.append(f.float().cpu().numpy())
    return np.concatenate(logits), np.concatenate(features)


def psnr(images: UInt8, others: UInt8) -> float:
    """Mean over images of the peak signal-to-noise ratio in dB; images uint8 [N, 3, S, S]."""
    error = np.square(images.astype(np.float32) - others).mean(axis=(1, 2, 3))
    return float(np.mean(10 * np.log10(255.0**2 / np.maximum(error, 1e-6))))


def generate(prior: Prior, classes: Sequence[ClassInfo], how: Sampling, seed: int) -> UInt8:
    """One image of each entry of `classes` from noise, uint8 [N, 3, S, S]; noise is keyed by (seed, position)."""
    made = []
    for first in range(0, len(classes), BATCH):
        some = classes[first : first + BATCH]
        keys = range(first, first + len(some))
        noise = np.stack([philox(seed, "generate", i).standard_normal(prior.latent_shape) for i in keys])
        z = torch.from_numpy(noise.astype(np.float32))
        steps = [torch.Generator(prior.device).manual_seed(int(philox(seed, "steps", i).integers(2**63))) for i in keys]
        made.append(prior.synthesize(z, prior.conditioning(some), z, how, steps).permute(0, 3, 1, 2).numpy())
    return np.concatenate(made)


def judge_autoencoder(
    autoencoder: Autoencoder, judge: Classifier, images: UInt8, indices: npt.NDArray[np.int64]
) -> dict[str, Any]:
    """How much of what a classifier knows survives encoding and decoding.

    Args:
        autoencoder: reads images of S px.
        judge: a classifier.
        images: uint8 [N, 3, S, S], real.
        indices: int64 [N], the judge's output for each one's class.

    Returns:
        images: N; psnr_db; top1_real_pct and top1_reconstructed_pct, the judge's.
    """
    again = reconstructions(autoencoder, images)
    right = [100.0 * float((answers(judge, x)[0].argmax(1) == indices).mean()) for x in (images, again)]
    return {
        "images": len(images),
        "psnr_db": round(psnr(images, again), 2),
        "top1_real_pct": round(right[0], 2),
        "top1_reconstructed_pct": round(right[1], 2),
    }


def judge_samples(
    generated: UInt8,
    real: UInt8,
    judge: Classifier,
    indices: npt.NDArray[np.int64],
) -> dict[str, Any]:
    """How a classifier sees generated images.

    Args:
        generated: uint8 [N, 3, S, S].
        real: uint8 [M, 3, S, S] of the same classes in the same shares.
        judge: a classifier.
        indices: int64 [N], the judge's output for each generated image's class.

    Returns:
        generated: N; class_consistency_pct: the share that the judge takes for their class; frechet: the distance
        of its features between generated and real, which is comparable at equal N, M and judge only.
    """
    logits, features = answers(judge, generated)
    return {
        "generated": len(generated),
        "class_consistency_pct": round(100.0 * float((logits.argmax(1) == indices).mean()), 2),
        "frechet": round(frechet_distance(features, answers(judge, real)[1]), 4),
    }


def _sized(x: Tensor, size: int) -> Tensor:
    if x.shape[-1] == size:
        return x
    return torch.nn.functional.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
