"""How a command is stopped from outside: SIGTERM (Slurm, Kubernetes, a stopped job) and SIGHUP end it as Ctrl-C does.

The signal becomes an exception in the main thread, so that every `finally` runs: actors go, the lease is given back.
"""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any

SIGNALS = tuple(s for s in (getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP")) if s is not None)


class Stopped(BaseException):
    """The command was told to stop; not an Exception, so that nothing takes it for an error of its own."""

    def __init__(self, number: int, why: str = "") -> None:
        super().__init__(number)
        self.number = number
        self.why = why

    @property
    def exit_code(self) -> int:
        """As a shell gives it for a process that a signal ended: 143 for SIGTERM."""
        return 128 + self.number

    @property
    def words(self) -> str:
        return self.why or f"stopped by {signal.Signals(self.number).name}"


_why = ""  # said by whoever stops this process from within


def listen() -> None:
    """Take the signals; again after anything that installs handlers of its own, as Ray does when it starts."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, _stop)


def stop_from_within(why: str) -> None:
    """Stop this command from another of its threads, with words."""
    global _why
    _why = why
    signal.raise_signal(signal.SIGTERM)


def _stop(number: int, frame: Any) -> None:
    for each in SIGNALS:  # once: a second one must not cut off what the first has begun to put away
        signal.signal(each, signal.SIG_IGN)
    sys.stderr.flush()
    raise Stopped(number, _why)
