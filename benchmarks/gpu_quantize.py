"""Many classes quantized at once: `gram_kmeans_batched` on the device there is, in float32 and bfloat16.

Beside it, class after class: numpy's `gram_kmeans` on the host and, where it is installed, faiss on the GPU. Classes
are synthetic, in float16 as the latent store keeps them; a few distinct ones are repeated, under different class ids,
up to `--classes`. `seconds` counts everything from arrays on the host to centroids on the host; `transfer_s` is what
copying the same arrays to the device takes alone. `distortion_pct` is the mean over the first `--looped` classes, the
same for every method, in percent of their variance. Needs no Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.provenance import finish, parser
from ddoq_ray.core.distortion import distortion
from ddoq_ray.core.gram_batched import MAX_BYTES, gram_kmeans_batched, group_bytes
from ddoq_ray.core.gram_kmeans import PRODUCTS, KMeansSettings, gram_kmeans
from ddoq_ray.core.rng import philox

MEASURED = ["classes", "seconds", "transfer_s", "classes_per_s", "distortion_pct", "peak_gib"]
COLUMNS = ["dim", "k", "method", "on", *MEASURED]


def synthetic_class(n: int, dim: int, class_id: int) -> np.ndarray:
    """float16 [n, dim]: 30 modes of unequal mass, a 1/f spectrum of 300 directions, unequal contrast, white noise."""
    rng = philox("gpu_quantize", n, dim, class_id)
    rank = min(300, dim)
    directions = rng.standard_normal((rank, dim), dtype=np.float32)
    directions /= np.sqrt(np.arange(1, rank + 1, dtype=np.float32))[:, None]
    mass = 1.0 / np.arange(1, 31)
    modes = rng.standard_normal((30, rank), dtype=np.float32)
    loads = modes[rng.choice(30, size=n, p=mass / mass.sum())] + rng.standard_normal((n, rank), dtype=np.float32)
    contrast = rng.uniform(0.5, 1.5, (n, 1)).astype(np.float32)
    x = contrast * (loads @ directions)
    return (x / x.std() + 0.3 * rng.standard_normal((n, dim), dtype=np.float32)).astype(np.float16)


def scores(scored: list[tuple[np.ndarray, float]], centroids: list[np.ndarray]) -> float:
    """Mean over (samples, variance) of 100 * distortion / variance; further centroids are ignored."""
    parts = [distortion(x, c) / variance for (x, variance), c in zip(scored, centroids, strict=False)]
    return 100.0 * float(np.mean(parts))


def variance(x: np.ndarray) -> float:
    return float(np.var(x.astype(np.float32), axis=0, dtype=np.float64).sum())


def transfer(classes: list[np.ndarray]) -> float:
    """Seconds that copying the classes to the GPU takes, one after the other, from pageable memory."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for x in classes:
        torch.from_numpy(x).to("cuda")
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(quantize: Callable[[], list[np.ndarray]], scored: list[tuple[np.ndarray, float]]) -> dict[str, Any]:
    """A row of `quantize`, which returns the centroids of each class on the host."""
    start = time.perf_counter()
    centroids = quantize()
    seconds = time.perf_counter() - start
    row = {"classes": len(centroids), "seconds": seconds, "classes_per_s": len(centroids) / seconds}
    return row | {"distortion_pct": scores(scored, centroids)}


def batch(classes: list[np.ndarray], k: int, **how: Any) -> list[np.ndarray]:
    return [c for c, _ in gram_kmeans_batched(classes, k, seed=0, class_ids=range(len(classes)), **how)]


def loop(one: Callable[[np.ndarray, int, int], np.ndarray], classes: list[np.ndarray], k: int) -> list[np.ndarray]:
    return [one(x, k, class_id) for class_id, x in enumerate(classes)]


def gram_one(x: np.ndarray, k: int, class_id: int) -> np.ndarray:
    return gram_kmeans(x, k, seed=0, class_id=class_id)[0]


