"""A pool of actors that grows when there is room, survives the loss of any of them, and does each unit once.

Why not Ray Data's actor pool: see docs/adr/0001-elastic-pool.md.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError

from ddoq_ray.execution.workers import DEATHS

MAX_DEATHS = 3  # a unit that kills its worker this often would kill every worker


def run_elastic(
    spawn: Callable[[], Any],
    units: Sequence[Any],
    *,
    min_workers: int,
    max_workers: int,
    name: Callable[[Any], str] = str,
    on_event: Callable[..., None] = lambda event, **facts: None,
) -> Iterator[tuple[Any, Any]]:
    """Run every unit on some worker and yield (unit, result) as they finish, in any order.

    Workers beyond those that fit stay pending in Ray: that is the demand an autoscaler sees, and they start by
    themselves when a node joins. Idle workers go when no unit is left for them. A worker's death puts its unit
    back in front of the queue.

    Args:
        spawn: Makes an actor with a method ``run(unit)``; called again after a death.
        units: What is to be done; small, picklable.
        min_workers: This many are asked for even for fewer units.
        max_workers: Never more than this.
        name: A unit's name, for events and errors.
        on_event: Called with ``"worker lost"``, ``"unit requeued"`` and ``"worker joined"``.

    Raises:
        RuntimeError: When a unit was on a worker that died three times, or workers cannot start.
        RayTaskError: When our own code fails in a worker.
    """
    pool = _Pool(spawn, name, on_event)
    queue = deque(units)
    try:
        while queue or pool.running:
            if queue:
                pool.grow(max(min_workers, min(max_workers, len(queue) + len(pool.running))))
            while queue and pool.idle:
                pool.give(queue.popleft())
            if not queue:
                pool.release()
            unit, result, done = pool.wait()
            if done:
                yield unit, result
            elif unit is not None:
                queue.appendleft(unit)
    finally:
        pool.release()
        for actor, _ in pool.running.values():
            ray.kill(actor)


class _Pool:
    """The workers of `run_elastic`: starting, idle, or at a unit."""

    def __init__(self, spawn: Callable[[], Any], name: Callable[[Any], str], on_event: Callable[..., None]) -> None:
        self.spawn, self.name, self.on_event = spawn, name, on_event
        self.starting: dict[Any, Any] = {}  # ready ref -> actor
        self.running: dict[Any, tuple[Any, Any]] = {}  # result ref -> (actor, unit)
        self.idle: list[Any] = []
        self.deaths: Counter[str] = Counter()
        self.failed_starts = 0

    def grow(self, wanted: int) -> None:
        while len(self.starting) + len(self.running) + len(self.idle) < wanted:
            actor = self.spawn()
            self.starting[actor.__ray_ready__.remote()] = actor

    def give(self, unit: Any) -> None:
        actor = self.idle.pop()
        self.running[actor.run.remote(unit)] = (actor, unit)

    def release(self) -> None:
        """Let workers without a unit go."""
        for actor in [*self.idle, *self.starting.values()]:
            ray.kill(actor)
        self.idle.clear()
        self.starting.clear()

    def wait(self) -> tuple[Any, Any, bool]:
        """What happens next: (unit, result, True), (unit, None, False) of one to do again, or (None, None, False)."""
        ready, _ = ray.wait([*self.running, *self.starting], num_returns=1)
        if ready[0] in self.starting:
            self._joined(ready[0])
            return None, None, False
        actor, unit = self.running.pop(ready[0])
        try:
            result = ray.get(ready[0])
        except DEATHS as error:
            self._died(unit, error)
            ray.kill(actor)  # it may only be unreachable: its late result must not race the new one
            return unit, None, False
        self.idle.append(actor)
        return unit, result, True

    def _joined(self, ref: Any) -> None:
        actor = self.starting.pop(ref)
        try:
            ray.get(ref)
        except DEATHS as error:
            self.failed_starts += 1
            init_error = isinstance(error, RayActorError) and error.actor_init_failed
            if init_error or self.failed_starts >= MAX_DEATHS:
                raise RuntimeError(f"workers cannot start: {error}") from error
            self.on_event("worker lost", reason=type(error).__name__)
            return
        self.idle.append(actor)
        self.failed_starts = 0
        self.on_event("worker joined", workers=len(self.running) + len(self.idle))

    def _died(self, unit: Any, error: BaseException) -> None:
        name = self.name(unit)
        self.deaths[name] += 1
        self.on_event("worker lost", reason=type(error).__name__)
        if self.deaths[name] >= MAX_DEATHS:
            raise RuntimeError(
                f"{name} was on a worker that died {MAX_DEATHS} times ({type(error).__name__}); "
                "see the worker's log for the cause (often too little memory for its batch)"
            ) from error
        self.on_event("unit requeued", unit=name, deaths=self.deaths[name])
