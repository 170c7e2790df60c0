"""k-means++, Lloyd and Hartigan's exchange for many classes at once, on their stacked Gram matrices, in torch.

Every function takes a stack `gram`, float32 [C, N, N], symmetric, and `mass`, float64 [C, N]: the copies of each
distinct sample, 0 for padding, whose rows and columns of `gram` are 0. Labels are int64 [C, N] in 0..K-1; those of
padding mean nothing. Each class has more than K points, and no cell is ever empty.

Shapes: C classes, A of them still moving, N points of the largest class, K centroids, T trials of k-means++.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ddoq_ray.core.gram_exchange import GAIN
from ddoq_ray.core.rng import philox

# Passes of the search for disjoint exchanges: the first finds most of them, and the next round starts anew.
_PICKS = 4


def seed_uniforms(seed: int, class_ids: Sequence[int], restart: int, k: int) -> Tensor:
    """The uniforms of `gram_kmeans` for each class: float64 [C, 1 + (K-1) T], T = 2 + int(ln K)."""
    draws = 1 + (k - 1) * _trials(k)
    rows = [torch.from_numpy(philox("gram_kmeans", seed, c, restart).random(draws)) for c in class_ids]
    return torch.stack(rows)


def _trials(k: int) -> int:
    return 2 + int(math.log(k))


def kmeans_plus_plus(gram: Tensor, mass: Tensor, k: int, uniforms: Tensor) -> Tensor:
    """Greedy k-means++: K different points of each class, int64 [C, K], in the order of choice.

    Args:
        gram, mass: see the module.
        k: K.
        uniforms: float64 [C, 1 + (K-1) T], on the same device: one for the first point, T for each later one.

    Source: Arthur & Vassilvitskii 2007; T candidates a step, of which the best is kept, as scikit-learn does.
    """
    classes = torch.arange(len(gram), device=gram.device)
    diag = gram.diagonal(dim1=1, dim2=2).double()
    left = mass > 0.0

    def squared_distances(options: Tensor) -> Tensor:
        """From the points [C, T] to all: [C, T, N]."""
        rows = gram[classes[:, None], options].double()
        rows.mul_(-2.0).add_(diag[:, None]).add_(diag.gather(1, options)[:, :, None]).clamp_(min=0.0)
        return rows.scatter_(2, options[:, :, None], 0.0)

    newest = _draw(mass, uniforms[:, :1])
    chosen = [newest]
    closest = squared_distances(newest)[:, 0]
    trials = _trials(k)
    for at in range(1, 1 + (k - 1) * trials, trials):
        left = left.scatter(1, newest, False)
        pull = closest * mass
        # Distinct points whose distances round to 0 cannot be drawn: then the first one left.
        options = torch.where(
            pull.sum(dim=1, keepdim=True) > 0.0, _draw(pull, uniforms[:, at : at + trials]), _first(left)
        )
        reach = torch.minimum(squared_distances(options), closest[:, None])
        best = (reach * mass[:, None]).sum(dim=2).argmin(dim=1)
        newest = options.gather(1, best[:, None])
        chosen.append(newest)
        closest = reach[classes, best]
    return torch.cat(chosen, dim=1)


def _first(mask: Tensor) -> Tensor:
    """The place of the first True of each row: [C, 1]."""
    return mask.to(torch.uint8).argmax(dim=1, keepdim=True)


def _draw(pull: Tensor, uniforms: Tensor) -> Tensor:
    """Points drawn with probability proportional to `pull` [C, N]: [C, T], none of pull 0 unless all are."""
    # A lone row would take torch's one-dimensional scan, whose float sums vary from run to run on a GPU.
    cumulative = torch.nn.functional.pad(pull, (0, 0, 0, 1)).cumsum(dim=1)[:-1]
    drawn = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)
    last = pull.shape[1] - 1 - _first(pull.flip(1) > 0.0)
    return torch.minimum(drawn, last)


def start(gram: Tensor, seeds: Tensor) -> Tensor:
    """Labels of the nearest seed; each seed has its own, also among near-copies, so that no cell is empty."""
    classes = torch.arange(len(gram), device=gram.device)[:, None]
    rows = gram[classes, seeds].double()
    rows.mul_(-2.0).add_(gram.diagonal(dim1=1, dim2=2).double().gather(1, seeds)[:, :, None])
    labels = rows.argmin(dim=1)
    return labels.scatter_(1, seeds, torch.arange(seeds.shape[1], device=gram.device).expand_as(seeds))


def lloyd(gram: Tensor, mass: Tensor, labels: Tensor, k: int, max_iter: int) -> Tensor:
    """Lloyd's iteration until no point of any class moves: int64 [C, N]. Classes at rest drop out.

    A pass is one product of memberships [A, K, N] with Gram matrices, in float32. A class whose points still move,
    though that no longer lowers its sum, goes on in float64, and stops when the same happens there. A cell that loses
    all its points takes the point farthest from its own centroid, which never raises the distortion.
    """
    labels = labels.clone()
    unsettled = _lloyd_passes(gram, mass, labels, k, max_iter)
    if len(unsettled):
        _lloyd_passes(gram, mass, labels, k, max_iter, unsettled)
    return labels


def _lloyd_passes(
    gram: Tensor, mass: Tensor, labels: Tensor, k: int, max_iter: int, some: Tensor | None = None
) -> Tensor:
    """Changes the labels of all classes in place, by float32; or of `some`, by float64. Returns the unsettled ones."""
    exact = some is not None
    alive = torch.arange(len(gram), device=gram.device) if some is None else some
    unsettled = torch.zeros(len(gram), dtype=torch.bool, device=gram.device)
    diag = gram.diagonal(dim1=1, dim2=2).double()[alive]
    part, points, now = gram, mass[alive], labels[alive]
    lowest = torch.full_like(points[:, 0], torch.inf)
    for _ in range(max_iter):
        if exact:
            sums = exact_sums(gram, points, now, k, alive.tolist())
        else:
            sums = torch.bmm(_memberships(now, points, k, torch.float32), part).double()
        dist = _distances(sums, *_moments(sums, now, points, k), diag)
        own = dist.gather(1, now[:, None])[:, 0]
        least, best = dist.min(dim=1)
        real = points > 0.0
        # A tie, or a difference at the level of rounding, is no reason to move.
        noise = GAIN * (own * real).sum(dim=1).div(real.sum(dim=1)).clamp_(min=0.0)
        moves = (least < own - noise[:, None]) & real
        moving = moves.any(dim=1)
        # Rounding can also make circles: of these sums, or of a Gram matrix whose points are nearer than its rounding.
        total = (own * points).sum(dim=1)
        falls = total < (lowest if exact else lowest * (1.0 - GAIN))
        unsettled[alive] |= moving & ~falls
        moving &= falls
        lowest = torch.minimum(lowest, total)
        count = int(moving.sum())
        if not count:
            break
        now = torch.where(moves & moving[:, None], best, now)
        _reseed_empty(now, torch.where(moves, least, own) * points, real, k)
        labels[alive] = now
        if 2 * count <= len(alive):  # seldom: gathering copies the matrices
            part = part if exact else part[moving]
            alive, points, diag, now, lowest = (t[moving] for t in (alive, points, diag, now, lowest))
    return unsettled.nonzero()[:, 0]


def _memberships(labels: Tensor, mass: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """[C, K, N], the mass of point j where its label is k, else 0."""
    member = torch.zeros((len(labels), k, labels.shape[1]), dtype=dtype, device=labels.device)
    return member.scatter_(1, labels[:, None], mass[:, None].to(dtype))


def _moments(sums: Tensor, labels: Tensor, mass: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Sizes [C, K], the mass of each cell, and spread [C, K], the mean of G over its pairs, from `exact_sums`."""
    member = _memberships(labels, mass, k, torch.float64)
    sizes = member.sum(dim=2)
    return sizes, member.mul_(sums).sum(dim=2) / sizes**2


