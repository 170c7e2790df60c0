"""The Frechet distance against closed forms and against the matrix square root."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm

from ddoq_ray.core.frechet import frechet_distance


def test_frechet_of_gaussians_known_in_closed_form():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((500, 4))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T  # mean 0, covariance 1 exactly
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    # Commuting covariances: sum of (s1 - s2)^2, and the squared distance of the means.
    y = x * [1, 2, 3, 0.5] + [0, 0, 1, 2]
    assert frechet_distance(x, y) == pytest.approx(1 + 4 + 0.25 + 1 + 4, rel=1e-9)
    assert frechet_distance(y, x) == pytest.approx(frechet_distance(x, y), rel=1e-9)
    rotation = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    assert frechet_distance(x @ rotation, y @ rotation) == pytest.approx(frechet_distance(x, y), rel=1e-6)
    assert frechet_distance(x[:3], y[:3]) >= 0  # singular covariances
    with pytest.raises(ValueError, match="two arrays"):
        frechet_distance(x, y[:, :3])
    with pytest.raises(ValueError, match="finite"):
        frechet_distance(x, y * np.nan)


def test_it_is_the_formula_as_printed():
    """With a square root of the product itself, which is not symmetric, where the covariances do not commute."""
    rng = np.random.default_rng(2)
    for _ in range(5):
        x, y = (rng.standard_normal((60, 5)) @ rng.standard_normal((5, 5)) + rng.standard_normal(5) for _ in range(2))
        a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
        expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)
        assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-8)
