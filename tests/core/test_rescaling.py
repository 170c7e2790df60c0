"""Centroids that spread as the data does, against the data itself."""

from __future__ import annotations

import numpy as np
import pytest

from ddoq_ray.core.frechet import frechet_distance
from ddoq_ray.core.rescaling import rescaled


def test_means_of_cells_get_the_spread_and_keep_the_mean_of_the_data():
    rng = np.random.default_rng(0)
    data = rng.standard_normal((400, 6)) * [3, 1, 1, 0.5, 2, 1] + 5
    cells = np.argmin(np.square(data[:, None] - data[None, :7]).sum(-1), axis=1)
    centroids = np.stack([data[cells == k].mean(0) for k in range(7)])
    weights = np.bincount(cells, minlength=7) / len(data)
    distortion = float(np.square(data - centroids[cells]).sum(1).mean())
    made = rescaled(centroids, weights, distortion)
    mean = weights @ made
    assert made.dtype == np.float32 and np.allclose(mean, data.mean(0), atol=1e-4)
    spread = weights @ np.square(made - mean).sum(1)
    assert spread == pytest.approx(np.square(data - data.mean(0)).sum(1).mean(), rel=1e-5)
    assert np.allclose(rescaled(centroids, 40 * weights, distortion), made, atol=1e-5)


def test_what_has_no_spread_stays():
    one = np.array([[1.0, -2.0]])
    assert np.array_equal(rescaled(one, np.ones(1), 9.0), one)
    assert np.array_equal(rescaled(np.repeat(one, 3, 0), np.ones(3), 9.0), np.repeat(one, 3, 0))
    assert np.array_equal(rescaled(np.eye(2), np.ones(2), 0.0), np.eye(2))
    for bad in (np.nan, -1.0):
        with pytest.raises(ValueError, match="expected a distortion"):
            rescaled(np.eye(2), np.ones(2), bad)
    with pytest.raises(ValueError, match="positive weights"):
        rescaled(np.eye(2), np.ones(3), 1.0)


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
