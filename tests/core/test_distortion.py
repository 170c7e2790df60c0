import numpy as np
import ot
import pytest

from ddoq_ray.core import distortion as d
from ddoq_ray.core.losses import image_weights


def brute(x, c):
    return ((x[:, None, :].astype(np.float64) - c[None].astype(np.float64)) ** 2).sum(-1)


def test_by_hand():
    x = np.array([[0.0, 0.0], [1.0, 0.0], [4.0, 3.0]], np.float32)
    c = np.array([[0.0, 0.0], [4.0, 0.0]], np.float32)
    labels, sq_dist = d.assign(x, c)
    assert labels.tolist() == [0, 0, 1] and labels.dtype == np.int64
    assert sq_dist.tolist() == [0.0, 1.0, 9.0] and sq_dist.dtype == np.float64
    assert d.distortion(x, c) == pytest.approx(10 / 3)
    assert d.voronoi_counts(x, c).tolist() == [2, 1]
    # With masses 1/3 and 2/3 half a sample more goes to the second centroid: of the two near the first one,
    # (1, 0) is cheaper to send: 9 instead of 1.
    assert d.w2_squared(x, c, [2 / 3, 1 / 3]) == pytest.approx(10 / 3)
    assert d.w2_squared(x, c, [1 / 3, 2 / 3]) == pytest.approx((0 + 9 + 9) / 3)


def test_ties_go_to_the_lowest_index():
    x = np.zeros((3, 5), np.float32)
    c = np.array([[2.0] * 5, [1.0] * 5, [-1.0] * 5, [1.0] * 5], np.float32)
    assert d.assign(x, c)[0].tolist() == [1, 1, 1]


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equals_brute_force_even_far_from_the_origin(offset, dtype):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(300, 17)) + offset).astype(dtype)
    c = (rng.normal(size=(23, 17)) + offset).astype(dtype)
    labels, sq_dist = d.assign(x, c)
    table = brute(x, c)
    assert (labels == table.argmin(1)).all()
    np.testing.assert_allclose(sq_dist, table.min(1), rtol=1e-12)


def test_values_that_overflow_float32_squares_are_still_assigned():
    x = np.array([[1e25], [3e25]], np.float64)
    assert d.assign(x, np.array([[1.1e25], [2.8e25]]))[0].tolist() == [0, 1]


def test_blocks_do_not_change_the_result(monkeypatch):
    rng = np.random.default_rng(1)
    x, c = rng.normal(size=(101, 30)).astype("f4"), rng.normal(size=(7, 30)).astype("f4")
    whole = d.assign(x, c)
    monkeypatch.setattr(d, "_BLOCK_ELEMENTS", 90)
    parts = d.assign(x, c)
    assert (whole[0] == parts[0]).all() and (whole[1] == parts[1]).all()
    assert d.w2_squared(x, c, np.full(7, 1 / 7)) > 0


@pytest.mark.parametrize("shape", [(200, 64, 5), (150, 8, 40), (60, 2048, 10)])
def test_w2_with_voronoi_weights_equals_the_distortion(shape):
    n, dim, k = shape
    rng = np.random.default_rng(2)
    x = (rng.normal(size=(n, dim)) + 3).astype("f4")
    c = x[:k] + 0.1
    weights = d.voronoi_counts(x, c) / n
    value = d.distortion(x, c)
    assert d.w2_squared(x, c, weights) == pytest.approx(value, rel=1e-6)
    assert d.w2_squared(x, c, np.full(k, 1 / k)) >= value * (1 - 1e-9)


def test_w2_in_one_dimension_equals_the_sorted_coupling():
    rng = np.random.default_rng(3)
    x, c = rng.normal(size=(40, 1)), rng.normal(size=(40, 1))
    expected = ((np.sort(x[:, 0]) - np.sort(c[:, 0])) ** 2).mean()
    assert d.w2_squared(x, c, np.full(40, 1 / 40)) == pytest.approx(expected, rel=1e-9)


def test_total_variation():
    assert d.total_variation([0.2, 0.8], [0.2, 0.8]) == 0
    assert d.total_variation([1, 0, 0], [0, 0.5, 0.5]) == pytest.approx(1)
    assert d.total_variation([0.5, 0.5], [0.75, 0.25]) == pytest.approx(0.25)


def test_float16_is_read_as_float32():
    x = np.array([[1.0], [300.0]], np.float16)
    assert d.distortion(x, np.array([[0.0]], np.float32)) == pytest.approx((1 + 90000) / 2)


