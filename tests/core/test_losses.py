"""Oracles: torch.nn.functional's own losses, and hand-computed values."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ddoq_ray.core.losses import image_weights, weighted_cross_entropy, weighted_kl


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    student = (torch.randn(8, 5, generator=generator) * 3).requires_grad_()
    teacher = torch.randn(8, 5, generator=generator) * 3
    return student, teacher, torch.rand(8, generator=generator) * 2


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_uniform_weights_are_d4ms_loss(batch, temperature):
    student, teacher, _ = batch
    expected = F.kl_div(
        F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1), reduction="batchmean"
    )
    torch.testing.assert_close(weighted_kl(student, teacher, torch.ones(8), temperature), expected)


def test_kl_by_hand():
    # teacher (3/4, 1/4), student (1/2, 1/2): KL(teacher || student) = 3/4 ln 3/2 + 1/4 ln 1/2
    teacher, student = torch.tensor([[math.log(3.0), 0.0]] * 2), torch.zeros(2, 2)
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    weights = torch.tensor([3.0, 0.5])
    assert weighted_kl(student, teacher, weights, 1.0).item() == pytest.approx(3.5 * kl / 2, rel=1e-5)


def test_kl_as_the_paper_prints_it(batch):
    student, teacher, weights = batch
    swapped = weighted_kl(teacher, student.detach(), weights, 3.0)
    torch.testing.assert_close(weighted_kl(student, teacher, weights, 3.0, direction="student-teacher"), swapped)
    with pytest.raises(ValueError, match="direction must be one of"):
        weighted_kl(student, teacher, weights, 3.0, direction="both")


def test_kl_weighs_each_image(batch):
    student, teacher, weights = batch
    one = torch.stack([weighted_kl(student[i : i + 1], teacher[i : i + 1], torch.ones(1), 2.0) for i in range(8)])
    torch.testing.assert_close(weighted_kl(student, teacher, weights, 2.0), (weights * one).sum() / 8)
    torch.testing.assert_close(weighted_kl(student, teacher, weights.double(), 2.0), (weights * one).sum() / 8)


def test_kl_gradient_is_the_difference_of_probabilities(batch):
    student, teacher, weights = batch
    teacher = teacher.requires_grad_()
    weighted_kl(student, teacher, weights, 3.0).backward()
    expected = weights[:, None] * (F.softmax(student / 3, 1) - F.softmax(teacher / 3, 1)) / 3 / 8
    torch.testing.assert_close(student.grad, expected.detach())
    assert teacher.grad is None


def test_kl_is_zero_at_the_teacher_and_finite_at_extremes(batch):
    _, teacher, weights = batch
    assert weighted_kl(teacher, teacher, weights, 1.0).item() == 0
    hard = torch.tensor([[1000.0, 0.0, -1000.0]])
    assert weighted_kl(torch.zeros(1, 3), hard, torch.ones(1), 1.0).item() == pytest.approx(math.log(3))
    assert weighted_kl(hard, torch.zeros(1, 3), torch.ones(1), 1.0).isfinite()


def test_half_precision_logits_give_a_float32_loss(batch):
    student, teacher, weights = batch
    loss = weighted_kl(student.bfloat16(), teacher.half(), weights, 20.0)
    assert loss.dtype == torch.float32
    expected = weighted_kl(student.bfloat16().float(), teacher.half().float(), weights, 20.0)
    assert torch.equal(loss, expected)


def test_zero_weights_are_not_nan(batch):
    student, teacher, _ = batch
    assert weighted_kl(student, teacher, torch.zeros(8), 1.0).item() == 0


def test_cross_entropy_is_torchs(batch):
    student, _, weights = batch
    targets = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    torch.testing.assert_close(
        weighted_cross_entropy(student, targets, torch.ones(8)), F.cross_entropy(student, targets)
    )
    each = F.cross_entropy(student, targets, reduction="none", label_smoothing=0.1)
    loss = weighted_cross_entropy(student, targets, weights, label_smoothing=0.1)
    torch.testing.assert_close(loss, (each * weights).mean())
    # CutMix: linear in the target.
    lam = torch.rand(8, 1)
    other = targets.roll(1)
    mixed = lam * F.one_hot(targets, 5) + (1 - lam) * F.one_hot(other, 5)
    expected = (lam[:, 0] * F.cross_entropy(student, targets, reduction="none")
                + (1 - lam[:, 0]) * F.cross_entropy(student, other, reduction="none"))  # fmt: skip
    torch.testing.assert_close(weighted_cross_entropy(student, mixed, weights), (expected * weights).mean())


def test_image_weights_by_hand():
    ids = np.array([2, 5, 5, 2, 5, 2, 0])  # classes of 3, 3 and 1 images, interleaved
    weights = np.array([0.64, 0.5, 0.25, 0.2, 0.25, 0.16, 1.0])
    np.testing.assert_allclose(image_weights(weights, ids, "counts"), [1.92, 1.5, 0.75, 0.6, 0.75, 0.48, 1.0])
    np.testing.assert_allclose(image_weights(weights, ids, "sqrt"), np.sqrt([1.92, 1.5, 0.75, 0.6, 0.75, 0.48, 1.0]))
    np.testing.assert_array_equal(image_weights(weights, ids, "uniform"), np.ones(7))
    mass = np.array([10, 999, 20, 999, 999, 30])  # classes 1, 3, 4 have no image
    factor = np.array([1.0, 1.5, 1.5, 1.0, 1.5, 1.0, 0.5])
    for scheme in ("counts", "sqrt", "uniform"):
        np.testing.assert_allclose(
            image_weights(weights, ids, scheme, "empirical", mass),
            image_weights(weights, ids, scheme) * factor,
        )


def test_weights_of_mean_one():
    shares, ids = np.array([0.75, 0.25, 1.0, 0.64, 0.36]), np.array([0, 0, 1, 2, 2])
    mass = np.array([300.0, 100.0, 200.0])
    for scheme in ("counts", "sqrt", "uniform"):
        by_class = image_weights(shares, ids, scheme, normalize="class")
        assert [by_class[ids == c].mean() for c in range(3)] == pytest.approx([1, 1, 1])
        whole = image_weights(shares, ids, scheme, "empirical", mass, "set")
        plain = image_weights(shares, ids, scheme, "empirical", mass)
        assert whole.mean() == pytest.approx(1) and np.allclose(whole / whole[0], plain / plain[0])
    half = 1.5**0.5 + 0.5**0.5
    assert image_weights(shares, ids, "sqrt", normalize="class")[:2].tolist() == pytest.approx(
        [2 * 1.5**0.5 / half, 2 * 0.5**0.5 / half]
    )


def test_image_weights_invariants():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 7, 200)
    weights = rng.random(200)
    weights /= np.bincount(ids, weights=weights)[ids]
    counts, root = image_weights(weights, ids), image_weights(weights, ids, "sqrt")
    size = np.bincount(ids)
    np.testing.assert_allclose(np.bincount(ids, weights=counts) / size, 1)
    assert (np.bincount(ids, weights=root) / size <= 1).all()  # Jensen
    equal = 1 / size[ids]
    for scheme in ("counts", "sqrt", "uniform"):
        np.testing.assert_allclose(image_weights(equal, ids, scheme), 1)
        np.testing.assert_allclose(image_weights(equal, ids, scheme, "empirical", np.full(7, 3.0)), 1)
    image_weights(weights.astype(np.float32), ids)  # float32 storage passes the sum check
    assert image_weights(np.array([]), np.array([], dtype=np.int64)).shape == (0,)


def test_bad_input_is_refused(batch):
    student, teacher, weights = batch
    with pytest.raises(ValueError, match="shape"):
        weighted_kl(student, teacher[:, :4], weights, 1.0)
    with pytest.raises(ValueError, match="temperature"):
        weighted_kl(student, teacher, weights, 0.0)
    with pytest.raises(ValueError, match="one weight an image"):
        weighted_kl(student, teacher, weights[:, None], 1.0)
    with pytest.raises(ValueError, match="targets"):
        weighted_cross_entropy(student, torch.zeros(7, dtype=torch.int64), weights)
    ids = np.array([0, 0, 1])
    with pytest.raises(ValueError, match="class 0"):
        image_weights(np.array([0.5, 0.4, 1.0]), ids)
    for shares in (np.array([0.5, 0.5]), np.array([[0.5, 0.5, 1.0]])):
        with pytest.raises(ValueError, match="expected weights"):
            image_weights(shares, ids)
    with pytest.raises(ValueError, match="negative"):
        image_weights(np.array([1.5, -0.5, 1.0]), ids)
    with pytest.raises(ValueError, match="scheme"):
        image_weights(np.array([0.5, 0.5, 1.0]), ids, "cube")
    with pytest.raises(ValueError, match="across"):
        image_weights(np.array([0.5, 0.5, 1.0]), ids, across="all")
    with pytest.raises(ValueError, match="class_mass"):
        image_weights(np.array([0.5, 0.5, 1.0]), ids, across="empirical")
    with pytest.raises(ValueError, match="class_mass"):
        image_weights(np.array([0.5, 0.5, 1.0]), ids, across="empirical", class_mass=np.array([1.0]))
