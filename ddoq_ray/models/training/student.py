"""Train a student on weighted images and soft labels: weighted KL on seeded views, alone or as one of several ranks.

Batches are cut from one global order an epoch, keyed by (seed, epoch), so the sequence of images does not depend on the
number of ranks. Random layers (dropout, stochastic depth) draw from torch's own generators, which are seeded anew each
epoch by (student's seed, epoch, rank), so that a student that is resumed, or that follows another one in the same
process, draws what it would have drawn.

Shape suffixes: N images of the set, B of a batch, b of them on this rank, C outputs, H W stored size, S view size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from ddoq_ray.config.training import ProtocolConfig, StudentConfig
from ddoq_ray.core.losses import weighted_kl
from ddoq_ray.core.rng import philox
from ddoq_ray.core.views.params import Int64, ViewSpec, epoch_order
from ddoq_ray.core.views.render import batch_views
from ddoq_ray.models.classifiers import Classifier, build_classifier
from ddoq_ray.models.ensemble import Teacher, for_teacher

# Of views float32 [b, 3, S, S] and the images int64 [b] that they are of: the teacher's logits float32 [b, C].
Targets = Callable[[Tensor, Int64], Tensor]


class Ranks(Protocol):
    """The place of this process among those that train one student together."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    def mean(self, value: Tensor) -> float:
        """The mean of a scalar over the ranks: the same float on each."""


@dataclass(frozen=True)
class Alone:
    """One process trains the student."""

    rank: int = 0
    world: int = 1

    def mean(self, value: Tensor) -> float:
        return float(value)


@dataclass
class StudentTraining:
    """A student with what it is trained on.

    Attributes:
        model: The student, on the device of the images.
        wrapped: What is called for its logits: the model, or what averages its gradients over the ranks.
        images: uint8 [N, 3, H, W], the whole set.
        weights: float32 [N], of the images in the loss, on their device.
        protocol: Its optimizer, schedule, batch and temperature.
        spec: What views look like.
        seed: Of the student: its order of images and its random layers.
        view_seed: Of the views, which all students share.
        epoch: Epochs that are finished.
        view_epochs: Epochs that have views of their own, since labels are stored for no more; later ones see these
            again. None: all.
    """

    model: Classifier
    wrapped: nn.Module
    images: Tensor
    weights: Tensor
    protocol: ProtocolConfig
    spec: ViewSpec
    seed: int
    view_seed: int
    ranks: Ranks = field(default_factory=Alone)
    epoch: int = 0
    view_epochs: int | None = None

    def __post_init__(self) -> None:
        self.optimizer = make_optimizer(self.protocol, self.model)

    def train_epoch(self, rate: float, targets: Targets) -> float:
        """Train on every image once, and count the epoch.

        Args:
            rate: Learning rate of the epoch; see `learning_rate`.
            targets: The teacher's logits of views.

        Returns:
            The mean loss, or the first one that is not finite, after which nothing more is trained.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        key = philox("random layers", self.seed, self.epoch, self.ranks.rank)
        torch.manual_seed(int(key.integers(2**63)))
        order = epoch_order(self.seed, self.epoch, len(self.images))
        self.model.train()
        total = mean = 0.0
        for first in range(0, len(order), self.protocol.batch):
            batch = order[first : first + self.protocol.batch]
            mean = self.ranks.mean(self.step(batch, targets))
            if not math.isfinite(mean):
                break
            total += mean * len(batch)
        self.epoch += 1
        return total / len(order) if math.isfinite(mean) else mean

    def step(self, batch: Int64, targets: Targets) -> Tensor:
        """One step of the optimizer on a batch int64 [B], of which every rank trains its part; this rank's loss."""
        loss = self.loss(batch, targets)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def loss(self, batch: Int64, targets: Targets) -> Tensor:
        """This rank's part of the loss of a batch; its mean over the ranks is the mean over the batch.

        Args:
            batch: int64 [B], images of the set: the whole batch, on every rank.
            targets: The teacher's logits of views.

        Returns:
            float32 scalar with its graph.
        """
        mine = share(batch, self.ranks.rank, self.ranks.world)
        looked_at = mine if len(mine) else batch[:1].repeat(2)
        seen = self.epoch if self.view_epochs is None else self.epoch % self.view_epochs
        pixels, _, _ = batch_views(self.images, looked_at, self.spec, self.view_seed, seen)
        logits: Tensor = self.wrapped(pixels)
        if not len(mine):  # it has no image, but DDP's collectives want its (zero) gradients
            return logits.sum() * 0.0
        weights = self.weights[torch.from_numpy(mine).to(self.weights.device)]
        loss = weighted_kl(logits, targets(pixels, mine), weights, self.protocol.temperature)
        return loss * (len(mine) * self.ranks.world / len(batch))

    def finite(self) -> bool:
        """Whether no weight is infinite or NaN: of those that the last step left, no loss was taken."""
        return all(bool(t.isfinite().all()) for t in self.model.state_dict().values() if t.is_floating_point())


def share(batch: Int64, rank: int, world: int) -> Int64:
    """A rank's part of a batch: every `world`-th image.

    A batch with fewer than two images a rank is dealt to fewer ranks, so that none gets a single image while there are
    others: batch norm has no variance over one, and stops.
    """
    used = max(1, min(world, len(batch) // 2))
    return batch[rank::used] if rank < used else batch[:0]


def build_student(config: StudentConfig, outputs: int, seed: int) -> Classifier:
    """A fresh student; its weights are those of its seed."""
    key = int(philox("student", seed).integers(2**31))
    return build_classifier(config.arch, outputs, config.image_size, seed=key)


def teacher_targets(teacher: Teacher) -> Targets:
    """The answers of a teacher that looks at the student's own views, for labels that are not stored."""

    def targets(pixels: Tensor, _: Int64) -> Tensor:
        with torch.no_grad():
            logits: Tensor = teacher(for_teacher(pixels, teacher.image_size))
            return logits

    return targets


def learning_rate(protocol: ProtocolConfig, epoch: int, epochs: int) -> float:
    """The learning rate of an epoch (constant within it), as D4M's and the paper's scripts step it."""
    if protocol.schedule == "cosine":
        return protocol.lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    if protocol.schedule == "step":
        return protocol.lr * protocol.step_factor ** sum(epoch >= at for at in protocol.step_at)
    return protocol.lr


def make_optimizer(protocol: ProtocolConfig, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW or SGD; weight decay on matrices and filters only, as D4M's script separates them."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": protocol.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    if protocol.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=protocol.lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=protocol.lr)