def test_refusals():
    x = np.zeros((3, 2), np.float32)
    for bad in (np.zeros(3), np.zeros((3, 2), int), np.full((3, 2), np.nan), np.zeros((3, 0))):
        with pytest.raises(ValueError, match="x "):
            d.assign(bad, x)
    with pytest.raises(ValueError, match="D=2 but centroids have D=3"):
        d.assign(x, np.zeros((1, 3)))
    with pytest.raises(ValueError, match="empty"):
        d.assign(x, np.zeros((0, 2)))
    with pytest.raises(ValueError, match="empty"):
        d.distortion(x[:0], x)
    with pytest.raises(ValueError, match="sum to 1"):
        d.w2_squared(x, x, [1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="one for each centroid"):
        d.w2_squared(x, x, [0.5, 0.5])
    with pytest.raises(ValueError, match=">= 0"):
        d.total_variation([1.5, -0.5], [1.0, 0.0])
    with pytest.raises(ValueError, match="one shape"):
        d.total_variation([1.0], [0.5, 0.5])


def test_scheme_weights_by_hand():
    assert d.scheme_weights([3, 1, 0]).tolist() == [0.75, 0.25, 0.0]
    assert d.scheme_weights([9, 1, 0], "sqrt") == pytest.approx([0.75, 0.25, 0.0])
    assert d.scheme_weights([9, 1, 0, 0], "uniform").tolist() == [0.25] * 4


@pytest.mark.parametrize("scheme", ["counts", "sqrt", "uniform"])
def test_scheme_weights_are_the_loss_s_as_a_measure(scheme):
    counts = np.random.default_rng(4).integers(0, 50, 20)
    loss = image_weights(counts / counts.sum(), np.zeros(20, np.int64), scheme)
    np.testing.assert_allclose(d.scheme_weights(counts, scheme), loss / loss.sum(), rtol=1e-12)


def test_an_empty_cell_has_no_mass_and_no_cost():
    x = np.random.default_rng(5).normal(size=(80, 6)).astype("f4")
    grid = np.concatenate([x[:4], np.full((2, 6), 500.0, "f4")])  # two centroids that no sample is near to
    counts = d.voronoi_counts(x, grid)
    assert counts[4:].tolist() == [0, 0]
    for scheme in ("counts", "sqrt"):
        weights = d.scheme_weights(counts, scheme)
        plan, value = d.optimal_plan(x, grid, weights)
        assert weights[4:].tolist() == [0, 0] and not plan[:, 4:].any()
        assert value == pytest.approx(d.w2_squared(x, grid[:4], weights[:4]), rel=1e-12)
    assert d.w2_squared(x, grid, counts / 80) == pytest.approx(d.distortion(x, grid), rel=1e-6)
    assert d.w2_squared(x, grid, d.scheme_weights(counts, "uniform")) > 1e5  # a third of the mass must go there


def test_plan_has_the_masses_and_the_cost_of_the_oracle():
    rng = np.random.default_rng(6)
    x, c = rng.normal(size=(50, 3)), rng.normal(size=(6, 3))
    weights = d.scheme_weights(rng.integers(1, 9, 6))
    plan, value = d.optimal_plan(x, c, weights)
    np.testing.assert_allclose(plan.sum(axis=1), 1 / 50, atol=1e-12)
    np.testing.assert_allclose(plan.sum(axis=0), weights, atol=1e-12)
    assert value == pytest.approx((plan * brute(x, c)).sum(), rel=1e-9)
    assert value == pytest.approx(ot.emd2(np.full(50, 1 / 50), weights, brute(x, c)), rel=1e-9)


def test_unseen_samples_are_worth_no_less_than_their_distortion():
    rng = np.random.default_rng(7)
    fit, unseen = rng.normal(size=(2, 300, 20)).astype("f4")
    grid = fit[:25]
    weights = d.scheme_weights(d.voronoi_counts(fit, grid))
    assert d.w2_squared(unseen, grid, weights) > d.distortion(unseen, grid) > d.distortion(fit, grid)
    with pytest.raises(ValueError, match="empty"):
        d.w2_squared(unseen[:0], grid, weights)


def test_scheme_weights_refuse():
    for bad in ([], [0, 0], [-1, 2], [np.nan, 1], [[1, 2]]):
        with pytest.raises(ValueError, match="sum above 0"):
            d.scheme_weights(bad)
    with pytest.raises(ValueError, match="counts, sqrt or uniform"):
        d.scheme_weights([1, 2], "root")
