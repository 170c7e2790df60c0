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
        min_workers: A hint kept for the shape of the demand: this many are asked for even for fewer units.
        max_workers: Never more than this.
        name: A unit's name, for events and errors.
        on_event: Called with ``"worker lost"``, ``"unit requeued"`` and ``"worker joined"``.

    Raises:
        RuntimeError: When a unit was on a worker that died three times, or workers cannot start.
        RayTaskError: When our own code fails in a worker.
    """
    queue = deque(units)
    deaths: Counter[str] = Counter()
    failed_starts = 0
    starting: dict[Any, Any] = {}  # ready ref -> actor
    running: dict[Any, tuple[Any, Any]] = {}  # result ref -> (actor, unit)
    idle: list[Any] = []
    try:
        while queue or running:
            wanted = max(min_workers, min(max_workers, len(queue) + len(running))) if queue else 0
            while len(starting) + len(running) + len(idle) < wanted:
                actor = spawn()
                starting[actor.__ray_ready__.remote()] = actor
            while queue and idle:
                actor, unit = idle.pop(), queue.popleft()
                running[actor.run.remote(unit)] = (actor, unit)
            if not queue:
                _release(idle, starting)
            ready, _ = ray.wait([*running, *starting], num_returns=1)
            ref = ready[0]
            if ref in starting:
                actor = starting.pop(ref)
                try:
                    ray.get(ref)
                    idle.append(actor)
                    failed_starts = 0
                    on_event("worker joined", workers=len(running) + len(idle))
                except DEATHS as error:
                    failed_starts += 1
                    init_error = isinstance(error, RayActorError) and error.actor_init_failed
                    if init_error or failed_starts >= MAX_DEATHS:
                        raise RuntimeError(f"workers cannot start: {error}") from error
                    on_event("worker lost", reason=type(error).__name__)
                continue
            actor, unit = running.pop(ref)
            try:
                result = ray.get(ref)
            except DEATHS as error:
                deaths[name(unit)] += 1
                on_event("worker lost", reason=type(error).__name__)
                if deaths[name(unit)] >= MAX_DEATHS:
                    raise RuntimeError(
                        f"{name(unit)} was on a worker that died {MAX_DEATHS} times ({type(error).__name__}); "
                        "see the worker's log for the cause (often too little memory for its batch)"
                    ) from error
                on_event("unit requeued", unit=name(unit), deaths=deaths[name(unit)])
                queue.appendleft(unit)
                ray.kill(actor)  # it may only be unreachable: its late result must not race the new one
                continue
            idle.append(actor)
            yield unit, result
    finally:
        _release(idle, starting)
        for actor, _ in running.values():
            ray.kill(actor)


def _release(idle: list[Any], starting: dict[Any, Any]) -> None:
    for actor in [*idle, *starting.values()]:
        ray.kill(actor)
    idle.clear()
    starting.clear()
