import math

import numpy as np
import pytest

from studies import theory_diffusion as td
from studies import theory_reverse as tr

SDES = [tr.Forward("ve"), tr.Forward("vp")]


def cloud(n=7, dim=3, seed=0):
    return np.random.default_rng(seed).normal(size=(n, dim))


def log_density(points, x, sde, t):
    a, s2 = sde.scale(t), sde.variance(t)
    terms = -((x - a * points) ** 2).sum(axis=1) / (2 * s2)
    return math.log(np.exp(terms - terms.max()).sum()) + terms.max()


@pytest.mark.parametrize("sde", SDES, ids=lambda s: s.name)
def test_the_score_is_the_gradient_of_the_log_density(sde):
    points, y = cloud(), cloud(4, seed=1)
    got = tr.score(points, y, sde, 0.7)
    for i, row in enumerate(y):
        for j in range(3):
            step = np.zeros(3)
            step[j] = 1e-5
            slope = (log_density(points, row + step, sde, 0.7) - log_density(points, row - step, sde, 0.7)) / 2e-5
            assert got[i, j] == pytest.approx(slope, abs=1e-7)


@pytest.mark.parametrize("sde", SDES, ids=lambda s: s.name)
@pytest.mark.parametrize("t", [0.0, 0.1, 0.8])
def test_the_bridge_is_gaussian_conditioning(sde, t):
    above, x, y = 1.3, 0.4, -1.1
    # The joint law of (X_t, X_above) given X_0 = x, and the textbook formula for one given the other.
    ratio = sde.scale(above) / sde.scale(t)
    cross = ratio * sde.variance(t)
    mean = sde.scale(t) * x + cross / sde.variance(above) * (y - sde.scale(above) * x)
    variance = sde.variance(t) - cross**2 / sde.variance(above)
    a, b, v = sde.bridge(above, t)
    assert a * x + b * y == pytest.approx(mean) and v == pytest.approx(variance, abs=1e-15)


@pytest.mark.parametrize("sde", SDES, ids=lambda s: s.name)
def test_a_step_is_eulers_step_of_the_reverse_sde_to_first_order(sde):
    points, y, t, h = cloud(), cloud(5, seed=2), 0.6, 1e-5
    a, b, v = sde.bridge(t, t - h)
    drift = tr.score(points, y, sde, t) + (0.0 if sde.name == "ve" else y / 2)
    moved = a * tr.posterior_mean(points, y, sde, t) + b * y
    np.testing.assert_allclose((moved - y) / h, drift, rtol=1e-3, atol=1e-3)
    assert v / h == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("sde", SDES, ids=lambda s: s.name)
def test_paths_arrive_where_the_exact_kernel_says(sde):
    points, horizon, t = cloud(6, 2), 1.0, 0.05
    y = np.tile([[0.8, -0.3]], (10000, 1))
    times = np.geomspace(horizon, t, 120)
    *_, arrived = tr.reverse_paths(points, [y], sde, times, np.random.default_rng(0))
    post = tr.posterior(points, y[:1], sde, horizon)
    for name, (value, expected) in tr.FUNCTIONS.items():
        exact = expected(points, y[:1], post, sde.bridge(horizon, t))[0]
        sample = value(arrived[0])
        error = sample.std(axis=0) / math.sqrt(len(sample))
        assert (np.abs(sample.mean(axis=0) - exact) < 4 * error + 5e-3).all(), name


@pytest.mark.parametrize("sde", SDES, ids=lambda s: s.name)
def test_expectations_against_brute_force_sampling(sde):
    points, y = cloud(5, 2), cloud(3, 2, seed=3)
    post, bridge = tr.posterior(points, y, sde, 1.0), sde.bridge(1.0, 0.3)
    a, b, v = bridge
    rng = np.random.default_rng(4)
    for i in range(3):
        which = rng.choice(5, p=post[i], size=200_000)
        x = a * points[which] + b * y[i] + math.sqrt(v) * rng.normal(size=(200_000, 2))
        for value, expected in tr.FUNCTIONS.values():
            np.testing.assert_allclose(value(x).mean(axis=0), expected(points, y, post, bridge)[i], atol=0.01)


@pytest.mark.parametrize("sde", SDES, ids=lambda s: s.name)
def test_started_from_the_noised_data_the_data_come_back(sde):
    points = cloud(9, 2)
    start = td.noised(points, sde, 0.5, 400, "test")
    mass, values = td.exact_values(points, start, sde, 0.5, [0.0])
    assert mass.sum() == pytest.approx(len(start))
    np.testing.assert_allclose(mass / len(start), 1 / 9, atol=0.02)
    np.testing.assert_allclose(values["mean", 0.0].mean(axis=0), points.mean(axis=0), atol=0.05)


