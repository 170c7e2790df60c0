"""The k-means that others use, with one return type: centroids float32 [K, D] and counts int64 [K].

Always exactly K = k rows: a cell may be empty here (count 0), as the libraries leave it. Counts sum to N.

Shapes: N samples of a class, K centroids, D flattened latent dimension.
"""

from __future__ import annotations

import warnings
from typing import Literal

import numpy as np
import numpy.typing as npt

from ddoq_ray.core.distortion import F32, I64, check_samples, voronoi_counts
from ddoq_ray.core.rng import philox


def minibatch_kmeans(
    x: npt.ArrayLike,
    k: int,
    *,
    variant: Literal["d4m", "sklearn"] = "d4m",
    seed: int,
    class_id: int,
    km_expand: int = 1,
    leftovers: Literal["drop", "keep"] = "drop",
    counts: Literal["voronoi", "running"] = "voronoi",
    random_state: int | None = None,
) -> tuple[F32, I64]:
    """scikit-learn's MiniBatchKMeans, as D4M ran it or as its `fit` runs.

    `d4m`: `partial_fit` on consecutive batches of exactly km_expand * k samples; the leftovers of a class
    (up to km_expand * k - 1 samples) never reach the model. In D4M this holds for every class but the last
    one seen, whose short batch is used: `leftovers="keep"`. `sklearn`: `fit` with the library's defaults;
    `km_expand` and `leftovers` have no meaning there.

    Args:
        x: float [N, D], in stream order (D4M's loader shuffles without a seed), N >= k.
        k: number of centroids.
        variant: see above.
        seed: the run's seed.
        class_id: keys the library's random_state together with the seed.
        km_expand: D4M's option of that name; its ImageNet script has 1.
        leftovers: see above.
        counts: `voronoi` = samples of x in each Voronoi cell (they sum to N, dropped ones included);
            `running` = scikit-learn's own `_counts`, which drift, and which its random reassignment of small
            cells resets.
        random_state: overrides the derived one; D4M uses 0.

    Raises:
        ValueError: N < k, or an unknown option, or one that has no effect.

    Source: Su et al., CVPR 2024, released code (gen_prototype.py); arXiv 2501.07681, Algorithm 3; Sculley
    2010.

    Differences from D4M: latents are taken as given (D4M samples the posterior, and clusters half-precision
    latents that scikit-learn turns to float64; here they stay float32).
    """
    from sklearn.cluster import MiniBatchKMeans

    x = _check(x, k)
    if variant not in ("d4m", "sklearn"):
        raise ValueError(f'variant must be "d4m" or "sklearn", got {variant!r}')
    if counts not in ("voronoi", "running") or leftovers not in ("drop", "keep"):
        raise ValueError(f'expected counts voronoi|running and leftovers drop|keep, got "{counts}", "{leftovers}"')
    state = _random_state(seed, class_id, "minibatch") if random_state is None else random_state
    if variant == "sklearn":
        if km_expand != 1 or leftovers != "drop":
            raise ValueError('km_expand and leftovers have an effect only with variant="d4m"')
        model = MiniBatchKMeans(n_clusters=k, random_state=state, n_init="auto").fit(x)
    else:
        size = km_expand * k
        if km_expand < 1 or (size > len(x) and leftovers == "drop"):
            raise ValueError(
                f"a batch is km_expand * k = {size} samples and x has {len(x)}: D4M makes no centroid then; "
                'lower k or km_expand, or set leftovers="keep"'
            )
        model = MiniBatchKMeans(n_clusters=k, random_state=state, n_init="auto", batch_size=size)
        stop = len(x) if leftovers == "keep" else len(x) - len(x) % size
        for start in range(0, stop, size):
            model.partial_fit(x[start : min(start + size, stop)])
    centroids = np.ascontiguousarray(model.cluster_centers_, np.float32)
    if counts == "running":
        return centroids, np.rint(model._counts).astype(np.int64)
    return centroids, voronoi_counts(x, centroids)


def lloyd(
    x: npt.ArrayLike,
    k: int,
    *,
    seed: int,
    class_id: int,
    init: Literal["k-means++", "random"] = "k-means++",
    n_init: int = 1,
    max_iter: int = 300,
) -> tuple[F32, I64]:
    """scikit-learn's KMeans (Lloyd), for comparison.

    Args:
        x: float [N, D], N >= k.
        k: number of centroids.
        seed: the run's seed.
        class_id: keys the library's random_state together with the seed.
        init: start.
        n_init: runs; the best is kept.
        max_iter: passes of one run.

    Raises:
        ValueError: N < k, or wrong shape or type.

    Source: arXiv 2501.07681, Algorithm 2.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    x = _check(x, k)
    model = KMeans(
        n_clusters=k,
        init=init,
        n_init=n_init,
        max_iter=max_iter,
        random_state=_random_state(seed, class_id, "lloyd"),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct samples than k: counts of 0 tell it
        model.fit(x)
    centroids = np.ascontiguousarray(model.cluster_centers_, np.float32)
    return centroids, voronoi_counts(x, centroids)


def faiss_kmeans(x: npt.ArrayLike, k: int, *, seed: int, class_id: int, n_iter: int = 25) -> tuple[F32, I64]:
    """faiss.Kmeans on all samples (its default of 256 samples a centroid is lifted): for very large classes.

    Args:
        x: float [N, D], N >= k.
        k: number of centroids.
        seed: the run's seed.
        class_id: keys the library's seed together with the seed.
        n_iter: Lloyd passes from a random start.

    Raises:
        ValueError: N < k, or wrong shape or type.

    Source: Johnson, Douze, Jegou, "Billion-scale similarity search with GPUs", 2017.
    """
    import faiss

    x = _check(x, k)
    model = faiss.Kmeans(
        x.shape[1],
        k,
        niter=n_iter,
        seed=_random_state(seed, class_id, "faiss"),
        min_points_per_centroid=1,
        max_points_per_centroid=len(x) // k + 1,
        verbose=False,
    )
    model.train(x)
    centroids = np.ascontiguousarray(model.centroids, np.float32).reshape(k, x.shape[1])
    return centroids, voronoi_counts(x, centroids)


def _check(x: npt.ArrayLike, k: int) -> F32:
    array = check_samples(x).astype(np.float32, copy=False)
    if k < 1 or len(array) < k:
        raise ValueError(f"these algorithms need 1 <= k <= samples, got k={k} and {len(array)} samples: cap k")
    return array


def _random_state(seed: int, class_id: int, name: str) -> int:
    return int(philox("baseline", name, seed, class_id).integers(2**31 - 1))
