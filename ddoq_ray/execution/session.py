"""Ray for the duration of a run: which one, joined within a time limit, and what is said when it is lost."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import ray
from ray.exceptions import AuthenticationError

from ddoq_ray.config.cluster import ClusterConfig
from ddoq_ray.execution import console as progress
from ddoq_ray.execution import quiet, signals
from ddoq_ray.execution.cluster_address import Where, find, probe
from ddoq_ray.execution.console import say

JOIN_SECONDS = 90.0  # for ray.init once the cluster answers
WATCH_SECONDS = 2.0  # between two looks at the head
AWAY_SECONDS = 6.0  # without an answer: it is said
# Ray ends the driver, in C and without a word, after this time without its head; this run ends before, with words.
_RAY_GIVES_UP = float(os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s") or 60)  # noqa: SIM112
LOST_SECONDS = 0.75 * _RAY_GIVES_UP
TASKS_SEEN = 1000  # of those that are at work, when it is asked whether one is
SOCKET_BYTES = 107  # of a Unix socket's path
_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"


def locate(cluster: ClusterConfig) -> Where | None:
    """The cluster that a session will join, seen to answer; None for the one already joined, or one of the run's own.

    Raises:
        ValueError: When none answers there.
    """
    if ray.is_initialized():
        return None
    where = find(cluster.address, os.environ)
    if where is not None:
        say(f"ray        joins the cluster at {where.address} ({where.source})")
        probe(where)
    return where


def own_node(cluster: ClusterConfig) -> dict[str, float]:
    """What a Ray of the run's own will have, as far as it is known before it starts; its memory is not."""
    from ray._private.accelerators import NvidiaGPUAcceleratorManager

    gpus = NvidiaGPUAcceleratorManager.get_current_node_num_accelerators()
    visible = NvidiaGPUAcceleratorManager.get_current_process_visible_accelerator_ids()
    gpus = gpus if visible is None else min(gpus, len(visible))
    return {"CPU": float(_cpus(cluster)), "GPU": float(gpus), "memory": float("inf")}


def _cpus(cluster: ClusterConfig) -> int:
    # Two CPUs at least: the reader and the encoder of one stream must both find room.
    return cluster.num_cpus or max(2, os.cpu_count() or 1)


@contextlib.contextmanager
def ray_session(cluster: ClusterConfig, where: Where | None = None) -> Iterator[None]:
    """Ray for the duration of a run: the one already joined, the one that is asked for, or one of our own.

    Inside `ray job submit` RAY_ADDRESS is set, so the same command runs on the cluster without a change.

    Args:
        where: What `locate` found before.

    Raises:
        ValueError: When the cluster that is asked for cannot be joined.
    """
    loud = bool(os.environ.get("DDOQ_RAY_LOGS"))
    if ray.is_initialized():
        with contextlib.nullcontext() if loud else quiet.guest(), _spoken_of():
            yield
        return
    where = where or locate(cluster)
    logs = {"logging_level": logging.INFO if loud else logging.ERROR, "log_to_driver": loud}
    ended = contextlib.ExitStack()
    try:
        with contextlib.nullcontext() if loud else quiet.core():
            if where is not None:
                _join(where, logs)
            else:
                ended.enter_context(_unwatched())
                _start(cluster, logs)
        signals.reinstall()
        if not loud:
            quiet.ray_data()
        own = "this run's own Ray" if where is None else f"the cluster at {where.address}"
        with signals.last_resort(_kill_own), _Watch(ray.get_runtime_context().gcs_address, own), _spoken_of():
            yield
    finally:
        ray.shutdown()
        ended.close()


@contextlib.contextmanager
def _unwatched() -> Iterator[None]:
    """Ray Train without its watcher of preemptions, a process a run that takes seconds to start: of a run's own Ray
    there is but this node, and nobody takes it away with a warning."""
    given = os.environ.get(_WATCHER)
    os.environ.setdefault(_WATCHER, "0")
    try:
        yield
    finally:
        if given is None:
            os.environ.pop(_WATCHER, None)


def may_grow() -> bool:
    """Whether nodes may join the Ray of this process: not when it is its own."""
    node = ray._private.worker._global_node
    return node is None or not node.is_head()


def _join(where: Where, logs: dict[str, Any]) -> None:
    done = threading.Event()
    guard = threading.Thread(target=_bound, args=(where, done), daemon=True)
    guard.start()
    try:
        ray.init(address=where.address, **logs)
    except Exception as error:
        raise ValueError(refused_words(where, error)) from error
    finally:
        done.set()


