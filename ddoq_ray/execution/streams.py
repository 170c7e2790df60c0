"""Lines on standard output and error, either of which may be closed, or a pipe whose reader has gone (``| head``)."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TextIO


def open_all() -> None:
    """Lead standard output and error that were closed (``2>&-``) to nowhere: other files would get their numbers."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            _to_nowhere(number)
            setattr(sys, name, os.fdopen(number, "w", closefd=False))


def emit(text: str, stream: TextIO, end: str = "\n") -> None:
    """Print at once; where nobody reads any more, work goes on unheard."""
    try:
        print(text, file=stream, end=end, flush=True)
    except BrokenPipeError:
        _to_nowhere(stream.fileno())
        with contextlib.suppress(OSError):
            stream.flush()  # what it still held


def _to_nowhere(number: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    if null != number:
        os.dup2(null, number)
        os.close(null)
