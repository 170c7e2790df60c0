"""Latents noised to a level of a diffusion, each by noise that belongs to its sample.

Shape suffixes: n samples, D flattened latent dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ddoq_ray.core.rng import philox


@dataclass(frozen=True)
class NoiseLevel:
    """A time of a diffusion: a latent z becomes `signal * z + sigma * noise`.

    Attributes:
        signal: sqrt(alpha-bar) of a variance-preserving diffusion.
        sigma: sqrt(1 - alpha-bar) of one.
        seed: Of the noise.
    """

    signal: float
    sigma: float
    seed: int


def noised(latents: npt.NDArray[np.float16], keys: Sequence[str], level: NoiseLevel) -> npt.NDArray[np.float16]:
    """Noise latents to a level.

    The noise of a sample is a function of the seed and its key alone: the same in any chunk, shard, order and process.

    Args:
        latents: float16 [n, D].
        keys: n sample keys. Samples that share a key share their noise.
        level: signal, sigma and seed.

    Returns:
        float16 [n, D].

    Raises:
        ValueError: As many keys as latents are needed.

    Source: the paper's marginal at time T; Ho et al., Denoising Diffusion Probabilistic Models, Eq. 4.

    >>> level = NoiseLevel(0.8, 0.6, seed=0)
    >>> z = np.zeros((2, 3), np.float16)
    >>> bool((noised(z, ["a", "b"], level)[1] == noised(z[1:], ["b"], level)[0]).all())
    True
    """
    if len(keys) != len(latents):
        raise ValueError(f"noised() expects one key a latent, got {len(keys)} keys for {len(latents)} latents")
    out = np.empty(latents.shape, np.float16)
    for i, key in enumerate(keys):  # one by one: the float32 copy of many would be memory for nothing
        noise = philox("noise level", level.seed, key).standard_normal(latents.shape[1], dtype=np.float32)
        out[i] = np.float32(level.signal) * latents[i].astype(np.float32) + np.float32(level.sigma) * noise
    return out
