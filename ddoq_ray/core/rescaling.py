"""Centroids that spread as the data does.

Shape suffixes: K centroids, D flattened latent dimension.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def rescaled(
    centroids: npt.NDArray[np.floating], weights: npt.NDArray[np.floating], distortion: float
) -> npt.NDArray[np.float32]:
    """Centroids of a class moved away from their mean until they spread as the class's latents do.

    The centroids of a class vary less than its latents by what varies within the cells: of means of Voronoi cells, and
    of those only, total = between + distortion (the law of total variance). So the factor sqrt(total / between) follows
    from the codebook alone, and no latent is read again. The mean of a class stays what it is.

    Args:
        centroids: [K, D], means of their cells.
        weights: [K], masses of the cells; their sum need not be 1.
        distortion: mean squared distance of the class's latents to their centroids.

    Returns:
        float32 [K, D]. A single centroid, or equal ones, stay as they are: nothing says where to.

    Raises:
        ValueError: shapes that do not fit, or a distortion that is negative or not finite.

    Differences from a scaling by channel: one factor for all channels. A codebook holds no variance by channel, and
    where latents are normalised by channel they differ little.

    >>> rescaled(np.array([[-1.0], [1.0]]), np.array([0.5, 0.5]), 3.0).tolist()
    [[-2.0], [2.0]]
    """
    x, w = np.asarray(centroids, np.float64), np.asarray(weights, np.float64)
    if x.ndim != 2 or w.shape != x.shape[:1] or w.sum() <= 0:
        raise ValueError(f"expected centroids [K, D] and positive weights [K], got {x.shape} and {w.shape}")
    if not (np.isfinite(distortion) and distortion >= 0):
        raise ValueError(f"expected a distortion of 0 or more, got {distortion}")
    w = w / w.sum()
    mean = w @ x
    between = float(w @ np.square(x - mean).sum(1))
    if between <= 1e-12 * max(distortion, float(np.square(x).sum(1).max()), 1e-30):
        return x.astype(np.float32)
    return (mean + np.sqrt((between + distortion) / between) * (x - mean)).astype(np.float32)
