import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from sklearn.cluster import KMeans

from ddoq_ray.core import gram_kmeans as g
from ddoq_ray.core.distortion import assign, distortion, voronoi_counts
from ddoq_ray.core.rng import philox


def mixture(n, dim, modes, seed):
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(modes, dim))
    return (means[rng.integers(modes, size=n)] + rng.normal(size=(n, dim)) + 2).astype(np.float32)


def direct_sum(x, labels):
    x = x.astype(np.float64)
    return sum(((x[labels == c] - x[labels == c].mean(0)) ** 2).sum() for c in np.unique(labels))


def test_by_hand():
    x = np.array([[0.0], [1.0], [10.0], [11.0], [12.0]])
    centroids, counts = g.gram_kmeans(x, 2, seed=0, class_id=0)
    assert sorted(zip(centroids[:, 0].tolist(), counts.tolist(), strict=True)) == [(0.5, 2), (11.0, 3)]
    assert centroids.dtype == np.float32 and counts.dtype == np.int64


@pytest.mark.parametrize("seed", range(6))
def test_finds_the_optimum_of_tiny_problems(seed):
    x = np.random.default_rng(seed).normal(size=(8, 3)).astype(np.float32)
    best = min(direct_sum(x, np.array(cells)) for cells in itertools.product(range(3), repeat=8) if len({*cells}) == 3)
    centroids, _ = g.gram_kmeans(x, 3, seed=seed, class_id=0, settings=g.KMeansSettings(restarts=20))
    assert distortion(x, centroids) * 8 == pytest.approx(best, rel=1e-5)


def test_hartigan_leaves_an_optimum_of_lloyd_that_is_not_one_of_exchange():
    # Cells {-3, 0} and {2}: 0 is at 1.5 from its own mean and at 2 from the other one: Lloyd stops.
    # Exchange: leaving gains 2/1 * 2.25 = 4.5, entering {2} costs 1/2 * 4 = 2: it moves.
    x = np.array([[-3.0], [0.0], [2.0]])
    gram, mass, start = g.gram_matrix(x), np.ones(3), np.array([0, 0, 1])
    assert g.lloyd_gram(gram, mass, start, 2).tolist() == [0, 0, 1]
    assert g.exchange(gram, mass, start, 2)[0].tolist() == [0, 1, 1]


@pytest.mark.parametrize("seed", range(4))
def test_lloyd_in_gram_space_equals_lloyd_on_vectors(seed):
    x = mixture(200, 300, 6, seed)
    start = np.random.default_rng(seed).integers(7, size=200)
    start[:7] = np.arange(7)
    ours = g.lloyd_gram(g.gram_matrix(x), np.ones(200), start, 7)
    means = np.array([x[start == c].mean(0) for c in range(7)])
    theirs = KMeans(7, init=means, n_init=1, tol=0, max_iter=300).fit(x)
    assert (ours == theirs.labels_).all()


@pytest.mark.parametrize("hartigan", [False, True])
def test_the_sum_in_gram_space_is_the_direct_one_and_the_counts_are_voronoi_counts(hartigan):
    x = mixture(250, 400, 8, 1)
    labels, total = g.partition_gram(g.gram_matrix(x), np.ones(250), 12, philox(0), hartigan=hartigan)
    assert total == pytest.approx(direct_sum(x, labels), rel=1e-5)
    centroids, counts = g.cell_means(x, labels)
    assert distortion(x, centroids) * 250 == pytest.approx(total, rel=1e-5)
    assert (counts == voronoi_counts(x, centroids)).all()
    assert (assign(x, centroids)[0] == labels).all()


