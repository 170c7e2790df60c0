"""Quantizers side by side: CPU seconds, distortion (in-sample and held-out) and weights, one thread.

One process runs every method in turn, again and again, so that a busy machine slows all of them alike; each repeat
has its own seed, and a row holds the medians. Every method is handed the same float32 samples. `cpu_s` is the CPU
time from samples to centroids, everything included and nothing shared between K or methods. `heldout_distortion`
is that of a fit on one half of the samples, scored on the other half. `weight_tv` is the total variation between
the method's own counts and the Voronoi masses of its centroids; faiss returns no counts, so its masses are taken
by a final assignment and 0 stands there. `over_floor` is `cpu_s` over the CPU time of one matrix product of the
samples with K centroids, the least that one look at every sample costs.

With `--json OUT` a table (.md) and a plot (.svg) are written beside OUT.
"""

from __future__ import annotations

import os

if __name__ == "__main__":  # read by the BLAS libraries when they are loaded, hence before numpy
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.provenance import finish, parser, provenance
from ddoq_ray.core.clvq import Clvq
from ddoq_ray.core.distortion import assign, distortion, total_variation
from ddoq_ray.core.gram_kmeans import gram_kmeans
from ddoq_ray.core.rng import philox
from ddoq_ray.core.shrinkage import shrunk_means

Codebook = tuple[np.ndarray, np.ndarray | None]  # centroids; counts, None where the method has none
COLUMNS = ["latents", "method", "k", "cpu_s", "over_floor", "distortion", "heldout_distortion", "weight_tv"]
SYNTHETIC = "synthetic-2048d"
# gram's CPU time over that of scikit-learn's KMeans, and its distortion over KMeans's: at most these.
CPU_TARGET = {10: 1.0, 50: 1 / 3, 100: 1 / 4, 200: 1 / 8}
DISTORTION_TARGET = {10: 1.0, 50: 0.98, 100: 0.97, 200: 0.97}
CLVQ_TARGET = {10: 1.0, 50: 0.955, 100: 0.955, 200: 0.955}  # clvq-corrected's distortion over D4M's
PEERS = ("sklearn-kmeans", "faiss", "d4m")


def synthetic(n: int = 1300, shape: tuple[int, int, int] = (8, 16, 16), modes: int = 30, seed: int = 0) -> np.ndarray:
    """Latent-like samples, float32 [n, D]: modes of Zipf weights, 1/f spectra, uneven contrast, white noise."""
    rng = philox("benchmark", "synthetic", seed)
    frequency = np.hypot(np.fft.fftfreq(shape[1])[:, None], np.fft.fftfreq(shape[2])[None])
    envelope = 1.0 / np.maximum(frequency, 1.0 / shape[1])

    def smooth(rows: int) -> np.ndarray:
        spectrum = np.fft.fft2(rng.standard_normal((rows, *shape))) * envelope
        fields = np.fft.ifft2(spectrum).real.reshape(rows, -1)
        return fields / fields.std()

    zipf = 1.0 / np.arange(1, modes + 1)
    mode = rng.choice(modes, size=n, p=zipf / zipf.sum())
    contrast = np.exp(0.4 * rng.standard_normal((n, 1)))
    x = contrast * (smooth(modes)[mode] + 0.8 * smooth(n)) + 0.3 * rng.standard_normal((n, int(np.prod(shape))))
    return np.ascontiguousarray(x, np.float32)


def gram(x: np.ndarray, k: int, seed: int) -> Codebook:
    return gram_kmeans(x, k, seed=seed, class_id=0)


def gram_shrunk(x: np.ndarray, k: int, seed: int) -> Codebook:
    """As `quantizer=gram quantizer.shrink=true` runs it, less the pass that gives every method's Voronoi counts."""
    centroids, counts = gram_kmeans(x, k, seed=seed, class_id=0)
    return shrunk_means(x, centroids, counts), counts


def clvq_corrected(x: np.ndarray, k: int, seed: int) -> Codebook:
    return _clvq(x, k, Clvq(k, x.shape[1], winner="corrected", seed=seed, class_id=0))


def clvq_paper(x: np.ndarray, k: int, seed: int) -> Codebook:
    return _clvq(x, k, Clvq(k, x.shape[1], winner="paper", seed=seed, class_id=0))


def _clvq(x: np.ndarray, k: int, quantizer: Clvq) -> Codebook:
    quantizer.update(x)
    return quantizer.result()