def faiss_on_gpu() -> Callable[[np.ndarray, int, int], np.ndarray] | None:
    """faiss.Kmeans on the GPU, 25 iterations as it comes; None where it is missing or sees no GPU."""
    try:
        import faiss
    except ImportError:
        return None
    if not getattr(faiss, "get_num_gpus", int)():
        return None

    def quantize(x: np.ndarray, k: int, seed: int) -> np.ndarray:
        kmeans = faiss.Kmeans(x.shape[1], k, gpu=True, seed=seed, min_points_per_centroid=1)
        kmeans.train(x.astype(np.float32))
        return np.asarray(kmeans.centroids)

    return quantize


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--classes", type=int, help="classes of one batch (default: 1000 on a GPU, 4 on a CPU)")
    arguments.add_argument("--distinct", type=int, default=16, help="different classes among them")
    arguments.add_argument("--looped", type=int, default=4, help="classes for the methods that take one at a time")
    arguments.add_argument("--n", type=int, default=1300)
    arguments.add_argument("--dim", type=int, nargs="+", default=[4096, 16384])
    arguments.add_argument("--k", type=int, nargs="+", default=[10, 50, 100, 200])
    arguments.add_argument("--max-gib", type=float, help="memory of one group (default: 0.8 of the GPU's; 8 on a CPU)")
    asked = arguments.parse_args()
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    total = asked.classes or (1000 if gpu else 4)
    max_bytes = int(0.8 * torch.cuda.mem_get_info()[0]) if gpu else MAX_BYTES
    if asked.max_gib:
        max_bytes = int(asked.max_gib * 2**30)
    faiss = faiss_on_gpu() if gpu else None
    about = {"gpu": torch.cuda.get_device_name() if gpu else "none", "torch": torch.__version__, "n": asked.n}
    rows: list[dict[str, Any]] = []

    def report(dim: int, k: int, method: str, on: str, measured: dict[str, Any] | None) -> None:
        row = {"dim": dim, "k": k, "method": method, "on": on} | about
        rows.append(row | (dict.fromkeys(MEASURED, "not measured") if measured is None else measured))
        print(*(f"{c}={rows[-1].get(c)}" for c in COLUMNS), flush=True)

    ways = {product: KMeansSettings(product=product, max_bytes=max_bytes) for product in PRODUCTS}
    for dim in asked.dim:
        distinct = [synthetic_class(asked.n, dim, c) for c in range(min(asked.distinct, total))]
        classes = [distinct[i % len(distinct)] for i in range(total)]
        scored = [(x, variance(x)) for x in distinct[: asked.looped]]
        for settings in ways.values():  # libraries load and choose kernels on first use
            gram_kmeans_batched(distinct[:1], 2, seed=0, class_ids=[0], settings=settings, device=device)
        transfer_s = transfer(classes) if gpu else None
        for k in asked.k:
            for product, settings in ways.items():
                how = {"settings": settings, "device": device}
                if gpu:
                    torch.cuda.reset_peak_memory_stats()
                row = measure(partial(batch, classes, k, **how), scored)
                if gpu:
                    row["transfer_s"] = transfer_s
                    row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
                    row["max_gib"] = max_bytes / 2**30
                    row["formula_gib"] = group_bytes([(asked.n, 2)] * total, dim, k) / 2**30  # were it one group
                report(dim, k, f"gram-batched-{product}", device, row)
                if not gpu:
                    report(dim, k, f"gram-batched-{product}", "cuda", None)
            report(dim, k, "gram-numpy", "cpu", measure(partial(loop, gram_one, distinct[: asked.looped], k), scored))
            if faiss is None:
                report(dim, k, "faiss", "cuda", None)
            else:
                faiss(distinct[0], k, 0)
                report(dim, k, "faiss", "cuda", measure(partial(loop, faiss, distinct[: asked.looped], k), scored))
    finish(rows, COLUMNS, asked.json)


if __name__ == "__main__":
    main()
