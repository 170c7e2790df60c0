"""Exact k-means of one class in Gram space: for few samples of high dimension (n well below D).

With G = X X^T of the centred samples, k-means++, Lloyd and Hartigan's exchange need no D any more. A
centroid is a set of indices c, and ||x_j - mean(c)||^2 = G_jj - 2 mean_{i in c} G_ij + mean_{i,l in c} G_il.
One pass costs O(n^2), whatever D and K; many K and restarts can share one G.

Shapes: N samples, M distinct samples, K centroids, D flattened latent dimension.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from ddoq_ray.core.distortion import F32, F64, I64, check_samples
from ddoq_ray.core.gram_exchange import GAIN, cell_sums, exchange, members
from ddoq_ray.core.rng import philox

Product = Literal["float32", "bfloat16"]
PRODUCTS: tuple[Product, ...] = get_args(Product)
MAX_GRAM_BYTES = 2 << 30  # 23,170 distinct samples
_ROUNDS = 10
_KEY_COLUMNS = 16
_BLOCK = 256  # rows of one bfloat16 product


def _check_product(product: str) -> None:
    if product not in PRODUCTS:
        raise ValueError(f"product must be one of {PRODUCTS}, got {product!r}")


@dataclass(frozen=True)
class KMeansSettings:
    """How k-means in Gram space runs, on one class (`gram_kmeans`) and on many (`gram_kmeans_batched`).

    Attributes:
        hartigan: False stops at Lloyd's optimum, without Hartigan's exchange.
        restarts: independent runs on the one Gram matrix; the lowest distortion is kept.
        product: precision of the Gram matrix.
        max_iter: bound of the Lloyd passes. Rounds of exchange are shorter, and bounded by a multiple of it.
        max_bytes: bound of what may be taken at a time, the Gram matrix of one class or a group of classes on the
            device; None for the default of each.

    Raises:
        ValueError: restarts or max_iter below 1, or another product.
    """

    hartigan: bool = True
    restarts: int = 1
    product: Product = "float32"
    max_iter: int = 300
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.restarts < 1 or self.max_iter < 1:
            raise ValueError(f"restarts and max_iter must be >= 1, got {self.restarts} and {self.max_iter}")
        _check_product(self.product)


DEFAULTS = KMeansSettings()


def gram_kmeans(
    x: npt.ArrayLike, k: int, *, seed: int, class_id: int, settings: KMeansSettings = DEFAULTS
) -> tuple[F32, I64]:
    """Quantizes the samples of one class to K centroids with counts.

    Greedy k-means++ (2 + int(ln K) trials), then Hartigan's exchange of single points until no exchange
    helps: every such optimum is one of Lloyd too, and mostly a lower one. Every centroid is the mean of its
    cell, formed from the full samples at the end. Deterministic for one version of numpy and one BLAS thread
    count.

    Args:
        x: float [N, D], N >= 1.
        k: number of centroids wanted. With fewer than k distinct samples, each distinct sample becomes a
            centroid: K = min(k, distinct samples). Copies of a sample always share a cell.
        seed: the run's seed.
        class_id: keys the generator together with the seed.
        settings: without `hartigan`, Lloyd runs to convergence instead; `max_iter` is ten times as many rounds of
            exchange; `max_bytes` bounds the Gram matrix (default MAX_GRAM_BYTES); for `product` see `gram_matrix`.

    Returns:
        centroids float32 [K, D] and counts int64 [K]; counts are >= 1 and sum to N.

    Raises:
        ValueError: bad argument, or the Gram matrix would be too large.

    Source: arXiv 2501.07681, Algorithm 2 (Lloyd I); Arthur & Vassilvitskii 2007 (k-means++); Telgarsky &
    Vattani, "Hartigan's method: k-means clustering without Voronoi", AISTATS 2010.

    Differences from the paper: the paper runs scikit-learn's mini-batch k-means; this is the exact batch
    problem.

    >>> centroids, counts = gram_kmeans(np.array([[0.0], [0.2], [9.0]]), 2, seed=0, class_id=0)
    >>> sorted(zip(centroids[:, 0].round(3).tolist(), counts.tolist()))
    [(0.10000000149011612, 2), (9.0, 1)]
    """
    x = check_samples(x)
    return _means(x, _labels(x, k, seed, class_id, settings))


def gram_labels(x: npt.ArrayLike, k: int, *, seed: int, class_id: int, settings: KMeansSettings = DEFAULTS) -> I64:
    """The cells of `gram_kmeans`: int64 [N] in 0..K-1, each used. Arguments and errors as there.

    With pooled latents for `x` and the full ones for `cell_means`, distances are measured on the pooled ones.
    """
    return _labels(check_samples(x), k, seed, class_id, settings)


def _labels(x: npt.NDArray[np.floating], k: int, seed: int, class_id: int, settings: KMeansSettings) -> I64:
    """`gram_labels` for checked samples: a look at every latent costs, so it is done once."""
    if not len(x):
        raise ValueError("x is empty: a class without samples has no centroids")
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")
    first, inverse, copies = distinct_rows(x)
    needed = 4 * len(first) ** 2
    most = MAX_GRAM_BYTES if settings.max_bytes is None else settings.max_bytes
    if needed > most:
        raise ValueError(
            f"the Gram matrix of n={len(first)} distinct samples needs 4 n^2 = {needed} bytes, above "
            f"max_bytes={most}: use a streaming or faiss quantizer for this class, or raise it"
        )
    gram = gram_matrix(x if len(first) == len(x) else x[first], settings.product)
    mass = copies.astype(np.float64)
    best: I64 | None = None
    best_sum = np.inf
    for restart in range(settings.restarts):
        rng = philox("gram_kmeans", seed, class_id, restart)
        labels, total = partition_gram(gram, mass, k, rng, hartigan=settings.hartigan, max_iter=settings.max_iter)
        if total < best_sum:
            best, best_sum = labels, total
    assert best is not None
    return best[inverse]


def cell_means(x: npt.ArrayLike, labels: I64) -> tuple[F32, I64]:
    """Means (float32 [K, D], summed in float64) and counts (int64 [K]) of the cells 0..K-1, none empty."""
    return _means(check_samples(x), labels)


def _means(x: npt.NDArray[np.floating], labels: I64) -> tuple[F32, I64]:
    counts = np.bincount(labels).astype(np.int64)
    assert len(labels) == len(x) and (counts > 0).all()
    centroids = np.empty((len(counts), x.shape[1]), np.float32)
    for cell, points in enumerate(members(labels, len(counts))):
        centroids[cell] = x[points].mean(axis=0, dtype=np.float64)
    return centroids, counts


def distinct_rows(x: npt.NDArray[np.floating]) -> tuple[I64, I64, I64]:
    """Finds equal rows (as values: -0.0 equals 0.0).

    Returns:
        first int64 [M], the first index of each distinct row, in order; inverse int64 [N] with
        x == x[first[inverse]]; copies int64 [M].
    """
    original = np.arange(len(x))
    seen: dict[bytes, int] = {}
    for index in _suspects(x):
        key = hashlib.blake2b((x[index] + 0.0).tobytes(), digest_size=16).digest()
        original[index] = seen.setdefault(key, int(index))
    first = np.flatnonzero(original == np.arange(len(x))).astype(np.int64)
    inverse = np.searchsorted(first, original).astype(np.int64)
    copies = np.bincount(inverse, minlength=len(first)).astype(np.int64)
    return first, inverse, copies


def _suspects(x: npt.NDArray[np.floating]) -> I64:
    """Rows that agree with another one in a few columns: only these can have an equal, mostly there are none."""
    some = x[:, :: max(1, x.shape[1] // _KEY_COLUMNS)] + 0.0
    bits = some.view(np.uint32 if some.dtype == np.float32 else np.uint64).astype(np.uint64)
    odd = np.arange(bits.shape[1], dtype=np.uint64) * np.uint64(2 * 0x9E3779B97F4A7C15 % 2**64) + np.uint64(1)
    _, inverse, times = np.unique(bits @ odd, return_inverse=True, return_counts=True)
    return np.flatnonzero(times[inverse] > 1).astype(np.int64)


def gram_matrix(x: npt.NDArray[np.floating], product: Product = "float32") -> F32:
    """Product of the centred samples, float32 [N, N], symmetric. Centring keeps the digits that differences need.

    Args:
        x: float32 or float64 [N, D].
        product: `float32`; or `bfloat16`, the centred samples rounded to 8 bits and multiplied by torch, which
            is faster where the processor has such a product. The diagonal stays float32: it holds most of
            every distance.

    Raises:
        ValueError: another product.
    """
    _check_product(product)
    centred = (x - x.mean(axis=0, dtype=np.float64).astype(x.dtype)).astype(np.float32, copy=False)
    gram: F32
    if product == "float32":
        gram = centred @ centred.T
        return gram
    import torch  # heavy, and needed only here

    rounded = torch.from_numpy(centred).bfloat16()
    gram = np.empty((len(x), len(x)), np.float32)
    for start in range(0, len(x), _BLOCK):
        stop = start + _BLOCK
        part = (rounded[start:stop] @ rounded[:stop].T).float().numpy()
        gram[start:stop, :stop] = part
        gram[:start, start:stop] = part[:, :start].T
        square = part[:, start:]
        gram[start:stop, start:stop] = (square + square.T) / 2
    np.fill_diagonal(gram, np.einsum("nd,nd->n", centred, centred))
    return gram


def kmeans_plus_plus(
    gram: npt.NDArray[np.floating], mass: F64, k: int, rng: np.random.Generator, trials: int | None = None
) -> I64:
    """Greedy k-means++ on a Gram matrix: min(k, M) different indices, int64, in the order of choice.

    Each step draws `trials` candidates with probability proportional to mass times squared distance to the
    chosen ones, and keeps the one that lowers the distortion most.

    Args:
        gram: [M, M] of distinct samples.
        mass: float64 [M], positive.
        k: how many.
        rng: the generator; uses 1 + (k - 1) * trials uniforms.
        trials: default 2 + int(ln k), scikit-learn's.
    """
    diag = gram.diagonal().astype(np.float64)
    trials = 2 + int(np.log(k)) if trials is None else trials
    chosen = [_draw(mass, rng.random(1))[0]]
    closest = np.maximum(diag + diag[chosen[0]] - 2.0 * gram[chosen[0]], 0.0)
    closest[chosen[0]] = 0.0
    while len(chosen) < min(k, len(diag)):
        uniforms = rng.random(trials)
        pull = closest * mass
        if pull.sum() > 0.0:
            options = _draw(pull, uniforms)
        else:  # distinct rows whose distances round to 0: take the first left
            options = np.setdiff1d(np.arange(len(diag)), chosen)[:1]
        reach = np.maximum(diag + diag[options, None] - 2.0 * gram[options], 0.0)
        np.minimum(reach, closest, out=reach)
        reach[np.arange(len(options)), options] = 0.0
        best = int(np.argmin(reach @ mass))
        chosen.append(options[best])
        closest = reach[best]
    return np.array(chosen, np.int64)


def _draw(pull: F64, uniforms: F64) -> I64:
    """Indices drawn with probability proportional to `pull`; never one of pull 0."""
    cumulative = np.cumsum(pull)
    index = np.searchsorted(cumulative, uniforms * cumulative[-1], side="right")
    drawn: I64 = np.minimum(index, np.flatnonzero(pull)[-1]).astype(np.int64)
    return drawn


def partition_gram(
    gram: F32, mass: F64, k: int, rng: np.random.Generator, *, hartigan: bool = True, max_iter: int = 300
) -> tuple[I64, float]:
    """Cells of distinct samples from their Gram matrix: k-means++, then Hartigan's exchange or Lloyd.

    Returns:
        labels int64 [M] in 0..min(k, M)-1, none empty; and the sum over samples of mass * squared distance.
    """
    cells = min(k, len(gram))
    if cells == len(gram):
        return np.arange(cells, dtype=np.int64), 0.0
    diag = gram.diagonal().astype(np.float64)
    seeds = kmeans_plus_plus(gram, mass, cells, rng)
    labels = np.argmin(diag[seeds, None] - 2.0 * gram[seeds], axis=0).astype(np.int64)
    labels[seeds] = np.arange(cells)  # also for near-duplicates, so that no cell starts empty
    if hartigan:
        return exchange(gram, mass, labels, cells, max_iter=_ROUNDS * max_iter)
    labels = lloyd_gram(gram, mass, labels, cells, max_iter=max_iter)
    _, sizes, spread = cell_sums(gram, mass, labels, cells)
    return labels, max(float(diag @ mass) - float(spread @ sizes), 0.0)


def lloyd_gram(gram: F32, mass: F64, labels: I64, cells: int, *, max_iter: int = 300) -> I64:
    """Lloyd's iteration on cells until no point moves. No cell is empty before or after.

    A cell that loses all its points is seeded again with the point farthest from its own centroid, which
    never raises the distortion.
    """
    diag = gram.diagonal().astype(np.float64)
    points = np.arange(len(gram))
    labels = labels.copy()
    for _ in range(max_iter):
        sums, sizes, spread = cell_sums(gram, mass, labels, cells)
        sums *= (-2.0 / sizes)[:, None]
        sums += spread[:, None]
        sums += diag
        own = sums[labels, points]
        best = sums.argmin(axis=0)
        # A tie, or a difference at the level of rounding, is no reason to move: it could cycle.
        moves = sums[best, points] < own - GAIN * max(own.mean(), 0.0)
        if not moves.any():
            break
        labels = np.where(moves, best, labels).astype(np.int64)
        _reseed_empty(labels, sums[labels, points] * mass, cells)
    return labels


def _reseed_empty(labels: I64, pull: F64, cells: int) -> None:
    """Gives each empty cell, in place, the point of largest `pull` whose cell keeps another point."""
    points = np.bincount(labels, minlength=cells)
    for cell in np.flatnonzero(points == 0):
        point = int(np.argmax(np.where(points[labels] > 1, pull, -np.inf)))
        points[labels[point]] -= 1
        points[cell] = 1
        labels[point] = cell
        pull[point] = 0.0
