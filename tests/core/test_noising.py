"""Noise that belongs to its sample."""

from __future__ import annotations

import numpy as np
import pytest

from ddoq_ray.core.noising import NoiseLevel, noised
from ddoq_ray.core.rng import philox

LEVEL = NoiseLevel(0.8, 0.6, seed=5)


def latents(n: int = 6, dim: int = 32) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n, dim)).astype(np.float16)


def test_each_row_is_its_own_formula() -> None:
    x, keys = latents(), [f"k{i}" for i in range(6)]
    for row, z, key in zip(noised(x, keys, LEVEL), x, keys, strict=True):
        noise = philox("noise level", 5, key).standard_normal(32, dtype=np.float32)
        np.testing.assert_allclose(row, 0.8 * z.astype(np.float64) + 0.6 * noise, rtol=1e-3, atol=1e-3)


def test_rows_do_not_depend_on_their_neighbours() -> None:
    x, keys = latents(), [f"k{i}" for i in range(6)]
    whole = noised(x, keys, LEVEL)
    order = np.random.default_rng(1).permutation(6)
    np.testing.assert_array_equal(noised(x[order], [keys[i] for i in order], LEVEL), whole[order])
    np.testing.assert_array_equal(noised(x[2:3], ["k2"], LEVEL)[0], whole[2])


def test_seeds_and_keys_differ_and_the_noise_is_standard_normal() -> None:
    x = np.zeros((400, 50), np.float16)
    keys = [str(i) for i in range(400)]
    only = noised(x, keys, NoiseLevel(0.0, 1.0, seed=0)).astype(np.float64)
    assert abs(only.mean()) < 0.03 and abs(only.std() - 1) < 0.03
    assert abs(np.corrcoef(only[:-1].ravel(), only[1:].ravel())[0, 1]) < 0.03
    assert not np.array_equal(noised(x, keys, NoiseLevel(0.0, 1.0, seed=1)), only)
    np.testing.assert_array_equal(noised(latents(), list("abcdef"), NoiseLevel(1.0, 0.0, 0)), latents())


def test_keys_must_fit() -> None:
    with pytest.raises(ValueError, match="one key a latent"):
        noised(latents(), ["a"], LEVEL)
    assert noised(latents()[:0], [], LEVEL).shape == (0, 32)
