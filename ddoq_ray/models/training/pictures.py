"""The images of a training, in an order of its own.

Shape suffixes: N images, B batch, S image size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True)
class Pictures:
    """Training images in an order that does not depend on the shards'.

    Attributes:
        images: uint8 [N, 3, S, S].
        class_ids: int64 [N].
        order: int64 [N], the row of `images` that stands at each place.
    """

    images: npt.NDArray[np.uint8]
    class_ids: npt.NDArray[np.int64]
    order: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.order)

    def pixels(self, places: npt.NDArray[np.int64], device: torch.device) -> Tensor:
        """float32 [B, 3, S, S] in [-1, 1] at some places."""
        rows = np.ascontiguousarray(self.images[self.order[places]])
        return torch.from_numpy(rows).to(device).float() / 127.5 - 1.0

    def labels(self, places: npt.NDArray[np.int64], device: torch.device) -> Tensor:
        """int64 [B] at some places."""
        return torch.from_numpy(self.class_ids[self.order[places]].astype(np.int64)).to(device)
