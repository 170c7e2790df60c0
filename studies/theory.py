"""The paper's claims as measurements (arXiv 2501.07681): what holds on real latents, and what a bound is worth.

Parts, each with rows of its own `claim`:

* weights: Proposition 2 (W2^2 by exact OT against the distortion) and the cut of W2 by Voronoi over uniform weights,
  for each kind of grid;
* distortion: distortion against K, fitted slopes, intrinsic dimensions, and cubes as a control;
* gradient: Theorem 5 for the gradient of a small network's loss;
* diffusion: Theorem 13, Corollary 15 and Remark 14 by the reverse SDE with the exact score of a finite measure.

Latents are float [n, D], a class a file. Without `--latents` a built-in synthetic set is taken. With `--json OUT` plots
(OUT-*.svg) are written beside OUT; `--page FILE.md` fills that page's tables. docs/theory.md says what came out.
"""

from __future__ import annotations

import os

if __name__ == "__main__":  # read by the BLAS libraries when they are loaded, hence before numpy
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.provenance import parser, provenance
from benchmarks.quantize import synthetic
from benchmarks.tables import fill
from ddoq_ray.core.rng import philox
from studies import theory_diffusion, theory_gradient, theory_quantization
from studies.theory_figures import plots, tables
from studies.theory_reverse import Forward

Rows = list[dict[str, Any]]
Sets = dict[str, np.ndarray]
CURVE_KS = (1, 2, 5, 10, 20, 50, 100, 200, 400)
GRADIENT_KS = (1, 5, 10, 20, 50, 100, 200, 400)


def circle(n: int = 256) -> np.ndarray:
    """Points at random angles of the unit circle: data on a smooth curve, as Remark 14 has it."""
    angle = 2 * math.pi * philox("theory", "circle").random(n)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def principal(x: np.ndarray, dim: int) -> np.ndarray:
    """The first `dim` principal components of samples [n, D], scaled to a mean variance of 1 a component."""
    centred = x.astype(np.float64) - x.mean(axis=0, dtype=np.float64)
    left, size, _ = np.linalg.svd(centred, full_matrices=False)
    found = left[:, :dim] * size[:dim]
    return found / math.sqrt(found.var(axis=0).mean())


def unit_scale(x: np.ndarray) -> np.ndarray:
    """All dimensions, centred, scaled to a mean variance of 1 a dimension."""
    centred = x.astype(np.float64) - x.mean(axis=0, dtype=np.float64)
    return centred / math.sqrt(centred.var(axis=0).mean())


def built_in() -> Sets:
    """Two synthetic sets: 30 modes of very unequal mass."""
    return {f"synthetic-{seed}": synthetic(seed=seed) for seed in (0, 1)}


def weights(sets: Sets) -> Rows:
    """The given sets, and beside them the built-in ones: what weights are worth depends on the data."""
    made: Rows = []
    for which, some in (("given", sets), ("built-in", built_in())):
        rows: Rows = []
        for name, x in some.items():
            rows += theory_quantization.weight_rows(name, x, (10, 50), theory_quantization.GRIDS, seeds=3)
            rows += theory_quantization.weight_rows(name, x, (100, 200), ("gram",), seeds=1)
        made += rows
        made += [row | {"which": which} for row in theory_quantization.weight_means(rows)]
    return made


def curves(sets: Sets) -> Rows:
    cubes = {f"cube-{dim}d": theory_quantization.cube(dim) for dim in theory_quantization.CUBES}
    rows: Rows = []
    for name, x in (cubes | sets).items():
        rows += theory_quantization.curve_rows(name, x, [k for k in CURVE_KS if 3 * k <= len(x)])
    return rows


def gradients(sets: Sets) -> Rows:
    rows: Rows = []
    for dim in dict.fromkeys(x.shape[1] for x in sets.values()):
        classes = [x for x in sets.values() if x.shape[1] == dim]
        name = f"{len(classes)} classes of {dim}d" if len(classes) > 1 else f"1 class of {dim}d"
        ks = [k for k in GRADIENT_KS if 3 * k <= min(len(x) for x in classes)]
        rows += theory_gradient.gradient_rows(name, classes, ks)
    return rows


def diffusions(sets: Sets) -> Rows:
    name, x = next(iter(sets.items()))
    cases = [
        theory_diffusion.Case("circle-2d", circle(), horizon=0.25, copies=40, paths=2000),
        theory_diffusion.Case(f"{name}-pca4", principal(x, 4), horizon=1.0, copies=8, paths=1300),
        theory_diffusion.Case(
            name, unit_scale(x), horizon=1.0, copies=2, paths=0, replicates=2, deltas=(0.1, 1e-3, 0.0)
        ),
    ]
    rows: Rows = []
    for case in cases:
        for sde in ("ve", "vp"):
            made = theory_diffusion.diffuse(case, Forward(sde))
            rows += [*made, *theory_diffusion.summarize(made, case.points)]
    return [*rows, *theory_diffusion.worst()]


PARTS: dict[str, Callable[[Sets], Rows]] = {
    "weights": weights,
    "distortion": curves,
    "gradient": gradients,
    "diffusion": diffusions,
}


def short(row: dict[str, Any]) -> dict[str, Any]:
    """The row with six digits a number."""
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in row.items()}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--latents", type=Path, nargs="*", default=[], metavar="FILE.npy", help="float [n, D] each")
    arguments.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    arguments.add_argument("--page", type=Path, metavar="FILE.md", help="fill the tables of this page")
    asked = arguments.parse_args()
    # The recorded command names the sets, not where they lie on this machine.
    sys.argv[1:] = [Path(word).stem if word.endswith(".npy") else word for word in sys.argv[1:]]
    sets = {path.stem: np.ascontiguousarray(np.load(path), np.float32) for path in asked.latents}
    sets = sets or built_in()
    rows: Rows = []
    for part in asked.parts:
        start = time.process_time()
        rows += PARTS[part](sets)
        print(f"{part}: {time.process_time() - start:.0f} CPU s", file=sys.stderr)
    rows = [short(row) for row in rows]
    made = tables(rows)
    for name, table in made.items():
        print(f"\n{name}\n\n{table}")
    if asked.json:
        about = provenance()
        lines = ",\n".join(json.dumps(row | about) for row in rows)
        Path(asked.json).write_text(f"[\n{lines}\n]\n")
        plots(rows, Path(asked.json))
    if asked.page:
        asked.page.write_text(fill(asked.page.read_text(), made))


if __name__ == "__main__":
    main()
