"""Workers of a Ray of this machine, found and killed by what they are; commands, killed with all that they started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
MARK = "DDOQ_TEST_RUN"  # an environment variable by which the processes of a run are known
TIMEOUT = 180  # seconds of a command

Stamp = dict[str, tuple[int, int]]  # name -> inode and time of change


def workers(node: Any, word: str) -> list[int]:
    """Processes of a node's Ray workers whose title has `word`."""
    return [process for process, (_, words) in workers_of([node]).items() if word in words]


def workers_of(nodes: Sequence[Any]) -> dict[int, tuple[Any, str]]:
    """Process -> (node, title) of the Ray workers of some nodes, in the order of their numbers; one look at /proc."""
    raylets = {node.all_processes["raylet"][0].process.pid: node for node in nodes}
    found = {}
    for process in sorted(int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()):
        try:
            parent = int(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        if parent in raylets and (words := title(process)).startswith("ray::"):
            found[process] = (raylets[parent], words)
    return found


def title(process: int) -> str:
    """The command line of a process; empty when it has ended."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


class Over(AssertionError):
    """The work ended before the moment came."""


class InThread:
    """A piece of work that goes on beside the test; its error is raised by `join`.

    Attributes:
        errors: What the work raised.
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        self.errors: list[BaseException] = []

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self.errors.append(error)

        self._thread = threading.Thread(target=run, daemon=True)  # one that hangs does not keep the process
        self._thread.start()

    def wait_for(self, moment: Callable[[], Any]) -> Any:
        """What `moment` gives, as soon as it gives something, while the work goes on."""
        while not (found := moment()):
            if not self._thread.is_alive():
                raise Over("the work ended before the moment came", self.errors)
            time.sleep(0.01)
        return found

    def kill(self, node: Any, word: str, among: Callable[[list[int]], int] = min) -> None:
        """SIGKILL one such worker, as soon as there is one."""
        os.kill(among(self.wait_for(lambda: workers(node, word))), signal.SIGKILL)

    def join(self, timeout: float) -> None:
        assert self.ended(timeout) and not self.errors, self.errors

    def ended(self, timeout: float) -> bool:
        """Whether the work is over within so many seconds."""
        self._thread.join(timeout)
        return not self._thread.is_alive()


def start(keys: Sequence[str], log: Path) -> tuple[subprocess.Popen[bytes], str]:
    """The command with these keys, in a Ray of its own; and the mark of its processes."""
    mark = uuid.uuid4().hex
    # With Ray's own settings, not those of the tests' Ray.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {MARK: mark}
    line = [sys.executable, "-m", "ddoq_ray", *keys]
    with log.open("ab") as out:
        return subprocess.Popen(line, cwd=CHECKOUT, env=environment, stdout=out, stderr=out), mark


def processes(mark: str) -> list[int]:
    """Every living process of a run, from the environment that it inherited."""
    needle = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and needle in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:  # it ended meanwhile, or is not ours
            continue
    return found


def wait_gone(mark: str) -> None:
    """Until nothing of a run can work on.

    Ray's two agents of a node (status and environments, they run no task) are not waited for: after the driver's
    SIGKILL they look for their dead cluster for another minute before they end by themselves.
    """
    end = time.monotonic() + 60
    while left := {title(p) for p in processes(mark)} - {"", "ray::DashboardAgent", "ray::RuntimeEnvAgent"}:
        assert time.monotonic() < end, left
        time.sleep(0.1)


def kill_when(moment: Callable[[], bool], keys: Sequence[str], log: Path) -> None:
    """Run the command and SIGKILL its driver as soon as `moment` has come."""
    process, mark = start(keys, log)
    end = time.monotonic() + TIMEOUT
    try:
        while not moment():
            assert process.poll() is None, "it ended before the moment came:\n" + log.read_text()[-3000:]
            assert time.monotonic() < end, "the moment never came:\n" + log.read_text()[-3000:]
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_gone(mark)


def stamps(run: Path, *patterns: str) -> Stamp:
    """Inode and time of change of each such file, by which one that is made again is told."""
    files = [p for pattern in patterns for p in run.glob(pattern)]
    return {str(p.relative_to(run)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in files}
