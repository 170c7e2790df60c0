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
    """Print at once; where nobody reads any more, work goes on unheard.

    Raises:
        ValueError: Standard output, which is what was asked for, cannot be written. What is said on the way to it
            (stderr) is lost where its log's disk is full or its terminal is gone, for as long as that is so.
    """
    try:
        print(text, file=stream, end=end, flush=True)
    except BrokenPipeError:
        _to_nowhere(stream.fileno())
        with contextlib.suppress(OSError):
            stream.flush()  # what it still held
    except OSError as error:
        if stream is not sys.stderr:
            _to_nowhere(stream.fileno())  # else what it still holds would fail once more at the interpreter's end
            raise ValueError(f"cannot write standard output: {error.strerror or error}") from error


def _to_nowhere(number: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    if null != number:
        os.dup2(null, number)
        os.close(null)
