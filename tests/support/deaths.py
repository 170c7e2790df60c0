"""Workers of a Ray of this machine, found and killed by what they are."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def workers(node: Any, word: str) -> list[int]:
    """Processes of a node's Ray workers whose title has `word`."""
    raylet = node.all_processes["raylet"][0].process.pid
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                title = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if parent == raylet and title.startswith("ray::") and word in title:
                found.append(int(entry.name))
    return found


class InThread:
    """A piece of work that goes on beside the test; its error is raised by `join`."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._errors: list[BaseException] = []

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._errors.append(error)

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def wait_for(self, moment: Callable[[], Any]) -> Any:
        """What `moment` gives, as soon as it gives something, while the work goes on."""
        while not (found := moment()):
            assert self._thread.is_alive(), ("the work ended before the moment came", self._errors)
            time.sleep(0.01)
        return found

    def kill(self, node: Any, word: str, among: Callable[[list[int]], int] = min) -> None:
        """SIGKILL one such worker, as soon as there is one."""
        os.kill(among(self.wait_for(lambda: workers(node, word))), signal.SIGKILL)

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)
        assert not self._thread.is_alive() and not self._errors, self._errors
