"""Exact k-means of one class in Gram space: for few samples of high dimension (n well below D).

With G = X X^T of the centred samples, k-means++, Lloyd and Hartigan's exchange need no D any more. A
centroid is a set of indices c, and ||x_j - mean(c)||^2 = G_jj - 2 mean_{i in c} G_ij + mean_{i,l in c} G_il.
One pass costs O(n^2), whatever D and K; many K and restarts can share one G.

Shapes: N samples, M distinct samples, K centroids, D flattened latent dimension.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from ddoq_ray.core.distortion import F32, F64, I64, check_samples
from ddoq_ray.core.rng import philox

MAX_GRAM_BYTES = 2 << 30  # 23,170 distinct samples
# A move must lower the sum by this part of the mean distortion: below it, a float32 Gram matrix is noise.
_GAIN = 1e-6


def gram_kmeans(
    x: npt.ArrayLike,
    k: int,
    *,
    seed: int,
    class_id: int,
    hartigan: bool = True,
    restarts: int = 1,
    max_iter: int = 300,
    max_gram_bytes: int = MAX_GRAM_BYTES,
) -> tuple[F32, I64]:
    """Quantizes the samples of one class to K centroids with counts.

    Greedy k-means++ (2 + int(ln K) trials), Lloyd to convergence, then Hartigan's exchange of single points
    until no exchange helps. Every centroid is the mean of its cell, formed from the full samples at the end.
    Deterministic for one version of numpy and one BLAS thread count.

    Args:
        x: float [N, D], N >= 1.
        k: number of centroids wanted. With fewer than k distinct samples, each distinct sample becomes a
            centroid: K = min(k, distinct samples). Copies of a sample always share a cell.
        seed: the run's seed.
        class_id: keys the generator together with the seed.
        hartigan: False stops after Lloyd.
        restarts: independent runs on the one Gram matrix; the lowest distortion is kept.
        max_iter: bound of the Lloyd passes, and of the Hartigan sweeps.
        max_gram_bytes: largest Gram matrix allowed, in bytes.

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
    labels = gram_labels(
        x, k, seed=seed, class_id=class_id, hartigan=hartigan, restarts=restarts, max_iter=max_iter,
        max_gram_bytes=max_gram_bytes,
    )  # fmt: skip
    return cell_means(x, labels)


def gram_labels(
    x: npt.ArrayLike,
    k: int,
    *,
    seed: int,
    class_id: int,
    hartigan: bool = True,
    restarts: int = 1,
    max_iter: int = 300,
    max_gram_bytes: int = MAX_GRAM_BYTES,
) -> I64:
    """The cells of `gram_kmeans`: int64 [N] in 0..K-1, each used. Arguments and errors as there.

    With pooled latents for `x` and the full ones for `cell_means`, distances are measured on the pooled ones.
    """
    x = check_samples(x)
    if not len(x):
        raise ValueError("x is empty: a class without samples has no centroids")
    if k < 1 or restarts < 1 or max_iter < 1:
        raise ValueError(f"k, restarts and max_iter must be >= 1, got {k}, {restarts} and {max_iter}")
    first, inverse, copies = distinct_rows(x)
    needed = 4 * len(first) ** 2
    if needed > max_gram_bytes:
        raise ValueError(
            f"the Gram matrix of n={len(first)} distinct samples needs 4 n^2 = {needed} bytes, above "
            f"max_gram_bytes={max_gram_bytes}: use a streaming or faiss quantizer for this class, or raise it"
        )
    gram = gram_matrix(x if len(first) == len(x) else x[first])
    mass = copies.astype(np.float64)
    best: I64 | None = None
    best_sum = np.inf
    for restart in range(restarts):
        rng = philox("gram_kmeans", seed, class_id, restart)
        labels, total = partition_gram(gram, mass, k, rng, hartigan=hartigan, max_iter=max_iter)
        if total < best_sum:
            best, best_sum = labels, total
    assert best is not None
    return best[inverse]


def cell_means(x: npt.ArrayLike, labels: I64) -> tuple[F32, I64]:
    """Means (float32 [K, D], summed in float64) and counts (int64 [K]) of the cells 0..K-1, none empty."""
    x = check_samples(x)
    counts = np.bincount(labels).astype(np.int64)
    assert len(labels) == len(x) and (counts > 0).all()
    centroids = np.empty((len(counts), x.shape[1]), np.float32)
    for cell, members in enumerate(_members(labels, len(counts))):
        centroids[cell] = x[members].mean(axis=0, dtype=np.float64)
    return centroids, counts


def distinct_rows(x: npt.NDArray[np.floating]) -> tuple[I64, I64, I64]:
    """Finds equal rows (as values: -0.0 equals 0.0).

    Returns:
        first int64 [M], the first index of each distinct row, in order; inverse int64 [N] with
        x == x[first[inverse]]; copies int64 [M].
    """
    seen: dict[bytes, int] = {}
    first: list[int] = []
    inverse = np.empty(len(x), np.int64)
    for index, row in enumerate(x):
        key = hashlib.blake2b((row + 0.0).tobytes(), digest_size=16).digest()
        cell = seen.setdefault(key, len(first))
        if cell == len(first):
            first.append(index)
        inverse[index] = cell
    copies = np.bincount(inverse, minlength=len(first)).astype(np.int64)
    return np.array(first, np.int64), inverse, copies


