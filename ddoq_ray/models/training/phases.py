"""The phases of a training, one after another, with checkpoints between their steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from ddoq_ray.models.training.checkpoints import Checkpoints
from ddoq_ray.models.training.course import WARM_UP, Course
from ddoq_ray.models.training.data import Progress
from ddoq_ray.models.training.ranks import Ranks

_REPORT_EVERY = 50


class Trainable(Protocol):
    """What is trained in a phase."""

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


class Phases:
    """Runs phases from where they were stopped, on every rank alike; rank 0 alone reads, writes and reports.

    Attributes:
        state: what the checkpoint holds beside the phase under way; a caller adds what a finished phase made.
        facts: steps, seconds and last losses of each finished phase.
        watch: called after each step of a phase with the number of steps made; it changes nothing.
    """

    def __init__(self, checkpoints: Checkpoints, every: int, report: Progress | None, ranks: Ranks) -> None:
        """Checkpoint each `every` steps; nothing is read yet."""
        self.checkpoints, self.every, self.ranks = checkpoints, every, ranks
        self._told = report
        self.state: dict[str, Any] = {}
        self.facts: dict[str, Any] = {}
        self.watch: Callable[[int], None] = lambda made: None

    def open(self) -> None:
        """Take up what was saved."""
        self.state = self.ranks.decide(lambda: self.checkpoints.open() or {})
        self.facts = self.state.get("facts", {})

    def save(self) -> None:
        """Keep `state` and `facts`."""
        self._save(self.state)

    def _save(self, state: dict[str, Any]) -> None:
        if self.ranks.rank == 0:
            self.checkpoints.save({**state, "facts": self.facts})

    def report(self, phase: str, step: int, steps: int, loss: float | None = None) -> None:
        if self._told is not None and self.ranks.rank == 0:
            self._told(phase, step, steps, loss)

    def course(self, name: str, steps: int, seconds: float | None) -> Course:
        """The course of a phase, as far as it had come."""
        begun = self.state.get("running")
        done = begun["course"] if begun is not None and begun["phase"] == name else {}
        return Course(steps, seconds, **done, agree=lambda spent: self.ranks.decide(lambda: spent))

    def run(
        self,
        name: str,
        training: Trainable,
        step: Callable[[int, float], dict[str, float]],
        course: Course,
        peak: float,
        warm_up: float = WARM_UP,
    ) -> None:
        """Run a phase to its end.

        Args:
            name: of the phase; its learning rate is the key `training.<name>_lr`.
            training: what a checkpoint holds.
            step: makes a step of a number at a learning rate, and gives its losses.
            course: of `course`.
            peak: the highest learning rate.
            warm_up: share of the course in which it is reached.

        Raises:
            ValueError: a loss that is not finite.
        """
        running: dict[str, float] = {}
        begun = self.state.pop("running", None)
        if begun is not None and begun["phase"] == name:
            training.restore(begun["training"])
            running = dict(begun["losses"])
        for number in course:
            losses = step(number, course.rate(peak, warm_up))
            if not all(np.isfinite(loss) for loss in losses.values()):
                raise ValueError(
                    f"training: the {name}'s losses are {losses} at step {number}; lower its rate (now {peak:g})"
                )
            running = {key: loss + 0.99 * (running.get(key, loss) - loss) for key, loss in losses.items()}
            made = number + 1
            if made % _REPORT_EVERY == 0:
                self.report(name, made, course.expected, running["loss"])
            if made % self.every == 0:
                now = {"phase": name, "training": training.state(), "course": {"done": made, "spent": course.spent},
                       "losses": running}  # fmt: skip
                self._save({**self.state, "running": now})
            if self.ranks.rank == 0:
                self.watch(made)
        self.report(name, course.done, course.done, running.get("loss", float("nan")))
        self.facts |= {
            f"{name}_steps": course.done, f"{name}_seconds": round(course.spent), f"{name}_losses": running,
        }  # fmt: skip
