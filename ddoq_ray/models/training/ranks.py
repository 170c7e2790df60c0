"""Who trains a network: one process alone, or several that share each batch and add up their gradients.

A step's rows, noise and times are those of the whole batch on every rank, of which each takes its part; so a training
is the same on any number of ranks, up to the order in which floats are added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class Ranks(Protocol):
    """The place of this process among those that train one network together.

    Attributes:
        rank: 0 to world - 1.
        world: how many they are.
        device: where this one computes.
    """

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    @property
    def device(self) -> Any: ...

    def decide(self, asked: Callable[[], T]) -> T:
        """What rank 0 answers, on every rank; the others are not asked."""

    def mean(self, value: Tensor) -> float:
        """The mean of a scalar over the ranks: the same float on each."""

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes its sum over the ranks: the same bits on each."""

    def gather(self, value: T) -> list[T]:
        """What each rank gives, in their order, on every rank."""


@dataclass(frozen=True)
class Alone:
    """One process trains the network."""

    device: Any = "cpu"
    rank: int = 0
    world: int = 1

    def decide(self, asked: Callable[[], T]) -> T:
        return asked()

    def mean(self, value: Tensor) -> float:
        return float(value)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        pass

    def gather(self, value: T) -> list[T]:
        return [value]


@dataclass(frozen=True)
class Part:
    """What a rank takes of a batch: every `world`-th row.

    Attributes:
        size: rows of the whole batch; each rank has at least one.
        ranks: who share it.
    """

    size: int
    ranks: Ranks

    def of(self, batch: Any) -> Any:
        """This rank's rows of an array or tensor [size, ...]."""
        return batch[self.ranks.rank :: self.ranks.world]

    @property
    def share(self) -> float:
        """In (0, 1]: of the batch. A mean over the part times this adds up to the mean over the batch."""
        return len(range(self.ranks.rank, self.size, self.ranks.world)) / self.size

    def told(self, parts: dict[str, Tensor]) -> dict[str, float]:
        """Means over the batch, on every rank, from those over each one's part."""
        values = torch.stack([part.detach().double() for part in parts.values()]) * self.share
        self.ranks.add_up([values])
        return dict(zip(parts, values.tolist(), strict=True))


def descend(
    loss: Tensor, optimizer: torch.optim.Optimizer, rate: float, part: Part, *, cut: float | None = None
) -> None:
    """One optimizer step on a loss that is a mean over a rank's part; gradients of the batch are cut to a norm."""
    optimizer.zero_grad(set_to_none=True)
    (loss * part.share).backward()  # type: ignore[no-untyped-call]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    part.ranks.add_up([p.grad for p in parameters if p.grad is not None])
    for group in optimizer.param_groups:
        group["lr"] = rate
        if cut is not None:
            nn.utils.clip_grad_norm_(group["params"], cut)
    optimizer.step()


def check_parts(images: int, batch: int, world: int, key: str, *, least: int = 1) -> None:
    """Refuse batches of which a rank would have no part, or one of fewer than `least` images.

    Raises:
        ValueError: With both numbers.
    """
    if world > 1 and min(images, batch) < least * world:
        fewer = "workers" if least == 1 else f"{least} a worker (batch norm has no variance over one)"
        raise ValueError(
            f"workers={world}: a step has {min(images, batch)} images ({key}={batch}, {images} in all), which are "
            f"fewer than {fewer}; give fewer workers, or a larger batch"
        )