@pytest.mark.parametrize("sde", SDES, ids=lambda s: s.name)
@pytest.mark.parametrize("delta", [0.02, 0.4])
def test_the_closed_form_of_equation_30_is_its_integral(sde, delta):
    radius, dim, horizon = 1.7, 5, 1.2
    t = np.geomspace(delta, horizon, 200_001)
    if sde.name == "ve":
        rate = radius**2 / t**2 - 1 / t + dim / 2
    else:
        rate = radius**2 * np.exp(-t) / (1 - np.exp(-t)) ** 2 - 1 / (1 - np.exp(-t)) + (dim + 1) / 2
    assert tr.log_constant_printed(sde, radius, dim, delta, horizon) == pytest.approx(np.trapezoid(rate, t), rel=1e-6)


@pytest.mark.parametrize("sde", SDES, ids=lambda s: s.name)
@pytest.mark.parametrize("delta", [0.0, 0.1])
def test_the_direct_constant_bounds_the_kernels_slope(sde, delta):
    """Two points and the steepest place between them are its worst case: it must hold there and almost be met."""
    points = np.array([[1.0], [-1.0]])
    y = np.linspace(-0.01, 0.01, 3)[:, None]
    h = tr.expected_mean(points, y, tr.posterior(points, y, sde, 0.5), sde.bridge(0.5, delta))
    steepest = float((h[2] - h[0])[0] / 0.02)
    bound = tr.constant_direct(sde, 1.0, delta, 0.5)
    assert 0.99 * bound < steepest <= bound * (1 + 1e-9)


def test_the_worst_case_meets_the_direct_constant():
    rows = td.worst()
    assert all(0.999 * row["c_direct"] < row["c"] <= row["c_direct"] * (1 + 1e-9) for row in rows)
    still = [row["c"] for row in rows if row["sde"] == "ve" and row["delta"] == 0]
    assert still == pytest.approx([1.0, 4.0, 16.0], rel=1e-3)  # R^2 / T


def test_the_enclosing_ball_holds_all_points_and_is_small():
    angle = np.linspace(0, 2 * math.pi, 30, endpoint=False)
    ring = np.stack([5 + 2 * np.cos(angle), 2 * np.sin(angle)], axis=1)
    lopsided = np.concatenate([ring, np.tile(ring[:1], (100, 1))])
    assert 2.0 <= tr.enclosing_radius(lopsided) < 2.0 * 1.05


def test_score_growth_of_two_points_by_hand():
    # Between points at +-1: variance 1 of X_0, so 1/t^2 - 1/t.
    assert tr.score_growth(np.array([[1.0], [-1.0]]), tr.Forward("ve"), 0.1) == pytest.approx(90.0)


def test_slope_recovers_a_power_law_and_leaves_zeros_out():
    assert td.slope([1, 2, 4, 8], [3 * k**-0.7 for k in (1, 2, 4, 8)]) == pytest.approx(-0.7)
    assert td.slope([1, 2, 4], [1.0, 0.5, 0.0]) is None


@pytest.mark.parametrize("sde", SDES, ids=lambda s: s.name)
def test_rows_obey_the_theorem_and_repeat(sde):
    case = td.Case("test", cloud(40, 2), 0.5, copies=5, paths=40, steps=20, replicates=2, ks=(1, 4, 16))
    rows = td.diffuse(case, sde)
    assert rows == td.diffuse(case, sde)
    assert len(rows) == 3 * len(case.deltas)
    radius = tr.enclosing_radius(case.points)
    for row in rows:
        bound = tr.constant_direct(sde, radius, row["delta"], 0.5) * row["w2"]
        assert max(row["gap_mean"], row["gap_cosine"], row["gap_hinge"], row.get("w1", 0.0)) <= bound
        if row["delta"] == 0:  # every function is 1-Lipschitz
            assert row["w1"] >= 0.999 * max(row["gap_mean"], row["gap_cosine"], row["gap_hinge"])
        else:
            assert row["path_ratio"] > 0
    lines = td.summarize(rows, case.points)
    assert [line["claim"] for line in lines].count("corollary15") == len(case.deltas)
    constants = [line for line in lines if line["claim"] == "theorem13-constant"]
    assert all(line["c_mean"] <= line["c_mean_max"] <= line["c_direct"] for line in constants)
