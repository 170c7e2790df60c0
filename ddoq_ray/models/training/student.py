"""Train a student on weighted images and soft labels: weighted KL on seeded views, alone or as one of several ranks.

Batches are cut from one global order an epoch, keyed by (seed, epoch), so the sequence of images does not depend on the
number of ranks. Random layers (dropout, stochastic depth) draw from torch's own generators, which are seeded anew each
epoch by (student's seed, epoch, rank), so that a student that is resumed, or that follows another one in the same
process, draws what it would have drawn.

Nothing in a step waits for the device: losses are summed there and read once an epoch.

Shape suffixes: N images of the set, B of a batch, b of them in one forward pass of this rank, C outputs, H W stored
size, S view size.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ddoq_ray.config.cluster import TrainerResources
from ddoq_ray.config.training import ProtocolConfig, StudentConfig, WeightsConfig
from ddoq_ray.core.losses import weighted_cross_entropy, weighted_kl
from ddoq_ray.core.rng import UInt64, philox, philox_key, philox_words
from ddoq_ray.core.transfers import on_device
from ddoq_ray.core.views.params import Int64, ViewSpec, epoch_orders
from ddoq_ray.models.classifiers import Classifier, build_classifier
from ddoq_ray.models.ensemble import Teacher, for_teacher
from ddoq_ray.models.training.averaging import Average
from ddoq_ray.models.training.course import arithmetic
from ddoq_ray.models.training.images import Images, Views
from ddoq_ray.models.training.ranks import Alone, Ranks

_ORDERS = 4096  # images whose places in epochs are drawn at once, where a single epoch has fewer


class Targets(Protocol):
    """What a student is to answer: a teacher's logits of the views float32 [b, C], or their classes' shares."""

    @property
    def hard(self) -> bool:
        """Whether the answers are shares of classes, which sum to 1 in a row, and the loss is cross-entropy."""

    def __call__(self, views: Views) -> Tensor: ...


@dataclass(frozen=True)
class Part:
    """What a rank looks at in one forward pass.

    Attributes:
        index: int64 [b], images of the set.
        of: B, images of the whole batch.
        counts: False where the rank has no image of the batch: it looks at one that is another's, for nothing.
    """

    index: Int64
    of: int
    counts: bool = True


@dataclass
class StudentTraining:
    """A student with what it is trained on.

    Attributes:
        model: The student, on the device of the images.
        wrapped: What is called for its logits: the model, or what averages its gradients over the ranks.
        images: The whole set.
        weights: float32 [N], of the images in the loss, on their device.
        protocol: Its optimizer, schedule, batch and temperature.
        spec: What views look like.
        seed: Of the student: its order of images and its random layers.
        view_seed: Of the views, which all students share.
        how: Arithmetic, and how many images are in a forward pass.
        cutmix_weight: See `weights.cutmix`.
        epoch: Epochs that are finished.
        view_epochs: Epochs that have views of their own, since labels are stored for no more; later ones see these
            again. None: all.
    """

    model: Classifier
    wrapped: nn.Module
    images: Images
    weights: Tensor
    protocol: ProtocolConfig
    spec: ViewSpec
    seed: int
    view_seed: int
    ranks: Ranks = field(default_factory=Alone)
    how: TrainerResources = field(default_factory=TrainerResources)
    cutmix_weight: str = WeightsConfig.cutmix
    epoch: int = 0
    view_epochs: int | None = None

    def __post_init__(self) -> None:
        if self.how.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._drawn = (range(0), np.empty((0, 0), np.int64), np.empty(0, np.uint64))  # epochs, orders, layers' seeds
        self.optimizer = make_optimizer(self.protocol, self.model)
        self.average = Average(self.model, self.protocol.ema) if self.protocol.ema else None

    def train_epoch(self, rate: float, targets: Targets) -> float:
        """Train on every image once, and count the epoch.

        Args:
            rate: Learning rate of the epoch; see `learning_rate`.
            targets: What the student is to answer.

        Returns:
            The mean loss; it is not finite where that of any step was not.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        order, seed = self._draws()
        self._seed(seed)
        size = self.protocol.batch
        batches = [self.parts(order[first : first + size]) for first in range(0, len(order), size)]
        looks = self._views(part for parts in batches for part in parts)
        if not self.model.training:  # it asks every module, which takes as long as a layer
            self.model.train()
        total = torch.zeros((), dtype=torch.float64, device=self.weights.device)
        for number, parts in enumerate(batches):
            total += self.step(parts, looks, targets).double() * parts[0].of
            if self.average is not None:
                self.average.update(self.epoch * len(batches) + number)
        self.epoch += 1
        return self.ranks.mean(total) / len(order)

    def _draws(self) -> tuple[Int64, int]:
        """(order int64 [N], seed of the random layers) of the epoch that comes; several epochs are drawn at once."""
        epochs, orders, seeds = self._drawn
        if self.epoch not in epochs:
            epochs = range(self.epoch, self.epoch + max(1, _ORDERS // len(self.images)))
            orders = epoch_orders(self.seed, epochs, len(self.images))
            seeds = layer_seeds(self.seed, epochs, self.ranks.rank)
            self._drawn = (epochs, orders, seeds)
        ahead = self.epoch - epochs.start
        return orders[ahead], int(seeds[ahead])

    def parts(self, batch: Int64) -> list[Part]:
        """This rank's share of a batch int64 [B], cut into forward passes of at most `micro_batch` images.

        No pass has a single image while there are others, since batch norm has no variance over one.
        """
        mine = share(batch, self.ranks.rank, self.ranks.world)
        if not len(mine):
            return [Part(batch[:1].repeat(2), len(batch), counts=False)]
        most = self.how.micro_batch or len(mine)
        pieces = min(-(-len(mine) // most), max(1, len(mine) // 2))
        cut = np.array_split(mine, pieces) if pieces > 1 else [mine]  # which takes as long as a batch's answers
        return [Part(piece, len(batch)) for piece in cut]

    def step(self, parts: list[Part], looks: Iterator[Views], targets: Targets) -> Tensor:
        """One step of the optimizer on a batch; this rank's part of its loss."""
        self.optimizer.zero_grad()
        losses = []
        for part in parts:
            # The ranks' gradients are averaged once a step, with those of the last pass.
            with contextlib.nullcontext() if part is parts[-1] else self._gathering():
                loss = self._loss(part, next(looks), targets)
                loss.backward()
            losses.append(loss.detach())
        self.optimizer.step()
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def loss(self, batch: Int64, targets: Targets) -> Tensor:
        """This rank's part of the loss of a batch; its mean over the ranks is the mean over the batch.

        Args:
            batch: int64 [B], images of the set: the whole batch, on every rank.
            targets: What the student is to answer.

        Returns:
            float32 scalar with its graph.
        """
        parts = self.parts(batch)
        looks = self._views(iter(parts))
        losses = [self._loss(part, next(looks), targets) for part in parts]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _seed(self, seed: int) -> None:
        """Of torch's own generators. `manual_seed` would set those of every device, used or not, in a tenth of a ms."""
        if self.weights.device.type == "cpu":
            torch.random.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)

    def _views(self, parts: Iterator[Part]) -> Iterator[Views]:
        seen = self.epoch if self.view_epochs is None else self.epoch % self.view_epochs
        return self.images.views((part.index for part in parts), self.spec, self.view_seed, seen)

    def _gathering(self) -> Any:
        """Gradients are added up on this rank alone."""
        return self.wrapped.no_sync() if self.ranks.world > 1 else contextlib.nullcontext()  # type: ignore[operator]

    def _loss(self, part: Part, views: Views, targets: Targets) -> Tensor:
        pixels = views.pixels
        if self.how.channels_last:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        # Entered anew in each pass: weights that were cast once would not see the optimizer's steps.
        with arithmetic(pixels.device, self.how.precision):
            logits: Tensor = self.wrapped(pixels)
        if not part.counts:  # it has no image, but DDP's collectives want its (zero) gradients
            return logits.sum() * 0.0
        answers, weights = targets(views), self._weights(views)
        if targets.hard:
            loss = weighted_cross_entropy(logits, answers, weights, label_smoothing=self.protocol.label_smoothing)
        else:
            temperature, direction = self.protocol.temperature, self.protocol.direction
            loss = weighted_kl(logits, answers, weights, temperature, direction=direction)
        share = len(part.index) * self.ranks.world / part.of
        return loss if share == 1 else loss * share  # a product forth and back is a hundredth of a small student's step

    def _weights(self, views: Views) -> Tensor:
        """float32 [b]: those of the images, or of both images in a view by their shares."""
        device = self.weights.device
        own = self.weights[on_device(views.index, device)]
        if self.cutmix_weight == "base":
            return own
        kept = on_device(views.kept.astype(np.float32), device)
        return kept * own + (1 - kept) * self.weights[on_device(views.partner.clip(0), device)]

    @contextlib.contextmanager
    def scored(self) -> Iterator[Classifier]:
        """The student as it is scored and published: with its averaged weights, where they are averaged."""
        with self.average.applied() if self.average is not None else contextlib.nullcontext():
            yield self.model

    def finite(self) -> bool:
        """Whether no weight is infinite or NaN: of those that the last step left, no loss was taken."""
        return all(bool(t.isfinite().all()) for t in self.model.state_dict().values() if t.is_floating_point())

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on from here."""
        return {
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.values if self.average is not None else [],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.restore(state["average"])
        self.epoch = state["epoch"]


def layer_seeds(seed: int, epochs: Sequence[int], rank: int) -> UInt64:
    """uint64 [E]: of the random layers at epochs, each as `philox("random layers", ...).integers(2**63)` draws it."""
    keys = np.stack([philox_key("random layers", seed, epoch, rank) for epoch in epochs], axis=1)
    first: UInt64 = philox_words(keys, np.zeros(len(epochs), np.int64), 1)[:, 0]
    return first >> np.uint64(1)


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


@dataclass(frozen=True)
class StoredTargets:
    """Soft labels that were stored: `decode` gives float32 [b, C] of the images int64 [b], on the device."""

    decode: Callable[[Int64], Tensor]
    hard = False

    def __call__(self, views: Views) -> Tensor:
        return self.decode(views.index)


@dataclass(frozen=True)
class TeacherTargets:
    """The answers of a teacher that looks at the student's own views, for labels that are not stored."""

    teacher: Teacher
    hard = False

    def __call__(self, views: Views) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self.teacher(for_teacher(views.pixels, self.teacher.image_size))
            return logits


@dataclass(frozen=True)
class HardTargets:
    """Classes of the images, and of what CutMix pasted in by its share (Yun et al., ICCV 2019).

    Attributes:
        outputs: int64 [N], the output that means each image's class, on the device.
        count: C.
    """

    outputs: Tensor
    count: int
    hard = True

    def __call__(self, views: Views) -> Tensor:
        device = self.outputs.device
        own, other = (self.outputs[on_device(rows, device)] for rows in (views.index, views.partner.clip(0)))
        kept = on_device(views.kept.astype(np.float32), device).unsqueeze(1)
        shares = torch.zeros(len(own), self.count, device=device)
        shares.scatter_add_(1, own.unsqueeze(1), kept)
        return shares.scatter_add_(1, other.unsqueeze(1), 1 - kept)


def learning_rate(protocol: ProtocolConfig, epoch: int, epochs: int) -> float:
    """The learning rate of an epoch (constant within it), as D4M's and the paper's scripts step it."""
    if protocol.schedule == "cosine":
        return protocol.lr * 0.5 * (1 + math.cos(math.pi * epoch / (protocol.cosine_span * epochs)))
    if protocol.schedule == "step":
        return protocol.lr * protocol.step_factor ** sum(epoch >= at for at in protocol.step_at)
    return protocol.lr


def make_optimizer(protocol: ProtocolConfig, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW or SGD; weight decay on matrices and filters only, as D4M's script separates them, or on all."""
    plain_decay = protocol.weight_decay if protocol.decay_all else 0.0
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": protocol.weight_decay}, {"params": plain, "weight_decay": plain_decay}]
    if protocol.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=protocol.lr, momentum=protocol.momentum, fused=True)
    return torch.optim.AdamW(groups, lr=protocol.lr, fused=True)
