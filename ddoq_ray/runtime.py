"""What every stage shares of Ray and of the terminal: the session, survivable deaths, progress, the event log."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
import threadpoolctl
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError
from tqdm import tqdm

from ddoq_ray.artifacts import Folder
from ddoq_ray.config.cluster import ClusterConfig

# Deaths that a stage survives by doing the unit again elsewhere. RayTaskError is not among them: it carries an
# exception of our own code, and a bug must surface.
DEATHS: tuple[type[BaseException], ...] = (RayActorError, NodeDiedError, WorkerCrashedError, OutOfMemoryError)


@contextlib.contextmanager
def ray_session(cluster: ClusterConfig) -> Iterator[None]:
    """Ray for the duration of a run: the one already joined, the one of RAY_ADDRESS, or one of our own.

    Inside `ray job submit` RAY_ADDRESS is set, so the same command runs on the cluster without a change.
    """
    if ray.is_initialized():
        yield
        return
    loud = bool(os.environ.get("DDOQ_RAY_LOGS"))
    quiet = {"logging_level": logging.INFO if loud else logging.ERROR, "log_to_driver": loud}
    with contextlib.nullcontext() if loud else _quiet_core():
        if os.environ.get("RAY_ADDRESS") or cluster.address == "auto":
            ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), **quiet)
        else:
            # Two CPUs at least: the reader and the encoder of one stream must both find room.
            cpus = cluster.num_cpus or max(2, os.cpu_count() or 1)
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
    if not loud:
        _quiet_ray_data()
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _quiet_core() -> Iterator[None]:
    """Keep Ray's C++ core off the driver's stderr: it warns there of Ray Data's own actors, in red and in vain.

    The variable silences it from the start of the session on; the line by which it announces that, and anything else
    that the start writes, is shown only when the start fails.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    sys.stderr.flush()
    stderr = os.dup(2)
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


class Progress:
    """A bar on a terminal; elsewhere (a log, a Ray job) one line at most every ten seconds, and one at the end."""

    def __init__(self, stage: str, total: int | None, unit: str) -> None:
        self.stage, self.total, self.unit = stage, total, unit
        self.done = 0
        self.start = self.last = time.monotonic()
        self.bar = None
        if sys.stderr.isatty():
            self.bar = tqdm(total=total, desc=f"{stage:<10}", unit=f" {unit}", file=sys.stderr, dynamic_ncols=True)

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done += n
        if self.bar is not None:
            if note:
                self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(n)
        elif time.monotonic() - self.last >= 10:
            self._line(note)

    def _line(self, note: str = "") -> None:
        self.last = time.monotonic()
        seconds = self.last - self.start
        of = f" of {self.total:,}" if self.total else ""
        rate = f", {self.done / seconds:,.1f} a second" if seconds > 0.5 and self.done else ""
        note = f" ({note})" if note else ""
        line = f"{self.stage:<10} {self.done:,}{of} {self.unit}{rate}, {seconds:.0f} s{note}"
        print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        else:
            self._line()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def in_tasks(jobs: Sequence[Callable[[], Any]], at_once: int) -> Iterator[tuple[int, Any]]:
    """(number, result) of each job as it ends; at most `at_once` are with Ray at any time.

    Raises:
        ValueError: A worker's, for the person; the other tasks are cancelled.
    """
    waiting: dict[Any, int] = {}
    left = deque(enumerate(jobs))
    while left or waiting:
        while left and len(waiting) < at_once:
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
            raise (error.cause if isinstance(error.cause, ValueError) else error) from None


def say(text: str) -> None:
    """One line for the person who runs it; on stderr, so that stdout holds the result only."""
    tqdm.write(text, file=sys.stderr) if sys.stderr.isatty() else print(text, file=sys.stderr, flush=True)


class Events:
    """``events.jsonl`` of the run: node lost, unit requeued, stage finished. The driver alone writes it."""

    def __init__(self, run: Folder) -> None:
        self.run = run
        self._lines: list[str] | None = None

    def add(self, event: str, **facts: Any) -> None:
        line = json.dumps({"time": round(time.time(), 3), "event": event, **facts}, default=str) + "\n"
        if self.run.local:
            os.makedirs(self.run.uri, exist_ok=True)
            with open(self.run.path("events.jsonl"), "a") as f:
                f.write(line)
            return
        if self._lines is None:  # an object store cannot append: publish the (short) log again
            there = self.run.read("events.jsonl").decode() if self.run.exists("events.jsonl") else ""
            self._lines = there.splitlines(True)
        self._lines.append(line)
        self.run.publish("events.jsonl", "".join(self._lines).encode())


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


def environment(threads: int) -> dict[str, Any]:
    """What bit-identity depends on beside the configuration; recorded in every manifest."""
    import diffusers
    import numpy
    import torch

    return {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "numpy": numpy.__version__,
        "ray": ray.__version__,
        "threads": threads,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
    }


def commit() -> str | None:
    """The commit of the code that runs, if it runs from its own checkout."""
    here = Path(__file__).resolve()

    def git(*words: str) -> str:
        command = ["git", *words]
        return subprocess.run(command, cwd=here.parent, capture_output=True, text=True, timeout=10, check=True).stdout

    try:
        git("ls-files", "--error-unmatch", here.name)  # installed inside another project's checkout it is not tracked
        return git("rev-parse", "--short=12", "HEAD").strip()
    except (OSError, subprocess.SubprocessError):
        return None
