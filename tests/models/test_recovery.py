"""Images recovered from a classifier: the loss of its batch norms by hand, and what optimizing it does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ddoq_ray.config.baselines import RecoveryConfig
from ddoq_ray.models.classifiers import Classifier, build_classifier
from ddoq_ray.models.recovery import Recovery, norm_loss, norm_losses, recovered

INDICES = np.array([0, 1, 2, 3])


@pytest.fixture(scope="module")
def teacher() -> Classifier:
    """With statistics of its batch norms that are of some images."""
    made = build_classifier("convnet3-w8-batch", 4, 16).train()
    with torch.no_grad():
        for i in range(20):
            made(torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(i)))
    return made.eval()


def test_the_loss_of_a_batch_norm_by_hand() -> None:
    norm = nn.BatchNorm2d(2)
    norm.running_mean, norm.running_var = torch.tensor([1.0, 0.0]), torch.tensor([2.0, 5.0])
    # Channel 0: 0, 2, 4, 6: mean 3, variance 5. Channel 1: 1, 1, 3, 3: mean 2, variance 1.
    x = torch.tensor([[[[0.0, 2.0]], [[1.0, 1.0]]], [[[4.0, 6.0]], [[3.0, 3.0]]]])
    by_hand = ((5 - 2) ** 2 + (1 - 5) ** 2) ** 0.5 + ((3 - 1) ** 2 + (2 - 0) ** 2) ** 0.5
    assert float(norm_loss(x, norm)) == pytest.approx(by_hand)


def test_every_layer_is_asked_in_its_order_and_no_hook_stays(teacher: Classifier) -> None:
    layers = [m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)]
    with norm_losses(teacher) as found, torch.no_grad():
        x = torch.rand(4, 3, 16, 16)
        teacher(x)
        assert list(found) == layers
        first = norm_loss(_input_of(teacher, layers[0], x), layers[0])
        assert float(found[layers[0]]) == pytest.approx(float(first))
    assert all(not m._forward_pre_hooks for m in layers)


def _input_of(teacher: Classifier, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    teacher(x)
    hook.remove()
    return seen[0]


def losses(teacher: Classifier, pictures: np.ndarray) -> tuple[float, float]:
    """Cross-entropy, and the sum of the batch norms' losses, of pictures."""
    x = torch.from_numpy(pictures.transpose(0, 3, 1, 2) / np.float32(255))
    with norm_losses(teacher) as norms, torch.no_grad():
        logits = teacher(x)
    return float(nn.functional.cross_entropy(logits, torch.from_numpy(INDICES))), float(sum(norms.values()))


def test_recovered_images_are_named_rightly_and_look_familiar_to_the_batch_norms(teacher: Classifier) -> None:
    weights = [p.detach().clone() for p in teacher.parameters()]
    plain = {"min_crop": 1.0, "flip": False, "jitter": 0}
    before = recovered(teacher, INDICES, Recovery(RecoveryConfig(iterations=1, lr=1e-9, **plain)), (0,))
    after = recovered(teacher, INDICES, Recovery(RecoveryConfig(iterations=60, bn=0.1, **plain)), (0,))
    (cross, norm), (cross_after, norm_after) = losses(teacher, before), losses(teacher, after)
    assert cross_after < 0.8 * cross and norm_after < norm
    assert before.dtype == after.dtype == np.uint8 and after.shape == (4, 16, 16, 3)
    assert all(p.requires_grad and bool((p == w).all()) for p, w in zip(teacher.parameters(), weights, strict=True))
    assert not any(p.grad is not None for p in teacher.parameters())


def test_the_same_key_gives_the_same_bytes(teacher: Classifier) -> None:
    how = Recovery(RecoveryConfig(iterations=5))
    first = recovered(teacher, INDICES, how, (0, "recover", 0, 0))
    torch.rand(7)  # the global generator is not asked
    assert (recovered(teacher, INDICES, how, (0, "recover", 0, 0)) == first).all()
    assert (recovered(teacher, INDICES, how, (0, "recover", 0, 1)) != first).any()


def test_the_curriculum_begins_with_the_whole_image() -> None:
    config = RecoveryConfig(iterations=100)
    areas = [Recovery(config, curriculum=True).least_area(step) for step in range(101)]
    assert areas[0] == 1 and areas[50] == pytest.approx(0.08 + 0.92 / 2) and areas[100] == pytest.approx(0.08)
    assert areas == sorted(areas, reverse=True)
    assert {Recovery(config).least_area(step) for step in range(100)} == {0.08}


def test_published_settings_by_size() -> None:
    config = RecoveryConfig()
    assert (config.iterations, config.lr, config.bn, config.first_bn, config.batch) == (4000, 0.25, 0.01, 10.0, 100)
    assert [config.shift(side) for side in (32, 64, 224)] == [4, 4, 32] and RecoveryConfig(jitter=7).shift(32) == 7