def _distances(sums: Tensor, sizes: Tensor, spread: Tensor, diag: Tensor) -> Tensor:
    """Squared distances [C, K, N] of points to means."""
    return (sums * (-2.0 / sizes)[:, :, None]).add_(spread[:, :, None]).add_(diag[:, None])


def _reseed_empty(labels: Tensor, pull: Tensor, real: Tensor, k: int) -> None:
    """Gives each empty cell, in place, the point of largest `pull` whose cell keeps another point."""
    count = torch.zeros((len(labels), k), dtype=torch.int64, device=labels.device)
    count.scatter_add_(1, labels, real.long())
    while bool((count == 0).any()):
        has = (count == 0).any(dim=1, keepdim=True)
        cell = _first(count == 0)
        keeps = (count.gather(1, labels) > 1) & real
        point = torch.where(keeps, pull, -torch.inf).argmax(dim=1, keepdim=True)
        old = labels.gather(1, point)
        step = has.long()
        count.scatter_add_(1, old, -step)
        count.scatter_add_(1, cell, step)
        labels.scatter_(1, point, torch.where(has, cell, old))
        pull.scatter_(1, point, torch.where(has, 0.0, pull.gather(1, point)))


def exact_sums(gram: Tensor, mass: Tensor, labels: Tensor, k: int, places: Sequence[int] | None = None) -> Tensor:
    """Float64 [A, K, N]: sum_{i in k} mass_i G_ij for the matrices at `places`, or all, of which mass and labels are.

    One class at a time, since a float64 copy of all of `gram` is large.
    """
    sums = _memberships(labels, mass, k, torch.float64)
    for a, place in enumerate(range(len(gram)) if places is None else places):
        sums[a] = sums[a] @ gram[place].double()
    return sums