def test_no_pass_raises_the_distortion():
    x = mixture(300, 50, 10, 2)
    gram, mass = g.gram_matrix(x), np.ones(300)
    labels = np.random.default_rng(0).integers(15, size=300)
    labels[:15] = np.arange(15)
    for step in (g.lloyd_gram, lambda *given, **how: g.exchange(*given, **how)[0]):
        for _ in range(60):
            moved = step(gram, mass, labels, 15, max_iter=1)
            assert direct_sum(x, moved) <= direct_sum(x, labels) * (1 + 1e-9)
            if (moved == labels).all():
                break
            labels = moved
        else:
            pytest.fail("no convergence")


@pytest.mark.parametrize("seed", range(8))
def test_not_worse_than_scikit_learn(seed):
    x = mixture(400, 64, 12, seed)
    theirs = KMeans(20, n_init=1, random_state=seed).fit(x).inertia_ / 400
    twice = g.KMeansSettings(restarts=2)
    assert distortion(x, g.gram_kmeans(x, 20, seed=seed, class_id=0, settings=twice)[0]) <= theirs * (1 + 1e-6)


def test_copies_share_a_cell_and_weigh():
    x = np.repeat(mixture(60, 20, 4, 3), np.random.default_rng(0).integers(1, 5, 60), axis=0)
    x = x[np.random.default_rng(1).permutation(len(x))]
    labels = g.gram_labels(x, 9, seed=0, class_id=0, settings=g.KMeansSettings(restarts=8))
    for row in np.unique(x, axis=0):
        assert len({*labels[(x == row).all(1)].tolist()}) == 1
    theirs = KMeans(9, n_init=8, random_state=0).fit(x).inertia_
    assert direct_sum(x, labels) <= theirs * 1.02


def test_fewer_distinct_samples_than_k():
    x = np.array([[1.0, -0.0], [2.0, 0.0], [1.0, 0.0], [1.0, 0.0]], np.float32)
    centroids, counts = g.gram_kmeans(x, 5, seed=0, class_id=0)
    assert centroids.tolist() == [[1.0, 0.0], [2.0, 0.0]] and counts.tolist() == [3, 1]


def test_near_copies_never_leave_a_cell_empty():
    x = np.full((30, 4), 1000.0, np.float32)
    x[:, 0] += np.arange(30, dtype=np.float32) * 1e-4
    x[:3] = 0.0
    centroids, counts = g.gram_kmeans(x, 6, seed=0, class_id=0)
    assert len(centroids) == min(6, len(np.unique(x, axis=0))) and counts.sum() == 30 and counts.min() >= 1


