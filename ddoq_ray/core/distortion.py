"""Assignment to the nearest centroid, distortion, Voronoi counts and exact Wasserstein distance.

Shapes: N samples of a class, K centroids, D flattened latent dimension, B rows of one block.

Distances are screened with a float32 matrix product; every decision that its rounding could turn is settled
from float64 differences. So labels do not depend on the BLAS, its threads or the block size.
"""

from __future__ import annotations

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
        score = _pair_distances(x, centroids, unsure[row], col)
        if factor is not None:
            score *= factor[col]
        order = np.lexsort((col, score, row))
        first = np.flatnonzero(np.r_[True, np.diff(row[order]) > 0])
        labels[unsure] = col[order][first]
    return labels


def _pair_distances(x: npt.NDArray[np.floating], centroids: npt.NDArray[np.floating], rows: I64, cols: I64) -> F64:
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


def _check_pair(
    x: npt.ArrayLike, centroids: npt.ArrayLike
) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.floating]]:
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
    x, centroids = _check_pair(x, centroids)
    labels = np.empty(len(x), np.int64)
    step = max(1, _BLOCK_ELEMENTS // max(x.shape[1], len(centroids)))
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        labels[part] = nearest(x[part], centroids)
    return labels, _pair_distances(x, centroids, np.arange(len(x)), labels)


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


def w2_squared(x: npt.ArrayLike, centroids: npt.ArrayLike, weights: npt.ArrayLike) -> float:
    """Exact squared Wasserstein-2 distance between the samples (mass 1/N each) and the weighted centroids.

    In the units of `distortion`, which it equals when the weights are the Voronoi masses; it is larger with
    any other weights. Cost: one float64 matrix [N, K] and a network simplex (0.1 s at N = 1300, K = 200).

    Args:
        x: float [N, D].
        centroids: float [K, D].
        weights: float [K], not negative, sum 1 (to 1e-6; rescaled to exactly 1).

    Raises:
        ValueError: wrong shapes, or weights that are not a probability vector.
        RuntimeError: the solver stopped before it reached the optimum.

    Source: arXiv 2501.07681, Proposition 2; solver `ot.emd2` of POT.
    """
    import ot  # heavy, and needed only here

    x, centroids = _check_pair(x, centroids)
    mass = _check_probability(weights, "weights")
    if mass.shape != (len(centroids),):
        raise ValueError(f"weights must be [K] = [{len(centroids)}], one for each centroid, got {mass.shape}")
    if not len(x):
        raise ValueError("x is empty: the distance to no sample is undefined")
    # Centred, so that the expanded square keeps its digits.
    shift = centroids.mean(axis=0, dtype=np.float64)
    c = centroids - shift
    cost = np.empty((len(x), len(c)), np.float64)
    step = max(1, _BLOCK_ELEMENTS // x.shape[1])
    for start in range(0, len(x), step):
        rows = x[start : start + step] - shift
        cost[start : start + step] = (rows * rows).sum(axis=1)[:, None] - 2.0 * (rows @ c.T)
    cost += (c * c).sum(axis=1)
    np.maximum(cost, 0.0, out=cost)
    uniform = np.full(len(x), 1.0 / len(x))
    value, log = ot.emd2(uniform, mass, cost, numItermax=50_000_000, log=True)
    if log.get("warning"):
        raise RuntimeError(f"ot.emd2 did not reach the optimum: {log['warning']}")
    return float(value)


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
