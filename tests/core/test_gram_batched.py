import itertools
import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddoq_ray.core import gram_batched as gb
from ddoq_ray.core import gram_kmeans as g
from ddoq_ray.core.distortion import assign, distortion, voronoi_counts

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def mixture(n, dim, modes, seed):
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(modes, dim))
    return (means[rng.integers(modes, size=n)] + rng.normal(size=(n, dim)) + 2).astype(np.float32)


def direct_sum(x, labels):
    x = x.astype(np.float64)
    return sum(((x[labels == c] - x[labels == c].mean(0)) ** 2).sum() for c in np.unique(labels))


def unequal(k=12):
    """Classes of unequal size: larger than k, as large, smaller, a single sample, and one full of copies."""
    copies = np.repeat(mixture(60, 200, 4, 3), np.random.default_rng(0).integers(1, 5, 60), axis=0)
    sizes = (260, 130, 90, k + 1, k, k - 1, 1)
    return [*(mixture(n, 200, 9, i) for i, n in enumerate(sizes)), copies, np.ones((30, 200), np.float32)]


def test_by_hand():
    x = np.array([[0.0], [1.0], [10.0], [11.0], [12.0]])
    [(centroids, counts)] = gb.gram_kmeans_batched([x], 2, seed=0, class_ids=[0])
    assert sorted(zip(centroids[:, 0].tolist(), counts.tolist(), strict=True)) == [(0.5, 2), (11.0, 3)]
    assert centroids.dtype == np.float32 and counts.dtype == np.int64


def test_finds_the_optimum_of_tiny_problems():
    classes = [np.random.default_rng(s).normal(size=(7 + s % 2, 3)).astype(np.float32) for s in range(6)]
    found = gb.gram_kmeans_batched(classes, 3, seed=0, class_ids=range(6), settings=g.KMeansSettings(restarts=20))
    for x, (centroids, _) in zip(classes, found, strict=True):
        partitions = (np.array(p) for p in itertools.product(range(3), repeat=len(x) - 1) if len({*p}) == 3)
        best = min(direct_sum(x, np.append(p, last)) for p in partitions for last in range(3))
        assert distortion(x, centroids) * len(x) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("product", g.PRODUCTS)
def test_as_good_as_numpy_on_unequal_classes(product, device):
    classes, k, ratios = unequal(), 12, []
    how = g.KMeansSettings(product=product, restarts=2)
    found = gb.gram_kmeans_batched(classes, k, seed=1, class_ids=range(len(classes)), settings=how, device=device)
    for c, (x, (centroids, counts)) in enumerate(zip(classes, found, strict=True)):
        assert len(centroids) == len(counts) == min(k, len(np.unique(x, axis=0)))
        assert counts.min() >= 1 and counts.sum() == len(x)
        theirs = distortion(x, g.gram_kmeans(x, k, seed=1, class_id=c, settings=g.KMeansSettings(restarts=2))[0])
        if len(centroids) < k or len(np.unique(x, axis=0)) == k:
            assert distortion(x, centroids) == pytest.approx(0.0, abs=1e-9)
        else:
            ratios.append(distortion(x, centroids) / theirs)
            labels = assign(x, centroids)[0]
            assert (counts == voronoi_counts(x, centroids)).all() or product == "bfloat16"
            means = np.stack([x[labels == c].mean(0, dtype=np.float64) for c in range(k)])
            np.testing.assert_allclose(centroids, means, rtol=2e-7, atol=1e-12 if product == "float32" else 0.3)
    assert len(ratios) == 5 and np.mean(ratios) < 1.01


