"""Theorem 5 for the gradient of a network's loss: its error on a codebook against L * distortion^(1/2).

The network is x -> tanh(W1 x + b1) -> W2 h + b2, the loss l(x, y) the cross-entropy with the class y of x, and
f_y(x) its gradient in all parameters. The classes are quantized one by one, so

    | E_data f - E_codebook f |  <=  mean over classes of L G_y^(1/2)  <=  L G^(1/2),   G the mean distortion,

with L the largest Lipschitz constant of f_y, y = 0..C-1, on the convex hull of the samples. That is all the proof
uses: a sample, its centroid and the line between them lie in the hull. (On all of R^D the theorem's hypothesis need
not hold: W1's gradient is an outer product with x, so its slope grows with |x|.)

L has no formula. It is put between two numbers:

* `certificate`: an upper bound from the norms of the weights. Only with it is the right side surely an upper bound.
* `sampled_slope`: the largest |Df_y| found at samples, at their centroids and halfway between. Each is exact
  (`slopes`), their largest is a lower bound of L.

Shapes: n samples, D dimensions, H hidden units, C logits, K centroids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ddoq_ray.core.distortion import assign, w2_squared
from ddoq_ray.core.gram_kmeans import gram_kmeans
from ddoq_ray.core.rng import philox
from studies.theory_diffusion import slope

HIDDEN, LOGITS = 32, 10
_BEND = 4 / (3 * math.sqrt(3))  # largest slope of tanh' = 1 - tanh^2

Measure = list[tuple[np.ndarray, np.ndarray]]  # of each class: points [m, D] and weights [m] of sum 1


@dataclass(frozen=True)
class Network:
    """Parameters, float64: W1 [H, D], b1 [H], W2 [C, H], b2 [C]."""

    w1: np.ndarray
    b1: np.ndarray
    w2: np.ndarray
    b2: np.ndarray

    def forward(self, x: np.ndarray, label: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Hidden units h [m, H], g = dl/dlogits = p - e_y [m, C], and u = dl/d(W1 x + b1) [m, H]."""
        h = np.tanh(x @ self.w1.T + self.b1)
        logits = h @ self.w2.T + self.b2
        g = np.exp(logits - logits.max(axis=1, keepdims=True))
        g /= g.sum(axis=1, keepdims=True)
        g[:, label] -= 1.0
        return h, g, (g @ self.w2) * (1.0 - h * h)


def initial_network(dim: int, seed: int = 0) -> Network:
    """Normal weights of variance 1/fan-in, zero biases."""
    rng = philox("theory", "network", seed)
    first = rng.standard_normal((HIDDEN, dim)) / math.sqrt(dim)
    second = rng.standard_normal((LOGITS, HIDDEN)) / math.sqrt(HIDDEN)
    return Network(first, np.zeros(HIDDEN), second, np.zeros(LOGITS))


def mean_gradient(network: Network, measure: Measure) -> np.ndarray:
    """E f with mass 1/C on each class: the gradients in W1, b1, W2, b2, one float64 vector."""
    parts = [np.zeros_like(p) for p in (network.w1, network.b1, network.w2, network.b2)]
    for label, (x, weights) in enumerate(measure):
        h, g, u = network.forward(x, label)
        mass = weights[:, None] / len(measure)
        for part, value in zip(parts, ((mass * u).T @ x, mass * u, (mass * g).T @ h, mass * g), strict=True):
            part += value if part.ndim == 2 else value.sum(axis=0)
    return np.concatenate([part.ravel() for part in parts])


def trained(network: Network, measure: Measure, steps: int = 100, rate: float = 0.02) -> Network:
    """After full-batch gradient descent: a state in the middle of training."""
    parts = [network.w1, network.b1, network.w2, network.b2]
    ends = np.cumsum([p.size for p in parts])[:-1]
    for _ in range(steps):
        down = np.split(mean_gradient(Network(*parts), measure), ends)
        parts = [p - rate * d.reshape(p.shape) for p, d in zip(parts, down, strict=True)]
    return Network(*parts)


