"""Shrunk centroids: the formula on known values, invariances, and latents that were not quantized."""

from __future__ import annotations

import numpy as np
import pytest

from ddoq_ray.core.distortion import assign, distortion
from ddoq_ray.core.gram_kmeans import gram_kmeans
from ddoq_ray.core.shrinkage import LEAST_REAL, shrunk, shrunk_means


def drawn(n: int, dim: int, seed: int) -> np.ndarray:
    """Latents [n, dim]: a dozen loose clusters with a spectrum that falls, as latents of images have."""
    rng = np.random.default_rng(seed)
    scale = 1 / np.sqrt(1 + np.arange(dim) / 20)
    middles = np.random.default_rng(99).normal(size=(12, dim)) * scale
    return (0.5 * middles[rng.integers(0, 12, n)] + rng.normal(size=(n, dim)) * scale).astype(np.float32)


def test_known_values() -> None:
    """By hand: means -2 and 2 of 3 and 1 members about 0.5 on average, total (3 + 1) * 4 / 3."""
    c, m = np.array([[-1.0], [3.0]]), np.array([3, 1])
    mean, between = 0.0, 3.0  # (3 * 1 + 1 * 9) / 4
    total = (between + 1.0) * 4 / 3
    tau = max((4 * between - total) / (4 - 10 / 4), LEAST_REAL * between)
    expected = [mean + tau / (tau + total / 3) * -1.0, mean + tau / (tau + total) * 3.0]
    np.testing.assert_allclose(shrunk(c, m, 1.0)[:, 0], expected, rtol=1e-6)


def test_where_all_is_noise_the_least_part_is_kept() -> None:
    """K = N: every member is its own centroid; none becomes the mean, none falls on another."""
    x = drawn(40, 60, 0)
    made = shrunk(x, np.ones(40, int), 0.0)
    factors = (made - x.mean(0)) / (x - x.mean(0))
    share = LEAST_REAL / (LEAST_REAL + 40 / 39)
    np.testing.assert_allclose(factors, share, rtol=1e-3)


@pytest.mark.parametrize("k", [2, 7, 30])
def test_it_moves_and_scales_with_the_latents(k: int) -> None:
    c, m = gram_kmeans(drawn(120, 40, 1), k, seed=0, class_id=0)
    moved = shrunk(3 * c + 5, m, 9 * 2.5)
    np.testing.assert_allclose(moved, 3 * shrunk(c, m, 2.5) + 5, atol=2e-4)
    permuted = np.random.default_rng(0).permutation(len(c))
    np.testing.assert_array_equal(shrunk(c[permuted], m[permuted], 2.5), shrunk(c, m, 2.5)[permuted])


def test_small_cells_are_drawn_further_and_large_ones_hardly() -> None:
    c, m = gram_kmeans(drawn(300, 200, 2), 60, seed=0, class_id=0)
    x = drawn(300, 200, 2)
    mean = m @ c / m.sum()
    factor = np.linalg.norm(shrunk(c, m, distortion(x, c)) - mean, axis=1) / np.linalg.norm(c - mean, axis=1)
    assert (np.diff(factor[np.argsort(m, kind="stable")]) > -1e-6).all() and 0 < factor.min() < factor.max() < 1
    many = shrunk(c, m * 10**9, distortion(x, c))
    np.testing.assert_allclose(many, c, atol=1e-5)


def test_one_centroid_and_equal_ones_stay() -> None:
    one = np.array([[1.0, 2.0]], np.float32)
    np.testing.assert_array_equal(shrunk(one, np.array([9]), 4.0), one)
    same = np.repeat(one, 3, 0)
    np.testing.assert_array_equal(shrunk(same, np.array([1, 2, 3]), 4.0), same)


@pytest.mark.parametrize("k", [20, 60, 120])
def test_latents_that_were_not_quantized_are_nearer(k: int) -> None:
    """Against the exact optimum, whose distortion on its own latents is lower; no cell becomes empty."""
    fit, rest = drawn(250, 256, 3), drawn(2000, 256, 4)
    c, m = gram_kmeans(fit, k, seed=0, class_id=0)
    made = shrunk(c, m, distortion(fit, c))
    assert distortion(rest, made) < 0.99 * distortion(rest, c)
    assert distortion(fit, made) > distortion(fit, c)
    assert np.bincount(assign(fit, made)[0], minlength=len(c)).min() >= 1


@pytest.mark.parametrize("k", [1, 5, 60, 120])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_of_means_no_distance_need_be_measured(k: int, offset: float) -> None:
    """The distortion that the law of total variance leaves is the measured one, far from the origin too."""
    x = drawn(120, 100, 5) + np.float32(offset)
    c, m = gram_kmeans(x, k, seed=0, class_id=0)
    np.testing.assert_allclose(shrunk_means(x, c, m), shrunk(c, m, distortion(x, c)), rtol=1e-5, atol=2e-5)


def test_counts_of_other_latents_are_refused() -> None:
    x = drawn(20, 4, 6)
    c, m = gram_kmeans(x, 3, seed=0, class_id=0)
    with pytest.raises(ValueError, match="counts that sum to the 19 latents, got 20"):
        shrunk_means(x[:19], c, m)


@pytest.mark.parametrize(
    ("c", "m", "d"),
    [
        (np.ones((2, 3)), np.array([1]), 1.0),
        (np.ones((2, 3)), np.array([1, 0]), 1.0),
        (np.ones((2, 3)), np.array([1, 1]), np.nan),
        (np.ones((2, 3)), np.array([1, 1]), -1.0),
        (np.ones(3), np.ones(3), 1.0),
    ],
)
def test_what_is_no_codebook_is_refused(c: np.ndarray, m: np.ndarray, d: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        shrunk(c, m, d)
