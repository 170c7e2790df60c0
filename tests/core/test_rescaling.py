"""Centroids that spread as the data does, against the data itself."""

from __future__ import annotations

import numpy as np
import pytest

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
    for weights in (np.ones(3), np.zeros(2)):
        with pytest.raises(ValueError, match="positive weights"):
            rescaled(np.eye(2), weights, 1.0)
