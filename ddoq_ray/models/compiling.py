"""Whether torch.compile works here, asked before a network is compiled: what fails in the middle of one says less."""

from __future__ import annotations

import functools

import torch

from ddoq_ray.models.folders import first_line


@functools.cache
def check_compiler(key: str) -> None:
    """Compile one operator.

    Args:
        key: that asked for it.

    Raises:
        ValueError: torch.compile does not work on this machine.
    """
    try:
        torch.compile(torch.neg)(torch.ones(2, device="cuda" if torch.cuda.is_available() else "cpu"))
    except Exception as error:  # of whichever compiler
        raise ValueError(
            f"{key}=true: torch.compile does not work here ({type(error).__name__}: {first_line(error)}). On a CPU it "
            "needs a C++ compiler, on a GPU Triton; leave the key out"
        ) from error
