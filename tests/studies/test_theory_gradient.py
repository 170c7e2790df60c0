import math

import numpy as np
import pytest
import torch

from studies import theory_gradient as tg


def random_network(dim, seed=0):
    rng = np.random.default_rng(seed)
    base = tg.initial_network(dim)
    return tg.Network(base.w1 * 2, rng.normal(size=tg.HIDDEN), base.w2 * 1.5, rng.normal(size=tg.LOGITS))


def torch_loss(parts, x, label):
    w1, b1, w2, b2 = parts
    logits = torch.tanh(x @ w1.T + b1) @ w2.T + b2
    return torch.logsumexp(logits, -1) - logits[..., label]


def tensors(network, grad=False):
    parts = (network.w1, network.b1, network.w2, network.b2)
    return tuple(torch.tensor(p, requires_grad=grad) for p in parts)


def test_the_mean_gradient_is_autograds():
    rng = np.random.default_rng(1)
    network = random_network(5)
    measure = []
    for size in (4, 7):
        weights = rng.random(size)
        measure.append((rng.normal(size=(size, 5)), weights / weights.sum()))
    parts = tensors(network, grad=True)
    risk = sum(torch.tensor(w) @ torch_loss(parts, torch.tensor(x), y) for y, (x, w) in enumerate(measure)) / 2
    risk.backward()
    expected = np.concatenate([p.grad.numpy().ravel() for p in parts])
    np.testing.assert_allclose(tg.mean_gradient(network, measure), expected, atol=1e-12)


@pytest.mark.parametrize("label", [0, 3])
def test_slopes_are_the_spectral_norms_of_autograds_jacobian(label):
    network = random_network(6)
    x = np.random.default_rng(2).normal(size=(3, 6)) * 2
    parts = tensors(network)

    def gradient(row):
        return torch.cat([g.flatten() for g in torch.func.grad(torch_loss)(parts, row, label)])

    expected = [float(torch.linalg.matrix_norm(torch.func.jacrev(gradient)(torch.tensor(row)), 2)) for row in x]
    np.testing.assert_allclose(tg.slopes(network, x, label), expected, rtol=1e-9)


@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0])
def test_the_certificate_is_above_every_slope(scale):
    network = random_network(6, seed=3)
    x = np.random.default_rng(4).normal(size=(60, 6)) * scale
    radius = float(np.linalg.norm(x, axis=1).max())
    for label in (0, 9):
        assert tg.slopes(network, x, label).max() <= tg.certificate(network, radius)


def test_rows_obey_the_theorem():
    rng = np.random.default_rng(5)
    classes = [rng.normal(size=(60, 8)) + c for c in (0.0, 0.7)]
    rows = tg.gradient_rows("test", classes, [1, 4, 16], draws=3)
    measured = [row for row in rows if row["claim"] == "theorem5"]
    assert [row["network"] for row in measured] == ["initial"] * 3 + ["trained"] * 3
    for row in measured:
        assert row["l_sampled"] <= row["l_certificate"]
        assert row["error_voronoi"] <= row["bound_certificate"]
    for state in ("initial", "trained"):
        errors = [row["error_voronoi"] for row in measured if row["network"] == state]
        assert errors[-1] < errors[0]


def test_a_codebook_of_all_samples_has_no_error():
    rng = np.random.default_rng(6)
    samples = tg.scaled([rng.normal(size=(20, 4)) for _ in range(2)])
    voronoi, uniform, spread, squared = tg.quantized(samples, 20)
    assert spread < 1e-12 and squared < 1e-12
    network = random_network(4)
    truth = tg.mean_gradient(network, samples)
    for book in (voronoi, uniform):
        assert np.linalg.norm(tg.mean_gradient(network, book) - truth) < 1e-6


def test_scaling_gives_mean_zero_and_mean_square_one():
    samples = tg.scaled([np.full((3, 2), 4.0), np.array([[1.0, 2.0]])])
    whole = np.concatenate([x for x, _ in samples])
    np.testing.assert_allclose(whole.mean(axis=0), 0, atol=1e-12)
    assert math.isclose((whole**2).mean(), 1.0)
