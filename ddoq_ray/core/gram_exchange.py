"""Hartigan's exchange of single points on a Gram matrix, many exchanges at a time.

Shapes: M distinct samples, K cells, T cells that one round touches.
"""

from __future__ import annotations

import numpy as np

from ddoq_ray.core.distortion import F32, F64, I64

# A move must lower the sum by this part of the mean distortion: below it, a float32 Gram matrix is noise.
GAIN = 1e-6
_SHARE = 4  # in one round a cell of n points has at most n // 4 moves, and at least one
_CONSIDERED = 10  # one round considers the best moves, for one sample in this many
_BLOCK_ELEMENTS = 1 << 22  # of the Gram matrix that are copied at one time to be summed


def members(labels: I64, cells: int) -> list[I64]:
    """The points of each cell, ascending."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.cumsum(np.bincount(labels, minlength=cells))[:-1])


def cell_sums(gram: F32, mass: F64, labels: I64, cells: int) -> tuple[F64, F64, F64]:
    """sums[k, j] = sum_{i in k} mass_i G_ij; sizes[k] = mass of cell k; spread[k] = mean of G in k x k."""
    sums = np.empty((cells, len(gram)), np.float64)
    for cell, points in enumerate(members(labels, cells)):
        weights = mass[points]
        step = max(1, _BLOCK_ELEMENTS // max(1, len(points)))  # a cell may be the class: not its rows all at once
        for first in range(0, len(gram), step):
            part = slice(first, first + step)
            if (weights == 1.0).all():
                gram[points, part].sum(axis=0, dtype=np.float64, out=sums[cell, part])
            else:
                np.matmul(weights, gram[points, part].astype(np.float64), out=sums[cell, part])
    sizes: F64 = np.bincount(labels, weights=mass, minlength=cells).astype(np.float64)
    within = np.bincount(labels, weights=mass * sums[labels, np.arange(len(gram))], minlength=cells)
    return sums, sizes, within / sizes**2


def exchange(gram: F32, mass: F64, labels: I64, cells: int, *, max_iter: int = 300) -> tuple[I64, float]:
    """Moves single points between cells while that lowers the distortion, counting how both means move.

    A point of mass w leaves a (size n_a) for b (size n_b) when n_b w/(n_b+w) d_b^2 < n_a w/(n_a-w) d_a^2:
    the exact change of the sum. A round finds every point's best move with whole-matrix operations and makes
    the best ones together. Moves that share no cell add up exactly. Where cells are large, a few moves may
    share one: they disturb each other little. Should they not lower the sum, the round is taken back and fewer
    may share one in the next. So no round raises the sum. A cell never empties.

    Args:
        gram: float32 [M, M].
        mass: float64 [M], positive.
        labels: int64 [M] in 0..cells-1, each used.
        cells: K.
        max_iter: bound of the rounds.

    Returns:
        labels int64 [M], such that no single move lowers the sum (unless `max_iter` came first); and the sum
        over samples of mass * squared distance.

    Source: Telgarsky & Vattani, "Hartigan's method: k-means clustering without Voronoi", AISTATS 2010.

    Differences from the source: it moves one point at a time.
    """
    state = _Cells(gram, mass, labels, cells)
    share = _SHARE
    for _ in range(max_iter):
        limit = np.maximum(state.sizes // share, 1.0)
        points, targets = state.proposals(limit)
        if not len(points):
            break
        if state.move(points, targets):
            share = max(share // 2, _SHARE)
        elif limit.max() > 1.0:
            share *= 4
        else:
            break  # what is left to gain is below rounding
    return state.labels, max(state.total - state.kept, 0.0)


class _Cells:
    """The cells and, kept up to date with them, all that a move's gain depends on."""

    def __init__(self, gram: F32, mass: F64, labels: I64, cells: int) -> None:
        self.gram, self.mass, self.labels = gram, mass, labels.copy()
        self.diag = gram.diagonal().astype(np.float64)
        # A scalar for the usual case, samples without copies: then factors are [T, 1] and not [T, M].
        self.weight = 1.0 if (mass == 1.0).all() else mass
        self.sums, self.sizes, self.spread = cell_sums(gram, mass, labels, cells)
        self.inner = self.sums[labels, np.arange(len(gram))]  # sum over the point's own cell
        # The sum of squared distances is total - kept.
        self.total, self.kept = float(self.diag @ mass), float(self.spread @ self.sizes)
        self.threshold = GAIN * max(self.total - self.kept, 0.0) / float(mass.sum())
        # What it costs to put a point into a cell. Float32 serves to find the best moves: their gains are
        # computed anew. Infinite for the point's own cell.
        self.entering = np.empty((cells, len(gram)), np.float32)
        self._refresh(np.arange(cells), self.sums, np.arange(len(gram)))

    def _refresh(self, rows: I64, sums: F64, points: I64) -> None:
        """Entering costs of the cells `rows`, whose sums are `sums` and whose points are `points`."""
        size = self.sizes[rows, None]
        cost = sums * (-2.0 / size)
        cost += self.spread[rows, None]
        cost += self.diag
        cost *= size * self.weight / (size + self.weight)
        self.entering[rows] = cost
        self.entering[self.labels[points], points] = np.inf

    def proposals(self, limit: F64) -> tuple[I64, I64]:
        """Points to move together and their new cells, best first; none where no move gains.

        At most `limit` [K] of the moves leave or enter a cell.
        """
        size = self.sizes[self.labels]
        rest = size - self.weight
        rest[rest <= 0.0] = np.inf  # the only point of a cell stays
        leaving = self.diag + self.spread[self.labels]
        leaving -= 2.0 * self.inner / size
        leaving *= size * self.weight / rest
        gain = leaving - self.entering.min(axis=0)
        points = np.flatnonzero(gain > self.threshold)
        most = -(-len(gain) // _CONSIDERED)
        if len(points) > most:
            points = np.sort(points[np.argpartition(-gain[points], most)[:most]])
        targets = self.entering[:, points].argmin(axis=0)
        size, weight = self.sizes[targets], self.mass[points]
        cost = self.diag[points] + self.spread[targets] - 2.0 * self.sums[targets, points] / size
        gain = leaving[points] - cost * (size * weight / (size + weight))
        order = np.argsort(-gain, kind="stable")
        order = order[gain[order] > self.threshold]
        points, targets = points[order], targets[order]
        touched = np.concatenate([self.labels[points], targets])
        chosen = _turns(touched, np.tile(np.arange(len(points)), 2)) < limit[touched]
        chosen = chosen[: len(points)] & chosen[len(points) :]
        return points[chosen], targets[chosen]

    def move(self, points: I64, targets: I64) -> bool:
        """Makes the moves if together they lower the sum; otherwise changes nothing."""
        rows, slots = np.unique(np.concatenate([self.labels[points], targets]), return_inverse=True)
        change = np.zeros((len(rows), len(points)), np.float32)
        moves, weight = np.arange(len(points)), self.mass[points]
        change[slots[: len(points)], moves] = -weight
        change[slots[len(points) :], moves] = weight
        sums = self.sums[rows]
        sums += change @ self.gram[points]
        labels, sizes, inner, spread = self.labels.copy(), self.sizes.copy(), self.inner.copy(), self.spread.copy()
        labels[points] = targets
        sizes[rows] += change.sum(axis=1, dtype=np.float64)
        slot = np.full(len(sizes), -1)
        slot[rows] = np.arange(len(rows))
        own = np.flatnonzero(slot[labels] >= 0)
        slots = slot[labels[own]]
        inner[own] = sums[slots, own]
        within = np.bincount(slots, weights=self.mass[own] * inner[own], minlength=len(rows))
        spread[rows] = within / sizes[rows] ** 2
        kept = float(spread @ sizes)
        if not kept > self.kept:
            return False
        self.labels, self.sizes, self.inner, self.spread, self.kept = labels, sizes, inner, spread, kept
        self.sums[rows] = sums
        self._refresh(rows, sums, own)
        return True


def _turns(cells: I64, rank: I64) -> I64:
    """How many entries of lower rank name the same cell, for each entry."""
    order = np.lexsort((rank, cells))
    ordered = cells[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    turns = np.empty(len(cells), np.int64)
    turns[order] = np.arange(len(cells)) - np.repeat(starts, np.diff(np.append(starts, len(cells))))
    return turns
