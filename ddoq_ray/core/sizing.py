"""Sizes in words; what quantizing costs in memory, and which algorithm a class of a given size can have.

Shapes: N samples of a class, K centroids, D flattened latent dimension. All sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from ddoq_ray.core.distortion import F64

GIB = 1 << 30
_BLOCKS = 48 << 20  # what `core` copies at one time of a matrix that may be as large as the class
CLASS_OVERHEAD = 6 << 10  # of one open class beside its rows: objects, array headers, squared norms

Exact = Literal["gram", "faiss", "clvq"]


def in_bytes(size: float) -> str:
    """A size in words.

    >>> in_bytes(999), in_bytes(7.74e9)
    ('999 B', '7.7 GB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        text = f"{size:.0f}" if unit == "B" else f"{size:.1f}"
        if float(text) < 1000:
            return f"{text} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def clvq_bytes(n: npt.ArrayLike, k: int, dim: int, buffer: int) -> F64:
    """Memory of one open CLVQ class, float64 of the shape of `n`: 4 D max(min(n, buffer), min(n, k)) + 24 K + 6 KiB.

    A class holds its first `buffer` samples until k-means++ has seeded from them, then its K centroids; the larger
    of the two counts.
    """
    size = np.asarray(n, np.float64)
    rows = np.maximum(np.minimum(size, buffer), np.minimum(size, k))
    return 4.0 * dim * rows + 24.0 * k + CLASS_OVERHEAD


def clvq_seeding_bytes(k: int, dim: int, buffer: int) -> float:
    """What the moment of seeding adds, for one class at a time: the chosen rows, and two Gram matrices in float64."""
    return 4.0 * dim * (k + buffer) + 16.0 * buffer**2


def gram_bytes(n: npt.ArrayLike, dim: int, k: int) -> F64:
    """Memory of one class in numpy's Gram space: 14 n D + 5 n^2 + 32 k n + 48 MiB.

    The latents, their distinct rows, these centred and (`product=bfloat16`) rounded; the Gram matrix and the rows of
    it that one round of exchanges moves; sums, costs and their copies for each centroid; and blocks of a fixed size.
    """
    size = np.asarray(n, np.float64)
    return 14.0 * size * dim + 5.0 * size**2 + 32.0 * k * size + _BLOCKS


def group_bytes(shapes: Sequence[tuple[int, int]], dim: int, k: int) -> int:
    """Device memory of one group of `gram_kmeans_batched`: D sum_c s_c n_c + C (8 N^2 + 64 k N) + 16 N (N + D).

    The latents as they came; the Gram matrices, twice, since those of unfinished classes are gathered once half have
    finished; distances and memberships; and one class while its matrix or its means are formed.

    Args:
        shapes: (n_c, s_c) of each class: samples, and bytes of one element. N is the largest n_c.
        dim: D.
        k: centroids.
    """
    largest = max(n for n, _ in shapes)
    stacked = len(shapes) * (8 * largest**2 + 64 * k * largest)
    return dim * sum(n * s for n, s in shapes) + stacked + 16 * largest * (largest + dim)


def exact_algorithm(
    n: int, dim: int, k: int, *, together: bool, max_gram_bytes: float, max_class_bytes: float
) -> Exact:
    """The algorithm that a class gets when the Gram space was asked for: a function of its size and of the hardware.

    `gram` while the Gram matrix (4 n^2) and the class keep their bounds; else `faiss` while two float32 copies of the
    class (8 n D) do; else `clvq`, which needs no class in memory.

    Args:
        n: Latents of the class.
        together: Whether classes go to a GPU together (`group_bytes` of their float16 latents, 24 n^2 and more), or
            one by one through numpy (`gram_bytes`).

    >>> bounds = {"together": False, "max_gram_bytes": 2 * GIB, "max_class_bytes": 8 * GIB}
    >>> [exact_algorithm(n, 4096, 10, **bounds) for n in (1300, 50_000, 10**6)]
    ['gram', 'faiss', 'clvq']
    """
    needed = group_bytes([(n, 2)], dim, k) if together else float(gram_bytes(n, dim, k))
    if 4.0 * n * n <= max_gram_bytes and needed <= max_class_bytes:
        return "gram"
    return "faiss" if 8.0 * n * dim <= max_class_bytes else "clvq"
