"""Assignment to the nearest centroid, distortion, Voronoi counts and exact Wasserstein distance.

Shapes: N samples of a class, K centroids, D flattened latent dimension, B rows of one block.

Distances are screened with a float32 matrix product; every decision that its rounding could turn is settled
from float64 differences. So labels do not depend on the BLAS, its threads or the block size.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

_BLOCK_ELEMENTS = 1 << 22  # elements of one float64 temporary: 32 MiB


def check_samples(x: npt.ArrayLike, name: str = "x") -> npt.NDArray[np.floating]:
    """Returns `x` as a C-contiguous float array [N, D] (float16 becomes float32), or refuses it.

    Raises:
        ValueError: not two-dimensional, not floating point, D = 0, or not finite.
    """
    array = np.asarray(x)
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(f"{name} must be [rows, D] with D >= 1 (flatten each latent), got shape {array.shape}")
    if array.dtype == np.float16:
        array = array.astype(np.float32)
    if array.dtype not in (np.float32, np.float64):
        raise ValueError(f"{name} must be float16, float32 or float64, got {array.dtype}: convert it first")
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array).all(axis=1)).sum())
        raise ValueError(f"{name} has NaN or infinity in {bad} of {len(array)} rows: drop or re-encode them")
    return np.ascontiguousarray(array)


def screening_tolerance(dim: int) -> float:
    """Rounding bound of `||x||^2 - 2<x,c> + ||c||^2` in float32, as a part of ||x||^2 + ||c||^2.

    A dot product that runs in at least 8 partial sums errs by at most (D/8 + 16) u |x|.|c|, with u = 2^-24;
    the three terms together by twice that, since 2|x||c| <= |x|^2 + |c|^2.
    """
    return (dim / 8 + 16) * 2.0**-23


def nearest(
    x: npt.NDArray[np.floating],
    centroids: npt.NDArray[np.floating],
    factor: F64 | None = None,
) -> I64:
    """Labels of one block of rows: argmin over k of factor_k ||x - c_k||^2, ties to the lowest index.

    Args:
        x: float32 or float64 [B, D]; the caller keeps B*K bounded.
        centroids: float32 or float64 [K, D], K >= 1.
        factor: float64 [K], positive; None means all 1.

    Returns:
        int64 [B].
    """
    x32 = x.astype(np.float32, copy=False)
    c32 = centroids.astype(np.float32, copy=False)
    # Overflow or NaN in the screen only makes more candidates: the comparison below is written for that.
    with np.errstate(over="ignore", invalid="ignore"):
        cross = (x32 @ c32.T).astype(np.float64)
        cross *= 2.0
        size = np.einsum("bd,bd->b", x32, x32).astype(np.float64)[:, None] + np.einsum("kd,kd->k", c32, c32)
        slack = screening_tolerance(x.shape[1]) * size
        size -= cross
        lower, upper = size - slack, size + slack
        if factor is not None:
            lower *= factor
            upper *= factor
        candidate = ~(lower > upper.min(axis=1, keepdims=True))
    labels: I64 = candidate.argmax(axis=1).astype(np.int64)
    unsure = np.flatnonzero(candidate.sum(axis=1) > 1)
    if len(unsure):
        row, col = np.nonzero(candidate[unsure])
        score = pair_distances(x, centroids, unsure[row], col)
        if factor is not None:
            score *= factor[col]
        order = np.lexsort((col, score, row))
        first = np.flatnonzero(np.r_[True, np.diff(row[order]) > 0])
        labels[unsure] = col[order][first]
    return labels


def pair_distances(x: npt.NDArray[np.floating], centroids: npt.NDArray[np.floating], rows: I64, cols: I64) -> F64:
    """Squared distances x[rows[p]] - centroids[cols[p]], by float64 differences. float64 [P]."""
    out = np.empty(len(rows), np.float64)
    step = max(1, _BLOCK_ELEMENTS // x.shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        diff = x[rows[part]].astype(np.float64)
        diff -= centroids[cols[part]]
        diff *= diff
        out[part] = diff.sum(axis=1)
    return out


def squared_distances(x: npt.NDArray[np.floating], centroids: npt.NDArray[np.floating]) -> F64:
    """Squared distances float64 [N, K], from a float64 matrix product, centred so that the square keeps its digits."""
    shift = centroids.mean(axis=0, dtype=np.float64)
    c = centroids - shift
    cost = np.empty((len(x), len(c)), np.float64)
    step = max(1, _BLOCK_ELEMENTS // x.shape[1])
    for start in range(0, len(x), step):
        rows = x[start : start + step] - shift
        cost[start : start + step] = (rows * rows).sum(axis=1)[:, None] - 2.0 * (rows @ c.T)
    cost += (c * c).sum(axis=1)
    np.maximum(cost, 0.0, out=cost)
    return cost


def check_pair(x: npt.ArrayLike, centroids: npt.ArrayLike) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.floating]]:
    """`check_samples` of both, or ValueError when their D differ or there is no centroid."""
    x, centroids = check_samples(x), check_samples(centroids, "centroids")
    if x.shape[1] != centroids.shape[1]:
        raise ValueError(f"x has D={x.shape[1]} but centroids have D={centroids.shape[1]}: same latents expected")
    if not len(centroids):
        raise ValueError("centroids is empty: at least one is needed")
    return x, centroids


def assign(x: npt.ArrayLike, centroids: npt.ArrayLike) -> tuple[I64, F64]:
    """Nearest centroid of each sample, exactly; ties go to the lowest index.

    Memory beyond the inputs is bounded (a few times 32 MiB), whatever N.

    Args:
        x: float [N, D].
        centroids: float [K, D], K >= 1.

    Returns:
        labels int64 [N], and squared distances float64 [N] in squared latent units.

    Raises:
        ValueError: wrong shape or type, not finite, or no centroid.
    """
    x, centroids = check_pair(x, centroids)
    labels = np.empty(len(x), np.int64)
    step = max(1, _BLOCK_ELEMENTS // max(x.shape[1], len(centroids)))
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        labels[part] = nearest(x[part], centroids)
    return labels, pair_distances(x, centroids, np.arange(len(x)), labels)


def distortion(x: npt.ArrayLike, centroids: npt.ArrayLike) -> float:
    """Quadratic distortion G = mean_i min_k ||x_i - c_k||^2, in squared latent units.

    A mean: scikit-learn's inertia is the sum. Measured on samples the centroids were not fitted to, it is the
    held-out distortion.

    Raises:
        ValueError: as `assign`; or no sample.

    Source: arXiv 2501.07681, Section 2.2 (quadratic distortion).

    >>> distortion(np.array([[0.0], [2.0], [9.0]]), np.array([[1.0], [9.0]]))
    0.6666666666666666
    """
    sq_dist = assign(x, centroids)[1]
    if not len(sq_dist):
        raise ValueError("x is empty: the distortion of no sample is undefined")
    return float(sq_dist.mean())


def voronoi_counts(x: npt.ArrayLike, centroids: npt.ArrayLike) -> I64:
    """Number of samples in each Voronoi cell, int64 [K]; sums to N. Ties go to the lowest index.

    Divided by N these are the companion weights, the best weights for these centroids (Prop. 2).
    """
    labels, _ = assign(x, centroids)
    return np.bincount(labels, minlength=len(np.asarray(centroids))).astype(np.int64)


def scheme_weights(counts: npt.ArrayLike, scheme: Literal["counts", "sqrt", "uniform"] = "counts") -> F64:
    """The probability vector that a weight scheme gives the centroids of one class.

    counts: n_k / n, the Voronoi masses (of Voronoi counts) or a streaming estimate of them (of streaming counts).
    sqrt: sqrt(n_k) / sum_j sqrt(n_j), Eq. 33 as a measure. uniform: 1 / K, empty cells included.
    Except under `uniform`, an empty cell has weight 0: its centroid is no part of the measure.

    Args:
        counts: int or float [K], not negative, with a sum above 0.
        scheme: see above.

    Returns:
        float64 [K], sum 1.

    Raises:
        ValueError: negative or not finite counts, none above 0, or an unknown scheme.

    Source: arXiv 2501.07681, Algorithm 4 (counts) and Eq. 33 (sqrt).

    Differences from the paper: Eq. 33 is a factor in the loss, sqrt(K w_k), which `core.losses.image_weights` gives
    and which does not sum to K; a transport plan needs a measure, so here it is divided by its sum.

    >>> scheme_weights([4, 1, 0], "sqrt").tolist()
    [0.6666666666666666, 0.3333333333333333, 0.0]
    """
    mass = np.asarray(counts, dtype=np.float64)
    if mass.ndim != 1 or not len(mass) or not np.isfinite(mass).all() or not (mass >= 0).all() or not mass.sum() > 0:
        raise ValueError(f"counts must be a vector of numbers >= 0 with a sum above 0, got shape {mass.shape}")
    if scheme not in ("counts", "sqrt", "uniform"):
        raise ValueError(f"scheme must be counts, sqrt or uniform, got {scheme!r}")
    mass = {"counts": mass, "sqrt": np.sqrt(mass), "uniform": np.ones_like(mass)}[scheme]
    probability: F64 = mass / mass.sum()
    return probability


def optimal_plan(x: npt.ArrayLike, centroids: npt.ArrayLike, weights: npt.ArrayLike) -> tuple[F64, float]:
    """The exact transport plan from the samples (mass 1/N each) to the weighted centroids, and its cost.

    Centroids of weight 0 receive nothing and cost nothing. Memory: two float64 matrices [N, K].

    Args:
        x: float [N, D].
        centroids: float [K, D].
        weights: float [K], not negative, sum 1 (to 1e-6; rescaled to exactly 1).

    Returns:
        float64 [N, K], rows of sum 1/N and columns of sum weights; and its mean squared distance, W2^2.

    Raises:
        ValueError: wrong shapes, or weights that are not a probability vector.
        RuntimeError: the solver stopped before it reached the optimum.

    Source: solver `ot.emd` of POT (network simplex).
    """
    import ot  # heavy, and needed only here

    x, centroids = check_pair(x, centroids)
    mass = _check_probability(weights, "weights")
    if mass.shape != (len(centroids),):
        raise ValueError(f"weights must be [K] = [{len(centroids)}], one for each centroid, got {mass.shape}")
    if not len(x):
        raise ValueError("x is empty: the distance to no sample is undefined")
    carried = np.flatnonzero(mass)
    uniform = np.full(len(x), 1.0 / len(x))
    cost = squared_distances(x, centroids[carried])
    found, log = ot.emd(uniform, mass[carried], cost, numItermax=50_000_000, log=True)
    if log.get("warning"):
        raise RuntimeError(f"ot.emd did not reach the optimum: {log['warning']}")
    if len(carried) == len(mass):
        plan: F64 = found
    else:
        plan = np.zeros((len(x), len(mass)))
        plan[:, carried] = found
    return plan, float(log["cost"])


def w2_squared(x: npt.ArrayLike, centroids: npt.ArrayLike, weights: npt.ArrayLike) -> float:
    """Exact squared Wasserstein-2 distance between the samples (mass 1/N each) and the weighted centroids.

    In the units of `distortion`, which it equals when the weights are the Voronoi masses; it is larger with
    any other weights. On samples the centroids were not fitted to, with the weights of those that they were, it is
    the held-out W2^2, at least the held-out distortion. Cost: two float64 matrices [N, K] and a network simplex
    (0.1 s at N = 1300, K = 200).

    Args:
        x: float [N, D].
        centroids: float [K, D].
        weights: float [K], not negative, sum 1 (to 1e-6; rescaled to exactly 1); see `scheme_weights`.

    Raises:
        ValueError: wrong shapes, or weights that are not a probability vector.
        RuntimeError: the solver stopped before it reached the optimum.

    Source: arXiv 2501.07681, Proposition 2.
    """
    return optimal_plan(x, centroids, weights)[1]


def total_variation(p: npt.ArrayLike, q: npt.ArrayLike) -> float:
    """Total variation distance of two probability vectors of one length: half the L1 distance, in [0, 1].

    Raises:
        ValueError: different shapes, or one is not a probability vector.

    >>> total_variation([0.5, 0.5], [1.0, 0.0])
    0.5
    """
    first, second = _check_probability(p, "p"), _check_probability(q, "q")
    if first.shape != second.shape:
        raise ValueError(f"p and q must have one shape, got {first.shape} and {second.shape}")
    return float(0.5 * np.abs(first - second).sum())


def _check_probability(values: npt.ArrayLike, name: str) -> F64:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array) or not (array >= 0).all():
        raise ValueError(f"{name} must be a vector of numbers >= 0, got shape {array.shape}")
    total = array.sum()
    if not abs(total - 1.0) <= 1e-6:
        raise ValueError(f"{name} must sum to 1, got {total}: divide counts by their sum")
    probability: F64 = array / total
    return probability
