import numpy as np
import pytest

from ddoq_ray.core.balanced import balanced
from ddoq_ray.core.baselines import lloyd
from ddoq_ray.core.distortion import distortion, optimal_plan, w2_squared


def cloud(n=90, dim=5, seed=0):
    rng = np.random.default_rng(seed)
    middles = rng.normal(size=(7, dim)) * 3
    return (middles[rng.choice(7, n, p=np.arange(1, 8) / 28)] + rng.normal(size=(n, dim))).astype(np.float32)


def test_by_hand_with_a_split_sample():
    # Masses 1/3 each; a half has room for 0 and half of 3: (0 * 1/3 + 3 * 1/6) / (1/2) = 1, and (3/6 + 9/3) * 2 = 7.
    x = np.array([[0.0], [3.0], [9.0]], np.float32)
    found = balanced(x, np.array([[0.0], [9.0]]))
    assert found.centroids.tolist() == [[1.0], [7.0]] and found.centroids.dtype == np.float32
    # From (0, 9) the half of 3 goes 3 and 6 far: 9/6 + 36/6; from (1, 7): 1/3 + 4/6 + 16/6 + 4/3.
    assert found.history == pytest.approx((7.5, 5.0)) and found.converged


def test_in_one_dimension_it_is_the_means_of_the_quantiles():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 1)).astype(np.float32)
    for start in (rng.normal(size=(6, 1)), x[:6], np.linspace(-9, 9, 6)[:, None]):
        found = balanced(x, start)
        expected = np.sort(x[:, 0]).reshape(6, 10).mean(1)
        np.testing.assert_allclose(np.sort(found.centroids[:, 0]), expected, rtol=1e-5)


@pytest.mark.parametrize(("k", "seed"), [(4, 0), (9, 1), (13, 2)])
def test_w2_falls_from_round_to_round_and_is_that_of_the_result(k, seed):
    x = cloud(seed=seed)
    grid, _ = lloyd(x, k, seed=seed, class_id=0)
    uniform = np.full(k, 1 / k)
    found = balanced(x, grid)
    assert found.converged and len(found.history) > 2
    assert (np.diff(found.history) < 0).all()
    assert found.history[0] == pytest.approx(w2_squared(x, grid, uniform), rel=1e-9)
    assert found.history[-1] == pytest.approx(w2_squared(x, found.centroids, uniform), rel=1e-9)
    # Between the distortion, which no weights can beat on this grid, and the unbalanced start.
    assert distortion(x, found.centroids) <= found.history[-1] < found.history[0]
    # A fixed point: each centroid is the mean of the mass that it receives.
    plan, _ = optimal_plan(x, found.centroids, uniform)
    np.testing.assert_allclose(plan.sum(axis=0), uniform, atol=1e-12)
    np.testing.assert_allclose(k * plan.T @ x, found.centroids, atol=1e-3)


def test_cut_short_it_says_so_and_repeats():
    x = cloud()
    cut = balanced(x, x[:9], max_rounds=1)
    assert not cut.converged and len(cut.history) == 2
    assert cut.centroids.tobytes() == balanced(x, x[:9], max_rounds=1).centroids.tobytes()
    start = balanced(x, x[:9], max_rounds=0)
    assert start.centroids.tobytes() == x[:9].tobytes() and len(start.history) == 1


def test_duplicates_and_more_centroids_than_samples():
    x = np.zeros((4, 2), np.float32)
    found = balanced(x, np.ones((3, 2)))
    assert not found.centroids.any() and found.history == pytest.approx((2.0, 0.0))
    two = balanced(np.array([[0.0], [1.0]]), np.array([[0.1], [0.5], [0.9]]))
    assert two.centroids[:, 0] == pytest.approx([0.0, 0.5, 1.0])


def test_refusals():
    x = cloud()
    with pytest.raises(ValueError, match="D=5 but centroids have D=3"):
        balanced(x, np.zeros((2, 3)))
    with pytest.raises(ValueError, match="centroids is empty"):
        balanced(x, x[:0])
    with pytest.raises(ValueError, match="x is empty"):
        balanced(x[:0], x)
    with pytest.raises(ValueError, match="max_rounds"):
        balanced(x, x[:2], max_rounds=-1)
    with pytest.raises(ValueError, match="NaN"):
        balanced(np.full((3, 5), np.nan), x[:2])
