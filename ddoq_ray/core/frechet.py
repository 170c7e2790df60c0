"""The Frechet distance between two sets of feature vectors, each taken as a Gaussian.

Shape suffixes: N M rows, d features.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]


def frechet_distance(first: Floats, second: Floats) -> float:
    """|m1 - m2|^2 + trace(S1 + S2 - 2 (S1 S2)^(1/2)) of the rows' means m and covariances S.

    Args:
        first: [N, d], N >= 2.
        second: [M, d], M >= 2. With fewer rows than features the covariances are singular and the figure is biased
            upwards; compare figures of equal N and M only.

    Returns:
        The squared 2-Wasserstein distance of the two Gaussians, 0 or more.

    Raises:
        ValueError: shapes that do not fit, or values that are not finite.

    Source: Dowson and Landau 1982; Heusel et al., NeurIPS 2017 (arXiv 1706.08500), there with Inception's features.

    >>> float(round(frechet_distance(np.array([[0.0], [2.0]]), np.array([[3.0], [5.0]])), 6))
    9.0
    """
    a, b = (np.asarray(x, dtype=np.float64) for x in (first, second))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"expected two arrays [N >= 2, d] of one d, got {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("expected finite features, got NaN or infinite values")
    shift = a.mean(0) - b.mean(0)
    cov_a, cov_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    # trace((A B)^(1/2)) = trace((A^(1/2) B A^(1/2))^(1/2)), whose argument is symmetric.
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return float(max(shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2 * cross, 0.0))
