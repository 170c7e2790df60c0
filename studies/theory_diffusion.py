"""Theorem 13, Corollary 15 and Remark 14 as measurements, by `studies.theory_reverse`. No network.

Shapes: N points of the measure, d dimensions, M starts, K centroids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ddoq_ray.core.baselines import lloyd
from ddoq_ray.core.distortion import assign
from ddoq_ray.core.gram_kmeans import gram_kmeans
from ddoq_ray.core.rng import philox
from studies.theory_reverse import (
    BLOCK,
    FUNCTIONS,
    Forward,
    constant_direct,
    enclosing_radius,
    expected_mean,
    log_constant_printed,
    log_constant_repaired,
    posterior,
    reverse_paths,
    score_growth,
)

_FEW_DIMENSIONS = 32
_NEAR = 0  # stands for a K among the paired starts


def noised(points: np.ndarray, sde: Forward, t: float, copies: int, *key: int | str) -> np.ndarray:
    """`copies` samples of X_t from each point: float64 [copies N, d]."""
    centres = sde.scale(t) * np.tile(points, (copies, 1))
    return centres + math.sqrt(sde.variance(t)) * philox("theory", "noised", *key).standard_normal(centres.shape)


def grid(start: np.ndarray, k: int, seed: int) -> np.ndarray:
    """K centroids of the samples of mu_T, float64 [K, d]."""
    quantizer = lloyd if start.shape[1] <= _FEW_DIMENSIONS else gram_kmeans
    return quantizer(start.astype(np.float32), k, seed=seed, class_id=0)[0].astype(np.float64)


def exact_values(
    points: np.ndarray, y: np.ndarray, sde: Forward, horizon: float, deltas: Sequence[float]
) -> tuple[np.ndarray, dict[tuple[str, float], np.ndarray]]:
    """For each start: the posterior summed over starts [N] and E f for each function and delta, [M, .]."""
    step = max(1, BLOCK // len(points))
    mass = np.zeros(len(points))
    parts: dict[tuple[str, float], list[np.ndarray]] = {(f, t): [] for f in FUNCTIONS for t in deltas}
    for i in range(0, len(y), step):
        some = y[i : i + step]
        post = posterior(points, some, sde, horizon)
        mass += post.sum(axis=0)
        for (f, t), values in parts.items():
            values.append(FUNCTIONS[f][1](points, some, post, sde.bridge(horizon, t)))
    return mass, {key: np.concatenate(values) for key, values in parts.items()}


def mean_and_error(difference: np.ndarray) -> tuple[float, float]:
    """Norm of the mean of vectors [M, .], and the standard error of that mean."""
    error = math.sqrt(float(difference.var(axis=0, ddof=1).sum()) / len(difference))
    return float(np.linalg.norm(difference.mean(axis=0))), error


def w1(points: np.ndarray, p: np.ndarray, q: np.ndarray) -> float:
    """Exact Wasserstein-1 between two measures on the points: the largest E f gap of all 1-Lipschitz f."""
    import ot

    return float(ot.emd2(p / p.sum(), q / q.sum(), ot.dist(points, points, "euclidean"), numItermax=10_000_000))


@dataclass(frozen=True)
class Case:
    """One finite measure and how it is measured."""

    name: str
    points: np.ndarray  # float64 [N, d]
    horizon: float  # T
    copies: int  # noised samples of each point
    paths: int  # simulated pairs; 0 for none
    steps: int = 200
    replicates: int = 5
    ks: Sequence[int] = (1, 4, 16, 64, 256)
    deltas: Sequence[float] = (0.5, 0.1, 0.01, 1e-3, 1e-4, 0.0)  # as parts of T; 0 is exact only


def diffuse(case: Case, sde: Forward) -> list[dict[str, Any]]:
    """Rows of Theorem 13, one for each K and delta.

    mu_T is the law of `copies` noised samples of each point (the theorem allows any start), nu_T its K-point
    quantization with Voronoi weights, so W2(mu_T, nu_T) is exact by Proposition 2, and each pair obeys the theorem as
    it stands. Replicates draw the samples, and fit the grid, anew; gaps are the norms of means over replicates, with
    the standard errors of those means.
    """
    points, horizon = case.points, case.horizon
    deltas = [part * horizon for part in case.deltas]
    w2: dict[int, list[float]] = {k: [] for k in case.ks}
    arrival: dict[int, list[float]] = {k: [] for k in case.ks}
    gaps: dict[tuple[int, str, float], list[np.ndarray]] = {}
    walked: dict[tuple[int, float], dict[str, float]] = {}
    for replicate in range(case.replicates):
        start = noised(points, sde, horizon, case.copies, case.name, sde.name, replicate)
        mass, values = exact_values(points, start, sde, horizon, deltas)
        paired = {}
        for k in case.ks:
            centroids = grid(start, k, replicate)
            labels, square = assign(start, centroids)
            counts = np.bincount(labels, minlength=len(centroids))
            _, ours = exact_values(points, centroids, sde, horizon, deltas)
            for (f, t), value in values.items():
                gap = value.mean(axis=0) - counts @ ours[f, t] / len(start)
                gaps.setdefault((k, f, t), []).append(gap)
            w2[k].append(math.sqrt(square.mean()))
            arrival[k].append(w1(points, mass, counts @ posterior(points, centroids, sde, horizon)))
            paired[k] = centroids[labels[: case.paths]]
        if replicate == 0 and case.paths:
            start = start[: case.paths]
            paired[_NEAR] = start + nearby(start.shape, case, sde)
            walked = walk(case, sde, start, paired, [t for t in deltas if t > 0])
    rows = []
    for k in case.ks:
        for t in deltas:
            row: dict[str, Any] = {"claim": "theorem13", "case": case.name, "sde": sde.name, "n": len(points)}
            row |= {"dim": points.shape[1], "horizon": horizon, "k": k, "delta": t, "w2": float(np.mean(w2[k]))}
            row |= {"samples": case.copies * len(points), "replicates": case.replicates}
            for f in FUNCTIONS:
                row[f"gap_{f}"], row[f"gap_{f}_se"] = mean_and_error(np.array(gaps[k, f, t]))
            if t == 0:
                row |= {"w1": float(np.mean(arrival[k])), "w1_over_w2": float(np.mean(np.divide(arrival[k], w2[k])))}
            near = {f"near_{name}": value for name, value in walked.get((_NEAR, t), {}).items() if "ratio" in name}
            rows.append(row | walked.get((k, t), {}) | near)
    return rows


def nearby(shape: tuple[int, ...], case: Case, sde: Forward) -> np.ndarray:
    """Steps of 0.05 sqrt(T) in random directions: to starts so near that their distance shows how paths part."""
    along = philox("theory", "nearby", case.name, sde.name).standard_normal(shape)
    return 0.05 * math.sqrt(case.horizon) * along / np.linalg.norm(along, axis=1, keepdims=True)


def walk(
    case: Case, sde: Forward, start: np.ndarray, paired: dict[int, np.ndarray], deltas: Sequence[float]
) -> dict[tuple[int, float], dict[str, float]]:
    """Simulated gaps and path distances at each (K, delta): the two starts of a pair see the same noise.

    Each noised sample is paired with its centroid, the optimal coupling of mu_T and nu_T. Standard errors are those of
    the paired differences.
    """
    times = np.union1d(np.geomspace(case.horizon, min(deltas), case.steps + 1)[:-1], deltas)[::-1].tolist()
    rng = philox("theory", "paths", case.name, sde.name)
    found: dict[tuple[int, float], dict[str, float]] = {}
    before = [start, *paired.values()]
    for t, now in zip(times[1:], reverse_paths(case.points, before, sde, times, rng), strict=True):
        if t not in deltas:
            continue
        for k, first, arrived in zip(paired, before[1:], now[1:], strict=True):
            row: dict[str, float] = {"paths": len(start), "steps": len(times) - 1}
            for f, (value, _) in FUNCTIONS.items():
                gap, error = mean_and_error(value(now[0]) - value(arrived))
                row |= {f"path_gap_{f}": gap, f"path_gap_{f}_se": error}
            apart = np.linalg.norm(now[0] - arrived, axis=1)
            at_start = np.linalg.norm(before[0] - first, axis=1).mean()
            row["path_ratio"] = float(apart.mean() / at_start)
            row["path_ratio_se"] = float(apart.std(ddof=1) / math.sqrt(len(apart)) / at_start)
            found[k, t] = row
    return found


def slope(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Least-squares slope of ln y against ln x over the positive pairs; None for fewer than three."""
    pairs = [(math.log(a), math.log(b)) for a, b in zip(x, y, strict=True) if a > 0 and b > 0]
    if len(pairs) < 3:
        return None
    first, second = np.array(pairs).T
    return float(np.polyfit(first, second, 1)[0])


