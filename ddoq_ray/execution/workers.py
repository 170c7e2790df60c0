"""What every stage shares of Ray: survivable deaths, tasks, the event log, threads and devices."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
import threadpoolctl
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ddoq_ray.execution.console import Progress as Progress  # the stages know both from here
from ddoq_ray.execution.console import say as say
from ddoq_ray.execution.errors import plain_error
from ddoq_ray.storage import layout
from ddoq_ray.storage.folder import Folder

# Deaths that a stage survives by doing the unit again elsewhere. RayTaskError is not among them: it carries an
# exception of our own code, and a bug must surface.
DEATHS: tuple[type[BaseException], ...] = (RayActorError, NodeDiedError, WorkerCrashedError, OutOfMemoryError)


MAX_DEATHS = 3  # a unit that kills its worker this often would kill every worker


def on_actor(spawn: Callable[[], Any], ask: Callable[[Any], Any], on_event: Callable[..., None]) -> Any:
    """What `ask` gives of an actor that is made for it alone; after a death of another one. No actor is left.

    Args:
        spawn: Makes an actor.
        ask: Calls it and waits for what it says; doing so again changes nothing.
        on_event: Called with ``"worker lost"``.

    Raises:
        One of `DEATHS`: The third one, or the actor's constructor fails.
        ValueError: Of the actor, for the user.
    """
    for deaths in range(1, MAX_DEATHS + 1):
        actor = spawn()
        try:
            return ask(actor)
        except DEATHS as error:
            if deaths == MAX_DEATHS or getattr(error, "actor_init_failed", False):
                raise
            on_event("worker lost", reason=type(error).__name__, deaths=deaths)
        except ray.exceptions.RayTaskError as error:
            raise plain_error(error) from None
        finally:
            ray.kill(actor)
    raise AssertionError(MAX_DEATHS)


def twice_the_room(num_cpus: float) -> Callable[[], int]:
    """For `in_tasks`: twice as many tasks of `num_cpus` as the nodes have room for that are there at that time.

    Those that wait are the demand that an autoscaler sees: on a cluster that begins with none it grows with the nodes.
    """
    return lambda: 2 * max(1, int(ray.cluster_resources().get("CPU", 1) / max(0.25, num_cpus)))


def in_tasks(jobs: Sequence[Callable[[], Any]], at_once: int | Callable[[], int]) -> Iterator[tuple[int, Any]]:
    """(number, result) of each job as it ends; at most `at_once` are with Ray, a number or what is asked each time.

    Raises:
        ValueError: A worker's, for the user; the other tasks are cancelled.
    """
    waiting: dict[Any, int] = {}
    left = deque(enumerate(jobs))
    while left or waiting:
        most = at_once() if callable(at_once) else at_once
        while left and len(waiting) < most:
            number, submit = left.popleft()
            waiting[submit()] = number
        ready, _ = ray.wait(list(waiting), num_returns=1)
        number = waiting.pop(ready[0])
        try:
            yield number, ray.get(ready[0])
        except ray.exceptions.RayTaskError as error:
            for ref in waiting:  # one answer is enough; Ray would print the others' errors
                ray.cancel(ref)
                with contextlib.suppress(ray.exceptions.RayError, ValueError):
                    ray.get(ref)
            raise plain_error(error) from None


_turns = itertools.count()


def on_a_working_node() -> dict[str, Any]:
    """Options of a task that asks Ray for no CPU: a node that has some, another one each time; none where none has.

    Ray sends a task that asks for nothing to the driver's own node, spread or not: the head of a cluster, which has no
    CPUs so that nothing should come to it, and whose memory and disk are for the books of all.
    """
    nodes = sorted(node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU"))
    if not nodes:
        return {}
    here = nodes[next(_turns) % len(nodes)]
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=True)}  # soft: it may have left


def in_background(jobs: Sequence[Callable[[], Any]], at_once: int = 64) -> None:
    """Do small jobs of reading on the cluster, of which nothing is wanted but their errors, beside what has its CPUs.

    Args:
        jobs: Picklable; each goes to a worker.
        at_once: As many at a time, or one a CPU where there are fewer: Ray limits no task that asks for no CPU, and
            would start a process for each.

    Raises:
        ValueError: As `in_tasks`.
    """
    if not jobs:
        return
    task = ray.remote(num_cpus=0)(_called)

    def most() -> int:
        return min(at_once, max(1, int(ray.cluster_resources().get("CPU", 1))))

    def submit(job: Callable[[], Any]) -> Any:
        return task.options(**on_a_working_node()).remote(job)

    for _ in in_tasks([functools.partial(submit, job) for job in jobs], most):
        pass


def _called(job: Callable[[], Any]) -> None:
    job()


class Events:
    """``events.jsonl`` of the run: node lost, unit requeued, stage finished. The driver alone writes it.

    Attributes:
        run: Where it lies; None where another run writes there: nothing is written.
        hear: Told of each event too; the metrics are.
    """

    def __init__(self, run: Folder | None, hear: Callable[..., None] = lambda event, **facts: None) -> None:
        self.run, self.hear = run, hear
        self._lines: list[str] | None = None

    def add(self, event: str, **facts: Any) -> None:
        self.hear(event, **facts)
        if self.run is None:
            return
        line = json.dumps({"time": round(time.time(), 3), "event": event, **facts}, default=str) + "\n"
        if self.run.local:
            os.makedirs(self.run.uri, exist_ok=True)
            with open(self.run.path(layout.EVENTS), "a") as f:
                f.write(line)
            return
        if self._lines is None:  # an object store cannot append: publish the (short) log again
            there = self.run.read(layout.EVENTS).decode() if self.run.exists(layout.EVENTS) else ""
            self._lines = there.splitlines(True)
        self._lines.append(line)
        self.run.publish(layout.EVENTS, "".join(self._lines).encode())


def pin_blas_threads(threads: int) -> None:
    """Fix the threads of numpy's BLAS, and of the OpenMP libraries that are loaded later (scikit-learn, faiss)."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    threadpoolctl.threadpool_limits(threads)


def pin_threads(threads: int) -> None:
    """Fix torch's threads in an actor: the bits of a CPU forward pass depend on their number."""
    import torch

    pin_blas_threads(threads)
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = False


def device() -> str:
    """The device of this process: its GPU when Ray gave it one, else the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu"
