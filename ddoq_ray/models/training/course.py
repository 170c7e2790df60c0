"""How a training goes on: how far it is, its learning rate, and the rows and noise of each step.

All of it is a function of the step (or of the time spent), never of what was drawn before, so that a training that is
stopped and taken up again sees what an undisturbed one sees.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from time import monotonic
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ddoq_ray.core.rng import philox


@dataclass
class Course:
    """One phase of a training, measured in steps or in time.

    Attributes:
        steps: that it takes, where `seconds` is None.
        seconds: that it takes, whatever number of steps that makes; then the bytes depend on the machine's speed.
        done: steps made.
        spent: seconds in which they were made.
    """

    steps: int
    seconds: float | None = None
    done: int = 0
    spent: float = 0.0

    @property
    def fraction(self) -> float:
        """In [0, 1]: how much of it is done."""
        whole = self.done / self.steps if self.seconds is None else self.spent / self.seconds
        return min(whole, 1.0)

    @property
    def expected(self) -> int:
        """About how many steps it will have made at the end."""
        if self.seconds is None:
            return self.steps
        return max(self.done, round(self.done / max(self.fraction, 1e-6)), 1)

    def __iter__(self) -> Iterator[int]:
        """The numbers of the steps that are still to be made."""
        while self.fraction < 1.0:
            begun = monotonic()
            yield self.done
            self.done += 1
            self.spent += monotonic() - begun

    def state(self) -> dict[str, Any]:
        return {"done": self.done, "spent": self.spent}

    def rate(self, peak: float, warm_up: float = 0.05) -> float:
        """The learning rate now: up to `peak` by half a cosine over the share `warm_up`, then down to zero by another.

        By steps it is the rate of the step's middle, so that the last one is not zero.
        """
        at = min(self.fraction + (0.5 / self.steps if self.seconds is None else 0.0), 1.0)
        if at < warm_up:
            return peak * (0.04 + 0.48 * (1 - math.cos(math.pi * at / warm_up)))
        return peak * 0.5 * (1 + math.cos(math.pi * (at - warm_up) / (1 - warm_up)))


@dataclass(frozen=True)
class Passes:
    """Endless passes over n rows, each in an order of its own, cut into batches of equal size.

    Attributes:
        n: rows.
        batch: rows of a step; all of them where there are fewer.
        key: of the orders, with the pass's number.
    """

    n: int
    batch: int
    key: tuple[int | str, ...]

    def rows(self, step: int) -> npt.NDArray[np.int64]:
        """int64 [min(n, batch)]: the rows of a step; one may straddle two passes."""
        size = min(self.n, self.batch)
        first = step * size
        passes = range(first // self.n, (first + size - 1) // self.n + 1)
        order = np.concatenate([_pass(self.n, (*self.key, "pass", p)) for p in passes])
        return order[first - passes[0] * self.n :][:size]


@lru_cache(maxsize=2)  # neighbouring steps are of one pass, or of two
def _pass(n: int, key: tuple[int | str, ...]) -> npt.NDArray[np.int64]:
    return philox(*key).permutation(n)


def generator_of(*key: int | str) -> torch.Generator:
    """torch's generator on the CPU that belongs to a key: the same numbers whichever device computes."""
    return torch.Generator().manual_seed(int(philox(*key).integers(2**63)))


@contextmanager
def arithmetic(device: torch.device, precision: str) -> Iterator[None]:
    """Matrix products and convolutions in `precision` (float32 or bfloat16), sums and weights in float32."""
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        yield


def batches(n: int, batch: int, steps: int, generator: torch.Generator) -> Any:
    """`steps` index batches from endless shuffled passes over n rows; never smaller than min(n, batch)."""
    batch = min(n, batch)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(n, generator=generator)])
        yield order[:batch]
        order = order[batch:]


def one_cycle(optimizer: torch.optim.Optimizer, lr: float, steps: int, *, warm_up: float) -> Any:
    """A cosine up to `lr` over the share `warm_up` of the steps, then down to about zero; momentum stays.

    OneCycleLR divides by zero where the warm-up is exactly one step (20 steps at 0.05), so it is a little longer there.
    """
    share = 1.5 * warm_up if warm_up * steps == 1.0 else warm_up
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=lr, total_steps=steps, pct_start=share, cycle_momentum=False
    )
