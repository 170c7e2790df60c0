"""Latents averaged over squares, in whose distances the layout of an image counts for less than what is in it.

Shape suffixes: n latents, C H W of a latent, D = C H W, s side of a square.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Pooling:
    """Average pooling of flattened latents.

    Attributes:
        shape: (C, H, W).
        side: s, which divides H and W; 1 leaves latents as they are.

    Source: an independent replication of CoDA on ImageWoof (2026), which pooled the latents that k-means saw by 8 x 8
    and gained 3.6 points of its students' accuracy at IPC 10, one seed.

    >>> Pooling((1, 2, 2), 2)(np.array([[1.0, 2.0, 3.0, 6.0]], np.float16))
    array([[3.]], dtype=float16)
    """

    shape: tuple[int, ...]
    side: int = 1

    def __post_init__(self) -> None:
        if self.side > 1 and (len(self.shape) != 3 or any(extent % self.side for extent in self.shape[1:])):
            raise ValueError(
                f"quantizer.pool={self.side}: latents of this prior are {' x '.join(map(str, self.shape))}; expected a "
                "side that divides the last two"
            )

    @property
    def dim(self) -> int:
        """D / s^2: of a pooled latent."""
        return int(np.prod(self.shape)) // self.side**2

    def __call__(self, latents: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
        """[n, D] to [n, D / s^2], of the same dtype; means are taken in float32."""
        if self.side == 1:
            return latents
        channels, height, width = self.shape
        squares = latents.reshape(len(latents), channels, height // self.side, self.side, width // self.side, self.side)
        return squares.mean(axis=(3, 5), dtype=np.float32).astype(latents.dtype).reshape(len(latents), self.dim)
