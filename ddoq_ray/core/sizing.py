"""What quantizing costs in memory, and which algorithm a class of a given size can have.

Shapes: N samples of a class, K centroids, D flattened latent dimension. All sizes are bytes.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from ddoq_ray.core.distortion import F64

GIB = 1 << 30
CLASS_OVERHEAD = 6 << 10  # of one open class beside its rows: objects, array headers, squared norms

Exact = Literal["gram", "faiss", "clvq"]


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


def gram_bytes(n: npt.ArrayLike, dim: int) -> F64:
    """Memory of one class in Gram space: 8 n D + 12 n^2 (latents and their centred copy, Gram matrix and work)."""
    size = np.asarray(n, np.float64)
    return 8.0 * size * dim + 12.0 * size**2


def exact_algorithm(n: int, dim: int, *, max_gram_bytes: float, max_class_bytes: float) -> Exact:
    """The algorithm that a class gets when the Gram space was asked for: a function of its size alone.

    `gram` while the Gram matrix (4 n^2) and the class (`gram_bytes`) keep their bounds; else `faiss` while two
    float32 copies of the class (8 n D) do; else `clvq`, which needs no class in memory.

    >>> [exact_algorithm(n, 4096, max_gram_bytes=2 * GIB, max_class_bytes=8 * GIB) for n in (1300, 50_000, 10**6)]
    ['gram', 'faiss', 'clvq']
    """
    if 4.0 * n * n <= max_gram_bytes and gram_bytes(n, dim) <= max_class_bytes:
        return "gram"
    return "faiss" if 8.0 * n * dim <= max_class_bytes else "clvq"
