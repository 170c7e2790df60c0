"""Workers of a Ray of this machine, found and killed by what they are."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


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
