import faiss
import numpy as np
import pytest
from sklearn.cluster import MiniBatchKMeans

from ddoq_ray.core import baselines as b
from ddoq_ray.core.distortion import distortion, voronoi_counts


def samples(n=130, dim=16, seed=0):
    return np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)


def d4m_loop(latents, ipc, km_expand=1):
    """The loop of D4M's gen_prototype.py: latents arrive one by one, a full list is fitted and emptied."""
    model = MiniBatchKMeans(n_clusters=ipc, random_state=0, batch_size=km_expand * ipc, n_init="auto")
    held = []
    for z in latents:
        held.append(z)
        if len(held) == km_expand * ipc:
            model.partial_fit(np.vstack(held))
            held = []
    return model, held


@pytest.mark.parametrize(("k", "km_expand", "lost"), [(13, 1, 0), (20, 1, 10), (20, 3, 10), (50, 1, 30)])
def test_d4m_is_the_released_loop_and_loses_its_leftovers(k, km_expand, lost):
    x = samples()
    model, held = d4m_loop(x, k, km_expand)
    assert len(held) == lost
    centroids, counts = b.minibatch_kmeans(x, k, seed=0, class_id=0, km_expand=km_expand, random_state=0)
    assert centroids.tobytes() == model.cluster_centers_.tobytes()
    assert counts.sum() == len(x) and (counts == voronoi_counts(x, centroids)).all()
    # What the leftovers are does not matter to it...
    other = np.concatenate([x[: len(x) - lost], samples(lost, seed=9) + 50])
    again, _ = b.minibatch_kmeans(other, k, seed=0, class_id=0, km_expand=km_expand, random_state=0)
    assert again.tobytes() == centroids.tobytes()
    # ...unless they are kept, as for the last class D4M sees.
    kept, _ = b.minibatch_kmeans(x, k, seed=0, class_id=0, km_expand=km_expand, random_state=0, leftovers="keep")
    assert (kept.tobytes() == centroids.tobytes()) == (lost == 0)


def test_running_counts_are_the_library_s():
    x = samples(205, 8)
    model, _ = d4m_loop(x, 10)
    _, running = b.minibatch_kmeans(x, 10, seed=0, class_id=0, random_state=0, counts="running")
    assert (running == model._counts).all() and running.dtype == np.int64


@pytest.mark.parametrize(
    "method",
    [
        b.minibatch_kmeans,
        lambda x, k, **key: b.minibatch_kmeans(x, k, variant="sklearn", **key),
        b.lloyd,
        b.faiss_kmeans,
    ],
)
def test_every_baseline_quantizes_and_repeats(method):
    x = samples(400, 6, 3)
    centroids, counts = method(x, 25, seed=1, class_id=2)
    assert centroids.shape == (25, 6) and centroids.dtype == np.float32 and centroids.flags.c_contiguous
    assert counts.dtype == np.int64 and counts.sum() == 400
    assert distortion(x, centroids) < distortion(x, x[:25])
    again = method(x, 25, seed=1, class_id=2)
    assert again[0].tobytes() == centroids.tobytes() and (again[1] == counts).all()
    assert method(x, 25, seed=1, class_id=3)[0].tobytes() != centroids.tobytes()
    with pytest.raises(ValueError, match="1 <= k <= samples"):
        method(x[:24], 25, seed=1, class_id=2)


def test_faiss_uses_every_sample():
    # One far point among 3000: with faiss's default of 256 samples a centroid it would often be left out.
    x = np.zeros((3000, 2), np.float32)
    x[1234] = 3000.0
    with_all = b.faiss_kmeans(x, 1, seed=0, class_id=0)[0]
    np.testing.assert_allclose(with_all, [[1.0, 1.0]], rtol=1e-5)
    assert faiss.Kmeans(2, 1).cp.max_points_per_centroid == 256


def test_lloyd_with_too_few_distinct_samples_has_cells_of_count_zero():
    x = np.repeat(samples(3, 4), 5, axis=0)
    _, counts = b.lloyd(x, 5, seed=0, class_id=0)
    assert counts.sum() == 15 and (counts > 0).sum() == 3


def test_options_without_effect_are_refused():
    x = samples()
    with pytest.raises(ValueError, match='only with variant="d4m"'):
        b.minibatch_kmeans(x, 5, variant="sklearn", km_expand=2, seed=0, class_id=0)
    with pytest.raises(ValueError, match="variant"):
        b.minibatch_kmeans(x, 5, variant="D4M", seed=0, class_id=0)
    with pytest.raises(ValueError, match="km_expand"):
        b.minibatch_kmeans(x, 50, km_expand=3, seed=0, class_id=0)
    with pytest.raises(ValueError, match="leftovers"):
        b.minibatch_kmeans(x, 5, leftovers="lose", seed=0, class_id=0)
