"""How a training goes on: how far it is, its learning rate, and the rows and noise of each step.

All of it is a function of the step (or of the time spent), never of what was drawn before, so that a training that is
stopped and taken up again sees what an undisturbed one sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from time import monotonic
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ddoq_ray.core.rng import philox
from ddoq_ray.models.compiling import check_compiler

WARM_UP = 0.05  # share of a course


@dataclass
class Course:
    """One phase of a training, measured in steps or in time.

    Attributes:
        steps: that it takes, where `seconds` is None.
        seconds: that it takes, whatever number of steps that makes; then the bytes depend on the machine's speed.
        done: steps made.
        spent: seconds in which they were made.
        agree: gives all ranks of a training by time the seconds of one clock.
    """

    steps: int
    seconds: float | None = None
    done: int = 0
    spent: float = 0.0
    agree: Callable[[float], float] = lambda spent: spent

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
            spent = self.spent + monotonic() - begun
            self.spent = spent if self.seconds is None else self.agree(spent)

    def state(self) -> dict[str, Any]:
        return {"done": self.done, "spent": self.spent}

    def rate(self, peak: float, warm_up: float = WARM_UP) -> float:
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
        # Cut before they are joined: a pass over a large set is a hundred megabytes, and a step a few rows.
        cuts = [(p, max(0, first - p * self.n), min(self.n, first + size - p * self.n)) for p in passes]
        return np.concatenate([_pass(self.n, (*self.key, "pass", p))[start:end] for p, start, end in cuts])


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


def compiled(functions: Sequence[Callable[..., Any]], wanted: bool) -> tuple[Callable[..., Any], ...]:
    """Functions through torch.compile, where that is wanted; the networks that they belong to stay as they are.

    Raises:
        ValueError: It does not work here.
    """
    if not wanted:
        return tuple(functions)
    check_compiler("training.compile")
    return tuple(torch.compile(function, dynamic=False) for function in functions)