def d4m(x: np.ndarray, k: int, seed: int) -> Codebook:
    """As `ddoq_ray.core.baselines.d4m_kmeans` runs it, less the pass that makes its counts Voronoi counts."""
    from sklearn.cluster import MiniBatchKMeans

    model = MiniBatchKMeans(n_clusters=k, random_state=seed, n_init="auto", batch_size=k)
    for start in range(0, len(x) - len(x) % k, k):
        model.partial_fit(x[start : start + k])
    return model.cluster_centers_, model._counts


def sklearn_kmeans(x: np.ndarray, k: int, seed: int) -> Codebook:
    from sklearn.cluster import KMeans

    model = KMeans(k, n_init=1, random_state=seed).fit(x)
    return model.cluster_centers_, np.bincount(model.labels_, minlength=k)


def sklearn_minibatch(x: np.ndarray, k: int, seed: int) -> Codebook:
    from sklearn.cluster import MiniBatchKMeans

    model = MiniBatchKMeans(k, n_init="auto", random_state=seed).fit(x)
    return model.cluster_centers_, np.bincount(model.labels_, minlength=k)


def faiss(x: np.ndarray, k: int, seed: int) -> Codebook:
    import faiss as library

    model = library.Kmeans(
        x.shape[1], k, niter=25, seed=seed, min_points_per_centroid=1, max_points_per_centroid=len(x) // k + 1
    )
    model.train(x)
    return np.asarray(model.centroids), None


METHODS: dict[str, Callable[[np.ndarray, int, int], Codebook]] = {
    "gram": gram,
    "gram-shrunk": gram_shrunk,
    "clvq-corrected": clvq_corrected,
    "clvq-paper": clvq_paper,
    "d4m": d4m,
    "sklearn-kmeans": sklearn_kmeans,
    "sklearn-minibatch": sklearn_minibatch,
    "faiss": faiss,
}


