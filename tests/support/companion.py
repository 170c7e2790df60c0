"""Algorithm 1 of the paper as printed, with the step of its weight recursion made explicit.

The reference for `ddoq_ray.core.clvq`, which keeps counts instead of these weights.

Shapes: N samples, K centroids, D flattened latent dimension.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from ddoq_ray.core.distortion import F64, I64, check_samples

WeightStep = Literal["winner", "global"]


def companion_weights(winners: npt.ArrayLike, k: int, *, step: WeightStep) -> F64:
    """The weight recursion: w <- (1 - gamma) w + gamma e_win, from w = (1/K, ..., 1/K), for each winner in turn.

    The K initial centroids count as K samples, one each. After t samples in all, v of them won by the winner:

        winner:  gamma = 1/v, the step that moves the winner's centroid
        global:  gamma = 1/t

    With the global step the weights are v/t, the counts over their sum, exactly. With the winner's own step
    they are not: a rare winner has a large step and takes weight from all others, so that the result depends
    on who won last and is far from the Voronoi masses.

    Args:
        winners: integers [N] in 0..K-1, in the order of the samples.
        k: K.
        step: see above.

    Returns:
        float64 [K], not negative, sum 1.

    Raises:
        ValueError: a winner out of range, or an unknown step.

    Source: arXiv 2501.07681, Algorithm 1, lines 1 and 7.

    Differences from the paper: it has one sequence of steps for the centroids and the weights, left open.

    >>> companion_weights([0, 0, 1], 2, step="global").round(12).tolist()
    [0.6, 0.4]
    """
    order = np.asarray(winners)
    if order.ndim != 1 or (order.size and not np.issubdtype(order.dtype, np.integer)):
        raise ValueError(f"winners must be a vector of integers, got shape {order.shape} and type {order.dtype}")
    if k < 1 or (order.size and not 0 <= order.min() <= order.max() < k):
        raise ValueError(f"winners must lie in 0..{k - 1} for k={k}, and k must be >= 1")
    if step not in ("winner", "global"):
        raise ValueError(f'step must be "winner" or "global", got {step!r}')
    weights = np.full(k, 1.0 / k)
    wins = [1] * k
    for samples, winner in enumerate(order.tolist(), k + 1):
        wins[winner] += 1
        gamma = 1.0 / (wins[winner] if step == "winner" else samples)
        weights *= 1.0 - gamma
        weights[winner] += gamma
    return weights


def clvq_as_printed(x: npt.ArrayLike, start: npt.ArrayLike, *, weight_step: WeightStep) -> tuple[F64, I64, F64]:
    """One pass of Algorithm 1 from given initial centroids, in float64.

    Args:
        x: float [N, D], in stream order.
        start: float [K, D], K >= 1: the initial centroids, each a sample with count 1.
        weight_step: gamma of line 7, see `companion_weights`. Line 6 has gamma = 1/v, as in Algorithm 3.

    Returns:
        centroids float64 [K, D]; counts int64 [K], sum N + K; weights float64 [K], sum 1.

    Raises:
        ValueError: wrong shape or type, not finite, no centroid, or an unknown step.

    Source: arXiv 2501.07681, Algorithm 1.

    >>> centroids, counts, weights = clvq_as_printed([[1.0], [9.0]], [[0.0], [10.0]], weight_step="global")
    >>> centroids.tolist(), counts.tolist(), weights.tolist()
    ([[0.5], [9.5]], [2, 2], [0.5, 0.5])
    """
    rows = check_samples(x)
    centroids = check_samples(start, "start").astype(np.float64)
    if not len(centroids) or centroids.shape[1] != rows.shape[1]:
        raise ValueError(f"start must be [K, {rows.shape[1]}] with K >= 1, got shape {centroids.shape}")
    counts = np.ones(len(centroids), np.int64)
    winners = np.empty(len(rows), np.int64)
    for index, row in enumerate(rows):
        winner = int(np.argmin(((centroids - row) ** 2).sum(axis=1)))
        counts[winner] += 1
        centroids[winner] += (row - centroids[winner]) / counts[winner]
        winners[index] = winner
    return centroids, counts, companion_weights(winners, len(centroids), step=weight_step)
