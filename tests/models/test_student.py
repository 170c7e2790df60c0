"""A student's epoch against the same written out; the ranks' parts add up to the whole; schedules by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ddoq_ray.models.training.images as images_module
from ddoq_ray.config.cluster import TrainerResources
from ddoq_ray.config.compose import load_config
from ddoq_ray.config.training import ProtocolConfig, StudentConfig
from ddoq_ray.core.losses import image_weights
from ddoq_ray.core.rng import philox
from ddoq_ray.core.views.params import epoch_orders, view_params
from ddoq_ray.core.views.render import batch_views, render_epochs
from ddoq_ray.data.pixel_rows import Chosen, FileRows, MemoryRows
from ddoq_ray.models.classifiers import Classifier, build_classifier
from ddoq_ray.models.protocol_views import view_spec
from ddoq_ray.models.training.images import Gathered, Images, Resident, Views
from ddoq_ray.models.training.student import (
    HardTargets,
    StoredTargets,
    StudentTraining,
    TeacherTargets,
    build_student,
    layer_seeds,
    learning_rate,
    make_optimizer,
    share,
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
    made = StudentTraining(
        model, model, Resident(IMAGES), WEIGHTS, PROTOCOL, view_spec(PROTOCOL, 8), seed=1, view_seed=5
    )
    return dataclasses.replace(made, **changed)


@pytest.fixture(scope="module")
def teacher() -> Classifier:
    return build_classifier("convnet3-w8", C, 16).eval()


def test_seeds_of_random_layers_are_those_of_their_keys() -> None:
    """Drawn for several epochs at once, each is what its own generator draws first."""
    drawn = layer_seeds(7, range(3, 9), 2)
    assert drawn.tolist() == [int(philox("random layers", 7, epoch, 2).integers(2**63)) for epoch in range(3, 9)]


def test_an_epoch_is_its_steps_written_out(teacher: Classifier) -> None:
    """Algorithm 4, line 7: the mean over a batch of weight x KL(teacher || student) of the same view.

    By SGD: Adam makes steps of the rounding errors of biases before a norm, which have no gradient.
    """
    protocol = dataclasses.replace(PROTOCOL, optimizer="sgd")
    ours = training(protocol=protocol, epoch=2)
    loss = ours.train_epoch(0.003, TeacherTargets(teacher))

    model = build_student(STUDENT, C, seed=1).train()
    steps = make_optimizer(protocol, model)
    for group in steps.param_groups:
        group["lr"] = 0.003
    order, total = epoch_orders(1, [2], N)[0], 0.0
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
        loss = part.loss(batch, TeacherTargets(teacher))
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


def test_a_loss_that_is_no_number_is_told_after_the_epoch(teacher: Classifier) -> None:
    """Nobody waits for the device within it."""
    made = training()
    made.model.head.bias.data[0] = float("nan")
    assert np.isnan(made.train_epoch(0.01, TeacherTargets(teacher))) and made.epoch == 1
    assert not made.finite() and training().finite()


def trained(teacher: Classifier, epochs: int = 2, **changed: Any) -> torch.Tensor:
    made = training(**changed)
    for _ in range(epochs):
        made.train_epoch(0.01, TeacherTargets(teacher))
    with made.scored() as model:
        return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_where_images_are_kept_changes_no_bit(teacher: Classifier, tmp_path: Path) -> None:
    file = FileRows(str(tmp_path / "rows"), (N + 1, 3, 12, 12))
    places = np.array([3, 0, 1, 2, 4, 5, 6, 7, 10, 9])  # one row is of a picture that could not be read
    for image, row in zip(IMAGES.numpy(), places, strict=True):
        file.put(row, image.transpose(1, 2, 0))
    kept: dict[str, Images] = {
        "memory": Gathered(MemoryRows(IMAGES.numpy()), "cpu"), "file": Gathered(Chosen(file, places), "cpu")
    }  # fmt: skip
    expected = trained(teacher)
    for name, images in kept.items():
        assert images.shape == (N, 3, 12, 12) and torch.equal(trained(teacher, images=images), expected), name
    file.path, short = "rows", np.empty((1, 3, 12, 12), np.uint8)
    with pytest.raises(ValueError, match="rows is shorter than it was"):
        file.take(np.array([N + 1]), short)


@pytest.mark.parametrize("options", [{}, {"cutmix": False}, {"cutmix": False, "mixup": 0.5}])
@pytest.mark.parametrize("small", [1, 12 * 192, 25 * 192, 2**20], ids=["a batch", "3 batches", "2 epochs", "many"])
@pytest.mark.parametrize("ranks", [1, 4], ids=["whole epochs", "a share"])
def test_views_are_of_their_epoch_however_many_are_rendered_at_once(
    monkeypatch: pytest.MonkeyPatch, small: int, options: dict[str, Any], ranks: int
) -> None:
    monkeypatch.setattr(images_module, "_SMALL", small)
    spec, resident = dataclasses.replace(view_spec(PROTOCOL, 8), **options), Resident(IMAGES, ranks)
    for epoch in (0, 1, 2, 9, 3):
        order = np.random.default_rng(epoch).permutation(N)
        found = list(resident.views(np.array_split(order, 3), spec, 5, epoch))
        pixels, partner, kept = batch_views(IMAGES, order, spec, 5, epoch)
        assert torch.equal(torch.cat([v.pixels for v in found]), pixels)
        for name, expected in (("index", order), ("partner", partner), ("kept", kept)):
            np.testing.assert_array_equal(np.concatenate([getattr(v, name) for v in found]), expected)
    other = next(iter(resident.views([np.arange(N)], spec, 6, 3)))
    assert not torch.equal(other.pixels, batch_views(IMAGES, np.arange(N), spec, 5, 3)[0])


@pytest.mark.parametrize(("room", "renders"), [(0, 12), (1, 10), (2, 8), (3, 4)])
def test_views_wait_for_the_next_student_while_there_is_room(
    monkeypatch: pytest.MonkeyPatch, room: int, renders: int
) -> None:
    """Three students see four epochs; `room` of them may be kept beside the last one that was rendered."""
    monkeypatch.setattr(images_module, "_SMALL", 1)
    spec, resident, rendered = view_spec(PROTOCOL, 8), Resident(IMAGES, room=room * N * 192), []

    def counted(*given: Any) -> torch.Tensor:
        rendered.append(render_epochs(*given))
        return rendered[-1]

    monkeypatch.setattr(images_module, "render_epochs", counted)
    for _ in range(3):
        for epoch in range(4):
            (found,) = resident.views([np.arange(N)], spec, 5, epoch)
            assert torch.equal(found.pixels, batch_views(IMAGES, np.arange(N), spec, 5, epoch)[0])
    assert len(rendered) == renders


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_passes_of_a_batch_add_up_to_it(teacher: Classifier, micro_batch: int) -> None:
    """Each has two images at least; ConvNet-3 has no batch norm, so that the sums differ in rounding alone."""
    how = TrainerResources(micro_batch=micro_batch)
    made = training(how=how)
    assert [len(p.index) for p in made.parts(np.arange(4))] == [2, 2]
    assert [len(p.index) for p in made.parts(np.arange(1))] == [1]
    sgd = dataclasses.replace(PROTOCOL, optimizer="sgd")
    torch.testing.assert_close(
        trained(teacher, how=how, protocol=sgd), trained(teacher, protocol=sgd), rtol=1e-4, atol=1e-6
    )


def test_bfloat16_sees_the_weights_of_each_step(teacher: Classifier) -> None:
    """Autocast that is entered once for several steps would go on with weights that it cast before the first."""
    plain = training(protocol=dataclasses.replace(PROTOCOL, optimizer="sgd"))
    low = training(protocol=plain.protocol, how=TrainerResources(precision="bfloat16", channels_last=True))
    before = torch.cat([p.detach().flatten() for p in plain.model.parameters()]).clone()
    for made in (plain, low):
        for _ in range(3):
            made.train_epoch(0.05, TeacherTargets(teacher))
    after, near = (torch.cat([p.detach().flatten() for p in m.model.parameters()]) for m in (plain, low))
    assert all(p.dtype == torch.float32 for p in low.model.parameters())
    assert 0 < float((near - after).norm()) < 0.05 * float((after - before).norm())


def test_averaged_weights_are_scored_and_trained_ones_are_trained(teacher: Classifier) -> None:
    """EDC's and others' exponential moving average, whose first terms weigh more."""
    made = training(protocol=dataclasses.replace(PROTOCOL, ema=0.9))
    expected = [p.detach().clone() for p in made.model.parameters()]
    step, taken = StudentTraining.step, 0

    def watched(self: StudentTraining, *asked: Any) -> torch.Tensor:
        nonlocal taken
        loss = step(self, *asked)
        decay = min(0.9, (taken + 1) / (taken + 11))
        for mean, p in zip(expected, self.model.parameters(), strict=True):
            mean.lerp_(p.detach(), 1 - decay)
        taken += 1
        return loss

    made.step = watched.__get__(made)  # type: ignore[method-assign]
    for _ in range(2):
        made.train_epoch(0.01, TeacherTargets(teacher))
    own = [p.detach().clone() for p in made.model.parameters()]
    with made.scored() as model:
        for p, mean in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.detach(), mean)
    assert taken == 6 and all(torch.equal(p, o) for p, o in zip(made.model.parameters(), own, strict=True))
    again = training(protocol=made.protocol)
    again.restore(made.state())
    with again.scored() as one, made.scored() as other:
        assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_hard_labels_are_shared_by_area_and_weights_too() -> None:
    pixels = torch.zeros(3, 3, 8, 8)
    drawn = view_params(view_spec(PROTOCOL, 8), 5, 0, np.arange(3), (3, 12, 12))
    drawn = dataclasses.replace(drawn, partner=np.array([1, -1, 0]), lam=np.array([0.75, 1.0, 0.5]))
    views = Views(pixels, np.array([0, 1, 2]), drawn, slice(None))
    targets = HardTargets(torch.tensor([2, 0, 2]), 3)
    assert targets(views).tolist() == [[0.25, 0, 0.75], [1, 0, 0], [0, 0, 1]]
    weights = torch.tensor([1.0, 3.0, 5.0])
    assert training(weights=weights)._weights(views).tolist() == [1, 3, 5]
    assert training(weights=weights, cutmix_weight="mixed")._weights(views).tolist() == [1.5, 3, 3]
    made = training(protocol=dataclasses.replace(PROTOCOL, label_smoothing=0.1))
    classes = torch.arange(N) % C
    loss = made.loss(np.arange(4), HardTargets(classes, C))
    seen, partner, kept = batch_views(IMAGES, np.arange(4), made.spec, 5, 0)
    logits, share = made.model(seen), torch.as_tensor(kept, dtype=torch.float32)
    one, two = (
        F.cross_entropy(logits, classes[rows], reduction="none", label_smoothing=0.1)
        for rows in (np.arange(4), partner.clip(0))
    )
    torch.testing.assert_close(loss, (WEIGHTS[:4] * (share * one + (1 - share) * two)).mean())


def test_schedules() -> None:
    rates = [learning_rate(dataclasses.replace(PROTOCOL, lr=1.0), epoch, 4) for epoch in range(4)]
    assert rates == pytest.approx([1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2])
    steps = dataclasses.replace(PROTOCOL, lr=1.0, schedule="step", step_at=(1, 3), step_factor=0.5)
    assert [learning_rate(steps, epoch, 4) for epoch in range(4)] == [1, 0.5, 0.5, 0.25]
    assert learning_rate(dataclasses.replace(PROTOCOL, schedule="constant"), 3, 4) == PROTOCOL.lr
    half = dataclasses.replace(PROTOCOL, lr=1.0, cosine_span=2.0)  # RDED's: lr/2 (1 + cos(pi e / 2E))
    assert [learning_rate(half, epoch, 4) for epoch in (0, 4)] == pytest.approx([1, 0.5])


def test_weight_decay_is_on_matrices_and_filters_only() -> None:
    for name in ("adamw", "sgd"):
        protocol = dataclasses.replace(PROTOCOL, optimizer=name, weight_decay=0.3)  # type: ignore[arg-type]
        decayed, plain = make_optimizer(protocol, build_student(STUDENT, C, 0)).param_groups
        assert decayed["weight_decay"] == 0.3 and all(p.ndim > 1 for p in decayed["params"])
        of_all = dataclasses.replace(protocol, decay_all=True)
        assert {g["weight_decay"] for g in make_optimizer(of_all, build_student(STUDENT, C, 0)).param_groups} == {0.3}
        assert plain["weight_decay"] == 0 and all(p.ndim == 1 for p in plain["params"]) and plain["params"]


def test_ddoq_v1_by_hand_and_by_torchs_kldivloss() -> None:
    """Appendix C with Eq. 33's weights: sum of sqrt(K w) KL(teacher || student) at T = 20 over the batch, AdamW 2e-3 on
    filters with decay 0.01, a quarter of it from epoch 250. Printed is KL(student || teacher): direction has both.
    """
    ruled = ["experiment=digits", "protocol=ddoq-v1", "weights=sqrt"]
    protocol = dataclasses.replace(load_config(ruled).protocol, batch=4, cutmix=False)
    assert [learning_rate(protocol, epoch, 300) for epoch in (0, 249, 250, 299)] == [2e-3, 2e-3, 5e-4, 5e-4]
    assert [g["weight_decay"] for g in make_optimizer(protocol, build_student(STUDENT, C, 0)).param_groups] == [0.01, 0]
    shares, ids = np.array([0.5, 0.3, 0.2, 1.0]), np.array([0, 0, 0, 1])
    weights = torch.from_numpy(image_weights(shares, ids, "sqrt")).float()
    assert weights.tolist() == pytest.approx([1.5**0.5, 0.9**0.5, 0.6**0.5, 1.0])

    answers = torch.tensor([[20.0, 0.0, -20.0], [0.0, 0.0, 0.0], [40.0, 20.0, 0.0], [-20.0, 0.0, 20.0]])
    of = training(images=Resident(IMAGES[:4]), weights=weights, protocol=protocol, spec=view_spec(protocol, 8))
    loss = of.loss(np.arange(4), StoredTargets(lambda index: answers[index]))
    pixels, _, _ = batch_views(IMAGES[:4], np.arange(4), of.spec, 5, 0)
    logits = of.model(pixels).double() / 20
    by_torch = torch.nn.KLDivLoss(reduction="none")(logits.log_softmax(1), (answers.double() / 20).softmax(1)).sum(1)
    assert float(loss) == pytest.approx(float((weights * by_torch).sum() / 4), rel=1e-5)
    e = np.exp(np.array([1.0, 0.0, -1.0]))  # by hand: the teacher's shares of the first image at T = 20
    p, q = e / e.sum(), np.exp(logits[0].detach().numpy() - float(logits[0].logsumexp(0)))
    assert float(by_torch[0]) == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-6)

    printed = dataclasses.replace(protocol, direction="student-teacher")
    other = dataclasses.replace(of, model=of.model, protocol=printed)
    expected = torch.nn.KLDivLoss(reduction="none", log_target=True)(
        (answers.double() / 20).log_softmax(1), logits.log_softmax(1)
    ).sum(1)
    found = other.loss(np.arange(4), StoredTargets(lambda index: answers[index]))
    assert float(found) == pytest.approx(float((weights * expected).sum() / 4), rel=1e-5)
    assert abs(float(found) - float(loss)) > 1e-4
