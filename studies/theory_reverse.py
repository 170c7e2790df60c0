"""The reverse VE and VP SDE with the exact score of a finite measure, and the constants that bound them.

No network. For points x_1..x_N of mass 1/N the forward process is X_t = a(t) X_0 + s(t) Z, its law a mixture of N
Gaussians, and its score (a(t) E[X_0 | X_t = x] - x) / s(t)^2 a softmax over the points.

Two ways from a start y at time T to time t, which check each other:

* exactly: the reverse SDE started at y has the law of X_t given X_T = y. Given X_0 too, that is the Gaussian
  N(A X_0 + B y, v I) of `Forward.bridge`; so E f is a sum over the posterior of X_0, without any simulation;
* by paths: `reverse_paths` steps the SDE from T down to t. Paths from two starts share their noise (the coupling of the
  theorem's proof), so that their distance is the quantity of the paper's Eq. 29.

Shapes: N points, d dimensions, M starts, K centroids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

BLOCK = 1 << 22  # elements of one [starts, points] temporary: 32 MiB


@dataclass(frozen=True)
class Forward:
    """The noising process: `ve` is dx = dW (Eq. 26), `vp` is dx = -x/2 dt + dW (Eq. 27)."""

    name: str

    def scale(self, t: float) -> float:
        """a(t)."""
        return 1.0 if self.name == "ve" else math.exp(-t / 2)

    def variance(self, t: float) -> float:
        """s(t)^2."""
        return t if self.name == "ve" else -math.expm1(-t)

    def bridge(self, above: float, t: float) -> tuple[float, float, float]:
        """A, B, v with X_t | X_0 = x, X_above = y distributed as N(A x + B y, v I); 0 <= t < above."""
        ratio = self.scale(above) / self.scale(t)
        fresh = self.variance(above) - ratio**2 * self.variance(t)  # variance of X_above given X_t
        total = self.variance(above)
        return (
            fresh * self.scale(t) / total,
            ratio * self.variance(t) / total,
            self.variance(t) * fresh / total,
        )


def posterior(points: np.ndarray, y: np.ndarray, sde: Forward, t: float) -> np.ndarray:
    """P(X_0 = x_i | X_t = y), float64 [M, N]."""
    a, s2 = sde.scale(t), sde.variance(t)
    logits = y @ (points.T * (a / s2))
    logits -= (points**2).sum(axis=1) * (a * a / (2 * s2))
    logits -= logits.max(axis=1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(axis=1, keepdims=True)
    return logits


def posterior_mean(points: np.ndarray, y: np.ndarray, sde: Forward, t: float) -> np.ndarray:
    """E[X_0 | X_t = y], float64 [M, d], a block of starts at a time."""
    step = max(1, BLOCK // len(points))
    return np.concatenate([posterior(points, y[i : i + step], sde, t) @ points for i in range(0, len(y), step)])


def score(points: np.ndarray, y: np.ndarray, sde: Forward, t: float) -> np.ndarray:
    """Gradient of the log density of X_t at y, [M, d]."""
    return (sde.scale(t) * posterior_mean(points, y, sde, t) - y) / sde.variance(t)


def reverse_paths(
    points: np.ndarray, starts: Sequence[np.ndarray], sde: Forward, times: Sequence[float], rng: np.random.Generator
) -> Iterator[list[np.ndarray]]:
    """Steps the reverse SDE from times[0] down the list; yields the positions at each later time.

    All starts, float64 [M, d] each, share the noise. A step freezes E[X_0 | X_t] and is exact but for that: it is
    Euler's to first order, and stays stable where the score grows like 1/t.
    """
    now = [start.copy() for start in starts]
    for above, t in pairwise(times):
        a, b, v = sde.bridge(above, t)
        noise = math.sqrt(v) * rng.standard_normal(now[0].shape)
        now = [a * posterior_mean(points, y, sde, above) + b * y + noise for y in now]
        yield now


# --- test functions, each 1-Lipschitz, with their exact expectation under N(A X_0 + B y, v I), X_0 | y


def expected_mean(
    points: np.ndarray, y: np.ndarray, post: np.ndarray, bridge: tuple[float, float, float]
) -> np.ndarray:
    """f(x) = x, [M, d]: the norm of its gap is the largest gap of all linear 1-Lipschitz functions."""
    a, b, _ = bridge
    return a * (post @ points) + b * y


def expected_cosine(
    points: np.ndarray, y: np.ndarray, post: np.ndarray, bridge: tuple[float, float, float]
) -> np.ndarray:
    """f(x) = cos(x_1), [M, 1]."""
    a, b, v = bridge
    wave = post @ np.exp(1j * a * points[:, 0])
    return (math.exp(-v / 2) * (np.exp(1j * b * y[:, 0]) * wave).real)[:, None]


def expected_hinge(
    points: np.ndarray, y: np.ndarray, post: np.ndarray, bridge: tuple[float, float, float]
) -> np.ndarray:
    """f(x) = max(0, x_1), [M, 1]."""
    from scipy.special import ndtr

    a, b, v = bridge
    mean = a * points[:, 0] + b * y[:, :1]
    if v == 0.0:
        value = np.maximum(mean, 0.0)
    else:
        z = mean / math.sqrt(v)
        value = mean * ndtr(z) + math.sqrt(v / (2 * math.pi)) * np.exp(-z * z / 2)
    return np.einsum("mn,mn->m", post, value)[:, None]


Expectation = Callable[[np.ndarray, np.ndarray, np.ndarray, tuple[float, float, float]], np.ndarray]
FUNCTIONS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], Expectation]] = {
    "mean": (lambda x: x, expected_mean),
    "cosine": (lambda x: np.cos(x[:, :1]), expected_cosine),
    "hinge": (lambda x: np.maximum(x[:, :1], 0.0), expected_hinge),
}


# --- constants


def enclosing_radius(points: np.ndarray, rounds: int = 1000) -> float:
    """Radius of a ball that holds all points, within about 1/sqrt(rounds) of the smallest (Badoiu & Clarkson 2003)."""
    centre = points.mean(axis=0)
    best = math.inf
    for i in range(rounds):
        distance = np.linalg.norm(points - centre, axis=1)
        far = int(distance.argmax())
        best = min(best, float(distance[far]))
        centre = centre + (points[far] - centre) / (i + 2)
    return best


def log_constant_printed(sde: Forward, radius: float, dim: int, delta: float, horizon: float) -> float:
    """ln C of Eq. 30, as printed: its d/2 a unit of time is the Hilbert-Schmidt norm of the noise."""
    return log_constant_repaired(sde, radius, delta, horizon) + dim / 2 * (horizon - delta)


def log_constant_repaired(sde: Forward, radius: float, delta: float, horizon: float) -> float:
    """ln C of Eq. 30 without that norm: both paths have the same noise, so its difference in Eq. 24 is 0."""
    if sde.name == "ve":
        return radius**2 * (1 / delta - 1 / horizon) - math.log(horizon / delta)
    grown = radius**2 * (-1 / math.expm1(-delta) + 1 / math.expm1(-horizon))
    return grown - math.log(math.expm1(horizon) / math.expm1(delta)) + (horizon - delta) / 2


def constant_direct(sde: Forward, radius: float, delta: float, horizon: float) -> float:
    """C without a path: h(y) = E[f(X_delta) | X_T = y] has |grad h| <= L (B + A R^2 a(T)/s(T)^2). Finite at delta = 0.

    grad h = B E[grad F | y] + a(T)/s(T)^2 Cov(F, X_0 | y) for F the Gaussian mean of f, and a covariance of an A L
    Lipschitz function of X_0 with X_0 is at most A L R^2 on a support of radius R.
    """
    a, b, _ = sde.bridge(horizon, delta)
    return b + a * radius**2 * sde.scale(horizon) / sde.variance(horizon)


def score_growth(points: np.ndarray, sde: Forward, t: float) -> float:
    """Largest one-sided Lipschitz constant of the score found between neighbouring points at time t.

    At the middle of each point and its nearest neighbour, along the line through both: u' Hessian(log p_t) u.
    """
    square = (points**2).sum(axis=1)
    gap = square[:, None] + square - 2 * points @ points.T
    np.fill_diagonal(gap, np.inf)
    other = points[gap.argmin(axis=1)]
    along = other - points
    length = np.linalg.norm(along, axis=1, keepdims=True)
    keep = length[:, 0] > 1e-9
    along = along[keep] / length[keep]
    a, s2 = sde.scale(t), sde.variance(t)
    post = posterior(points, a * (points + other)[keep] / 2, sde, t)
    projected = along @ points.T  # [M, N]
    mean = np.einsum("mn,mn->m", post, projected)
    spread = np.einsum("mn,mn->m", post, (projected - mean[:, None]) ** 2)
    return float((spread * (a / s2) ** 2).max() - 1 / s2)
