"""Memory formulas by hand-computed values, and the rule that chooses an algorithm by a class's size."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from ddoq_ray.core.clvq import Clvq
from ddoq_ray.core.gram_batched import MAX_BYTES
from ddoq_ray.core.gram_kmeans import gram_kmeans
from ddoq_ray.core.sizing import CLASS_OVERHEAD, GIB, clvq_bytes, exact_algorithm, gram_bytes, group_bytes, in_bytes


@pytest.mark.parametrize(("unit", "size"), [("kB", 1e3), ("MB", 1e6), ("GB", 1e9), ("TB", 1e12)])
def test_what_is_rounded_up_to_a_thousand_is_one_of_the_next_unit(unit: str, size: float) -> None:
    assert in_bytes(size) == in_bytes(0.99996 * size) == f"1.0 {unit}"
    assert in_bytes(0.999 * size) != in_bytes(size)


def test_a_class_holds_its_buffer_then_its_centroids() -> None:
    n = np.array([0, 3, 10, 1000])
    rows = np.array([0, 3, 8, 8])  # K = 5 centroids, from a buffer of 8
    assert clvq_bytes(n, 5, 16, 8).tolist() == (4 * 16 * rows + 24 * 5 + CLASS_OVERHEAD).tolist()


@pytest.mark.parametrize("n", [50, 400])
def test_the_formula_covers_what_a_quantizer_holds(n: int) -> None:
    """At any moment of a stream; and it is no more than a little above the most that it holds."""
    quantizer = Clvq(20, 300, seed=0, class_id=0)
    stated = float(clvq_bytes(n, 20, 300, Clvq.default_buffer(20)))
    most = 0
    for row in np.random.default_rng(0).standard_normal((n, 300)).astype(np.float32):
        quantizer.update(row[None])
        most = max(most, sum(a.nbytes for a in quantizer.state().values()))
    assert most <= stated <= most + CLASS_OVERHEAD + 24 * 20 + 4 * 300  # the row that ends the buffering


@pytest.mark.parametrize(
    ("n", "gram_gib", "class_gib", "expected"),
    [
        (23_170, 2.0, 100.0, "gram"),  # 4 n^2 = 2 GiB
        (23_171, 2.0, 100.0, "faiss"),
        (1300, 2.0, 0.05, "faiss"),  # 8 n D = 0.04 GiB fits, with the Gram matrix it does not
        (1300, 2.0, 0.03, "clvq"),
        (10**6, 2.0, 8.0, "clvq"),
    ],
)
@pytest.mark.parametrize("together", [False, True])
def test_the_rule(n: int, gram_gib: float, class_gib: float, expected: str, together: bool) -> None:
    bounds = {"max_gram_bytes": gram_gib * GIB, "max_class_bytes": class_gib * GIB}
    assert exact_algorithm(n, 4096, 10, together=together, **bounds) == expected


@pytest.mark.parametrize("n", [18_000, 20_000, 23_000])
def test_a_class_that_a_gpu_cannot_hold_goes_to_faiss_and_is_not_refused(n: int) -> None:
    """The chooser counts what the batched form takes, so that whatever it sends there fits the form's own bound."""
    bounds = {"max_gram_bytes": 2 * GIB, "max_class_bytes": 8 * GIB}
    chosen = exact_algorithm(n, 4096, 10, together=True, **bounds)
    fits = group_bytes([(n, 2)], 4096, 10) <= MAX_BYTES
    assert (chosen == "gram") == fits and chosen in ("gram", "faiss")


def test_the_formula_covers_what_a_class_takes_in_gram_space() -> None:
    """numpy tells tracemalloc of every array; the figure is an upper bound, and not a wild one."""
    n, dim, k = 1200, 512, 40
    latents = np.random.default_rng(1).standard_normal((n, dim)).astype(np.float16)
    gram_kmeans(latents[:50], 5, seed=0, class_id=0)  # what is imported on the way is no part of a class
    tracemalloc.start()
    gram_kmeans(latents, k, seed=0, class_id=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    stated = float(gram_bytes(n, dim, k))
    assert peak <= stated <= 3 * peak + (64 << 20)