def summarize(rows: list[dict[str, Any]], points: np.ndarray) -> list[dict[str, Any]]:
    """Rows of one case and SDE: for each delta the fitted constants beside the bounds, then the rates over K."""
    sde, horizon = Forward(rows[0]["sde"]), rows[0]["horizon"]
    about = {name: rows[0][name] for name in ("case", "sde", "n", "dim", "horizon")}
    radius = enclosing_radius(points)
    made: list[dict[str, Any]] = []
    for t in dict.fromkeys(row["delta"] for row in rows):
        some = [row for row in rows if row["delta"] == t]
        line: dict[str, Any] = {"claim": "theorem13-constant", **about, "delta": t, "radius": radius}
        w2 = np.array([row["w2"] for row in some])
        for f in FUNCTIONS:
            gap = np.array([row[f"gap_{f}"] for row in some])
            line[f"c_{f}"] = float(gap @ w2 / (w2 @ w2))
            line[f"c_{f}_max"] = float((gap / w2).max())
        if t == 0:
            line["c_w1_max"] = max(row["w1_over_w2"] for row in some)
        if "path_ratio" in some[0]:
            line["c_path_max"] = max(row["path_ratio"] for row in some)
            line |= {name: some[0][name] for name in ("near_path_ratio", "near_path_ratio_se")}
        line["c_direct"] = constant_direct(sde, radius, t, horizon)
        if t > 0:
            line["log10_c_printed"] = log_constant_printed(sde, radius, rows[0]["dim"], t, horizon) / math.log(10)
            line["log10_c_repaired"] = log_constant_repaired(sde, radius, t, horizon) / math.log(10)
            line["score_growth"] = score_growth(points, sde, t)
        made.append(line)
    for t in dict.fromkeys(row["delta"] for row in rows):
        some = [row for row in rows if row["delta"] == t]
        ks, w2s = [row["k"] for row in some], [row["w2"] for row in some]
        line = {"claim": "corollary15", **about, "delta": t, "theory_vs_k": -1 / rows[0]["dim"]}
        line["w2_vs_k"] = slope(ks, w2s)
        for f in FUNCTIONS:  # a gap below two standard errors is noise, not a point of a line
            clear = [row for row in some if row[f"gap_{f}"] > 2 * row[f"gap_{f}_se"]]
            line[f"{f}_vs_k"] = slope([row["k"] for row in clear], [row[f"gap_{f}"] for row in clear])
            line[f"{f}_vs_w2"] = slope([row["w2"] for row in clear], [row[f"gap_{f}"] for row in clear])
        made.append(line)
    return made


