"""A signal that ends a run is told in one line, frees what the run holds, and gives the shell's exit code.

Python runs a handler only between two of its own instructions, so a call into C that hangs would swallow it; and Ray
installs handlers of its own. So a second listener sits on Python's wake-up pipe, which C writes to at once: it knows
what came whatever the main thread does, and ends a process that has not ended by itself.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

GRACE_SECONDS = 15.0  # for the run to free what it holds; then the process is ended
STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))

_received: list[int] = []  # signals of this run, the first one first, from both listeners
_raised: list[int] = []
_mine: list[int] = []  # those that `watching` handles now
_last_resorts: list[Callable[[], None]] = []
_own: list[bool] = []  # of this run's threads, where the shell has SIGINT ignored: asked for, and not yet raised
_stderr = [2]  # where words are seen at this moment


def _stop(number: int, _: FrameType | None) -> None:
    """End like Ctrl-C, the one exception that Ray's waits let through; a second signal must not cut the cleaning."""
    _received.append(number)
    if not _raised:
        _raised.append(number)
        raise KeyboardInterrupt


@contextlib.contextmanager
def watching() -> Iterator[None]:
    """Take SIGTERM and SIGHUP for the duration of a command; a signal that the shell ignores (nohup) stays ignored.

    In a thread other than the main one, where no handler can be set, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _received.clear()
    _raised.clear()
    before = {s: signal.getsignal(s) for s in (*STOPPING, signal.SIGINT)}
    _mine[:] = [s for s in STOPPING if before[s] is not signal.SIG_IGN]
    reading, writing = os.pipe()
    ending, end = os.pipe()
    os.set_blocking(writing, False)
    old = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    listener = threading.Thread(target=_listen, args=(reading, ending), name="signals", daemon=True)
    listener.start()
    reinstall()
    try:
        yield
    finally:
        signal.set_wakeup_fd(old)
        os.close(end)
        listener.join()
        for descriptor in (reading, writing, ending):
            os.close(descriptor)
        stopped = set(_received) & set(_mine)
        _mine.clear()
        for number, handler in before.items():
            if number in stopped:  # told already: what ends with the interpreter is not cut off by one more
                signal.signal(number, signal.SIG_IGN)
            elif handler is not None:
                signal.signal(number, handler)


def reinstall() -> None:
    """Take the signals back from a library that has taken them (ray.init does, in Python and in C)."""
    if _mine and threading.current_thread() is threading.main_thread():
        for number in _mine:
            signal.signal(number, _stop)


@contextlib.contextmanager
def own_ctrl_c() -> Iterator[None]:
    """Ctrl-C as it was, after a block in which a library takes it for good.

    Ray Train's handler stays behind and ends the process with exit code 0.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """For the block, `interrupt` works where the shell has SIGINT ignored too, as it has for a script's `command &`.

    Any other SIGINT stays ignored there.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        yield
        return
    _own.clear()
    signal.signal(signal.SIGINT, _only_own)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _only_own(number: int, _: FrameType | None) -> None:
    if _own:
        _own.clear()
        raise KeyboardInterrupt


def interrupt() -> None:
    """End what the main thread is at, from another thread, as Ctrl-C would."""
    if threading.current_thread() is not threading.main_thread():
        _own.append(True)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def received() -> int | None:
    """The signal that ends this run (SIGINT too); None when none came."""
    return _received[0] if _received else None


@contextlib.contextmanager
def last_resort(free: Callable[[], None]) -> Iterator[None]:
    """Call `free` also where the process must be ended while the block is still at work; quick, raising nothing."""
    _last_resorts.append(free)
    try:
        yield
    finally:
        _last_resorts.remove(free)


@contextlib.contextmanager
def stderr_at(descriptor: int) -> Iterator[None]:
    """Where `tell` writes while descriptor 2 is held back."""
    _stderr.append(descriptor)
    try:
        yield
    finally:
        _stderr.pop()


def tell(line: str) -> None:
    """A last line from any thread."""
    with contextlib.suppress(OSError):
        os.write(_stderr[-1], f"{line}\n".encode())


def leave(code: int) -> None:
    """End the process now, from any thread, freeing what is registered: what was registered last is freed last.

    That is Ray. A thread that is in Ray's core ends the process with exit code 1 as soon as its raylet is gone, so
    nothing may lie between that and the end here.
    """
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    for free in list(_last_resorts):
        with contextlib.suppress(Exception):
            free()
    os._exit(code)


def _listen(reading: int, ending: int) -> None:
    """Record what comes; when one that ends the run has had its time, end the process."""
    deadline: float | None = None
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = select.select([reading, ending], [], [], left)[0]
        if ending in ready:
            return
        if not ready:
            name = signal.Signals(_received[0]).name
            tell(f"ddoq-ray: stopped by {name}, by force: it was held up in a library")
            leave(128 + _received[0])
        if reading in ready:
            heard = [*_mine] if signal.getsignal(signal.SIGINT) is _only_own else [*_mine, signal.SIGINT]
            numbers = [n for n in os.read(reading, 64) if n in heard]
            _received.extend(numbers)
            if deadline is None and any(n in _mine for n in numbers):
                deadline = time.monotonic() + GRACE_SECONDS
