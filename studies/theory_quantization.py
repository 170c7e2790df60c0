"""Proposition 2, the rate of Proposition 4, and what weights are worth: measured on the samples of a class.

Shapes: n samples of a class, K centroids, D dimensions. `variance` is the mean squared distance of the samples to
their mean, the distortion of one centroid; distortions are told as a part of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.quantize import METHODS
from ddoq_ray.core.balanced import balanced
from ddoq_ray.core.baselines import lloyd
from ddoq_ray.core.distortion import assign, distortion, w2_squared
from ddoq_ray.core.gram_kmeans import gram_kmeans
from ddoq_ray.core.rng import philox

GRIDS = ("d4m", "sklearn-kmeans", "gram", "clvq-paper", "clvq-corrected")
PAPER_CUT_PCT = {10: 15.7, 50: 16.1}  # reported for the published version: latents of ImageNet-1K, means of classes
FIT_RANGE = (10, 200)  # K of the fitted slopes
ROUNDS = 8  # of the grid for uniform weights
CUBES = (1, 2, 4, 8)  # dimensions of the control


def variance(x: np.ndarray) -> float:
    return float(x.var(axis=0, dtype=np.float64).sum())


def weight_row(x: np.ndarray, centroids: np.ndarray) -> dict[str, Any]:
    """W2 of one grid under Voronoi and under uniform weights, by exact OT, beside its distortion (Prop. 2)."""
    labels, square = assign(x, centroids)
    counts = np.bincount(labels, minlength=len(centroids))
    voronoi = w2_squared(x, centroids, counts / len(x))
    uniform = w2_squared(x, centroids, np.full(len(centroids), 1 / len(centroids)))
    spread = float(square.mean())
    return {
        "distortion": spread / variance(x),
        "prop2_relative_difference": abs(voronoi - spread) / spread,
        "w2_voronoi": math.sqrt(voronoi),
        "w2_uniform": math.sqrt(uniform),
        "cut_pct": 100 * (1 - math.sqrt(voronoi / uniform)),
        "max_weight": counts.max() / len(x),
        "empty_cells": int((counts == 0).sum()),
    }


def weight_rows(name: str, x: np.ndarray, ks: Sequence[int], grids: Sequence[str], seeds: int) -> list[dict[str, Any]]:
    """One row a grid, K and seed; the samples come in an order of the seed, as a stream would."""
    rows = []
    for seed in range(seeds):
        stream = np.ascontiguousarray(x[philox("theory", "order", seed).permutation(len(x))])
        for k in ks:
            for method in grids:
                centroids = np.ascontiguousarray(METHODS[method](stream, k, seed)[0], np.float32)
                about = {"claim": "weights", "latents": name, "grid": method, "k": k, "seed": seed}
                rows.append(about | weight_row(x, centroids))
                if method == "gram" and seed == 0 and len(grids) > 1:
                    fair = balanced(x, centroids, max_rounds=ROUNDS).centroids
                    rows.append(about | {"grid": "gram, balanced"} | weight_row(x, fair))
    return rows


def weight_means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cut of each grid and K: mean and range over sets of samples (each the mean over its seeds)."""
    made = []
    for k, method in dict.fromkeys((row["k"], row["grid"]) for row in rows):
        some = [row for row in rows if row["k"] == k and row["grid"] == method]
        sets = list(dict.fromkeys(row["latents"] for row in some))
        line: dict[str, Any] = {"claim": "weights-mean", "grid": method, "k": k, "sets": len(sets)}
        for value in ("distortion", "max_weight", "w2_uniform", "w2_voronoi"):
            line[value] = float(np.mean([row[value] for row in some]))
        cuts = [float(np.mean([row["cut_pct"] for row in some if row["latents"] == name])) for name in sets]
        line |= {"cut_pct": float(np.mean(cuts)), "cut_pct_low": min(cuts), "cut_pct_high": max(cuts)}
        line["prop2_relative_difference"] = max(row["prop2_relative_difference"] for row in some)
        made.append(line | ({"paper_cut_pct": PAPER_CUT_PCT[k]} if k in PAPER_CUT_PCT else {}))
    return made