def gram_matrix(x: npt.NDArray[np.floating]) -> F32:
    """Float32 [N, N] product of the centred samples. Centring keeps the digits that differences need."""
    centred = (x - x.mean(axis=0, dtype=np.float64)).astype(np.float32)
    gram: F32 = centred @ centred.T
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
    """Cells of distinct samples from their Gram matrix: k-means++, Lloyd, then (if asked) Hartigan.

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
    labels = lloyd_gram(gram, mass, labels, cells, max_iter=max_iter)
    if hartigan:
        labels = hartigan_gram(gram, mass, labels, cells, max_iter=max_iter)
    sums, sizes, spread = _cell_sums(gram, mass, labels, cells)
    own = diag - 2.0 * sums[labels, np.arange(len(diag))] / sizes[labels] + spread[labels]
    return labels, float(np.maximum(own, 0.0) @ mass)


def _members(labels: I64, cells: int) -> list[I64]:
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.cumsum(np.bincount(labels, minlength=cells))[:-1])


def _cell_sums(gram: F32, mass: F64, labels: I64, cells: int) -> tuple[F64, F64, F64]:
    """sums[k, j] = sum_{i in k} mass_i G_ij; sizes[k] = mass of cell k; spread[k] = mean of G in k x k."""
    sums = np.empty((cells, len(gram)), np.float64)
    for cell, members in enumerate(_members(labels, cells)):
        weights = mass[members]
        if (weights == 1.0).all():
            gram[members].sum(axis=0, dtype=np.float64, out=sums[cell])
        else:
            np.matmul(weights, gram[members].astype(np.float64), out=sums[cell])
    sizes: F64 = np.bincount(labels, weights=mass, minlength=cells).astype(np.float64)
    within = np.bincount(labels, weights=mass * sums[labels, np.arange(len(gram))], minlength=cells)
    return sums, sizes, within / sizes**2


def lloyd_gram(gram: F32, mass: F64, labels: I64, cells: int, *, max_iter: int = 300) -> I64:
    """Lloyd's iteration on cells until no point moves. No cell is empty before or after.

    A cell that loses all its points is seeded again with the point farthest from its own centroid, which
    never raises the distortion.
    """
    diag = gram.diagonal().astype(np.float64)
    points = np.arange(len(gram))
    labels = labels.copy()
    for _ in range(max_iter):
        sums, sizes, spread = _cell_sums(gram, mass, labels, cells)
        sums *= (-2.0 / sizes)[:, None]
        sums += spread[:, None]
        sums += diag
        own = sums[labels, points]
        best = sums.argmin(axis=0)
        # A tie, or a difference at the level of rounding, is no reason to move: it could cycle.
        moves = sums[best, points] < own - _GAIN * max(own.mean(), 0.0)
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


def hartigan_gram(gram: F32, mass: F64, labels: I64, cells: int, *, max_iter: int = 300) -> I64:
    """Moves single points between cells while that lowers the distortion, counting how both means move.

    A point of mass w leaves a (size n_a) for b (size n_b) when n_b w/(n_b+w) d_b^2 < n_a w/(n_a-w) d_a^2:
    the exact change of the sum. Each sweep finds the points that could gain with whole-matrix operations,
    then visits only those, best first, each with its gain computed anew. A cell never empties.
    """
    diag = gram.diagonal().astype(np.float64)
    points = np.arange(len(gram))
    labels = labels.copy()
    for _ in range(max_iter):
        sums, sizes, spread = _cell_sums(gram, mass, labels, cells)  # anew each sweep: rounding cannot pile up
        dist = diag + spread[:, None] - 2.0 * sums / sizes[:, None]
        own = dist[labels, points]
        threshold = _GAIN * max(float(own @ mass) / mass.sum(), 0.0)
        dist *= sizes[:, None] * mass / (sizes[:, None] + mass)
        dist[labels, points] = np.inf
        gain = _leaving(own, sizes[labels], mass) - dist.min(axis=0)
        visit = np.flatnonzero(gain > threshold)
        moved = False
        for j in visit[np.argsort(-gain[visit], kind="stable")]:
            a, w = labels[j], mass[j]
            to_all = diag[j] + spread - 2.0 * sums[:, j] / sizes
            cost = to_all * (sizes * w / (sizes + w))
            cost[a] = np.inf
            b = int(np.argmin(cost))
            n_a, n_b = sizes[a], sizes[b]
            if n_a <= w or to_all[a] * (n_a * w / (n_a - w)) - cost[b] <= threshold:
                continue
            row = gram[j] if w == 1.0 else w * gram[j]
            spread[a] = (spread[a] * n_a**2 - 2.0 * w * sums[a, j] + w * w * diag[j]) / (n_a - w) ** 2
            spread[b] = (spread[b] * n_b**2 + 2.0 * w * sums[b, j] + w * w * diag[j]) / (n_b + w) ** 2
            sums[a] -= row
            sums[b] += row
            sizes[a], sizes[b] = n_a - w, n_b + w
            labels[j] = b
            moved = True
        if not moved:
            break
    return labels


def _leaving(own: F64, size: F64, mass: F64) -> F64:
    """What the sum loses when each point leaves its cell; 0 for the only point of a cell: it stays."""
    rest = size - mass
    alone = rest <= 0.0
    return np.where(alone, 0.0, own * size * mass / np.where(alone, 1.0, rest))
