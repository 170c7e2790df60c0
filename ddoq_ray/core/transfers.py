"""Arrays of the host on the device that computes, without waiting for what it is at."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def on_device(values: npt.NDArray[np.generic], device: torch.device | str) -> Tensor:
    """An array as a tensor on the device. A copy from pageable memory would wait until a GPU's queue is empty."""
    tensor = torch.from_numpy(values)
    if pinned(torch.device(device)):
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def pinned(device: torch.device) -> bool:
    """Whether what goes to the device is to lie in pinned memory."""
    return device.type == "cuda" and torch.cuda.is_available()
