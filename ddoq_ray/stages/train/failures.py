"""What a failed training run says, and whether trying it once more can help."""

from __future__ import annotations

from typing import Any

from ray.train import ControllerError, TrainingFailedError, WorkerGroupError

from ddoq_ray.execution.errors import cause_of, device_memory

# What a living rank says when another one dies in the middle of a collective: torch's own errors are of these kinds.
_COLLATERAL = (RuntimeError, OSError)


def failures(error: BaseException) -> list[BaseException]:
    """The exceptions behind Ray Train's, in order of rank; one that is not Ray Train's stands for itself."""
    if isinstance(error, WorkerGroupError):
        found: list[Any] = [error.worker_failures[rank] for rank in sorted(error.worker_failures)]
    elif isinstance(error, ControllerError):
        found = [error.controller_failure]
    else:
        found = [] if isinstance(error, TrainingFailedError) else [error]
    return [cause_of(e) for e in found]


def own_words(error: BaseException) -> str | None:
    """Of what is the user's to mend among the failures: a ValueError of our own in its words, or a GPU's memory."""
    told = (str(e) if type(e) is ValueError else device_memory(e) for e in failures(error))
    return next((words for words in told if words is not None), None)


def worth_retrying(error: BaseException, workers: int) -> bool:
    """Whether a worker died, which says nothing about the work: it may go well elsewhere, from the last checkpoint.

    An exception of the work itself comes again however often it is tried. In a group, a death also shows as the other
    ranks' broken collectives, often before the death itself is seen.
    """
    import torch

    found = failures(error)
    if any(isinstance(e, (ValueError, torch.OutOfMemoryError)) for e in found):
        return False
    if any(type(e).__module__.split(".")[0] == "ray" for e in found):  # an actor, a node, a health check
        return True
    return bool(found) and workers > 1 and all(isinstance(e, _COLLATERAL) for e in found)
