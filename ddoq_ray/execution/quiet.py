"""Ray kept from talking into a run's lines: in the run's own session, and in one that was up before."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator

from ddoq_ray.execution import signals

_TALK = ("enable_progress_bars", "enable_rich_progress_bars", "print_on_execution_start")  # of Ray Data
# Ray Data logs pages of a worker's error before it raises the same.
_LOGGERS = {"ray.data": logging.CRITICAL, "ray.train": logging.ERROR}
_CORE = re.compile(rb"\[\d{4}-\d\d-\d\d [\d:,]+ [A-Z] \d+ \d+\] ")  # how a line of Ray's C++ core begins


@contextlib.contextmanager
def core() -> Iterator[None]:
    """Keep Ray's C++ core off the driver's stderr: it warns there of Ray Data's own actors.

    The variable silences it from the start of the session on; the line by which it announces that, and anything else
    that the start writes, is shown only when the start fails for a reason that we have no words for.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as held, signals.stderr_at(stderr):
        os.dup2(held.fileno(), 2)
        try:
            yield
        except Exception as error:
            if not isinstance(error, ValueError):
                held.seek(0)
                os.write(stderr, held.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def ray_data() -> None:
    """One progress line a stage is ours; Ray Data's own plan lines and bars would bury it."""
    import ray.data

    context = ray.data.DataContext.get_current()
    for name in _TALK:
        setattr(context, name, False)
    for name, level in _LOGGERS.items():
        logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def guest() -> Iterator[None]:
    """In a session that was up before: as quiet as in the run's own, and afterwards as it was."""
    import ray.data
    from ray._private.ray_logging import global_worker_stdstream_dispatcher as prints  # of this driver's workers

    context = ray.data.DataContext.get_current()
    talk = {name: getattr(context, name) for name in _TALK}
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    handlers, prints.handlers = prints.handlers, []
    ray_data()
    try:
        with _without_core_lines():
            yield
    finally:
        prints.handlers = handlers
        for name, value in talk.items():
            setattr(context, name, value)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def _without_core_lines() -> Iterator[None]:
    """Leave out what Ray's C++ core writes to this process's stderr; how much it says was fixed when Ray was started.

    On a terminal everything stays: bars need the terminal itself.
    """
    if sys.stderr.isatty():
        yield
        return
    sys.stderr.flush()
    stderr = os.dup(2)
    reading, writing = os.pipe()
    os.dup2(writing, 2)
    os.close(writing)

    def pass_on() -> None:
        with os.fdopen(reading, "rb") as lines:
            for line in lines:
                if not _CORE.match(line):
                    with contextlib.suppress(OSError):  # nobody reads any more
                        os.write(stderr, line)

    thread = threading.Thread(target=pass_on, name="stderr", daemon=True)
    thread.start()
    try:
        with signals.stderr_at(stderr):
            yield
    finally:
        sys.stderr.flush()
        os.dup2(stderr, 2)
        thread.join(timeout=2)  # a process that was started meanwhile may hold the pipe open
        if not thread.is_alive():
            os.close(stderr)