def certificate(network: Network, radius: float) -> float:
    """An upper bound of |Df_y(x)| for all y and all |x| <= radius.

    With s1, s2 the spectral norms of W1 and W2, and c the largest norm of a column of W2:
        |Dg| <= s1 s2 / 2                                 softmax's Jacobian has norm at most 1/2
        |Du| <= s2 |Dg| + bend sqrt(2) c s1               as |g| <= sqrt(2) and tanh' <= 1
        |D(g h')| <= sqrt(H) |Dg| + sqrt(2) s1,   |D(u x')| <= radius |Du| + sqrt(2) s2
    and f is (u x', u, g h', g).
    """
    s1, s2 = (float(np.linalg.norm(w, 2)) for w in (network.w1, network.w2))
    column = float(np.linalg.norm(network.w2, axis=0).max())
    of_g = s1 * s2 / 2
    of_u = s2 * of_g + _BEND * math.sqrt(2) * column * s1
    of_w2 = math.sqrt(len(network.w1)) * of_g + math.sqrt(2) * s1
    of_w1 = radius * of_u + math.sqrt(2) * s2
    return math.sqrt(of_g**2 + of_u**2 + of_w2**2 + of_w1**2)


def slopes(network: Network, x: np.ndarray, label: int) -> np.ndarray:
    """|Df_y(x)|, the spectral norm of the Jacobian of f_y at each row, exactly: float64 [m].

    For a direction v the derivatives of g, h and u are linear in a = W1 v, and |Df v|^2 is |u|^2 |v|^2 plus a quadratic
    form of (a, x'v). So D'fDf is |u|^2 times the identity plus B' Q B with B = (W1; x') of H + 1 rows, and its largest
    eigenvalue is |u|^2 plus that of Q B B', a matrix of H + 1 rows.
    """
    h, g, u = network.forward(x, label)
    norms = np.empty(len(x))
    units = len(network.w1)
    inner = np.empty((units + 1, units + 1))
    inner[:units, :units] = network.w1 @ network.w1.T
    for i, row in enumerate(x):
        p = g[i].copy()
        p[label] += 1.0
        bend = 1.0 - h[i] ** 2
        of_g = (np.diag(p) - np.outer(p, p)) @ (network.w2 * bend)  # [C, H]
        of_u = bend[:, None] * (network.w2.T @ of_g) + np.diag((network.w2.T @ g[i]) * (-2.0 * h[i] * bend))
        cross = np.outer(of_g.T @ g[i], h[i] * bend)
        form = np.zeros_like(inner)
        form[:units, :units] = (
            (1.0 + h[i] @ h[i]) * of_g.T @ of_g
            + (g[i] @ g[i]) * np.diag(bend**2)
            + (cross + cross.T)
            + (1.0 + row @ row) * of_u.T @ of_u
        )
        form[:units, units] = form[units, :units] = of_u.T @ u[i]
        inner[:units, units] = inner[units, :units] = network.w1 @ row
        inner[units, units] = row @ row
        values, vectors = np.linalg.eigh(inner)
        root = vectors * np.sqrt(np.maximum(values, 0.0))
        norms[i] = math.sqrt(u[i] @ u[i] + max(np.linalg.eigvalsh(root.T @ form @ root)[-1], 0.0))
    return norms


def sampled_slope(network: Network, samples: Measure, codebook: Measure, points: int = 200) -> float:
    """The largest |Df_y| found on the lines from samples to their centroids: start, middle and end."""
    found = 0.0
    for label, ((x, _), (centroids, _)) in enumerate(zip(samples, codebook, strict=True)):
        some = x[philox("theory", "slopes", label).choice(len(x), size=min(points, len(x)), replace=False)]
        ends = centroids[assign(some, centroids)[0]]
        rows = np.concatenate([some, (some + ends) / 2, np.unique(ends, axis=0)])
        found = max(found, float(slopes(network, rows, label).max()))
    return found


