"""Which student a group of training workers takes next: its own, in their order, then what others have not begun.

Neighbours are dealt to one group, since those of an image set share its pictures. A group that is through takes the
last of the group that has most left, so that a slow node, a death or a wrong estimate holds up no other student.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


class Dealt(NamedTuple):
    """A student to train.

    Attributes:
        job: Index of its job.
        row: Index in that job's rows.
        views: What it has to see; see `ahead.Load`.
        identity: Digest of what it follows from, which its checkpoint carries.
    """

    job: int
    row: int
    views: int = 1
    identity: str = ""


class Dealing(Protocol):
    """What a worker asks for its group."""

    def begin(self, group: int, identity: str | None) -> None:
        """The group's workers have started, perhaps after a death, with a checkpoint of the student `identity`."""

    def next(self, group: int) -> Dealt | None:
        """What it trains next; None: nothing is left that nobody has begun."""


class Dealer:
    """The students of all groups.

    >>> dealer = Dealer([[Dealt(0, 0), Dealt(0, 1), Dealt(0, 2)], [Dealt(0, 3)]])
    >>> [dealer.next(group).row for group in (0, 1, 1, 0)], dealer.next(0)
    ([0, 3, 2, 1], None)
    """

    def __init__(self, shares: Sequence[Sequence[Dealt]]) -> None:
        """`shares`: the students of each group, in their order."""
        self._left = [deque(share) for share in shares]
        self._first: list[deque[Dealt]] = [deque() for _ in shares]  # of the group alone: it has begun them
        self._at: list[Dealt | None] = [None] * len(shares)

    def begin(self, group: int, identity: str | None) -> None:
        """See `Dealing`. What the group was at comes first, and before all what it has a checkpoint of."""
        first = self._first[group]
        if (cut_off := self._at[group]) is not None:
            first.appendleft(cut_off)
            self._at[group] = None
        for left in self._left:
            for dealt in [d for d in left if identity is not None and d.identity == identity]:
                left.remove(dealt)
                first.appendleft(dealt)

    def next(self, group: int) -> Dealt | None:
        """See `Dealing`."""
        first, mine = self._first[group], self._left[group]
        most = max(self._left, key=lambda left: sum(d.views for d in left))
        self._at[group] = first.popleft() if first else mine.popleft() if mine else most.pop() if most else None
        return self._at[group]


class SharedDealer:
    """A `Dealer` that several groups ask: an actor on the driver's own node, which is lost with the run alone.

    Killed, it starts again with all students: those that are published are skipped, and at worst one that is at work is
    trained twice, to the same bytes.
    """

    def __init__(self, shares: Sequence[Sequence[Dealt]]) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        lasting = {"max_restarts": -1, "max_task_retries": -1}
        self._actor: Any = ray.remote(Dealer).options(num_cpus=0, scheduling_strategy=here, **lasting).remote(shares)

    def begin(self, group: int, identity: str | None) -> None:
        """See `Dealing`."""
        ray.get(self._actor.begin.remote(group, identity))

    def next(self, group: int) -> Dealt | None:
        """See `Dealing`."""
        dealt: Dealt | None = ray.get(self._actor.next.remote(group))
        return dealt
