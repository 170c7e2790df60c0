from dataclasses import replace

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
    options = b.D4mOptions(km_expand=km_expand, random_state=0)
    centroids, counts = b.d4m_kmeans(x, k, seed=0, class_id=0, options=options)
    assert centroids.tobytes() == model.cluster_centers_.tobytes()
    assert counts.sum() == len(x) and (counts == voronoi_counts(x, centroids)).all()
    # What the leftovers are does not matter to it...
    other = np.concatenate([x[: len(x) - lost], samples(lost, seed=9) + 50])
    again, _ = b.d4m_kmeans(other, k, seed=0, class_id=0, options=options)
    assert again.tobytes() == centroids.tobytes()
    # ...unless they are kept, as for the last class D4M sees.
    kept, _ = b.d4m_kmeans(x, k, seed=0, class_id=0, options=replace(options, leftovers="keep"))
    assert (kept.tobytes() == centroids.tobytes()) == (lost == 0)


def test_running_counts_are_the_library_s():
    x = samples(205, 8)
    model, _ = d4m_loop(x, 10)
    _, running = b.d4m_kmeans(x, 10, seed=0, class_id=0, options=b.D4mOptions(random_state=0, counts="running"))
    assert (running == model._counts).all() and running.dtype == np.int64


@pytest.mark.parametrize(
    "method",
    [b.d4m_kmeans, b.minibatch_kmeans, b.lloyd, b.faiss_kmeans],
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


def test_faiss_is_given_the_gpu_where_it_finds_one():
    """The same bytes where there is none; with one, another order of sums: as good, and exact counts."""
    x = samples(2000, 12)
    on_cpu = b.faiss_kmeans(x, 25, seed=0, class_id=0)
    on_gpu = b.faiss_kmeans(x, 25, seed=0, class_id=0, device="cuda")
    assert (on_gpu[1] == voronoi_counts(x, on_gpu[0])).all()
    if faiss.get_num_gpus():
        assert distortion(x, on_gpu[0]) == pytest.approx(distortion(x, on_cpu[0]), rel=0.02)
    else:
        assert on_gpu[0].tobytes() == on_cpu[0].tobytes()


def test_lloyd_with_too_few_distinct_samples_has_cells_of_count_zero():
    x = np.repeat(samples(3, 4), 5, axis=0)
    _, counts = b.lloyd(x, 5, seed=0, class_id=0)
    assert counts.sum() == 15 and (counts > 0).sum() == 3


def test_options_out_of_range_are_refused():
    for wrong, message in (
        ({"km_expand": 0}, "km_expand"),
        ({"leftovers": "lose"}, "leftovers"),
        ({"counts": "x"}, "counts"),
    ):
        with pytest.raises(ValueError, match=message):
            b.D4mOptions(**wrong)
    with pytest.raises(ValueError, match="makes no centroid"):
        b.d4m_kmeans(samples(), 50, seed=0, class_id=0, options=b.D4mOptions(km_expand=3))


def test_herding_by_hand():
    # The mean is 4: first 4 itself; then 5 (mean 4.5) before 7 and 0; then 0 (mean 3, 1 off) before 7 (16/3, 4/3 off).
    x = np.array([[0.0], [4.0], [5.0], [7.0]])
    assert b.herding(x, 4).tolist() == [1, 2, 0, 3]


@pytest.mark.parametrize("seed", range(4))
def test_herding_is_the_greedy_choice_of_brute_force(seed):
    x = samples(40, 6, seed) + 3
    mean = x.mean(axis=0, dtype=np.float64)
    chosen: list[int] = []
    for _ in range(15):
        left = [i for i in range(40) if i not in chosen]
        off = [np.linalg.norm(x[[*chosen, i]].mean(axis=0, dtype=np.float64) - mean) for i in left]
        chosen.append(left[int(np.argmin(off))])
    found = b.herding(x, 15)
    assert found.tolist() == chosen and found.dtype == np.int64
    assert b.herding(x, 6).tolist() == chosen[:6]  # nested


def test_herding_follows_the_mean_better_than_chance():
    x = samples(500, 10)
    rng = np.random.default_rng(0)
    off = np.linalg.norm(x[b.herding(x, 20)].mean(0) - x.mean(0))
    assert off < min(np.linalg.norm(x[rng.choice(500, 20)].mean(0) - x.mean(0)) for _ in range(50))


def test_medoids_by_hand():
    x = np.array([[0.0], [1.0], [9.0]])
    # 0 is nearest to all three and 0.1 keeps it; of the others 0.3 is closer to 1; 0.2 gets what is left.
    assert b.medoids(x, np.array([[0.3], [0.1], [0.2]])).tolist() == [1, 0, 2]
    assert b.medoids(x, np.array([[8.0], [0.4]])).tolist() == [2, 0]


@pytest.mark.parametrize(("n", "k", "spread"), [(60, 10, 1.0), (60, 30, 0.05), (25, 25, 0.01)])
def test_medoids_are_distinct_and_no_pair_would_rather_swap(n, k, spread):
    x = samples(n, 4, k)
    grid = (spread * np.random.default_rng(k).normal(size=(k, 4))).astype(np.float32)
    found = b.medoids(x, grid)
    assert len(set(found.tolist())) == k
    table = ((x[:, None].astype(np.float64) - grid[None]) ** 2).sum(-1)
    mine = table[found, np.arange(k)]
    theirs = np.full(n, np.inf)
    theirs[found] = mine
    assert not ((table < mine[None]) & (table < theirs[:, None])).any()
    if spread == 1.0:  # mostly apart: the nearest is the medoid, except where it was taken
        assert (found == table.argmin(0)).mean() > 0.5


def test_medoids_of_samples_are_the_samples_and_ties_go_low():
    x = samples(50, 8)
    order = np.random.default_rng(1).permutation(50)[:20]
    assert b.medoids(x, x[order]).tolist() == order.tolist()
    twins = np.repeat(samples(4, 8), 3, axis=0)  # three copies of each of four
    assert b.medoids(twins, twins[[6, 6, 0, 6]]).tolist() == [6, 7, 0, 8]
    assert b.herding(np.zeros((5, 2), np.float32), 3).tolist() == [0, 1, 2]


def test_choices_of_samples_are_refused():
    x = samples(5, 3)
    with pytest.raises(ValueError, match="1 <= k <= samples"):
        b.herding(x, 6)
    with pytest.raises(ValueError, match="1 <= k <= samples"):
        b.medoids(x, samples(6, 3))
    with pytest.raises(ValueError, match="centroids is empty"):
        b.medoids(x, x[:0])
    with pytest.raises(ValueError, match="D=3 but centroids have D=4"):
        b.medoids(x, samples(2, 4))


def test_d4m_starts_from_its_first_batch_as_it_comes():
    x = samples(47, 5)
    centroids, _ = b.d4m_kmeans(x[:20], 20, seed=0, class_id=0)  # one batch: nothing is averaged
    assert sorted(map(tuple, centroids)) == sorted(map(tuple, x[:20]))
