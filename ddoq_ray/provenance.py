"""What results say of where they come from: the commit, the machine, the versions. Imports neither torch nor Ray.

The header of a run's configuration, its report, the manifests and the rows of benchmarks and studies all take it here.
"""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any


def commit() -> str | None:
    """The commit of the code that runs, `-dirty` where files were changed since; None outside its own checkout."""
    here = Path(__file__).resolve()

    def git(*words: str) -> str:
        command = ["git", *words]
        return subprocess.run(command, cwd=here.parent, capture_output=True, text=True, timeout=10, check=True).stdout

    try:
        git("ls-files", "--error-unmatch", here.name)  # installed inside another project's checkout it is not tracked
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*").strip()
    except (OSError, subprocess.SubprocessError):
        return None


def hardware() -> str:
    """The processor's own name and what of it this process may use."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {usable} cores"


def environment(threads: int) -> dict[str, Any]:
    """Versions, threads and processor kind that the bits of a CPU forward pass depend on."""
    # Here, because whoever only asks for a commit must not load them.
    import diffusers
    import numpy
    import torch

    return {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "numpy": numpy.__version__,
        "threads": threads,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "device": "cpu",
    }
