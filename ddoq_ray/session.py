"""Ray for the duration of a run: a cluster that is joined, or a Ray of the run's own; probed, quiet, and watched."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import ray

from ddoq_ray import stopping
from ddoq_ray.config.cluster import ClusterConfig
from ddoq_ray.runtime import say

PROBE_S = 10.0  # until a port must answer
JOIN_S = 60.0  # until a cluster whose port answers must have taken this driver in
WATCH_S = 5.0  # between two looks at a joined cluster's head; Ray itself ends the driver after a minute without it
MISSED = 4  # looks in a row, before the head is called lost
SOCKET_BYTES = 107  # a socket's path, at most; Ray's own part of it is some 65


@contextlib.contextmanager
def ray_session(cluster: ClusterConfig) -> Iterator[None]:
    """Ray for the duration of a run: the one already joined, the one that is asked for, or one of our own.

    Inside `ray job submit` RAY_ADDRESS is set, so the same command runs on the cluster without a change.

    Raises:
        ValueError: When there is no such cluster, or it does not let this driver in.
    """
    if ray.is_initialized():
        yield
        return
    loud = bool(os.environ.get("DDOQ_RAY_LOGS"))
    quiet: dict[str, Any] = {"logging_level": logging.INFO if loud else logging.ERROR, "log_to_driver": loud}
    where = joined_address(cluster)
    head: tuple[str, int] | None = None
    if where is not None:
        head = _probe(*where)
    with contextlib.nullcontext() if loud else _quiet_core():
        if where is not None:
            _join(where[0], where[1], quiet)
        else:
            # Two CPUs at least: the reader and the encoder of one stream must both find room.
            cpus = cluster.num_cpus or max(2, os.cpu_count() or 1)
            with _short_temporary_folder():
                ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
    stopping.listen()  # Ray has put handlers of its own in their place
    if not loud:
        _quiet_ray_data()
    watch: Any = _Watch(head) if head is not None else contextlib.nullcontext()
    try:
        with watch:
            yield
    finally:
        ray.shutdown()
        stopping.listen()


def joined_address(cluster: ClusterConfig) -> tuple[str, str] | None:
    """(address, where it came from) of the cluster to join; None for a Ray of the run's own.

    What the configuration says wins over the environment.

    Raises:
        ValueError: When the address is of a kind that cannot be joined, or `auto` finds no cluster.
    """
    asked, given = cluster.address, os.environ.get("RAY_ADDRESS")
    if asked == "local" or (asked is None and not given):
        return None
    address, source = (given, "RAY_ADDRESS") if asked in (None, "auto") and given else (asked, "cluster.address")
    assert address is not None
    if address == "local":
        return None
    if address == "auto":
        from ray._private.services import find_bootstrap_address

        found = find_bootstrap_address(None)
        if not found:
            raise ValueError(
                "cluster.address=auto: no Ray cluster runs on this machine, and RAY_ADDRESS is not set; start one "
                "(ray start --head), submit the command to one (ray job submit), or use cluster.address=local"
            )
        address, source = found, "the Ray that runs on this machine"
    if address.startswith("ray://"):
        raise ValueError(
            f"{source}={address} is an address of Ray Client, through which Ray Data and Ray Train do not run; use the "
            "head's own address on a node of the cluster (HEAD:6379), or `ray job submit` from elsewhere"
        )
    if "://" in address:
        raise ValueError(
            f"{source}={address} is a dashboard's address, for `ray job submit --address`; to join a cluster give the "
            "head's own (HEAD:6379), or unset it"
        )
    return address, source


def _probe(address: str, source: str) -> tuple[str, int]:
    """Host and port of a cluster's head, which answers.

    Raises:
        ValueError: When nothing answers there in time.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"{source}={address}: expected HOST:PORT of a Ray head, such as 10.0.0.1:6379")
    say(f"ray        joining the cluster at {address} (from {source})")
    where = (host.strip("[]"), int(port))
    try:
        socket.create_connection(where, timeout=PROBE_S).close()
    except OSError as error:
        raise ValueError(
            f"no Ray cluster answers at {address} (from {source}): {error}. Start it, give another address, or unset "
            f"{source if source == 'RAY_ADDRESS' else 'it'}; cluster.address=local runs on this machine alone"
        ) from error
    return where


def _join(address: str, source: str, quiet: dict[str, Any]) -> None:
    def give_up() -> None:
        words = (
            f"ddoq-ray: error: what answers at {address} (from {source}) did not take this driver in for "
            f"{JOIN_S:.0f} s: it is no Ray head, or one of another version or another token (RAY_AUTH_TOKEN)\n"
        )
        os.write(_STDERR[-1] if _STDERR else 2, words.encode())
        os._exit(2)  # Ray waits inside its core, where no signal and no exception reaches it

    timer = threading.Timer(JOIN_S, give_up)
    timer.daemon = True
    timer.start()
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        text = " ".join(str(error).split())
        kind = "token" if "oken" in text or "uthentic" in type(error).__name__ else "version"
        hint = {
            "token": "driver and cluster must have the same RAY_AUTH_MODE and RAY_AUTH_TOKEN",
            "version": "driver and cluster must have the same versions of Ray and Python",
        }[kind]
        raise ValueError(f"cannot join the Ray cluster at {address} (from {source}): {text[:400]}; {hint}") from error
    finally:
        timer.cancel()


class _Watch:
    """Looks whether the head of a joined cluster is there: Ray ends a driver without one word when it is not."""

    def __init__(self, head: tuple[str, int]) -> None:
        self.head = head
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, name="head", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._end.set()

    def _look(self) -> None:
        missed = 0
        while not self._end.wait(WATCH_S):
            try:
                socket.create_connection(self.head, timeout=WATCH_S).close()
                missed = 0
            except OSError:
                missed += 1
            if missed == MISSED:
                say(
                    f"ddoq-ray: error: the head of the Ray cluster at {self.head[0]}:{self.head[1]} has been gone "
                    f"for {MISSED * WATCH_S:.0f} s. What is finished stays; when a cluster is there again, the same "
                    "command goes on where this one stopped"
                )
                os._exit(1)


@contextlib.contextmanager
def _short_temporary_folder() -> Iterator[None]:
    """Ray puts sockets below TMPDIR, whose paths have a limit: a long one is left to everything but Ray."""
    own = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    if len(os.fsencode(os.path.join(own, "ray"))) + 68 <= SOCKET_BYTES:
        yield
        return
    before = os.environ.get("RAY_TMPDIR")
    os.environ["RAY_TMPDIR"] = "/tmp"
    try:
        yield
    finally:
        if before is None:
            del os.environ["RAY_TMPDIR"]
        else:
            os.environ["RAY_TMPDIR"] = before


_STDERR: list[int] = []  # where this process's own words go while descriptor 2 is held


@contextlib.contextmanager
def _quiet_core() -> Iterator[None]:
    """Keep Ray's C++ core off the driver's stderr: it warns there of Ray Data's own actors, in red and in vain.

    The variable silences it from the start of the session on; the line by which it announces that, and anything else
    that the start writes, is shown only when the start fails.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    sys.stderr.flush()
    stderr = os.dup(2)
    _STDERR.append(stderr)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(stderr, held.read())
            raise
        finally:
            os.dup2(stderr, 2)
            _STDERR.remove(stderr)
            os.close(stderr)


def _quiet_ray_data() -> None:
    """One progress line a stage is ours; Ray Data's own plan lines and bars would bury it."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_rich_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
