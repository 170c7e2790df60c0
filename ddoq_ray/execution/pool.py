"""A pool of actors that grows when there is room, survives the loss of any of them, and does each unit once.

Why not Ray Data's actor pool: see docs/adr/0001-elastic-pool.md.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import ray
from ray.exceptions import RayActorError

from ddoq_ray.config.cluster import ClusterConfig, WorkerResources
from ddoq_ray.execution.waiting import Waiting, give_up
from ddoq_ray.execution.workers import DEATHS, MAX_DEATHS, Progress

SLOW = 2.0  # times the median of finished units: so long at work, a unit is begun on an idle worker too
REMEMBERED = 999  # finished units of which the median is taken
IDLE_SECONDS = 5.0  # a worker that was idle for longer is asked whether it is there before it is given a unit
TICK_SECONDS = 0.5  # between two looks when nothing happens


@dataclass(frozen=True)
class Elastic:
    """How large a pool is.

    Attributes:
        stage: Whose pool it is, in words.
        min_workers: So many are ready before units are given, as far as there are units for them; after `wait_s` it is
            said what is missing, and those that are there begin.
        max_workers: Never more than this.
        ahead: Units that a worker is given before it has finished its present one, so that it can fetch and publish
            beside its GPU's work: its actor has ``max_concurrency`` of one more, and a lock of its own around what must
            not overlap.
        copy_after_s: No unit is begun on a second worker before this time.
        room: What each worker asks of one node, by Ray's names.
        key: The configuration's group that says so.
        wait_s: After so long without a worker it is said why.
        give_up_s: After so long without a worker the run ends; None: never.
    """

    stage: str
    min_workers: int = 1
    max_workers: int = 1
    ahead: int = 0
    copy_after_s: float = 10.0
    room: Mapping[str, float] = field(default_factory=lambda: {"CPU": 1.0})
    key: str = ""
    wait_s: float = 30.0
    give_up_s: float | None = None

    @staticmethod
    def of(
        cluster: ClusterConfig, stage: str, worker: str, *, min_workers: int = 1, max_workers: int, ahead: int = 0
    ) -> Elastic:
        """A pool of workers that ask for what ``cluster.<worker>`` says."""
        asked: WorkerResources = getattr(cluster, worker)
        return Elastic(
            stage,
            min_workers,
            max_workers,
            ahead,
            room={"CPU": asked.num_cpus, "GPU": asked.num_gpus},
            key=f"cluster.{worker}",
            wait_s=cluster.wait_s,
            give_up_s=give_up(cluster),
        )


def run_elastic(
    spawn: Callable[[], Any],
    units: Collection[Any],
    how: Elastic,
    *,
    name: Callable[[Any], str] = str,
    on_event: Callable[..., None] = lambda event, **facts: None,
    progress: Progress | None = None,
) -> Iterator[tuple[Any, Any]]:
    """Run every unit on some worker and yield (unit, result) as they finish, in any order.

    Workers beyond those that fit stay pending in Ray: that is the demand an autoscaler sees, and they start by
    themselves when a node joins. A worker's death puts its unit back in front of the queue, to be given to a worker
    alone; a unit whose worker died three times is set aside until all others are finished. When no unit is left, a unit
    that takes long is begun on an idle worker too; the first result counts, and the other worker goes. Idle workers go
    when there are more of them than units at work.

    Args:
        spawn: Makes an actor with a method ``run(unit)``; called again after a death.
        units: What is to be done; small, picklable. Each is asked for when it is given, in order.
        how: How large the pool is.
        name: A unit's name, for events and errors.
        on_event: Called with ``"worker joined"``, ``"worker lost"``, ``"unit requeued"``, ``"unit set aside"`` and
            ``"unit copied"``.
        progress: Is told how many workers are ready.

    Raises:
        RuntimeError: When units were set aside (at the end, with their names), or workers cannot start.
        NoWorkers: When there was no room for any worker for `give_up_s`.
        RayTaskError: When our own code fails in a worker.
    """
    pool = _Pool(spawn, how, on_event, _Queue(units, name))
    try:
        while pool.queue or pool.running:
            pool.grow()
            if progress is not None:
                progress.workers = len(pool.workers)
            if pool.begun():
                pool.give()
            pool.copy_slow()
            pool.release()
            if found := pool.wait():
                yield found
        if pool.aside:
            raise pool.failure()
    finally:
        pool.close()


@dataclass(eq=False, slots=True)
class _Unit:
    """A unit and its fate: worker deaths that it saw, and how many workers it is on."""

    given: Any
    name: str
    deaths: int = 0
    copies: int = 0
    done: bool = False

    @property
    def may_be_copied(self) -> bool:
        return self.copies == 1 and not self.deaths


class _Queue:
    """Units that wait: those that lost their worker, then those that none has had, made when they are given."""

    def __init__(self, units: Collection[Any], name: Callable[[Any], str]) -> None:
        self.again: deque[_Unit] = deque()
        self.fresh = (_Unit(unit, name(unit)) for unit in units)
        self.left = len(units)

    def __len__(self) -> int:
        return len(self.again) + self.left

    def pop(self) -> _Unit:
        if self.again:
            return self.again.popleft()
        self.left -= 1
        return next(self.fresh)

    def put_back(self, unit: _Unit) -> None:
        self.again.appendleft(unit)

    @property
    def next_has_deaths(self) -> bool:
        return bool(self.again and self.again[0].deaths)


@dataclass(eq=False)
class _Worker:
    """An actor, and the units it was given.

    Attributes:
        since: When it began the first of its units, or became idle (time.monotonic).
        seen: Whether it was ever ready.
    """

    actor: Any
    units: list[_Unit] = field(default_factory=list)
    since: float = 0.0
    seen: bool = False


@dataclass(eq=False)
class _Pool:
    """The workers and units of `run_elastic`."""

    spawn: Callable[[], Any]
    how: Elastic
    on_event: Callable[..., None]
    queue: _Queue
    starting: dict[Any, _Worker] = field(default_factory=dict)  # by the ref of its being ready
    workers: list[_Worker] = field(default_factory=list)
    running: dict[Any, tuple[_Worker, _Unit]] = field(default_factory=dict)  # by result ref
    aside: list[tuple[_Unit, str]] = field(default_factory=list)  # with the reason of the last death
    durations: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))  # seconds of finished units
    finished: int = 0
    failed_starts: int = 0

    def __post_init__(self) -> None:
        how = self.how
        self.least = min(how.min_workers, how.max_workers, len(self.queue))  # ready before units are given
        self.start = time.monotonic()
        self.waiting = Waiting(how.stage, how.room, how.key, how.wait_s, how.give_up_s)

    def begun(self) -> bool:
        """Whether units are given by now: as many workers as there should be are ready, or have been waited for."""
        ready = len(self.workers)
        if ready < self.least and ready and time.monotonic() - self.start >= self.how.wait_s:
            self.waiting.few(ready, self.least)
            self.least = 0
        if ready >= self.least:
            self.least = 0  # it is a matter of the beginning only
        return not self.least

    def grow(self) -> None:
        if not self.queue:
            return
        useful = len(self.queue) + sum(bool(w.units) for w in self.workers)
        while len(self.starting) + len(self.workers) < min(self.how.max_workers, useful):
            self._ask(_Worker(self.spawn()))

    def _ask(self, worker: _Worker) -> None:
        self.starting[worker.actor.__ray_ready__.remote()] = worker

    def give(self) -> None:
        """A unit for each idle worker, then units ahead.

        Whoever was on a worker that died is alone on its next one, so that a death is the fault of no other unit.
        Nothing is given ahead while such a unit waits, or no worker would come free for it; nor are the last units, as
        many as there are workers, which are for those that come free first.
        """
        stale = time.monotonic() - IDLE_SECONDS
        for worker in [w for w in self.workers if not w.units]:
            if not self.queue:
                return
            if worker.since < stale:  # nobody would have heard of its death, and a unit would be counted for it
                self.workers.remove(worker)
                self._ask(worker)
            else:
                self._hand(self.queue.pop(), worker)
        for level in range(1, self.how.ahead + 1):
            for worker in [w for w in self.workers if len(w.units) == level and not w.units[0].deaths]:
                if len(self.queue) <= len(self.workers) or self.queue.next_has_deaths:
                    return
                self._hand(self.queue.pop(), worker)

    def copy_slow(self) -> None:
        """Begin the unit that is longest at work on an idle worker too, when it takes long and no other is left."""
        idle = [w for w in self.workers if not w.units]
        if self.queue or not idle or not self.durations:
            return
        begun = time.monotonic() - max(self.how.copy_after_s, SLOW * median(self.durations))
        slow = [w for w in self.workers if w.units and w.units[0].may_be_copied and w.since < begun]
        for worker, other in zip(sorted(slow, key=lambda w: w.since), idle, strict=False):
            self._hand(worker.units[0], other)
            self.on_event("unit copied", unit=worker.units[0].name)

    def _hand(self, unit: _Unit, worker: _Worker) -> None:
        if not worker.units:
            worker.since = time.monotonic()
        worker.units.append(unit)
        unit.copies += 1
        self.running[worker.actor.run.remote(unit.given)] = (worker, unit)

    def release(self) -> None:
        """Let workers go for which no unit is left; those stay that may take over one that is at work."""
        if self.queue:
            return
        at_work = sum(unit.may_be_copied for _, unit in self.running.values())
        for worker in [w for w in self.workers if not w.units][at_work:]:
            self._give_back(worker)
        for worker in self.starting.values():
            ray.kill(worker.actor)
        self.starting.clear()

    def _give_back(self, worker: _Worker) -> None:
        """Let a worker go; a unit that only it had is to be done again, which is not the unit's fault."""
        self.workers.remove(worker)
        ray.kill(worker.actor)
        for ref in [ref for ref, (there, _) in self.running.items() if there is worker]:
            _, unit = self.running.pop(ref)
            unit.copies -= 1
            if not unit.done and not unit.copies:
                self.queue.put_back(unit)

    def close(self) -> None:
        for worker in [*self.starting.values(), *self.workers]:
            ray.kill(worker.actor)

    def wait(self) -> tuple[Any, Any] | None:
        """What happens next; (unit, result) if it is the end of a unit."""
        self.waiting.look(len(self.workers))
        ready, _ = ray.wait([*self.starting, *self.running], num_returns=1, timeout=TICK_SECONDS)
        if not ready:
            return None
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
        self._finished(worker, unit)
        return unit.given, result

    def _finished(self, worker: _Worker, unit: _Unit) -> None:
        now = time.monotonic()
        self.durations.append(now - worker.since)
        worker.since = now
        unit.done = True
        self.finished += 1
        for other in [w for w in self.workers if unit in w.units]:
            self._give_back(other)

    def _joined(self, ref: Any) -> None:
        worker = self.starting.pop(ref)
        try:
            ray.get(ref)
        except DEATHS as error:
            self.failed_starts += not _of_its_node(error)
            init_error = isinstance(error, RayActorError) and error.actor_init_failed
            if init_error or self.failed_starts >= MAX_DEATHS:
                raise RuntimeError(f"workers cannot start: {error}") from error
            self.on_event("worker lost", reason=type(error).__name__)
            return
        worker.since = time.monotonic()
        self.workers.append(worker)
        self.failed_starts = 0
        if not worker.seen:
            worker.seen = True
            self.on_event("worker joined", workers=len(self.workers))

    def _died(self, worker: _Worker, unit: _Unit, error: BaseException) -> None:
        if worker in self.workers:  # else another of its units told of it
            self.workers.remove(worker)
            ray.kill(worker.actor)  # it may only be unreachable: its late result must not race the new one
            self.on_event("worker lost", reason=type(error).__name__)
        if unit.done:
            return
        unit.deaths += 1
        if unit.copies:
            return
        if unit.deaths < MAX_DEATHS:
            self.queue.put_back(unit)
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
