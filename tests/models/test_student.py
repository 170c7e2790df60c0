"""A student's epoch against the same written out; the ranks' parts add up to the whole; schedules by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ddoq_ray.config.training import ProtocolConfig, StudentConfig
from ddoq_ray.core.views.params import epoch_order
from ddoq_ray.core.views.render import batch_views
from ddoq_ray.models.classifiers import Classifier, build_classifier
from ddoq_ray.models.labelling import view_spec
from ddoq_ray.models.training.student import (
    StudentTraining,
    build_student,
    learning_rate,
    make_optimizer,
    share,
    teacher_targets,
)

N, C = 10, 3
PROTOCOL = ProtocolConfig(batch=4, lr=0.01, temperature=2.0)
STUDENT = StudentConfig("convnet3-w4", 8)
IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (N, 3, 12, 12), dtype=np.uint8))
WEIGHTS = torch.linspace(0.5, 1.5, N)


@dataclasses.dataclass(frozen=True)
class OneOf:
    """A rank whose collectives are left out: its own value stands for the mean."""

    rank: int
    world: int

    def mean(self, value: torch.Tensor) -> float:
        return float(value)


def training(**changed: Any) -> StudentTraining:
    model = build_student(STUDENT, C, seed=1)
    made = StudentTraining(model, model, IMAGES, WEIGHTS, PROTOCOL, view_spec(PROTOCOL, 8), seed=1, view_seed=5)
    return dataclasses.replace(made, **changed)


@pytest.fixture(scope="module")
def teacher() -> Classifier:
    return build_classifier("convnet3-w8", C, 16).eval()


def test_an_epoch_is_its_steps_written_out(teacher: Classifier) -> None:
    """Algorithm 4, line 7: the mean over a batch of weight x KL(teacher || student) of the same view.

    By SGD: Adam makes steps of the rounding errors of biases before a norm, which have no gradient.
    """
    protocol = dataclasses.replace(PROTOCOL, optimizer="sgd")
    ours = training(protocol=protocol, epoch=2)
    loss = ours.train_epoch(0.003, teacher_targets(teacher))

    model = build_student(STUDENT, C, seed=1).train()
    steps = make_optimizer(protocol, model)
    for group in steps.param_groups:
        group["lr"] = 0.003
    order, total = epoch_order(1, 2, N), 0.0
    for batch in (order[:4], order[4:8], order[8:]):
        pixels, _, _ = batch_views(IMAGES, batch, view_spec(protocol, 8), 5, 2)
        larger = F.interpolate(pixels, size=(16, 16), mode="bilinear", antialias=True)
        with torch.no_grad():
            p = (teacher(larger) / 2).softmax(1)
        kl = (p * (p.log() - (model(pixels) / 2).log_softmax(1))).sum(1)
        mean = (WEIGHTS[torch.from_numpy(batch)] * kl).mean()
        steps.zero_grad()
        mean.backward()
        steps.step()
        total += float(mean.detach()) * len(batch)
    assert loss == pytest.approx(total / N, rel=1e-5) and ours.epoch == 3
    for found, expected in zip(ours.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_ranks_losses_and_gradients_have_the_mean_of_the_whole_batch(teacher: Classifier, world: int) -> None:
    """ConvNet-3 has no batch norm, so that an image's gradient does not depend on the others of its rank."""
    batch = np.array([7, 1, 4, 9, 2])

    def of(ranks: Any) -> tuple[float, torch.Tensor]:
        part = training(ranks=ranks)
        loss = part.loss(batch, teacher_targets(teacher))
        loss.backward()
        return float(loss.detach()), torch.cat([p.grad.flatten() for p in part.model.parameters()])

    whole, gradient = of(OneOf(0, 1))
    parts = [of(OneOf(rank, world)) for rank in range(world)]
    assert np.mean([loss for loss, _ in parts]) == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(torch.stack([g for _, g in parts]).mean(0), gradient, rtol=1e-4, atol=1e-6)


def test_every_image_of_a_batch_has_one_rank_and_none_has_a_single_one() -> None:
    for world in (1, 2, 3, 4, 8):
        for size in range(1, 40):
            batch = np.arange(size)
            parts = [share(batch, rank, world) for rank in range(world)]
            assert sorted(np.concatenate(parts).tolist()) == batch.tolist()
            assert size == 1 or 1 not in [len(p) for p in parts]
            if size >= 2 * world:
                assert all(np.array_equal(p, batch[r::world]) for r, p in enumerate(parts))


def test_a_loss_that_is_no_number_ends_the_epoch(teacher: Classifier) -> None:
    made = training()
    made.model.head.bias.data[0] = float("nan")
    seen: list[int] = []

    def targets(pixels: torch.Tensor, index: Any) -> torch.Tensor:
        seen.append(len(index))
        return teacher_targets(teacher)(pixels, index)

    assert np.isnan(made.train_epoch(0.01, targets)) and seen == [4] and made.epoch == 1
    assert not made.finite() and training().finite()


def test_schedules() -> None:
    rates = [learning_rate(dataclasses.replace(PROTOCOL, lr=1.0), epoch, 4) for epoch in range(4)]
    assert rates == pytest.approx([1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2])
    steps = dataclasses.replace(PROTOCOL, lr=1.0, schedule="step", step_at=(1, 3), step_factor=0.5)
    assert [learning_rate(steps, epoch, 4) for epoch in range(4)] == [1, 0.5, 0.5, 0.25]
    assert learning_rate(dataclasses.replace(PROTOCOL, schedule="constant"), 3, 4) == PROTOCOL.lr


def test_weight_decay_is_on_matrices_and_filters_only() -> None:
    for name in ("adamw", "sgd"):
        protocol = dataclasses.replace(PROTOCOL, optimizer=name, weight_decay=0.3)  # type: ignore[arg-type]
        decayed, plain = make_optimizer(protocol, build_student(STUDENT, C, 0)).param_groups
        assert decayed["weight_decay"] == 0.3 and all(p.ndim > 1 for p in decayed["params"])
        assert plain["weight_decay"] == 0 and all(p.ndim == 1 for p in plain["params"]) and plain["params"]
