"""The best grid when every centroid must weigh the same: what uniform weights cost, at the least.

A codebook's centroids are fitted for Voronoi weights. Giving them uniform weights afterwards, as D4M does, compares a
grid with a use it was not made for; the fair reference is a grid made for uniform weights: the K-point Wasserstein
barycenter of the class with fixed masses 1/K.

Shapes: N samples of a class, K centroids, D flattened latent dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ddoq_ray.core.distortion import F32, F64, check_pair, optimal_plan

_BLOCK_ELEMENTS = 1 << 22  # elements of one float64 temporary: 32 MiB
_FALL = 1e-9  # relative; a smaller fall is rounding


class Balanced(NamedTuple):
    """A grid for uniform weights.

    Attributes:
        centroids: float32 [K, D].
        history: exact W2^2 of the samples and the uniformly weighted grid, at the start and after each round; it
            falls from entry to entry, and the last is that of `centroids`.
        converged: False when `max_rounds` ended the descent.
    """

    centroids: F32
    history: tuple[float, ...]
    converged: bool


def balanced(x: npt.ArrayLike, centroids: npt.ArrayLike, *, max_rounds: int = 100) -> Balanced:
    """Re-optimize a grid for uniform weights: transport, then barycentric means, until W2^2 stops falling.

    A round takes the exact plan from the samples to K masses of 1/K and moves each centroid to the mean of what it
    receives (a sample may be split). Both steps lower the transport cost or leave it, so W2^2 never rises; the limit
    is a local optimum that depends on the start. Deterministic.

    Cost of a round: one network simplex and one [K, N] x [N, D] product; memory: two float64 matrices [N, K].

    Args:
        x: float [N, D], the latents of a class, N >= 1.
        centroids: float [K, D], the grid to start from. K > N is allowed: then samples are split.
        max_rounds: rounds at most, 0 or more.

    Raises:
        ValueError: wrong shape or type, not finite, no centroid, no sample, or max_rounds below 0.

    Source: Cuturi & Doucet, "Fast Computation of Wasserstein Barycenters", ICML 2014, Algorithm 2.

    Differences from the paper: one measure instead of several; the weights stay uniform (its Algorithm 1 is not run);
    the full step theta = 1; an exact plan instead of an entropic one.

    >>> balanced(np.array([[0.0], [3.0], [9.0]]), np.array([[0.0], [9.0]])).centroids.tolist()
    [[1.0], [7.0]]
    """
    x, start = check_pair(x, centroids)
    if max_rounds < 0:
        raise ValueError(f"max_rounds must be 0 or more, got {max_rounds}")
    grid: F32 = start.astype(np.float32)
    uniform = np.full(len(grid), 1.0 / len(grid))
    plan, value = optimal_plan(x, grid, uniform)
    history = [value]
    for _ in range(max_rounds):
        moved = _barycentric_means(x, plan)
        plan, value = optimal_plan(x, moved, uniform)
        if not value < history[-1] * (1 - _FALL):
            return Balanced(grid, tuple(history), True)
        grid = moved
        history.append(value)
    return Balanced(grid, tuple(history), False)


def _barycentric_means(x: npt.NDArray[np.floating], plan: F64) -> F32:
    """Mean of the mass that each column of the plan receives: float32 [K, D]."""
    total = np.zeros((plan.shape[1], x.shape[1]))
    step = max(1, _BLOCK_ELEMENTS // x.shape[1])
    for first in range(0, len(x), step):
        part = slice(first, first + step)
        total += plan[part].T @ x[part].astype(np.float64)
    means: F32 = (total / plan.sum(axis=0)[:, None]).astype(np.float32)
    return means
