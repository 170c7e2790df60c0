"""Competitive learning vector quantization of one class: one pass, constant memory.

Shapes: N samples, K centroids, D flattened latent dimension, B samples of a mini-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt

from ddoq_ray.core.distortion import F32, F64, I64, check_samples, nearest, screening_tolerance
from ddoq_ray.core.gram_kmeans import distinct_rows, kmeans_plus_plus
from ddoq_ray.core.rng import philox

Winner = Literal["corrected", "paper"]
WINNERS: tuple[Winner, ...] = ("corrected", "paper")
_STATE_VERSION = 1
_SCALARS = ("version", "k", "dim", "winner", "batch", "buffer", "seed", "class_id", "n_seen")
_GRAM_COLUMNS = 1024
_BLOCK = 64  # samples whose products with the centroids are made together


class Clvq:
    """Streaming quantizer of one class.

    The first `buffer` samples are collected; greedy k-means++ picks K of them as centroids (each its own
    first count), and the others are consumed in order. From then on each sample moves its winner:

        paper:      winner = argmin_k ||x - c_k||
        corrected:  winner = argmin_k v_k/(v_k+1) ||x - c_k||^2      (what inserting x adds to the distortion)
        then v += 1 and c += (x - c)/v, so that a centroid is the running mean of the samples it won.

    The state is the same bytes however the stream is cut into `update` calls, whether or not it went through
    `state`, and (decisions that float32 could turn are settled in float64) under any BLAS and thread count.
    Nothing is dropped: the counts sum to `n_seen`.

    Exact copies: as long as fewer than K different samples have been seen, each new one becomes a centroid,
    so that K' = min(K, different samples seen).

    Memory, independent of N: 4 D buffer bytes while buffering (twice that for the moment of choosing), then
    4 D (K + B). Cost of a sample: its products with the K centroids and with 64 other samples.

    Source: arXiv 2501.07681, Algorithm 1 (CLVQ) and Algorithm 3 lines 3-11 (the same with step 1/v).

    Differences from the paper:
        * `corrected` is ours. In high dimension the paper's rule starves: a centroid that has averaged m
          samples is at about s^2 (1 + 1/m) from a fresh sample and an unmoved one at 2 s^2, so the first
          winners take everything. The factor v/(v+1) cancels exactly that.
        * Initial centroids are k-means++ picks that count as consumed samples; Algorithm 3 leaves the choice
          open and starts its counts at 1 for points that need not be samples.
        * Algorithm 1 line 7 keeps weights by a recursion whose step is left open. With the global step 1/t
          (t = samples so far) they are the counts over their sum; with the winner's own step 1/v they are far
          from the Voronoi masses (`tests/support/companion.py` is that recursion). So counts are kept, and weights are
          counts/sum.
        * `batch` > 1 freezes centroids and counts for the winners of one mini-batch, then applies its steps
          in order (for `paper` this is Sculley's mini-batch k-means). Borders depend only on the sample's
          index.
    """

    # Seven parameters: what the algorithm is told, each by itself; nothing else takes them together.
    def __init__(
        self,
        k: int,
        dim: int,
        *,
        winner: Winner = "corrected",
        batch: int = 1,
        buffer: int | None = None,
        seed: int,
        class_id: int,
    ) -> None:
        """Starts an empty quantizer.

        Args:
            k: number of centroids wanted.
            dim: D.
            winner: `corrected` or `paper`.
            batch: B; 1 is the algorithm as written.
            buffer: samples collected before centroids are chosen, at least k; None takes `default_buffer(k)`.
            seed: the run's seed.
            class_id: keys the generator together with the seed.

        Raises:
            ValueError: an argument out of its range.
        """
        buffer = self.default_buffer(k) if buffer is None else buffer
        if k < 1 or dim < 1 or batch < 1:
            raise ValueError(f"k, dim and batch must be >= 1, got {k}, {dim} and {batch}")
        if winner not in WINNERS:
            raise ValueError(f"winner must be one of {WINNERS}, got {winner!r}")
        if buffer < k:
            raise ValueError(f"buffer must be at least k={k} (k-means++ picks k of the buffered), got {buffer}")
        if not all(-(2**63) <= value < 2**63 for value in (seed, class_id)):
            raise ValueError(f"seed and class_id must fit 64 bits (they are stored), got {seed} and {class_id}")
        self.k, self.dim, self.winner, self.batch, self.buffer = k, dim, winner, batch, buffer
        self.seed, self.class_id = seed, class_id
        self._n_seen = 0
        self._waiting = 0  # rows in use in _held
        self._held = np.empty((0, dim), np.float32)  # the buffer at first, then the open mini-batch
        self._num = 0  # centroids in use; 0 while buffering
        self._tolerance = screening_tolerance(dim)

    @staticmethod
    def default_buffer(k: int) -> int:
        """Samples buffered when nothing is said: max(4 k, 64)."""
        return max(4 * k, 64)

    @property
    def n_seen(self) -> int:
        """Samples consumed so far, the buffered ones included."""
        return self._n_seen

    def update(self, x: npt.ArrayLike) -> None:
        """Consumes samples in order.

        Args:
            x: float [N, D], any N; computed in float32.

        Raises:
            ValueError: wrong shape, type or D, or not finite; the state is then unchanged.
        """
        rows = check_samples(x)
        if rows.dtype == np.float64:
            with np.errstate(over="ignore"):
                rows = check_samples(rows.astype(np.float32), "x in float32")
        if rows.shape[1] != self.dim:
            raise ValueError(f"samples have D={rows.shape[1]}, this quantizer was made for dim={self.dim}")
        self._n_seen += len(rows)
        if self._num == 0:
            rows = self._fill(rows, self.buffer)
            if self._waiting < self.buffer:
                return
            self._begin()
        self._consume(rows)

    def result(self) -> tuple[F32, I64]:
        """Centroids float32 [K', D] and counts int64 [K']; counts are >= 1 and sum to `n_seen`.

        May be called at any time and changes nothing: waiting samples are consumed on a copy.
        """
        if self._waiting == 0:
            return self._live(self._num)
        copy = self.from_state(self.state())
        if copy._num == 0:
            copy._begin()
        if copy._waiting:
            copy._step_batch(copy._held[: copy._waiting])
        return copy._live(copy._num)

    def _live(self, num: int) -> tuple[F32, I64]:
        if num == 0:
            return np.empty((0, self.dim), np.float32), np.empty(0, np.int64)
        return self._centroids[:num].copy(), self._counts[:num].copy()

    def state(self) -> dict[str, npt.NDArray[np.generic]]:
        """Everything needed to go on, as arrays: scalars (int64, 0-d), centroids, counts, waiting samples."""
        values = (
            _STATE_VERSION, self.k, self.dim, WINNERS.index(self.winner), self.batch, self.buffer, self.seed,
            self.class_id, self._n_seen,
        )  # fmt: skip
        centroids, counts = self._live(self._num)
        arrays: dict[str, npt.NDArray[np.generic]] = {
            name: np.array(value, np.int64) for name, value in zip(_SCALARS, values, strict=True)
        }
        return arrays | {
            "centroids": centroids, "counts": counts, "waiting": self._held[: self._waiting].copy()
        }  # fmt: skip

    @classmethod
    def from_state(cls, state: Mapping[str, npt.NDArray[np.generic]]) -> Clvq:
        """The quantizer that `state` was taken from; goes on with the same bytes.

        Raises:
            ValueError: missing entries, another version, or entries that contradict each other.
        """
        missing = sorted({*_SCALARS, "centroids", "counts", "waiting"} - set(state))
        if missing:
            raise ValueError(f"this is no quantizer state: entries {missing} are missing")
        version, k, dim, winner, batch, buffer, seed, class_id, n_seen = (int(state[name]) for name in _SCALARS)
        if version != _STATE_VERSION or winner not in range(len(WINNERS)):
            raise ValueError(f"the state has version {version}, this code reads version {_STATE_VERSION}")
        self = cls(k, dim, winner=WINNERS[winner], batch=batch, buffer=buffer, seed=seed, class_id=class_id)
        centroids = np.asarray(state["centroids"], np.float32)
        counts = np.asarray(state["counts"], np.int64)
        waiting = np.asarray(state["waiting"], np.float32)
        num = len(centroids)
        shapes = centroids.shape == (num, dim) and counts.shape == (num,) and waiting.shape[1:] == (dim,)
        if not shapes or num > k or counts.sum() + len(waiting) != n_seen:
            raise ValueError(
                f"state contradicts itself: k={k}, dim={dim}, n_seen={n_seen}; centroids {centroids.shape}, "
                f"counts {counts.shape} with sum {counts.sum()}, waiting {waiting.shape}"
            )
        self._n_seen = n_seen
        if num:
            self._install(centroids, counts)
        self._fill(waiting, buffer if num == 0 else batch)
        return self

    # ------------------------------------------------------------------ inside

    def _fill(self, rows: F32, capacity: int) -> F32:
        """Moves rows to `_held` until it has `capacity`; returns the rows left."""
        take = min(capacity - self._waiting, len(rows))
        if take and self._waiting + take > len(self._held):
            # Grows by doubling: most classes of a long-tailed set never fill the buffer.
            grown = np.empty((min(capacity, max(2 * len(self._held), self._waiting + take)), self.dim), np.float32)
            grown[: self._waiting] = self._held[: self._waiting]
            self._held = grown
        self._held[self._waiting : self._waiting + take] = rows[:take]
        self._waiting += take
        return rows[take:]

    def _begin(self) -> None:
        """Ends the buffering: chooses centroids, consumes the other buffered samples, frees the buffer."""
        held = self._held[: self._waiting]
        self._held, self._waiting = np.empty((0, self.dim), np.float32), 0
        self._consume(self._start(held))

    def _start(self, rows: F32) -> F32:
        """Chooses the initial centroids among `rows`; returns the others, in order."""
        first, _, copies = distinct_rows(rows)
        if len(first) <= self.k:
            chosen = first
        else:
            rng = philox("clvq", self.seed, self.class_id)
            chosen = first[kmeans_plus_plus(_gram64(rows[first]), copies.astype(np.float64), self.k, rng)]
        self._install(rows[chosen], np.ones(len(chosen), np.int64))
        return np.delete(rows, chosen, axis=0)

    def _install(self, centroids: F32, counts: I64) -> None:
        self._num = len(centroids)
        self._centroids = np.zeros((self.k, self.dim), np.float32)
        self._centroids[: self._num] = centroids
        self._counts = np.zeros(self.k, np.int64)
        self._counts[: self._num] = counts
        self._sq = np.zeros(self.k, np.float64)  # ||c||^2, kept so that a sample costs one product
        for index in range(self._num):
            self._sq[index] = self._square(index)
        self._factor: F64 = np.ones(self.k, np.float64)
        if self.winner == "corrected":
            self._factor[:] = self._counts / (self._counts + 1.0)

    def _square(self, index: int) -> float:
        row = self._centroids[index]
        with np.errstate(over="ignore", invalid="ignore"):
            return float(np.dot(row, row))

    def _consume(self, rows: F32) -> None:
        start = 0
        while start < len(rows) and self._num < self.k:
            self._grow(rows[start])
            start += 1
        rows = rows[start:]
        if self.batch == 1:
            for first in range(0, len(rows), _BLOCK):
                with np.errstate(over="ignore", invalid="ignore"):
                    self._steps(rows[first : first + _BLOCK])
            return
        while len(rows):
            rows = self._fill(rows, self.batch)
            if self._waiting == self.batch:
                self._step_batch(self._held)
                self._waiting = 0

    def _grow(self, row: F32) -> None:
        """Until there are k centroids, they are the distinct samples: a copy counts, a new one is added."""
        same = np.flatnonzero((self._centroids[: self._num] == row).all(axis=1))
        index = int(same[0]) if len(same) else self._num
        self._centroids[index] = row
        self._num = max(self._num, index + 1)
        self._count(index, 1)
        self._sq[index] = self._square(index)

    def _count(self, index: int, samples: int) -> float:
        self._counts[index] += samples
        count = float(self._counts[index])
        if self.winner == "corrected":
            self._factor[index] = count / (count + 1.0)
        return count

    def _steps(self, rows: F32) -> None:
        """Some samples, one after another: the winner by a screened distance, then step 1/v after v += 1.

        One product gives the distances to the centroids as they are at first. When one of them moves to
        c + s (x_i - c), its product with a later x becomes (1 - s) <c, x> + s <x_i, x>: no product is made anew.
        Centroids are moved as written, so where a block ends changes no byte.
        """
        among = (rows @ rows.T).astype(np.float64)
        own = among.diagonal().copy()
        among *= -2.0
        among += own
        far = (rows @ self._centroids.T).astype(np.float64)  # ||x||^2 - 2 <c, x> + ||c||^2, kept up to date
        far *= -2.0
        far += own[:, None] + self._sq
        # No centroid leaves the ball that holds the first ones and the samples. Each move rounds it anew.
        radius = max(float(own.max()), float(self._sq.max()))
        slack = (self._tolerance + 2.0**-22 * np.arange(len(rows))) * (own + radius)
        for at, row in enumerate(rows):
            score = far[at] * self._factor
            index = int(score.argmin())
            # Written as "not greater", so that an overflow makes candidates instead of losing them.
            beyond = score > score[index] + 2.0 * slack[at]
            if np.count_nonzero(beyond) != len(score) - 1:
                candidates = np.flatnonzero(~beyond)
                diff = self._centroids[candidates].astype(np.float64)
                diff -= row
                diff *= diff
                index = int(candidates[np.argmin(diff.sum(axis=1) * self._factor[candidates])])
            step = np.float32(1.0 / self._count(index, 1))
            centroid = self._centroids[index]
            centroid += (row - centroid) * step
            before, after = self._sq[index], float(np.dot(centroid, centroid))
            self._sq[index] = after
            later, share = far[at + 1 :, index], float(step)
            later *= 1.0 - share
            later += share * among[at, at + 1 :] + (after - (1.0 - share) * before)

    def _step_batch(self, rows: F32) -> None:
        """One mini-batch: frozen winners; then m steps 1/v are one move to the mean of all."""
        labels = nearest(rows, self._centroids, self._factor)
        for index in np.unique(labels):
            won = rows[labels == index]
            count = self._count(int(index), len(won))
            centroid = self._centroids[index].astype(np.float64)
            centroid += (won.sum(axis=0, dtype=np.float64) - len(won) * centroid) / count
            self._centroids[index] = centroid
            self._sq[index] = self._square(int(index))


def _gram64(x: F32) -> F64:
    """Centred Gram matrix in float64, a block of columns at a time: no float64 copy of the buffer is made."""
    gram = np.zeros((len(x), len(x)), np.float64)
    for start in range(0, x.shape[1], _GRAM_COLUMNS):
        part = x[:, start : start + _GRAM_COLUMNS].astype(np.float64)
        part -= part.mean(axis=0)
        gram += part @ part.T
    return gram