def worst(horizons: Sequence[float] = (1.0, 0.25, 0.0625), parts: Sequence[float] = (0.1, 0.0)) -> list[dict[str, Any]]:
    """Theorem 13 where its constant is largest: data at +-1 (R = 1, d = 1), both starts a point mass close to 0.

    Starts at +-y have W2 = 2y, and by the exact kernel the gap of f(x) = x: their ratio is a constant that no bound can
    be below.
    """
    points, y = np.array([[1.0], [-1.0]]), 1e-3
    starts = np.array([[y], [-y]])
    rows = []
    for sde in (Forward("ve"), Forward("vp")):
        for horizon in horizons:
            for delta in (part * horizon for part in parts):
                post = posterior(points, starts, sde, horizon)
                ends = expected_mean(points, starts, post, sde.bridge(horizon, delta))
                row: dict[str, Any] = {"claim": "theorem13-worst", "sde": sde.name, "horizon": horizon, "delta": delta}
                row |= {"c": float(ends[0, 0] - ends[1, 0]) / (2 * y)}
                row |= {"c_direct": constant_direct(sde, 1.0, delta, horizon)}
                if delta > 0:
                    row["log10_c_printed"] = log_constant_printed(sde, 1.0, 1, delta, horizon) / math.log(10)
                rows.append(row)
    return rows
