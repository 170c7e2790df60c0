"""Exact k-means in Gram space for many classes at once, in torch: the algorithm of `gram_kmeans` on one GPU.

A class's Gram matrix is one product, large enough to fill a device. What follows it is small and many: k-means++,
Lloyd and Hartigan's exchange therefore run for all classes of a group together, on their stacked Gram matrices.
Unequal class sizes are masked: a padding point has mass 0.

Shapes: C classes of a group, A of them still moving, n_c samples of class c, N the largest n_c of the group, K
centroids, D flattened latent dimension, T trials of k-means++.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddoq_ray.core.distortion import F32, I64, check_samples, screening_tolerance
from ddoq_ray.core.gram_batched_steps import distortion_sum, exchange, kmeans_plus_plus, lloyd, seed_uniforms, start
from ddoq_ray.core.gram_kmeans import DEFAULTS, KMeansSettings, distinct_rows
from ddoq_ray.core.sizing import group_bytes

MAX_BYTES = 8 << 30  # fixed, not read from the device: the groups, and so the bytes, depend on the input alone


def gram_kmeans_batched(
    latents: Sequence[npt.NDArray[np.floating]],
    k: int,
    *,
    seed: int,
    class_ids: Sequence[int],
    settings: KMeansSettings = DEFAULTS,
    device: str = "cpu",
) -> list[tuple[F32, I64]]:
    """Quantizes each class to K_c = min(k, its distinct samples) centroids with counts.

    Greedy k-means++ (2 + int(ln k) trials, from the uniforms that `gram_kmeans` draws for the class), Lloyd until no
    point moves, then Hartigan's exchange: in each round every class makes exchanges between disjoint pairs of cells,
    best first, until none lowers its distortion. Exchanges of disjoint pairs leave each other's gains exact, so each
    lowers the distortion by its own gain. Copies of a sample share a cell.

    A class's result depends on its own samples, its key (seed, class_id) and, through the rounding of batched sums
    alone, on the classes grouped with it. Equal input, settings, device kind, library versions and CPU threads give
    equal bytes.

    Args:
        latents: one float16, float32 or float64 array [n_c, D] a class, n_c >= 1, one D.
        k: number of centroids wanted.
        seed: the run's seed.
        class_ids: one integer a class, all different; keys the generator together with the seed.
        settings: a product of "float32" is never TF32, whatever torch is set to; for "bfloat16" centred samples are
            rounded and their products summed in float32, which on a CPU costs as much. The exchange may take k times
            `max_iter` rounds, each of up to k/2 moves. `max_bytes` (default MAX_BYTES) is device memory: classes are
            taken by falling size, in groups that fit it by the formula of `sizing.group_bytes`.
        device: "cpu", "cuda" or "cuda:<index>".

    Returns:
        For each class, in order: centroids float32 [K_c, D], the means of the cells' full samples, summed in float64
        and rounded once; and counts int64 [K_c], all >= 1, which sum to n_c.

    Raises:
        ValueError: bad argument; a class that is empty, not finite, or too large for `max_bytes` on its own.

    Source: arXiv 2501.07681, Algorithm 2 (Lloyd I); Arthur & Vassilvitskii 2007 (k-means++); Telgarsky & Vattani,
    "Hartigan's method: k-means clustering without Voronoi", AISTATS 2010.

    Differences from the paper: the exact batch problem in the place of mini-batch k-means, as in `gram_kmeans`.

    >>> x, y = np.array([[0.0], [0.2], [9.0]]), np.array([[5.0]])
    >>> (_, counts), (centroids, _) = gram_kmeans_batched([x, y], 2, seed=0, class_ids=[3, 7])
    >>> sorted(counts.tolist()), centroids.tolist()
    ([1, 2], [[5.0]])
    """
    arrays = _check(latents, k, class_ids, device)
    results: dict[int, tuple[F32, I64]] = {}
    large: dict[int, npt.NDArray[np.floating]] = {}
    for x, class_id in zip(arrays, class_ids, strict=True):
        if len(x) > k:
            large[class_id] = x
        else:
            results[class_id] = _distinct_samples(check_samples(x, f"the latents of class {class_id}"))
    if large:
        results |= _by_groups(large, k, seed, settings, device)
    return [results[class_id] for class_id in class_ids]


def _by_groups(
    classes: dict[int, npt.NDArray[np.floating]], k: int, seed: int, settings: KMeansSettings, device: str
) -> dict[int, tuple[F32, I64]]:
    """Centroids and counts of classes of more than k samples each, by class id."""
    most = MAX_BYTES if settings.max_bytes is None else settings.max_bytes
    ids, arrays = list(classes), list(classes.values())
    shapes = [(len(x), x.itemsize) for x in arrays]
    results: dict[int, tuple[F32, I64]] = {}
    with torch.inference_mode(), _ieee_products():
        for places in group_classes(shapes, arrays[0].shape[1], k, most, ids):
            group = _load([arrays[p] for p in places], [ids[p] for p in places], settings.product, device)
            labels = _partition(group, k, seed, settings)
            for c, p in enumerate(places):
                results[ids[p]] = _cell_means(group.latents[c], labels[c])
            del group  # before the next group takes its memory
    return results


def group_classes(
    shapes: Sequence[tuple[int, int]], dim: int, k: int, max_bytes: int, class_ids: Sequence[int]
) -> list[list[int]]:
    """Places of classes in groups that fit `max_bytes`: by falling size, none padded to more than twice its own.

    Args: as `group_bytes`; and class_ids, to name the class that does not fit.

    Raises:
        ValueError: a class does not fit on its own.
    """
    groups: list[list[int]] = []
    for place in sorted(range(len(shapes)), key=lambda p: (-shapes[p][0], p)):
        n, itemsize = shapes[place]
        alone = group_bytes([shapes[place]], dim, k)
        if alone > max_bytes:
            raise ValueError(
                f"class {class_ids[place]} has n={n} samples of D={dim} and needs s n D + 24 n^2 + 64 k n + 16 n D = "
                f"{alone} bytes (s={itemsize}, k={k}), above max_bytes={max_bytes}: quantize it with the faiss or "
                "clvq quantizer, or raise max_bytes"
            )
        joined = [*groups[-1], place] if groups and 2 * n >= shapes[groups[-1][0]][0] else []
        if joined and group_bytes([shapes[p] for p in joined], dim, k) <= max_bytes:
            groups[-1] = joined
        else:
            groups.append([place])
    return groups


def _check(
    latents: Sequence[npt.NDArray[np.floating]],
    k: int,
    class_ids: Sequence[int],
    device: str,
) -> list[npt.NDArray[np.floating]]:
    """The latents as arrays, their shapes checked; their values are checked on the device (`_load`)."""
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")
    if torch.device(device).type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device!r}")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, but torch sees no GPU here: use device='cpu'")
    if len(class_ids) != len(latents) or len(set(class_ids)) != len(latents):
        raise ValueError(f"class_ids must name {len(latents)} different classes, one an array, got {list(class_ids)}")
    arrays = [np.asarray(x) for x in latents]
    for x, class_id in zip(arrays, class_ids, strict=True):
        if x.ndim != 2 or x.shape[1] == 0 or x.dtype not in (np.float16, np.float32, np.float64):
            raise ValueError(
                f"the latents of class {class_id} must be float16, float32 or float64 [n, D], got {x.dtype} {x.shape}"
            )
        if not len(x):
            raise ValueError(f"class {class_id} is empty: a class without samples has no centroids, leave it out")
        if x.shape[1] != arrays[0].shape[1]:
            raise ValueError(
                f"all classes need one D: class {class_id} has {x.shape[1]}, class {class_ids[0]} {arrays[0].shape[1]}"
            )
    return arrays


@contextmanager
def _ieee_products() -> Iterator[None]:
    """Keeps float32 products from TF32 and bfloat16, for the whole process, and restores what was set before."""
    places: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision


def _distinct_samples(x: npt.NDArray[np.floating]) -> tuple[F32, I64]:
    first, _, copies = distinct_rows(x)
    return x[first].astype(np.float32), copies


@dataclass
class _Group:
    """Some classes on the device, padded to the largest.

    latents: [n_c, D] of each, as they came. gram: float32 [C, N, N] of the distinct samples, 0 in the padding. mass:
    float64 [C, N], copies of each distinct sample, 0 in the padding. inverse: where there are copies, the distinct
    sample of each sample, int64 [n_c].
    """

    latents: list[Tensor]
    class_ids: list[int]
    gram: Tensor
    mass: Tensor
    inverse: dict[int, Tensor]


def _load(arrays: list[npt.NDArray[np.floating]], class_ids: list[int], product: str, device: str) -> _Group:
    largest = max(map(len, arrays))
    gram = torch.zeros((len(arrays), largest, largest), dtype=torch.float32, device=device)
    mass = torch.zeros((len(arrays), largest), dtype=torch.float64, device=device)
    latents, checks = [], []
    for c, x in enumerate(arrays):
        # torch wants writable memory, though nothing writes to it here
        latents.append(torch.from_numpy(np.require(x, requirements=["C", "W"])).to(device))
        own = _gram_matrix(latents[c], product)
        checks.append(torch.stack((own.diagonal().isfinite().all(), _may_hold_copies(own, x.shape[1]))))
        gram[c, : len(x), : len(x)] = own
        mass[c, : len(x)] = 1.0
        del own
    group = _Group(latents, class_ids, gram, mass, {})
    for c, (finite, copies) in enumerate(torch.stack(checks).tolist()):  # one wait for the device a group
        if not finite:
            check_samples(arrays[c], f"the latents of class {class_ids[c]}")
            raise ValueError(f"the latents of class {class_ids[c]} are too large to be squared in float32: scale them")
        if copies:
            _fold_copies(group, c, arrays[c])
    return group


def _gram_matrix(x: Tensor, product: str) -> Tensor:
    """Float32 [n, n] product of the centred samples [n, D], exactly symmetric.

    Any float32 point near the mean serves as the centre: it cancels in every difference.
    """
    x = x.float() if x.dtype == torch.float16 else x
    centred = (x - x.mean(dim=0)).float()
    if product == "bfloat16":
        rounded = centred.bfloat16()
        if x.is_cuda:
            gram = torch.mm(rounded, rounded.T, out_dtype=torch.float32)
        else:  # torch's CPU product would round the sums to bfloat16; these products are exact in float32
            rounded = rounded.float()
            gram = rounded @ rounded.T
    else:
        gram = centred @ centred.T
    return (gram + gram.T).mul_(0.5)


def _may_hold_copies(gram: Tensor, dim: int) -> Tensor:
    """Whether two samples are as near as rounding: bool []. Equal samples always are, wherever the product put them."""
    size = gram.diagonal()
    size = size[:, None] + size
    near = size - 2.0 * gram <= screening_tolerance(dim) * size
    return near.sum() > len(gram)  # each is near itself


def _fold_copies(group: _Group, c: int, x: npt.NDArray[np.floating]) -> None:
    """Leaves one point, with mass, in the place of equal samples of class c."""
    first, inverse, copies = distinct_rows(check_samples(x))  # float16 becomes float32
    if len(first) == len(x):
        return
    kept = torch.from_numpy(first).to(group.gram.device)
    own = group.gram[c][kept][:, kept]
    group.gram[c] = 0.0
    group.gram[c, : len(first), : len(first)] = own
    group.mass[c] = 0.0
    group.mass[c, : len(first)] = torch.from_numpy(copies).to(group.mass)
    group.inverse[c] = torch.from_numpy(inverse).to(group.gram.device)


def _partition(group: _Group, k: int, seed: int, settings: KMeansSettings) -> list[Tensor]:
    """The cells of every class's samples: int64 [n_c], in 0..K_c-1, none empty."""
    distinct = (group.mass > 0.0).sum(dim=1).tolist()
    # Copies can leave a class with no more than k distinct samples: each is a cell.
    some = [c for c, m in enumerate(distinct) if m > k]
    labels = torch.arange(group.mass.shape[1], device=group.mass.device).repeat(len(distinct), 1)
    if some:
        whole = len(some) == len(distinct)
        gram, mass = (group.gram, group.mass) if whole else (group.gram[some], group.mass[some])
        best = best_sum = None
        for restart in range(settings.restarts):
            uniforms = seed_uniforms(seed, [group.class_ids[c] for c in some], restart, k).to(gram.device)
            seeds = kmeans_plus_plus(gram, mass, k, uniforms)
            found = lloyd(gram, mass, start(gram, seeds), k, settings.max_iter)
            if settings.hartigan:
                found, _ = exchange(gram, mass, found, k, k * settings.max_iter)
            if settings.restarts > 1:
                total = distortion_sum(gram, mass, found, k)
                if best is not None and best_sum is not None:
                    better = total < best_sum
                    found = torch.where(better[:, None], found, best)
                    total = torch.where(better, total, best_sum)
                best_sum = total
            best = found
        assert best is not None
        labels[some] = best
    return [
        labels[c][group.inverse[c]] if c in group.inverse else labels[c, : len(x)] for c, x in enumerate(group.latents)
    ]


def _cell_means(x: Tensor, labels: Tensor) -> tuple[F32, I64]:
    """Means and counts of the cells of one class, on the host."""
    counts = torch.bincount(labels)
    member = torch.zeros((len(counts), len(x)), dtype=torch.float64, device=x.device)
    member.scatter_(0, labels[None], 1.0)
    means = (member @ x.double()).div_(counts[:, None]).float()
    assert int(counts.min()) > 0
    return means.cpu().numpy(), counts.cpu().numpy()