def refused_words(where: Where, error: Exception) -> str:
    """Why a cluster that answers could not be joined, by Ray's own error, and what to do."""
    text = " ".join(str(error).split()).removesuffix(".")
    if isinstance(error, AuthenticationError):
        return (
            f"the cluster at {where.address} ({where.source}) refuses this run's token: give RAY_AUTH_MODE and "
            "RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) as they were given to its `ray start`"
        )
    if "ersion mismatch" in text:
        return (
            f"the cluster at {where.address} ({where.source}) runs another version than this process: {text}. "
            "Install the same versions of Ray and Python here and on its nodes"
        )
    return (
        f"cannot join the cluster at {where.address} ({where.source}): {type(error).__name__}: {text[:600]}. "
        "The driver must run on one of its nodes (or be submitted: ray job submit); cluster.address=local starts "
        "a Ray of this run's own"
    )


def _bound(where: Where, done: threading.Event) -> None:
    """ray.init waits in C where no signal reaches it; this ends the process when it takes too long."""
    if not done.wait(JOIN_SECONDS):
        signals.tell(
            f"ddoq-ray: error: {where.address} ({where.source}) answers, but Ray could not join it in "
            f"{JOIN_SECONDS:.0f} s; see `ray status --address {where.address}`, or set cluster.address=local"
        )
        signals.leave(2)


def _start(cluster: ClusterConfig, logs: dict[str, Any]) -> None:
    place = short_temporary(os.environ)
    more: dict[str, Any] = {} if place is None else {"_temp_dir": place}
    try:
        ray.init(address="local", num_cpus=_cpus(cluster), include_dashboard=False, **logs, **more)
    except OSError as error:
        raise ValueError(
            f"Ray cannot start with its files in {place or _temporary(os.environ)}: {error}. "
            "Set RAY_TMPDIR to a short path of a folder that can be written, such as /tmp"
        ) from error
    except Exception as error:
        logs_at = os.path.join(place or os.path.join(_temporary(os.environ), "ray"), "session_latest", "logs")
        text = " ".join(str(error).split()).removesuffix(".")
        raise ValueError(
            f"Ray did not start on this machine: {type(error).__name__}: {text[:600]}. Run again when the machine has "
            f"less to do and memory, processes and open files to give (ulimit -a); why is in {logs_at} (raylet.err, "
            "gcs_server.err)"
        ) from error


def _temporary(environment: Any) -> str:
    return str(environment.get("RAY_TMPDIR") or environment.get("TMPDIR") or "/tmp")


def short_temporary(environment: Any) -> str | None:
    """A folder for Ray's session where TMPDIR's own path is none for its sockets; None where it is one.

    Ray's core takes paths as ASCII alone.

    Raises:
        ValueError: When there is no short one that can be written.
    """
    wanted = _temporary(environment)
    if wanted.isascii() and len(wanted + _SOCKET) <= SOCKET_BYTES:
        return None
    for place in ("/tmp/ray", f"/tmp/ray-{os.getuid()}"):
        with contextlib.suppress(OSError):
            os.makedirs(place, exist_ok=True)
            with tempfile.TemporaryFile(dir=place):
                return place
    raise ValueError(
        f"{wanted} (RAY_TMPDIR or TMPDIR) is no path for Ray's sockets, which may have {SOCKET_BYTES} bytes of ASCII; "
        "set RAY_TMPDIR to a short one"
    )


def _kill_own() -> None:
    """Kill this run's own Ray, its raylet last, and wait for none of it (see `signals.leave`)."""
    node = ray._private.worker._global_node
    if node is not None and node.is_head():
        for kind in sorted(node.all_processes, key=lambda kind: kind == "raylet"):
            for info in node.all_processes[kind]:
                with contextlib.suppress(OSError):
                    info.process.kill()


# ---------------------------------------------------------------------- what is waited for


@contextlib.contextmanager
def _spoken_of() -> Iterator[None]:
    progress.waits.append(pending)
    try:
        yield
    finally:
        progress.waits.remove(pending)


def pending() -> str:
    """What Ray has no room for at this moment, and what is free: `waits for 0.5 CPU, 0.4 free`; empty when nothing.

    Empty too while a task of this run is at work: what has no room comes after it.
    """
    words = waiting_words(demands(), ray.available_resources())
    return "" if words and at_work() else words