def by_rows(x):
    """Equal rows by Python's own equality of tuples."""
    first = {}
    inverse = [first.setdefault(tuple(row), i) for i, row in enumerate(x.tolist())]
    return sorted(first.values()), inverse


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("dim", [1, 5, 16, 40, 700])
def test_distinct_rows(dim, dtype):
    rng = np.random.default_rng(dim)
    x = rng.integers(-1, 2, (60, dim)).astype(dtype)
    x = np.concatenate([x, x[rng.integers(0, 60, 20)], -x[:20]])
    x[3::7] *= -0.0  # zeros of both signs
    x[-1] = x[0]
    x[-1, dim // 2 + 1 :] += 1  # agrees with the first row only in front
    first, inverse, copies = g.distinct_rows(x)
    expected_first, expected_original = by_rows(x)
    assert first.tolist() == expected_first and first[inverse].tolist() == expected_original
    assert copies.tolist() == [expected_original.count(i) for i in expected_first]


def test_distinct_rows_of_nothing_and_of_rows_all_different():
    assert [len(part) for part in g.distinct_rows(np.empty((0, 4), np.float32))] == [0, 0, 0]
    first, inverse, copies = g.distinct_rows(mixture(50, 30, 3, 0))
    assert (first == np.arange(50)).all() and (inverse == first).all() and (copies == 1).all()


def test_an_empty_cell_is_seeded_with_the_farthest_point():
    labels = np.array([0, 0, 0, 2])
    g._reseed_empty(labels, np.array([1.0, 5.0, 2.0, 9.0]), 3)
    assert labels.tolist() == [0, 1, 0, 2]


def test_kmeans_plus_plus_draws_by_squared_distance():
    # From 0: squared distances 1 and 9, so the far point follows with probability .9 (one trial, no greed).
    gram = g.gram_matrix(np.array([[0.0], [1.0], [3.0]]))
    first_at_zero = [p for i in range(6000) if (p := g.kmeans_plus_plus(gram, np.ones(3), 2, philox(i), 1))[0] == 0]
    share = np.mean([p[1] == 2 for p in first_at_zero])
    assert abs(share - 0.9) < 4 * np.sqrt(0.09 / len(first_at_zero))


def test_same_bytes_again_and_another_class_another_draw():
    x = mixture(200, 30, 9, 4)
    one, two = (g.gram_kmeans(x, 10, seed=5, class_id=3) for _ in range(2))
    assert one[0].tobytes() == two[0].tobytes() and one[1].tobytes() == two[1].tobytes()
    assert g.gram_kmeans(x, 10, seed=5, class_id=4)[0].tobytes() != one[0].tobytes()


@pytest.mark.parametrize("product", ["float32", "bfloat16"])
def test_the_gram_matrix_is_symmetric_and_close(product):
    x = mixture(300, 500, 6, 6) + 20
    gram = g.gram_matrix(x, product)
    exact = x.astype(np.float64) - x.astype(np.float64).mean(0)
    exact = exact @ exact.T
    assert gram.dtype == np.float32 and (gram == gram.T).all()
    bound = {"float32": 1e-6, "bfloat16": 2.0**-7}[product] * exact.diagonal().mean()
    assert abs(gram - exact).max() < bound
    np.testing.assert_allclose(gram.diagonal(), exact.diagonal(), rtol=1e-4)


def quantize(x, k, seed, product):
    return g.gram_kmeans(x, k, seed=seed, class_id=0, settings=g.KMeansSettings(product=product))[0]


@pytest.mark.parametrize("k", [10, 60])
def test_a_bfloat16_product_costs_less_than_half_a_percent_of_distortion(k):
    x = mixture(600, 400, 25, 7)
    value = {p: distortion(x, quantize(x, k, 0, p)) for p in g.PRODUCTS}
    assert value["bfloat16"] < 1.005 * value["float32"]


@pytest.mark.assets
@pytest.mark.parametrize("k", [10, 50, 200])
def test_a_bfloat16_product_on_real_latents(k):
    folder = Path(os.environ.get("DDOQ_ASSETS", Path(__file__).parents[3] / "shared" / "assets")) / "latents"
    files = sorted(folder.glob("*-2048d.npy"))
    if not files:
        pytest.skip(f"no latents in {folder}: set DDOQ_ASSETS")
    for file in files:
        x = np.load(file).astype(np.float32)
        mean = {p: np.mean([distortion(x, quantize(x, k, s, p)) for s in range(3)]) for p in ("float32", "bfloat16")}
        assert mean["bfloat16"] < 1.005 * mean["float32"], file.stem


def test_refusals():
    x = mixture(50, 4, 2, 0)
    with pytest.raises(ValueError, match=r"4 n\^2 = 10000 bytes, above max_bytes=9999"):
        g.gram_kmeans(x, 2, seed=0, class_id=0, settings=g.KMeansSettings(max_bytes=9999))
    with pytest.raises(ValueError, match="empty"):
        g.gram_kmeans(x[:0], 2, seed=0, class_id=0)
    with pytest.raises(ValueError, match="k must be >= 1"):
        g.gram_kmeans(x, 0, seed=0, class_id=0)
    for wrong in ({"restarts": 0}, {"max_iter": 0}):
        with pytest.raises(ValueError, match="restarts and max_iter must be >= 1"):
            g.KMeansSettings(**wrong)
    for refused in (lambda: g.KMeansSettings(product="half"), lambda: g.gram_matrix(x, "half")):
        with pytest.raises(ValueError, match=r"product must be one of .*, got 'half'"):
            refused()