def distortion_sum(gram: Tensor, mass: Tensor, labels: Tensor, k: int) -> Tensor:
    """Float64 [C]: the sum over a class's samples of squared distances to their cell's mean."""
    sums = exact_sums(gram, mass, labels, k)
    dist = _distances(sums, *_moments(sums, labels, mass, k), gram.diagonal(dim1=1, dim2=2).double())
    return (dist.gather(1, labels[:, None])[:, 0].clamp_(min=0.0) * mass).sum(dim=1)


def exchange(gram: Tensor, mass: Tensor, labels: Tensor, k: int, max_rounds: int) -> tuple[Tensor, int]:
    """Hartigan's exchange: moves single points between cells while that lowers the distortion of their class.

    A point of mass w leaves a (size n_a) for b (size n_b) when n_b w/(n_b+w) d_b^2 < n_a w/(n_a-w) d_a^2: the exact
    change of the sum. A round takes, for each class, exchanges between disjoint pairs of cells, best first: none
    changes another's gain. Sums are kept in float64, so that rounding cannot make a cycle. A cell never empties.

    Returns:
        labels int64 [C, N], at an optimum of single exchanges unless max_rounds ended it; and the rounds made.

    Source: Telgarsky & Vattani, "Hartigan's method: k-means clustering without Voronoi", AISTATS 2010.
    """
    labels = labels.clone()
    alive = torch.arange(len(gram), device=gram.device)
    diag = gram.diagonal(dim1=1, dim2=2).double()
    points, now = mass, labels.clone()
    sums = exact_sums(gram, mass, labels, k)
    sizes, spread = _moments(sums, labels, mass, k)
    for made in range(max_rounds):
        cost = _distances(sums, sizes, spread, diag)
        own = cost.gather(1, now[:, None])[:, 0]
        threshold = GAIN * ((own * points).sum(dim=1) / points.sum(dim=1)).clamp_(min=0.0)
        # n w / (n + w) in one temporary; 0 in the padding
        cost.mul_(points[:, None]).mul_(sizes[:, :, None] / (sizes[:, :, None] + points[:, None]))
        cost.scatter_(1, now[:, None], torch.inf)
        entering, target = cost.min(dim=1)
        del cost
        gain = _leaving(own, sizes.gather(1, now), points) - entering
        taken = disjoint_exchanges(gain, now, target, (gain > threshold[:, None]) & (points > 0.0), k)
        c, j = taken.nonzero(as_tuple=True)
        if not len(c):
            return labels, made
        a, b, w = now[c, j], target[c, j], points[c, j]
        n_a, n_b, square = sizes[c, a], sizes[c, b], w * w * diag[c, j]
        spread[c, a] = (spread[c, a] * n_a**2 - 2.0 * w * sums[c, a, j] + square) / (n_a - w) ** 2
        spread[c, b] = (spread[c, b] * n_b**2 + 2.0 * w * sums[c, b, j] + square) / (n_b + w) ** 2
        rows = gram[alive[c], j].double().mul_(w[:, None])
        # Disjoint cells: every (c, a) and (c, b) appears once, so these are plain writes.
        sums[c, a] -= rows
        sums[c, b] += rows
        sizes[c, a], sizes[c, b] = n_a - w, n_b + w
        now[c, j] = b
        labels[alive[c], j] = b
        moving = taken.any(dim=1)
        if 2 * int(moving.sum()) <= len(alive):
            alive, diag, points, now, sums, sizes, spread = (
                t[moving] for t in (alive, diag, points, now, sums, sizes, spread)
            )
    return labels, max_rounds


def _leaving(own: Tensor, size: Tensor, mass: Tensor) -> Tensor:
    """What the sum loses when each point leaves its cell; 0 for the only point of a cell: it stays."""
    rest = size - mass
    alone = rest <= 0.0
    return torch.where(alone, 0.0, own * size * mass / torch.where(alone, 1.0, rest))


def disjoint_exchanges(gain: Tensor, source: Tensor, target: Tensor, useful: Tensor, k: int) -> Tensor:
    """Exchanges of each class that share no cell: those best for both their cells, then so among the rest.

    Args:
        gain: float64 [A, N].
        source, target: int64 [A, N], the cell that each point would leave and enter.
        useful: bool [A, N], the exchanges to choose from. With any, at least the best one is taken.
        k: K.

    Returns:
        bool [A, N].
    """
    order = torch.where(useful, gain, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1], device=gain.device).expand_as(order))
    none = gain.shape[1]

    def best_of_cells(among: Tensor) -> Tensor:
        """Lowest rank that touches each cell: [A, K]. A minimum of integers does not depend on the order."""
        ranked = torch.where(among, rank, none)
        best = torch.full((len(gain), k), none, dtype=torch.int64, device=gain.device)
        return best.scatter_reduce_(1, source, ranked, "amin").scatter_reduce_(1, target, ranked, "amin")

    taken, free = torch.zeros_like(useful), useful
    for _ in range(_PICKS):
        best = best_of_cells(free)
        taken = taken | (free & (rank == best.gather(1, source)) & (rank == best.gather(1, target)))
        used = best_of_cells(taken) < none
        free = free & ~used.gather(1, source) & ~used.gather(1, target)
    return taken