def at_work() -> bool:
    """Whether some node executes a task of this run; False where the head does not say. Actors are not looked at."""
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import common_pb2, gcs_service_pb2, gcs_service_pb2_grpc

    common, service = cast(Any, common_pb2), cast(Any, gcs_service_pb2)  # made of schemas, which types do not follow
    asked, same = service.GetTaskEventsRequest(limit=TASKS_SEEN), service.FilterPredicate.EQUAL
    asked.filters.exclude_driver = True
    asked.filters.job_filters.add(job_id=ray._private.worker.global_worker.current_job_id.binary(), predicate=same)
    asked.filters.state_filters.add(state="RUNNING", predicate=same)
    try:
        with init_grpc_channel(ray.get_runtime_context().gcs_address) as channel:
            found = gcs_service_pb2_grpc.TaskInfoGcsServiceStub(channel).GetTaskEvents(asked, timeout=WATCH_SECONDS)
    except Exception:  # words for comfort: what they are made of is private to Ray
        return False
    return any(task.task_info.type == common.NORMAL_TASK for task in found.events_by_task)


def demands() -> dict[tuple[tuple[str, float], ...], int]:
    """What Ray has no room for at this moment: shape (resources by name, sorted) -> how many."""
    from ray.autoscaler.v2.sdk import get_cluster_resource_state

    state = get_cluster_resource_state(ray._private.worker.global_worker.gcs_client)  # type: ignore[attr-defined]
    asked: dict[tuple[tuple[str, float], ...], int] = {}
    for item in state.pending_resource_requests:
        _count(asked, item.request.resources_bundle, item.count)
    for gang in state.pending_gang_resource_requests:
        for request in gang.requests:
            _count(asked, request.resources_bundle, 1)
    return asked


def _count(asked: dict[tuple[tuple[str, float], ...], int], bundle: Any, count: int) -> None:
    shape = tuple(sorted((name, float(amount)) for name, amount in bundle.items() if _told(name)))
    asked[shape] = asked.get(shape, 0) + count


def _told(name: str) -> bool:
    return name in ("CPU", "GPU", "memory")


def waiting_words(asked: dict[tuple[tuple[str, float], ...], int], free: dict[str, float]) -> str:
    """Words for pending demands: shape (resources by name) -> how many, and what is free."""
    words = []
    for shape, count in sorted(asked.items(), key=lambda item: -item[1])[:3]:
        parts = " and ".join(
            f"{_amount(name, amount)}, {_bare(name, free.get(name, 0.0))} free" for name, amount in shape
        )
        words.append(f"{f'{count} x ' if count > 1 else ''}{parts or 'a worker process'}")
    return f"waits for {'; '.join(words)}" if words else ""


def _bare(name: str, amount: float) -> str:
    return f"{round(amount / 2**30 if name == 'memory' else amount, 2):g}"


def _amount(name: str, amount: float) -> str:
    return f"{_bare(name, amount)} {'GiB of memory' if name == 'memory' else name}"


# ---------------------------------------------------------------------- the head


@dataclass
class _Lost:
    words: str = ""


_lost = _Lost()


def lost() -> str:
    """What to say of an error when the cluster is lost; empty while it is there."""
    return _lost.words


class _Watch:
    """Looks at the head while the block runs; ends the process, with words, before Ray does it without."""

    def __init__(self, address: str, name: str, leave: Callable[[int], None] = signals.leave) -> None:
        host, _, port = address.rpartition(":")
        self.place, self.name, self.leave = (host.strip("[]"), int(port)), name, leave
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, name="head", daemon=True)

    def __enter__(self) -> _Watch:
        _lost.words = ""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()

    def _look(self) -> None:
        last = time.monotonic()
        while not self._end.wait(WATCH_SECONDS):
            try:
                socket.create_connection(self.place, timeout=WATCH_SECONDS).close()
                if _lost.words:
                    say(f"ray        {self.name} answers again")
                _lost.words, last = "", time.monotonic()
                continue
            except OSError as error:
                reason = error.strerror or str(error)
            away = time.monotonic() - last
            if self._end.is_set():
                return
            if away > AWAY_SECONDS and not _lost.words:
                _lost.words = (
                    f"lost {self.name}: its head does not answer ({reason}). What is published stays; the same "
                    "command goes on from there once there is a cluster"
                )
                say(f"ray        {self.name} does not answer ({reason}); this run waits {LOST_SECONDS:.0f} s for it")
            if away > LOST_SECONDS:
                signals.tell(f"ddoq-ray: error: {_lost.words}")
                self.leave(1)
                return
