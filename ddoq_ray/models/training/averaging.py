"""A network under training with the running average of its weights, which is what is saved of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

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


class Resumable:
    """What a checkpoint holds of a training.

    Attributes:
        network: under training.
        optimizer: of its parameters.
        average: of its weights.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    average: Average

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on from here."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.values,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.restore(state["average"])