def one_run(x: np.ndarray, k: int, method: str, seed: int) -> dict[str, float]:
    """One fit of all samples, timed, and one of a half, scored on the other half."""
    x = x.copy()  # cold for every method alike, and no method can see another's leftovers
    start = time.process_time()
    centroids, counts = METHODS[method](x, k, seed)
    cpu_s = time.process_time() - start
    labels, sq_dist = assign(x, centroids)
    masses = np.bincount(labels, minlength=len(centroids)) / len(x)
    weight_tv = 0.0 if counts is None else total_variation(counts / counts.sum(), masses)
    order = philox("benchmark", "halves", seed).permutation(len(x))
    fit, rest = np.sort(order[: len(x) // 2]), np.sort(order[len(x) // 2 :])
    return {
        "cpu_s": cpu_s,
        "distortion": float(sq_dist.mean()),
        "heldout_distortion": distortion(x[rest], METHODS[method](x[fit], k, seed)[0]),
        "weight_tv": weight_tv,
    }


def floor_s(x: np.ndarray, k: int, repeats: int) -> float:
    """CPU seconds of one float32 product of the samples with K centroids, the median."""
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        x @ x[:k].T
        times.append(time.process_time() - start)
    return median(times[1:])


def measure(name: str, x: np.ndarray, ks: Sequence[int], repeats: int, methods: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of one set of samples. Methods and K alternate within each repeat; repeat r has seed r."""
    runs: dict[tuple[int, str], list[dict[str, float]]] = {(k, m): [] for k in ks for m in methods}
    for seed in range(repeats):
        turn = seed % len(methods)
        for k in ks:
            for method in [*methods[turn:], *methods[:turn]]:
                runs[k, method].append(one_run(x, k, method, seed))
    floors = {k: floor_s(x, k, repeats) for k in ks}
    variance = float(x.var(axis=0, dtype=np.float64).sum())
    rows = []
    for (k, method), many in runs.items():
        row: dict[str, Any] = {"latents": name, "method": method, "k": k, "n": len(x), "dim": x.shape[1]}
        row |= {column: median(run[column] for run in many) for column in many[0]}
        row |= {"variance": variance, "floor_s": floors[k], "over_floor": row["cpu_s"] / floors[k]}
        row |= {"repeats": repeats} | {f"{c}_all": [run[c] for run in many] for c in ("cpu_s", "distortion")}
        rows.append(row)
    return rows


def against_targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line a set and K: ours over the peers' (medians), beside the most it may be, and whether all hold."""
    table = {(row["latents"], row["k"], row["method"]): row for row in rows}
    lines = []
    for name, k in dict.fromkeys((row["latents"], row["k"]) for row in rows):
        case = {method: table[name, k, method] for method in METHODS if (name, k, method) in table}
        if not {"gram", "clvq-corrected", *PEERS} <= set(case) or k not in CPU_TARGET:
            continue
        ours, kmeans, best = case["gram"], case["sklearn-kmeans"], min(case[m]["distortion"] for m in PEERS)
        streamed, d4m_row = case["clvq-corrected"], case["d4m"]
        pairs = {
            "gram/best peer": (ours["distortion"] / best, 1.0),
            "gram/kmeans": (ours["distortion"] / kmeans["distortion"], DISTORTION_TARGET[k]),
            "gram/kmeans cpu": (ours["cpu_s"] / kmeans["cpu_s"], CPU_TARGET[k]),
            "clvq/d4m": (streamed["distortion"] / d4m_row["distortion"], CLVQ_TARGET[k]),
            "clvq/d4m cpu": (streamed["cpu_s"] / d4m_row["cpu_s"], 1.0),
        }
        line: dict[str, Any] = {"latents": name, "k": k}
        line |= {key: f"{ratio:.3f} (at most {most:.3f})" for key, (ratio, most) in pairs.items()}
        line["missed"] = ", ".join(key for key, (ratio, most) in pairs.items() if ratio > most) or "none"
        lines.append(line)
    return lines


def markdown(rows: list[dict[str, Any]]) -> str:
    """The measured rows and the lines against the targets, as Markdown."""
    about = provenance()
    repeats = rows[0]["repeats"]
    parts = [
        "# Quantizers side by side\n",
        f"Medians of {repeats} runs (seeds 0 to {repeats - 1}), one thread, CPU seconds from samples to centroids.",
        f"Made by `{about['command']}` at {about['commit']} on {about['hardware']}.\n",
    ]
    for name in dict.fromkeys(row["latents"] for row in rows):
        some = [row for row in rows if row["latents"] == name]
        parts.append(f"## {name} ({some[0]['n']} x {some[0]['dim']})\n")
        parts.append("Distortions as a part of the variance.\n")
        parts.append("| K | method | CPU ms | over one product | distortion | held-out | weight TV |\n|" + "---|" * 7)
        for row in some:
            parts.append(
                f"| {row['k']} | {row['method']} | {1e3 * row['cpu_s']:.1f} | {row['over_floor']:.1f} "
                f"| {row['distortion'] / row['variance']:.4f} | {row['heldout_distortion'] / row['variance']:.4f} "
                f"| {row['weight_tv']:.3f} |"
            )
        parts.append("")
    lines = against_targets(rows)
    if lines:
        parts.append("## Ratios against the targets\n")
        parts.append("The targets were set for real latents; the synthetic set is shown beside them.\n")
        parts.append("| " + " | ".join(lines[0]) + " |\n|" + "---|" * len(lines[0]))
        parts += ["| " + " | ".join(str(value) for value in line.values()) + " |" for line in lines]
    return "\n".join(parts) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Distortion (part of the variance) over CPU time: a panel for each set, a line for each method along K."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "quantize"
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["latents"] for row in rows))
    across = min(3, len(names))
    down = -(-len(names) // across)
    figure, axes = pyplot.subplots(down, across, figsize=(4.2 * across, 3.4 * down), squeeze=False)
    for panel, name in zip(axes.flat, names, strict=False):
        for method in dict.fromkeys(row["method"] for row in rows):
            some = sorted((r for r in rows if r["latents"] == name and r["method"] == method), key=lambda r: r["k"])
            panel.plot(
                [r["cpu_s"] for r in some], [r["distortion"] / r["variance"] for r in some], label=method, marker="o",
                markersize=3, linewidth=1.8 if method == "gram" else 1.0,
            )  # fmt: skip
        panel.set(title=name, xscale="log", xlabel="CPU s", ylabel="distortion / variance")
    for panel in axes.flat[len(names) :]:
        panel.set_axis_off()
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="lower center", ncol=7, fontsize=8)
    figure.tight_layout(rect=(0, 0.3 / figure.get_figheight(), 1, 1))
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--latents", type=Path, nargs="*", default=[], metavar="FILE.npy", help="float [n, D] each")
    arguments.add_argument("--k", type=int, nargs="+", default=[10, 50, 100, 200])
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    asked = arguments.parse_args()
    sets = {path.stem: np.ascontiguousarray(np.load(path), np.float32) for path in asked.latents}
    sets[SYNTHETIC] = synthetic()
    for method in asked.methods:  # the first call of a library pays for its loading
        METHODS[method](sets[SYNTHETIC][:400, :256].copy(), 10, 0)
    rows = [row for name, x in sets.items() for row in measure(name, x, asked.k, asked.repeats, asked.methods)]
    finish(rows, COLUMNS, asked.json)
    for line in against_targets(rows):
        print(line)
    if asked.json:
        Path(asked.json).with_suffix(".md").write_text(markdown(rows))
        plot(rows, Path(asked.json).with_suffix(".svg"))


if __name__ == "__main__":
    main()
