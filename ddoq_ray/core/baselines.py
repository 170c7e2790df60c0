"""What others do: their k-means, and their ways to choose real samples.

The k-means have one return type: centroids float32 [K, D] and counts int64 [K], always exactly K = k rows: a cell may
be empty here (count 0), as the libraries leave it. Counts sum to N. The choices of samples, `herding` and `medoids`,
return positions in the class.

Shapes: N samples of a class, K centroids, D flattened latent dimension.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ddoq_ray.core.distortion import (
    F32,
    I64,
    check_pair,
    check_samples,
    nearest,
    pair_distances,
    squared_distances,
    voronoi_counts,
)
from ddoq_ray.core.rng import philox


@dataclass(frozen=True)
class D4mOptions:
    """What D4M's script does beside k-means, each with the way out.

    Attributes:
        km_expand: a batch is km_expand * k samples. D4M's option of that name; its ImageNet script has 1: one new
            sample a centroid and step, where the library's default batch is 1,024.
        leftovers: what does not fill a batch, up to km_expand * k - 1 samples of a class (100 of 1,300 at K = 200),
            never reaches the model: `drop`. The last class that D4M sees is the exception: `keep`.
        counts: `voronoi` = samples of x in each Voronoi cell (they sum to N, dropped ones included). `running` = the
            library's own `_counts`, which are no Voronoi masses: every 10 K samples, and whenever a count is 0, a
            centroid whose count is below a hundredth of the largest moves onto a sample of the batch, and its count
            becomes the least of the others; counts of earlier positions stay. D4M drops them all and weighs its
            images alike.
        random_state: overrides the one that is derived from seed and class. D4M has 0 for every class, so that all
            classes share their draws.

    Raises:
        ValueError: an unknown option, or km_expand below 1.
    """

    km_expand: int = 1
    leftovers: Literal["drop", "keep"] = "drop"
    counts: Literal["voronoi", "running"] = "voronoi"
    random_state: int | None = None

    def __post_init__(self) -> None:
        if self.counts not in ("voronoi", "running") or self.leftovers not in ("drop", "keep"):
            raise ValueError(
                f'expected counts voronoi|running and leftovers drop|keep, got "{self.counts}", "{self.leftovers}"'
            )
        if self.km_expand < 1:
            raise ValueError(f"km_expand must be >= 1, got {self.km_expand}")


AS_D4M = D4mOptions()


def d4m_kmeans(x: npt.ArrayLike, k: int, *, seed: int, class_id: int, options: D4mOptions = AS_D4M) -> tuple[F32, I64]:
    """scikit-learn's MiniBatchKMeans as D4M ran it: one pass in batches of K, by `partial_fit`.

    Each sample is seen once. In the first batch, k-means++ draws k centroids from k samples, so the first k samples are
    the first centroids. For the rest that the library does not intend, all of it kept by default, see `D4mOptions`.

    Args:
        x: float [N, D], in stream order (D4M's loader shuffles without a seed), N >= k.
        k: number of centroids.
        seed: the run's seed.
        class_id: keys the library's random_state together with the seed.
        options: what is not to be as in D4M's script.

    Raises:
        ValueError: N < k, or no batch is full.

    Source: Su et al., CVPR 2024, released code (gen_prototype.py); arXiv 2501.07681, Algorithm 3; Sculley
    2010.

    Differences from D4M: the latents are the caller's, float32. D4M samples the posterior (here it is the mode),
    squashes images to 512 x 512 first, shuffles them without a seed, and clusters half-precision latents, which
    scikit-learn turns to float64. Its random_state is 0; here it is derived from seed and class unless given.
    """
    from sklearn.cluster import MiniBatchKMeans

    x = _check(x, k)
    state = options.random_state
    size = options.km_expand * k
    if size > len(x) and options.leftovers == "drop":
        raise ValueError(
            f"a batch is km_expand * k = {size} samples and x has {len(x)}: D4M makes no centroid then; "
            'lower k or km_expand, or set leftovers="keep"'
        )
    model = MiniBatchKMeans(
        n_clusters=k,
        random_state=_random_state(seed, class_id, "minibatch") if state is None else state,
        n_init="auto",
        batch_size=size,
    )
    stop = len(x) if options.leftovers == "keep" else len(x) - len(x) % size
    for start in range(0, stop, size):
        model.partial_fit(x[start : min(start + size, stop)])
    centroids = np.ascontiguousarray(model.cluster_centers_, np.float32)
    if options.counts == "running":
        return centroids, np.rint(model._counts).astype(np.int64)
    return centroids, voronoi_counts(x, centroids)


def minibatch_kmeans(x: npt.ArrayLike, k: int, *, seed: int, class_id: int) -> tuple[F32, I64]:
    """scikit-learn's MiniBatchKMeans by its own `fit`: many passes of batches of 1,024, drawn with replacement.

    Args:
        x: float [N, D], N >= k.
        k: number of centroids.
        seed: the run's seed.
        class_id: keys the library's random_state together with the seed.

    Raises:
        ValueError: N < k, or wrong shape or type.

    Source: Sculley, "Web-scale k-means clustering", WWW 2010.
    """
    from sklearn.cluster import MiniBatchKMeans

    x = _check(x, k)
    state = _random_state(seed, class_id, "minibatch")
    model = MiniBatchKMeans(n_clusters=k, random_state=state, n_init="auto").fit(x)
    centroids = np.ascontiguousarray(model.cluster_centers_, np.float32)
    return centroids, voronoi_counts(x, centroids)


def lloyd(x: npt.ArrayLike, k: int, *, seed: int, class_id: int) -> tuple[F32, I64]:
    """scikit-learn's KMeans (Lloyd) with its defaults: one run of at most 300 passes from k-means++, for comparison.

    Args:
        x: float [N, D], N >= k.
        k: number of centroids.
        seed: the run's seed.
        class_id: keys the library's random_state together with the seed.

    Raises:
        ValueError: N < k, or wrong shape or type.

    Source: arXiv 2501.07681, Algorithm 2.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    x = _check(x, k)
    model = KMeans(n_clusters=k, n_init=1, random_state=_random_state(seed, class_id, "lloyd"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct samples than k: counts of 0 tell it
        model.fit(x)
    centroids = np.ascontiguousarray(model.cluster_centers_, np.float32)
    return centroids, voronoi_counts(x, centroids)


def faiss_kmeans(x: npt.ArrayLike, k: int, *, seed: int, class_id: int, device: str = "cpu") -> tuple[F32, I64]:
    """faiss.Kmeans, 25 Lloyd passes from a random start, on all samples: for very large classes.

    The library would draw 256 samples a centroid; that bound is lifted.

    Args:
        x: float [N, D], N >= k.
        k: number of centroids.
        seed: the run's seed.
        class_id: keys the library's seed together with the seed.
        device: "cpu", or "cuda" for the GPUs that this process sees, where faiss was built for them and finds one;
            else the CPU. The samples stay in host memory and pass through the GPU in blocks. Sums are of another order
            there, so the bytes are not those of the CPU. The counts are made on the CPU.

    Raises:
        ValueError: N < k, or wrong shape or type.

    Source: Johnson, Douze, Jegou, "Billion-scale similarity search with GPUs", 2017.
    """
    import faiss

    x = _check(x, k)
    model = faiss.Kmeans(
        x.shape[1],
        k,
        niter=25,
        seed=_random_state(seed, class_id, "faiss"),
        min_points_per_centroid=1,
        max_points_per_centroid=len(x) // k + 1,
        verbose=False,
        gpu=_faiss_takes_gpu(device, getattr(faiss, "get_num_gpus", int)()),  # no such function: built without GPUs
    )
    model.train(x)
    centroids = np.ascontiguousarray(model.centroids, np.float32).reshape(k, x.shape[1])
    return centroids, voronoi_counts(x, centroids)


def _faiss_takes_gpu(device: str, found: int) -> bool:
    """Whether k-means of faiss, which found so many GPUs, runs on them.

    >>> [_faiss_takes_gpu(device, found) for device, found in (("cuda", 1), ("cuda:0", 2), ("cuda", 0), ("cpu", 1))]
    [True, True, False, False]
    """
    return device.startswith("cuda") and found > 0


def herding(x: npt.ArrayLike, k: int) -> I64:
    """Herding: real samples, chosen one by one so that their running mean follows the mean of the class.

    Step j takes the sample, among those not taken, that brings the mean of the j taken ones nearest to the class
    mean. Deterministic, and nested: the first j of k are the choice for j. Ties go to the lowest position.

    Args:
        x: float [N, D], the latents of a class.
        k: samples to choose, 1 <= k <= N.

    Returns:
        int64 [k], distinct positions in x, in the order of choice.

    Raises:
        ValueError: N < k, or wrong shape or type.

    Source: Welling, "Herding dynamical weights to learn", ICML 2009; in this form Rebuffi et al. (iCaRL), CVPR 2017,
    Algorithm 4, which the distillation literature calls herding.

    Differences: Welling's samples may repeat; a distilled set needs distinct ones. Features are latents of the prior,
    where others take those of a classifier.

    >>> herding(np.array([[0.0], [4.0], [5.0], [7.0]]), 2).tolist()
    [1, 2]
    """
    x = _check(x, k)
    mean = x.mean(axis=0, dtype=np.float64)
    left = np.arange(len(x))
    taken = np.empty(k, np.int64)
    total = np.zeros_like(mean)
    for step in range(k):
        # The mean of step + 1 samples is the class mean when the new one is this:
        target = (step + 1) * mean - total
        place = int(nearest(target[None], x[left])[0])
        taken[step] = left[place]
        total += x[taken[step]]
        left = np.delete(left, place)
    return taken


def medoids(x: npt.ArrayLike, centroids: npt.ArrayLike) -> I64:
    """The real sample nearest to each centroid; distinct samples.

    Where two centroids have the same nearest sample, the closer one keeps it and the other takes its next nearest,
    and so on: no centroid and sample are closer to each other than both are to what they have. Ties go to the lowest
    centroid, then to the lowest position.

    Args:
        x: float [N, D], the latents of a class.
        centroids: float [K, D], K <= N.

    Returns:
        int64 [K], distinct positions in x, in the order of the centroids.

    Raises:
        ValueError: N < K, no centroid, or wrong shape or type.

    >>> medoids(np.array([[0.0], [1.0], [9.0]]), np.array([[0.2], [0.1], [0.9]])).tolist()
    [2, 0, 1]
    """
    x, c = check_pair(x, centroids)
    x, k = _check(x, len(c)), len(c)
    cost = squared_distances(x, c)
    # A centroid can lose at most K - 1 samples to the others: its K nearest suffice. The margin, far above rounding,
    # takes in those that tie with the last of them; which is nearest is then told by exact differences.
    limit = np.partition(cost, k - 1, axis=0)[k - 1]
    rows, cols = np.nonzero(cost <= limit * (1 + 1e-9) + 1e-9 * cost.max())
    exact = pair_distances(x, c, rows, cols)
    chosen = np.full(k, -1)
    free = np.ones(len(x), bool)
    for pair in np.lexsort((rows, cols, exact)):
        if chosen[cols[pair]] < 0 and free[rows[pair]]:
            chosen[cols[pair]] = rows[pair]
            free[rows[pair]] = False
    return chosen


def _check(x: npt.ArrayLike, k: int) -> F32:
    array = check_samples(x).astype(np.float32, copy=False)
    if k < 1 or len(array) < k:
        raise ValueError(f"these algorithms need 1 <= k <= samples, got k={k} and {len(array)} samples: cap k")
    return array


def _random_state(seed: int, class_id: int, name: str) -> int:
    return int(philox("baseline", name, seed, class_id).integers(2**31 - 1))
