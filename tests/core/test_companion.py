import numpy as np
import pytest
from support.companion import clvq_as_printed, companion_weights

from ddoq_ray.core.clvq import Clvq
from ddoq_ray.core.distortion import total_variation, voronoi_counts


def test_by_hand():
    # K = 2, w = (1/2, 1/2), v = (1, 1), t = 2. Winners 0, 0, 1.
    # winner: gamma 1/2 -> (3/4, 1/4); 1/3 -> (5/6, 1/6); 1/2 -> (5/12, 7/12).
    np.testing.assert_allclose(companion_weights([0, 0, 1], 2, step="winner"), [5 / 12, 7 / 12], rtol=1e-15)
    # global: gamma 1/3 -> (2/3, 1/3); 1/4 -> (3/4, 1/4); 1/5 -> (3/5, 2/5): v/t.
    np.testing.assert_allclose(companion_weights([0, 0, 1], 2, step="global"), [3 / 5, 2 / 5], rtol=1e-15)
    assert companion_weights([], 4, step="winner").tolist() == [0.25] * 4


def test_with_the_global_step_the_weights_are_the_counts():
    winners = np.random.default_rng(0).choice(6, size=5000, p=[0.5, 0.3, 0.1, 0.05, 0.04, 0.01])
    counts = np.bincount(winners, minlength=6) + 1
    np.testing.assert_allclose(companion_weights(winners, 6, step="global"), counts / counts.sum(), atol=1e-12)


def test_on_data_the_winners_own_step_is_far_from_the_voronoi_masses():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(3000, 5)) + 4 * rng.normal(size=(8, 5))[rng.choice(8, 3000, p=np.arange(8, 0, -1) / 36)]
    distance = {}
    for step in ("winner", "global"):
        centroids, counts, weights = clvq_as_printed(x[12:], x[:12], weight_step=step)
        assert weights.sum() == pytest.approx(1.0) and (weights >= 0).all()
        distance[step] = total_variation(weights, voronoi_counts(x, centroids) / 3000)
        if step == "global":
            np.testing.assert_allclose(weights, counts / counts.sum(), atol=1e-12)
    assert distance["global"] < 0.1 and distance["winner"] > 0.3


def test_the_streaming_quantizer_with_the_papers_rule_is_this_algorithm():
    x = np.random.default_rng(2).normal(size=(400, 20)).astype(np.float32)
    quantizer = Clvq(7, 20, winner="paper", buffer=7, seed=0, class_id=0)
    quantizer.update(x[:7])
    start = quantizer.result()[0]
    quantizer.update(x[7:])
    centroids, counts, weights = clvq_as_printed(x[7:], start, weight_step="global")
    np.testing.assert_allclose(quantizer.result()[0], centroids, atol=1e-5)
    assert (quantizer.result()[1] == counts).all()
    np.testing.assert_allclose(weights, counts / 400, atol=1e-12)


def test_refusals():
    with pytest.raises(ValueError, match=r"winners must lie in 0\.\.1"):
        companion_weights([0, 2], 2, step="global")
    with pytest.raises(ValueError, match="vector of integers"):
        companion_weights([0.5], 2, step="global")
    with pytest.raises(ValueError, match=r"step must be .* got 'own'"):
        companion_weights([0], 2, step="own")
    with pytest.raises(ValueError, match=r"start must be \[K, 2\]"):
        clvq_as_printed(np.zeros((3, 2)), np.zeros((2, 3)), weight_step="global")