def test_bfloat16_costs_little():
    classes = [mixture(200, 300, 15, s) for s in range(6)]
    one, two = (
        np.mean([distortion(x, c) for x, (c, _) in zip(classes, found, strict=True)])
        for found in (
            gb.gram_kmeans_batched(
                classes, 20, seed=0, class_ids=range(6), settings=g.KMeansSettings(product=p, restarts=4)
            )
            for p in g.PRODUCTS
        )
    )
    assert two == pytest.approx(one, rel=5e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("product", g.PRODUCTS)
def test_the_gram_matrix_is_the_product_of_the_rounded_samples(product, device):
    x = torch.from_numpy(mixture(90, 700, 4, 0)).to(device)
    gram = gb._gram_matrix(x, product).cpu().double()
    centred = (x - x.mean(dim=0)).to(getattr(torch, product)).cpu().double()
    size = centred.norm(dim=1)
    assert (gram == gram.T).all()
    assert ((gram - centred @ centred.T).abs() <= 1e-5 * size[:, None] * size).all()


@pytest.mark.parametrize("hartigan", [False, True])
def test_a_class_alone_is_the_class_in_company(hartigan):
    classes, how = unequal(), g.KMeansSettings(hartigan=hartigan)
    together = gb.gram_kmeans_batched(classes, 12, seed=2, class_ids=range(len(classes)), settings=how)
    for c, x in enumerate(classes):
        [(centroids, counts)] = gb.gram_kmeans_batched([x], 12, seed=2, class_ids=[c], settings=how)
        assert counts.tolist() == together[c][1].tolist()
        np.testing.assert_allclose(centroids, together[c][0], rtol=1e-6)


def test_exchange_improves_on_lloyd_and_restarts_on_one():
    classes = [mixture(150, 60, 12, s) for s in range(4)]
    lloyd, once, best = (
        np.array([distortion(x, c) for x, (c, _) in zip(classes, found, strict=True)])
        for found in (
            gb.gram_kmeans_batched(classes, 15, seed=0, class_ids=range(4), settings=g.KMeansSettings(**how))
            for how in ({"hartigan": False}, {}, {"restarts": 5})
        )
    )
    assert (once < lloyd).all() and (best <= once * (1 + 1e-6)).all() and best.sum() < once.sum()


def test_copies_share_a_cell():
    x = unequal()[-2][np.random.default_rng(1).permutation(len(unequal()[-2]))]
    group = gb._load([x, mixture(300, 200, 5, 0)], [0, 1], "float32", "cpu")
    labels = gb._partition(group, 9, 0, g.KMeansSettings())
    for row in np.unique(x, axis=0):
        assert len({*labels[0][torch.from_numpy((x == row).all(1))].tolist()}) == 1
    assert [*group.inverse] == [0] and group.mass[0].sum() == len(x) and len(labels[1]) == 300


def test_fewer_distinct_samples_than_k():
    x = np.array([[1.0, -0.0], [2.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [2.0, 0.0]], np.float32)
    found = gb.gram_kmeans_batched([x, x[:4]], 5, seed=0, class_ids=[0, 1])
    for (centroids, counts), expected in zip(found, ([4, 2], [3, 1]), strict=True):
        assert centroids.tolist() == [[1.0, 0.0], [2.0, 0.0]] and counts.tolist() == expected


def test_near_copies_never_leave_a_cell_empty():
    x = np.full((30, 4), 1000.0, np.float32)
    x[:, 0] += np.arange(30, dtype=np.float32) * 1e-4
    x[:3] = 0.0
    for product in g.PRODUCTS:
        [(centroids, counts)] = gb.gram_kmeans_batched(
            [x], 6, seed=0, class_ids=[0], settings=g.KMeansSettings(product=product)
        )
        assert len(centroids) == min(6, len(np.unique(x, axis=0))) and counts.sum() == 30 and counts.min() >= 1


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_any_float_and_read_only_memory(dtype):
    x = mixture(100, 64, 5, 0).astype(np.float16).astype(dtype)
    x.setflags(write=False)
    [(centroids, _)] = gb.gram_kmeans_batched([x], 6, seed=0, class_ids=[0])
    [(expected, _)] = gb.gram_kmeans_batched([x.astype(np.float32)], 6, seed=0, class_ids=[0])
    np.testing.assert_allclose(centroids, expected, rtol=1e-6)


def test_a_far_origin_costs_no_digits_of_float64():
    x = mixture(100, 64, 5, 0).astype(np.float64)
    [(_, near)], [(_, far)] = (gb.gram_kmeans_batched([x + s], 6, seed=0, class_ids=[0]) for s in (0.0, 1e8))
    assert near.tolist() == far.tolist()


@pytest.mark.parametrize("device", DEVICES)
def test_same_bytes_again_and_another_class_another_draw(device):
    classes = [mixture(n, 30, 9, n) for n in (200, 150)]
    one, two, other = (
        gb.gram_kmeans_batched(classes, 10, seed=5, class_ids=ids, device=device) for ids in ([3, 4], [3, 4], [3, 5])
    )
    assert [c.tobytes() + n.tobytes() for c, n in one] == [c.tobytes() + n.tobytes() for c, n in two]
    assert one[1][0].tobytes() != other[1][0].tobytes()


def test_the_precision_that_torch_was_set_to_comes_back():
    place = torch.backends.cuda.matmul
    before = place.fp32_precision
    try:
        for precision in ("tf32", "ieee"):
            place.fp32_precision = precision
            with gb._ieee_products():
                assert place.fp32_precision == "ieee"
            assert place.fp32_precision == precision
    finally:
        place.fp32_precision = before


def test_groups_fit_and_pad_little():
    rng = np.random.default_rng(0)
    shapes = [(int(n), 4) for n in rng.integers(30, 900, 200)]
    limit = gb.group_bytes([(900, 4)] * 10, 512, 20)
    groups = gb.group_classes(shapes, 512, 20, limit, range(200))
    assert sorted(itertools.chain(*groups)) == list(range(200)) and len(groups) < 40
    for group in groups:
        sizes = [shapes[p][0] for p in group]
        assert max(sizes) <= 2 * min(sizes) and gb.group_bytes([shapes[p] for p in group], 512, 20) <= limit


def test_grouping_changes_no_more_than_rounding():
    classes = unequal()
    small = gb.group_bytes([(len(classes[0]), 4)], 200, 12)
    how = {"seed": 2, "class_ids": range(len(classes))}
    for one, two in zip(
        gb.gram_kmeans_batched(classes, 12, **how),
        gb.gram_kmeans_batched(classes, 12, **how, settings=g.KMeansSettings(max_bytes=small)),
        strict=True,
    ):
        assert one[1].tolist() == two[1].tolist()
        np.testing.assert_allclose(one[0], two[0], rtol=1e-6)


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors made inside it that lived at one time."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)):
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata)
        return out

    def free(self, key):
        self.now -= self.sizes.pop(key)


@pytest.mark.parametrize(
    ("n", "dim", "k", "dtype"),
    [(120, 64, 60, np.float32), (300, 4000, 10, np.float64), (300, 300, 1, np.float16), (200, 4000, 190, np.float32)],
)
def test_memory_stays_within_the_formula(n, dim, k, dtype):
    classes = [np.random.default_rng(s).normal(size=(n - s, dim)).astype(dtype) for s in range(5)]
    how = g.KMeansSettings(restarts=2, product="bfloat16", max_iter=4)
    with LiveBytes() as live:
        gb.gram_kmeans_batched(classes, k, seed=0, class_ids=range(5), settings=how)
    bound = gb.group_bytes([(len(x), x.itemsize) for x in classes], dim, k)
    assert 0.3 * bound < live.peak <= bound


def test_a_class_that_does_not_fit_is_refused_by_name():
    x = np.zeros((50, 4), np.float32)
    needed = 4 * 50 * 4 + 24 * 50**2 + 64 * 3 * 50 + 16 * 50 * 4
    with pytest.raises(ValueError, match=rf"class 8 has n=50 .* {needed} bytes .* faiss or clvq"):
        gb.gram_kmeans_batched([x[:2], x], 3, seed=0, class_ids=[7, 8], settings=g.KMeansSettings(max_bytes=needed - 1))


X = np.ones((4, 3), np.float32)
NAN = np.where(np.eye(4, 3) > 0, np.nan, X).astype(np.float32)


@pytest.mark.parametrize(
    ("classes", "changed", "message"),
    [
        ([X], {"k": 0}, "k must be >= 1"),
        ([X], {"device": "meta"}, "device must be cpu or cuda"),
        ([X], {"class_ids": [1, 2]}, "1 different classes"),
        ([X, X], {"class_ids": [1, 1]}, "2 different classes"),
        ([X, X[:0]], {}, "class 1 is empty"),
        ([X, X[:, :2]], {}, "class 1 has 2, class 0 3"),
        ([X, X[0]], {}, "class 1 must be float16, float32 or float64"),
        ([X, X.astype(int)], {}, "class 1 must be float16, float32 or float64"),
        ([X, NAN], {}, "latents of class 1 has NaN or infinity in 3 of 4 rows"),
        ([X, NAN], {"k": 9}, "latents of class 1 has NaN or infinity in 3 of 4 rows"),
        ([X, np.arange(12, dtype=np.float32).reshape(4, 3) * 1e30], {}, "class 1 are too large to be squared"),
    ],
)
def test_refusals(classes, changed, message):
    how = {"k": 2, "seed": 0, "class_ids": range(len(classes))} | changed
    with pytest.raises(ValueError, match=message):
        gb.gram_kmeans_batched(classes, **how)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(ValueError, match="use device='cpu'"):
        gb.gram_kmeans_batched([X], 2, seed=0, class_ids=[0], device="cuda")


def test_no_classes_no_results():
    assert gb.gram_kmeans_batched([], 3, seed=0, class_ids=[]) == []
