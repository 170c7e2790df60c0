"""Shrunk centroids: the formula on known values, invariances, and latents that were not quantized."""

from __future__ import annotations

import numpy as np
import pytest

from ddoq_ray.core.distortion import assign, distortion
from ddoq_ray.core.gram_kmeans import gram_kmeans
from ddoq_ray.core.shrinkage import LEAST_REAL, OF_GROUPS, shrunk, shrunk_means


def drawn(n: int, dim: int, seed: int) -> np.ndarray:
    """Latents [n, dim]: a dozen loose clusters with a spectrum that falls, as latents of images have."""
    rng = np.random.default_rng(seed)
    scale = 1 / np.sqrt(1 + np.arange(dim) / 20)
    middles = np.random.default_rng(99).normal(size=(12, dim)) * scale
    return (0.5 * middles[rng.integers(0, 12, n)] + rng.normal(size=(n, dim)) * scale).astype(np.float32)


def test_known_values() -> None:
    """By hand: centroids -1 and 3 of 3 and 1 members; variance about them 4 / 2, and 16 / 3 about their mean."""
    c, m = np.array([[-1.0], [3.0]]), np.array([3, 1])
    mean, between = 0.0, 3.0  # (3 * 1 + 1 * 9) / 4
    noise = (2 * 4 / 2 + 4 * OF_GROUPS * 16 / 3) / (2 + 4 * OF_GROUPS)
    tau = max((4 * between - noise) / (4 - 10 / 4), LEAST_REAL * between)
    expected = [mean + tau / (tau + noise / 3) * -1.0, mean + tau / (tau + noise) * 3.0]
    np.testing.assert_allclose(shrunk(c, m, 1.0)[:, 0], expected, rtol=1e-6)


def test_two_levels_by_hand() -> None:
    """Two groups of three, far apart: each centroid goes to its group's mean, and the groups' means to each other."""
    c = np.array([[0.0], [1.0], [2.0], [100.0], [102.0], [107.0]])
    m, distortion = np.array([1, 4, 2, 3, 5, 1]), 0.5
    n, groups = m.sum(), (slice(0, 3), slice(3, 6))
    means = np.array([m[g] @ c[g, 0] / m[g].sum() for g in groups])
    sizes = np.array([m[g].sum() for g in groups])
    spread = [m[g] @ (c[g, 0] - mean) ** 2 for g, mean in zip(groups, means, strict=True)]
    w, within = OF_GROUPS * n, n * distortion
    noise = (within + w * (within + sum(spread)) / (n - 2)) / (n - 6 + w)

    def factor(among: float, count: int, members: np.ndarray, noise: float) -> np.ndarray:
        real = (among - (count - 1) * noise) / (members.sum() - (members**2).sum() / members.sum())
        real = max(real, LEAST_REAL * among / members.sum())
        return real / (real + noise / members)

    middle = sizes @ means / n
    among = sizes @ (means - middle) ** 2
    within += sum(spread)
    of_groups = (within + w * (within + among) / (n - 1)) / (n - 2 + w)
    moved = middle + factor(among, 2, sizes, of_groups) * (means - middle)
    expected = [
        to + factor(s, 3, m[g], noise) * (c[g, 0] - mean)
        for g, mean, to, s in zip(groups, means, moved, spread, strict=True)
    ]
    np.testing.assert_allclose(shrunk(c, m, distortion)[:, 0], np.concatenate(expected), rtol=1e-6)


def test_where_every_member_is_a_centroid_none_falls_on_another() -> None:
    """K = N: all of the spread may be noise, and at least `LEAST_REAL` of it is kept on each level."""
    fit, rest = drawn(120, 60, 0), drawn(2000, 60, 4)
    made = shrunk(fit, np.ones(120, int), 0.0)
    assert len(np.unique(made, axis=0)) == 120
    assert distortion(rest, made) < 0.8 * distortion(rest, fit)


@pytest.mark.parametrize("k", [2, 7, 30])
def test_it_moves_and_scales_with_the_latents(k: int) -> None:
    c, m = gram_kmeans(drawn(120, 40, 1), k, seed=0, class_id=0)
    moved = shrunk(3 * c + 5, m, 9 * 2.5)
    np.testing.assert_allclose(moved, 3 * shrunk(c, m, 2.5) + 5, atol=2e-4)
    permuted = np.random.default_rng(0).permutation(len(c))
    np.testing.assert_allclose(shrunk(c[permuted], m[permuted], 2.5), shrunk(c, m, 2.5)[permuted], atol=1e-6)


def test_small_cells_are_drawn_further_and_large_ones_hardly() -> None:
    c, x = drawn(4, 200, 2), drawn(300, 200, 2)
    m = np.array([1, 5, 40, 254])  # so few centroids are one group
    mean = m @ c / m.sum()
    factor = np.linalg.norm(shrunk(c, m, distortion(x, c)) - mean, axis=1) / np.linalg.norm(c - mean, axis=1)
    assert (np.diff(factor) > 0).all() and 0 < factor.min() < factor.max() < 1
    c, m = gram_kmeans(x, 60, seed=0, class_id=0)
    np.testing.assert_allclose(shrunk(c, m * 10**9, distortion(x, c)), c, atol=1e-5)


def test_clusters_that_stand_apart_are_not_drawn_together() -> None:
    """Towards their common mean alone, cells of few members would leave their clusters."""
    rng = np.random.default_rng(7)
    middles = 5 * rng.normal(size=(15, 100))
    fit, rest = ((middles[rng.integers(0, 15, n)] + rng.normal(size=(n, 100))).astype(np.float32) for n in (300, 3000))
    for k in (15, 60, 150):
        c, m = gram_kmeans(fit, k, seed=0, class_id=0)
        assert distortion(rest, shrunk_means(fit, c, m)) <= (1.015 if k == 15 else 0.96) * distortion(rest, c)


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