def scaled(classes: Sequence[np.ndarray]) -> Measure:
    """All classes moved and scaled alike, to mean 0 and mean square 1 a dimension; weights 1/n."""
    whole = np.concatenate(classes).astype(np.float64)
    centre = whole.mean(axis=0)
    size = math.sqrt(float(((whole - centre) ** 2).mean()))
    return [((x.astype(np.float64) - centre) / size, np.full(len(x), 1 / len(x))) for x in classes]


def quantized(samples: Measure, k: int) -> tuple[Measure, Measure, float, float]:
    """The codebook with Voronoi and with uniform weights, their mean distortion and mean W2^2."""
    voronoi: Measure = []
    uniform: Measure = []
    spread, squared = 0.0, 0.0
    for label, (x, _) in enumerate(samples):
        found, counts = gram_kmeans(x.astype(np.float32), k, seed=0, class_id=label)
        centroids = found.astype(np.float64)
        even = np.full(len(centroids), 1 / len(centroids))
        voronoi.append((centroids, counts / counts.sum()))
        uniform.append((centroids, even))
        spread += float(assign(x, centroids)[1].mean()) / len(samples)
        squared += w2_squared(x, centroids, even) / len(samples)
    return voronoi, uniform, spread, squared


def random_error(network: Network, samples: Measure, truth: np.ndarray, k: int, draws: int) -> float:
    """Root mean square error of the gradient on K random samples a class, each of weight 1/K."""
    errors = []
    for draw in range(draws):
        rng = philox("theory", "random", k, draw)
        picks = [(x[rng.choice(len(x), size=k, replace=False)], np.full(k, 1 / k)) for x, _ in samples]
        errors.append(np.sum((mean_gradient(network, picks) - truth) ** 2))
    return math.sqrt(float(np.mean(errors)))


def gradient_rows(name: str, classes: Sequence[np.ndarray], ks: Sequence[int], draws: int = 10) -> list[dict[str, Any]]:
    """Theorem 5 on classes of one D: a row a network state and K, and the fitted exponents of each state.

    Errors and bounds are parts of |E_data f|: 1 is an error as large as the gradient itself. One class alone has no
    training worth the name, so only the initial network is measured there.
    """
    samples = scaled(classes)
    radius = math.sqrt(max(float((x**2).sum(axis=1).max()) for x, _ in samples))
    states = {"initial": initial_network(classes[0].shape[1])}
    if len(classes) > 1:
        states["trained"] = trained(states["initial"], samples)
    books = {k: quantized(samples, k) for k in ks}
    rows: list[dict[str, Any]] = []
    for state, network in states.items():
        truth = mean_gradient(network, samples)
        size = float(np.linalg.norm(truth))
        upper = certificate(network, radius)
        lower = max(sampled_slope(network, samples, books[k][0]) for k in (min(ks), max(ks)))
        about = {"latents": name, "classes": len(classes), "network": state}
        made: list[dict[str, Any]] = []
        for k, (voronoi, uniform, spread, squared) in books.items():
            row: dict[str, Any] = {"claim": "theorem5", **about, "k": k, "gradient_norm": size}
            row |= {"distortion_sqrt": math.sqrt(spread), "l_certificate": upper, "l_sampled": lower}
            for weights, book in (("voronoi", voronoi), ("uniform", uniform)):
                row[f"error_{weights}"] = float(np.linalg.norm(mean_gradient(network, book) - truth)) / size
            row["error_random"] = random_error(network, samples, truth, k, draws) / size
            row["bound_certificate"] = upper * math.sqrt(spread) / size
            row["bound_sampled"] = lower * math.sqrt(spread) / size
            row["bound_uniform_sampled"] = lower * math.sqrt(squared) / size
            made.append(row)
        line: dict[str, Any] = {"claim": "theorem5-slope", **about, "k_from": min(ks), "k_to": max(ks)}
        roots = [row["distortion_sqrt"] for row in made]
        line["distortion_sqrt_vs_k"] = slope(ks, roots)
        for method in ("voronoi", "uniform", "random"):
            errors = [row[f"error_{method}"] for row in made]
            line |= {f"{method}_vs_k": slope(ks, errors), f"{method}_vs_distortion_sqrt": slope(roots, errors)}
        rows += [*made, line]
    return rows
