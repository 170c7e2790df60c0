"""Errors that come through Ray: the exception that was raised where the work was done.

Ray raises a worker's exception as a subclass of its class with the worker's traceback as text; the original is its
`cause`. Nothing here imports Ray: the command line asks before it may.
"""

from __future__ import annotations

import os
import re
import traceback

from ddoq_ray.storage.calibration import BATCHES
from ddoq_ray.storage.fitting_facts import OtherVersion

# What Ray Data writes behind a worker's own words: how often it tried, and how to have it try more often.
_TRIED = re.compile(r"\nFailed to [^\n]* after \d+/\d+ attempts.*", re.DOTALL)


class NoWorkers(RuntimeError):
    """No worker could be placed for as long as the run waits for one: the cluster lacks room, nothing is broken."""


def cause_of(error: BaseException) -> BaseException:
    """What was raised in the worker; the error itself where it was raised here."""
    inner = getattr(error, "cause", None)
    return inner if isinstance(inner, BaseException) else error


def plain_error(error: BaseException) -> BaseException:
    """What to raise in the driver: a worker's ValueError as itself, since users mend it; all else as Ray has it."""
    cause = cause_of(error)
    return cause if isinstance(cause, ValueError) else error


def user_error(error: BaseException) -> str | None:
    """What a user can mend, at the bottom of an error, through Ray's wrappers; None for anything else.

    That is the words of a ValueError, or that a GPU's memory is too small.
    """
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        inner = cause_of(current) if cause_of(current) is not current else current.__cause__
        if type(current) in (ValueError, OtherVersion):
            return _TRIED.sub("", str(current)) if _raised_here(error, current) else None
        if told := device_memory(current):
            return told
        current = inner if isinstance(inner, BaseException) else None
    return None


def device_memory(error: BaseException) -> str | None:
    """What to say of torch's error that a device has not the memory; None for another. Nothing here imports torch."""
    if type(error).__name__ != "OutOfMemoryError" or not type(error).__module__.startswith("torch"):
        return None
    text = " ".join(str(error).split())
    return (
        f"a GPU's memory is too small for its worker ({text[:200]}): give a smaller batch of the stage that was at "
        f"work ({'; '.join(dict.fromkeys(BATCHES.values()))}), a larger part of a GPU (num_gpus of its group in "
        "cluster), or larger GPUs; where nodes have several kinds, the smallest counts. What is published stays"
    )


def _raised_here(outer: BaseException, error: BaseException) -> bool:
    """Whether our own code raised `error`: a library's ValueError is a bug of ours and keeps its traceback.

    An error that came from a worker has lost its frames; Ray keeps them as text.
    """
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    if not files or f"{os.sep}ray{os.sep}" in files[-1]:
        files = re.findall(r'File "([^"]+)"', str(getattr(outer, "traceback_str", "")))
    return not files or f"{os.sep}ddoq_ray{os.sep}" in files[-1] or "site-packages" not in files[-1]
