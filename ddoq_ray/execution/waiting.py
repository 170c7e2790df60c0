"""Work that has no place: why nothing moves, said by time, and when the run gives up."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from ddoq_ray.config.cluster import ClusterConfig
from ddoq_ray.execution import console, session
from ddoq_ray.execution.console import say
from ddoq_ray.execution.ending import Onlooker
from ddoq_ray.execution.errors import NoWorkers

Shape = tuple[tuple[str, float], ...]  # resources by Ray's names, sorted

OWN_GIVE_UP_SECONDS = 120.0  # on a Ray that no node will join
LOOK_SECONDS = 1.0  # between two looks at what is pending
AGAIN_SECONDS = 60.0  # between two lines of the same wait
_AUTOSCALER = b"__autoscaling_status"  # where Ray's first autoscaler leaves its report


@dataclass(eq=False)
class Waiting:
    """Whether a pool has a worker, looked at by time.

    Attributes:
        stage: Whose pool it is.
        room: What each worker asks of one node, by Ray's names.
        key: The configuration's group that says so; empty for none.
        wait_s: After so long without a worker it is said why.
        give_up_s: After so long the run ends; None: never.
    """

    stage: str
    room: Mapping[str, float]
    key: str
    wait_s: float
    give_up_s: float | None
    since: float = field(default_factory=time.monotonic)  # a worker was last there
    spoken: float | None = None

    def look(self, workers: int) -> None:
        """Called again and again, with the workers that are ready.

        Raises:
            NoWorkers: After `give_up_s` without one, while Ray has no room for it.
        """
        now = time.monotonic()
        if workers:
            self.since, self.spoken = now, None
            return
        waited = now - self.since
        due = waited >= self.wait_s and (self.spoken is None or now - self.spoken >= AGAIN_SECONDS)
        last = self.give_up_s is not None and waited >= self.give_up_s
        if not due and not last:
            return
        why, placed = self.why()
        if last and not placed:
            raise NoWorkers(self._gives_up(waited, why))
        if due:
            self.spoken = now
            say(f"{self.stage:<10} no worker for {waited:.0f} s: {why}")

    def few(self, ready: int, wanted: int) -> None:
        """Say that work begins with fewer workers than it should."""
        say(f"{self.stage:<10} {ready} of {wanted} workers are ready after {self.wait_s:g} s: {self.why()[0]}; begins")

    def why(self) -> tuple[str, bool]:
        """What is waited for, in words, and whether Ray has placed all workers, so that they are only starting."""
        try:
            pending = session.demands()
            has, free = ray.cluster_resources(), ray.available_resources()
        except (RayError, RuntimeError, OSError):  # the head may be away: the session says so
            return "the cluster does not answer", True
        shape = tuple(sorted((name, float(amount)) for name, amount in self.room.items() if amount))
        if not pending.get(shape):
            return "all workers that are asked for have their place and are starting", True
        return waiting_words(shape, has, free, pending, autoscaler()), False

    def _gives_up(self, waited: float, why: str) -> str:
        change = f"a smaller {self.key}.num_cpus or num_gpus, " if self.key else ""
        return (
            f"{self.stage}: no worker could be placed for {waited:.0f} s (cluster.give_up_s): {why}. "
            f"What is published stays; the same command goes on with {change}more nodes, or a longer cluster.give_up_s"
        )


def waiting_words(
    shape: Shape,
    has: Mapping[str, float],
    free: Mapping[str, float],
    pending: Mapping[Shape, int],
    scaling: str,
) -> str:
    """Why a worker of `shape` waits: what it asks, what the cluster has, all that is pending, what an autoscaler does.

    >>> shape = (("CPU", 4.0), ("GPU", 1.0))
    >>> words = waiting_words(shape, {"CPU": 8.0}, {"CPU": 6.0}, {shape: 2, (("CPU", 1.0),): 1}, "")
    >>> for part in words.split("; "):
    ...     print(part)
    a worker asks for 4 CPU and 1 GPU on one node
    the cluster has 8 CPU (6 free) and no GPU
    pending are 2 x 4 CPU and 1 GPU, 1 x 1 CPU
    """
    there = [
        f"{session._amount(name, has[name])} ({session._bare(name, free.get(name, 0.0))} free)"
        if has.get(name)
        else f"no {name}"
        for name, _ in shape
    ]
    waits = [f"{count} x {_together(s)}" for s, count in sorted(pending.items(), key=lambda item: -item[1])[:3]]
    words = f"a worker asks for {_together(shape)} on one node; the cluster has {' and '.join(there)}"
    return f"{words}; pending are {', '.join(waits)}{f'; {scaling}' if scaling else ''}"


class Patience(Onlooker):
    """Ends a run whose work has no place on any node, wherever it waits: for a task, in Ray Data, in Ray Train.

    A pool does so by itself (`Waiting`). A demand that would fit some node if it were free is no reason.

    Attributes:
        give_up_s: So long nothing has moved, and in the latter half of it some demand fits no node that is there.
    """

    error, code, every_s = NoWorkers, 3, LOOK_SECONDS

    def __init__(self, give_up_s: float, own_session: bool) -> None:
        super().__init__(own_session)
        self.give_up_s = give_up_s
        self._homeless_since: float | None = None

    def look(self) -> str:
        stage, still = console.at_rest()
        shape = homeless() if still >= self.give_up_s / 2 else None
        now = time.monotonic()
        since = self._homeless_since = None if shape is None else self._homeless_since or now
        if shape is None or since is None or still < self.give_up_s or now - since < self.give_up_s / 2:
            return ""
        why = waiting_words(shape, ray.cluster_resources(), ray.available_resources(), session.demands(), autoscaler())
        return (
            f"{stage}: nothing has moved for {still:.0f} s (cluster.give_up_s), and no node has room: {why}. What is "
            "published stays; the same command goes on with more nodes, smaller workers, or a longer cluster.give_up_s"
        )


@contextlib.contextmanager
def patience(cluster: ClusterConfig, own_session: bool) -> Iterator[None]:
    """Give a run up as `cluster.give_up_s` says.

    Args:
        own_session: The process is there for this run, and may be ended with it.

    Raises:
        NoWorkers: See `Patience`.
    """
    give_up_s = give_up(cluster)
    with contextlib.nullcontext() if give_up_s is None else Patience(give_up_s, own_session):
        yield


def give_up(cluster: ClusterConfig) -> float | None:
    """After how many seconds without a place a run ends; None: never."""
    if cluster.give_up_s is None and not session.may_grow():
        return OWN_GIVE_UP_SECONDS
    return cluster.give_up_s


def homeless() -> Shape | None:
    """A pending demand for which no node is large enough, were it idle; None where there is none."""
    with contextlib.suppress(RayError, RuntimeError, OSError):  # the head may be away: the session says so
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        for shape in session.demands():
            if not any(all(node.get(name, 0.0) >= amount for name, amount in shape) for node in nodes):
                return shape
    return None


def _together(shape: Shape) -> str:
    return " and ".join(session._amount(name, amount) for name, amount in shape) or "nothing"


def autoscaler() -> str:
    """What the cluster's autoscaler is about, in words; empty where there is none, or it has nothing to say.

    Ray has two: the second keeps its state in the head, the first leaves a report in the head's store of values.
    """
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.experimental.internal_kv import _internal_kv_get

    with contextlib.suppress(Exception):  # words for comfort: what they are made of is private to Ray
        status = get_cluster_status(ray.get_runtime_context().gcs_address)
        second = scaling_words(
            [(n.count, n.ray_node_type_name) for n in status.pending_launches]
            + [(1, n.ray_node_type_name) for n in status.pending_nodes],
            [(n.count, f"{n.ray_node_type_name} ({n.details})") for n in status.failed_launches],
        )
        report = json.loads(_internal_kv_get(_AUTOSCALER) or b"{}").get("autoscaler_report") or {}
        return second or scaling_words(*_of_report(report))
    return ""


def _of_report(report: Mapping[str, Any]) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    """(count, type) of nodes that are being started and of those that failed, of the first autoscaler's report."""
    started = [(count, kind) for kind, count in (report.get("pending_launches") or {}).items()]
    started += [(1, node[1]) for node in report.get("pending_nodes") or []]
    return started, [(1, node[1]) for node in report.get("failed_nodes") or []]


def scaling_words(started: Sequence[tuple[int, str]], failed: Sequence[tuple[int, str]]) -> str:
    """What an autoscaler does, of (count, kind) of nodes.

    >>> scaling_words([(2, "gpu"), (1, "gpu")], [(1, "spot (no capacity)")])
    'the autoscaler starts 3 x gpu, could not start 1 x spot (no capacity)'
    """
    words = []
    for what, nodes in (("starts", started), ("could not start", failed)):
        kinds = dict.fromkeys(kind for _, kind in nodes)
        counted = [f"{sum(n for n, k in nodes if k == kind)} x {kind}" for kind in kinds]
        words += [f"{what} {', '.join(counted)}"] if counted else []
    return f"the autoscaler {', '.join(words)}" if words else ""
