"""Exponential averages of weights: what is saved of a network that was trained with a noisy loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """The running average of a module's parameters.

    Attributes:
        values: one tensor a parameter, in their order.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        """Start at the parameters as they are; `decay` in [0, 1), 0 keeps the last ones."""
        self._parameters = list(module.parameters())
        self.decay = decay
        self.values = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the parameters after step number `step`, counted from 0."""
        # The first averages would otherwise remember the initialisation.
        decay = min(self.decay, (step + 1) / (step + 11))
        torch._foreach_lerp_(self.values, [p.detach() for p in self._parameters], 1.0 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        """Give the parameters their averages."""
        for parameter, value in zip(self._parameters, self.values, strict=True):
            parameter.copy_(value)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters have their averages for the duration of the block."""
        own = [p.detach().clone() for p in self._parameters]
        self.apply()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self._parameters, own, strict=True):
                    parameter.copy_(value)

    @torch.no_grad()
    def restore(self, values: Sequence[Tensor]) -> None:
        """Take averages from a checkpoint."""
        for mine, saved in zip(self.values, values, strict=True):
            mine.copy_(saved)