def fitted_slope(ks: Sequence[int], values: Sequence[float]) -> float:
    """Slope of ln sqrt(distortion) against ln K: -1/d where the rate is K^(-1/d)."""
    return float(np.polyfit(np.log(ks), np.log(values) / 2, 1)[0])


def two_nearest_dimension(x: np.ndarray, keep: float = 0.9) -> float:
    """Intrinsic dimension from the ratios of the distances to the two nearest neighbours, largest tenth left out.

    Source: Facco, d'Errico, Rodriguez, Laio, "Estimating the intrinsic dimension of datasets by a minimal
    neighborhood information", Scientific Reports 2017.
    """
    centred = x.astype(np.float64) - x.mean(axis=0, dtype=np.float64)
    norm = (centred**2).sum(axis=1)
    square = norm[:, None] + norm - 2 * centred @ centred.T
    np.fill_diagonal(square, np.inf)
    nearest = np.sqrt(np.maximum(np.partition(square, 1, axis=1)[:, :2], 0.0))
    ratio = np.sort(nearest[:, 1] / np.maximum(nearest[:, 0], 1e-12))
    rank = np.arange(1, len(ratio) + 1) / len(ratio)
    used = slice(0, int(keep * len(ratio)))
    log_ratio, tail = np.log(ratio[used]), -np.log1p(-rank[used])
    return float(log_ratio @ tail / (log_ratio @ log_ratio))


def participation(x: np.ndarray) -> float:
    """(sum of the covariance's eigenvalues)^2 / sum of their squares: how many directions share the variance."""
    centred = x.astype(np.float64) - x.mean(axis=0, dtype=np.float64)
    small = centred @ centred.T if len(x) < x.shape[1] else centred.T @ centred
    return float(np.trace(small) ** 2 / (small**2).sum())


def curve_rows(name: str, x: np.ndarray, ks: Sequence[int]) -> list[dict[str, Any]]:
    """Distortion against K, on the samples that were fitted and on a held-out half, and the fitted slopes."""
    order = philox("theory", "halves").permutation(len(x))
    fit, rest = x[order[: len(x) // 2]], x[order[len(x) // 2 :]]
    scale = variance(x)
    few = x.shape[1] <= 32
    quantizer = lloyd if few else gram_kmeans
    rows: list[dict[str, Any]] = []
    for k in ks:
        row = {"claim": "distortion", "latents": name, "n": len(x), "dim": x.shape[1], "k": k}
        row["distortion"] = distortion(x, quantizer(x, k, seed=0, class_id=0)[0]) / scale
        half = quantizer(fit, k, seed=0, class_id=0)[0]
        row |= {"half": distortion(fit, half) / scale, "heldout": distortion(rest, half) / scale}
        rows.append(row)
    used = [row for row in rows if FIT_RANGE[0] <= row["k"] <= FIT_RANGE[1]]
    line: dict[str, Any] = {"claim": "distortion-slope", "latents": name, "n": len(x), "dim": x.shape[1]}
    line |= {"k_from": used[0]["k"], "k_to": used[-1]["k"], "theory_slope": -1 / x.shape[1]}
    for which in ("distortion", "half", "heldout"):
        slope = fitted_slope([row["k"] for row in used], [row[which] for row in used])
        line |= {f"slope_{which}": slope, f"implied_dim_{which}": -1 / slope if slope < 0 else None}
    line |= {"two_nearest_dim": two_nearest_dimension(x), "participation": participation(x)}
    return [*rows, line]


def cube(dim: int, n: int = 6000) -> np.ndarray:
    """The control, where the rate is known: uniform samples of the unit cube, float32 [n, dim]."""
    return philox("theory", "cube", dim).random((n, dim)).astype(np.float32)
