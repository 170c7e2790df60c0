"""A pool of actors that grows when there is room, survives the loss of any of them, and does each unit once.

Why not Ray Data's actor pool: see docs/adr/0001-elastic-pool.md.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError

from ddoq_ray.execution.workers import DEATHS

MAX_DEATHS = 3  # a unit that kills its worker this often would kill every worker


@dataclass(frozen=True)
class Elastic:
    """How large a pool is.

    Attributes:
        stage: Whose pool it is, in words.
        min_workers: This many are asked for, if there are as many units.
        max_workers: Never more than this.
        ahead: Units that a worker is given before it has finished its present one, so that it can fetch and publish
            beside its GPU's work: its actor has ``max_concurrency`` of one more, and a lock of its own around what must
            not overlap.
    """

    stage: str
    min_workers: int = 1
    max_workers: int = 1
    ahead: int = 0


def run_elastic(
    spawn: Callable[[], Any],
    units: Sequence[Any],
    how: Elastic,
    *,
    name: Callable[[Any], str] = str,
    on_event: Callable[..., None] = lambda event, **facts: None,
) -> Iterator[tuple[Any, Any]]:
    """Run every unit on some worker and yield (unit, result) as they finish, in any order.

    Workers beyond those that fit stay pending in Ray: that is the demand an autoscaler sees, and they start by
    themselves when a node joins. Idle workers go when no unit is left for them. A worker's death puts its unit
    back in front of the queue, to be given to a worker alone; a unit whose worker died three times is set aside until
    all others are finished.

    Args:
        spawn: Makes an actor with a method ``run(unit)``; called again after a death.
        units: What is to be done; small, picklable.
        how: How large the pool is.
        name: A unit's name, for events and errors.
        on_event: Called with ``"worker joined"``, ``"worker lost"``, ``"unit requeued"`` and ``"unit set aside"``.

    Raises:
        RuntimeError: When units were set aside (at the end, with their names), or workers cannot start.
        RayTaskError: When our own code fails in a worker.
    """
    pool = _Pool(spawn, how, on_event, deque(_Unit(unit, name(unit)) for unit in units))
    try:
        while pool.queue or pool.running:
            pool.grow()
            pool.give()
            pool.release()
            if found := pool.wait():
                yield found
        if pool.aside:
            raise pool.failure()
    finally:
        pool.close()


@dataclass(eq=False)
class _Unit:
    """A unit and its fate: worker deaths that it saw, and the workers it is on."""

    given: Any
    name: str
    deaths: int = 0
    copies: int = 0


@dataclass(eq=False)
class _Worker:
    """An actor that is ready, and the units it was given."""

    actor: Any
    units: list[_Unit] = field(default_factory=list)


@dataclass(eq=False)
class _Pool:
    """The workers and units of `run_elastic`."""

    spawn: Callable[[], Any]
    how: Elastic
    on_event: Callable[..., None]
    queue: deque[_Unit]
    starting: dict[Any, Any] = field(default_factory=dict)  # ready ref -> actor
    workers: list[_Worker] = field(default_factory=list)
    running: dict[Any, tuple[_Worker, _Unit]] = field(default_factory=dict)  # by result ref
    aside: list[tuple[_Unit, str]] = field(default_factory=list)  # with the reason of the last death
    finished: int = 0
    failed_starts: int = 0

    def grow(self) -> None:
        if not self.queue:
            return
        useful = len(self.queue) + sum(bool(w.units) for w in self.workers)
        while len(self.starting) + len(self.workers) < min(self.how.max_workers, useful):
            actor = self.spawn()
            self.starting[actor.__ray_ready__.remote()] = actor

    def give(self) -> None:
        """A unit for each idle worker, then units ahead.

        Whoever was on a worker that died is alone on its next one, so that a death is the fault of no other unit.
        Nothing is given ahead while such a unit waits, or no worker would come free for it; nor are the last units, as
        many as there are workers, which are for those that come free first.
        """
        for worker in [w for w in self.workers if not w.units]:
            if not self.queue:
                return
            self._hand(self.queue.popleft(), worker)
        for level in range(1, self.how.ahead + 1):
            for worker in [w for w in self.workers if len(w.units) == level and not w.units[0].deaths]:
                if len(self.queue) <= len(self.workers) or self.queue[0].deaths:
                    return
                self._hand(self.queue.popleft(), worker)

    def _hand(self, unit: _Unit, worker: _Worker) -> None:
        worker.units.append(unit)
        unit.copies += 1
        self.running[worker.actor.run.remote(unit.given)] = (worker, unit)

    def release(self) -> None:
        """Let workers go for which no unit is left."""
        if self.queue:
            return
        for worker in [w for w in self.workers if not w.units]:
            self._give_back(worker)
        for actor in self.starting.values():
            ray.kill(actor)
        self.starting.clear()

    def _give_back(self, worker: _Worker) -> None:
        self.workers.remove(worker)
        ray.kill(worker.actor)

    def close(self) -> None:
        for actor in [*self.starting.values(), *(w.actor for w in self.workers)]:
            ray.kill(actor)

    def wait(self) -> tuple[Any, Any] | None:
        """What happens next; (unit, result) if it is the end of a unit."""
        ready, _ = ray.wait([*self.starting, *self.running], num_returns=1)
        if ready[0] in self.starting:
            self._joined(ready[0])
            return None
        worker, unit = self.running.pop(ready[0])
        worker.units.remove(unit)
        unit.copies -= 1
        try:
            result = ray.get(ready[0])
        except DEATHS as error:
            self._died(worker, unit, error)
            return None
        self.finished += 1
        return unit.given, result

    def _joined(self, ref: Any) -> None:
        actor = self.starting.pop(ref)
        try:
            ray.get(ref)
        except DEATHS as error:
            self.failed_starts += not _of_its_node(error)
            init_error = isinstance(error, RayActorError) and error.actor_init_failed
            if init_error or self.failed_starts >= MAX_DEATHS:
                raise RuntimeError(f"workers cannot start: {error}") from error
            self.on_event("worker lost", reason=type(error).__name__)
            return
        self.workers.append(_Worker(actor))
        self.failed_starts = 0
        self.on_event("worker joined", workers=len(self.workers))

    def _died(self, worker: _Worker, unit: _Unit, error: BaseException) -> None:
        if worker in self.workers:  # else another of its units told of it
            self._give_back(worker)  # it may only be unreachable: its late result must not race the new one
            self.on_event("worker lost", reason=type(error).__name__)
        unit.deaths += 1
        if unit.deaths < MAX_DEATHS:
            self.queue.appendleft(unit)
            self.on_event("unit requeued", unit=unit.name, deaths=unit.deaths)
            return
        self.aside.append((unit, _reason(error)))
        self.on_event("unit set aside", unit=unit.name, deaths=unit.deaths, reason=_reason(error))
        if len(self.aside) >= MAX_DEATHS and not self.finished:
            raise self.failure()  # nothing is ever finished: it is not these units, and there may be thousands more

    def failure(self) -> RuntimeError:
        """What to raise of the units that were set aside."""
        names = [unit.name for unit, _ in self.aside]
        was = f"{names[0]} was" if len(names) == 1 else f"{len(names)} units ({', '.join(names)}) were each"
        others = f"the other {self.finished} are finished" if self.finished else "none was finished"
        return RuntimeError(
            f"{was} on a worker that died {MAX_DEATHS} times; {others}. Last reason: {self.aside[-1][1]}; "
            "see the worker's log for the cause (often too little memory for its batch)"
        )


def _of_its_node(error: BaseException) -> bool:
    """Whether an actor went with its node, which says nothing about the actor."""
    return "node has died" in str(error)


def _reason(error: BaseException) -> str:
    """A death in one line: its class, and Ray's sentence on it without the actor's numbers."""
    text = " ".join(str(error).split())
    start = max(text.rfind("The actor is dead because"), text.rfind("The actor died because"), 0)
    return f"{type(error).__name__}: {text[start:][:300]}".removesuffix(".")
