"""Pictures to latents, as an encoder actor does it and as a benchmark measures it: fixed inner batches, seeded noise.

Shape suffixes: n images, B inner batch, C latent channels, h w latent size, D = C h w, H W image size.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from ddoq_ray.core.rng import philox
from ddoq_ray.models.autoencoder import Autoencoder


@dataclass(frozen=True)
class Encoding:
    """How latents are made of pictures.

    Attributes:
        latent_shape: (C, h, w) of one latent.
        batch: Images of an inner batch; another gives most latents other last bits.
        posterior: Its mode, or a sample of it by noise that belongs to (seed, key).
        seed: Of that noise.
        one_shape: Fill up the last inner batch with zeros: the compiled form would be compiled anew for a smaller one.
    """

    latent_shape: tuple[int, ...]
    batch: int
    posterior: Literal["mode", "sample"] = "mode"
    seed: int = 0
    one_shape: bool = False


class LatentEncoder:
    """An autoencoder's encoder for pictures in host memory.

    Two threads may call it: while one computes, the other copies its pictures to the device.
    """

    def __init__(self, autoencoder: Autoencoder, how: Encoding) -> None:
        self.autoencoder, self.how = autoencoder, how
        self._computing = threading.Lock()

    def encode(self, pixels: npt.NDArray[np.uint8], keys: Sequence[str]) -> npt.NDArray[np.float16]:
        """Latents of pictures, rounded to float16.

        Args:
            pixels: uint8 [n, H, W, 3].
            keys: Names of the n pictures, which their noise belongs to.

        Returns:
            float16 [n, D], in host memory; not finite where the network's output is not, or does not fit: see
            `not_finite`.
        """
        own, noise = self.how, None
        if own.posterior == "sample" and keys:
            noise = torch.from_numpy(np.stack([posterior_noise(own.seed, key, own.latent_shape) for key in keys]))
        images = self._upload(pixels)
        parts = []
        with self._computing, torch.inference_mode():
            for first in range(0, len(keys), own.batch):
                inner = images[first : first + own.batch]
                drawn = None if noise is None else noise[first : first + own.batch]
                rows = len(inner)
                if own.one_shape:
                    inner, drawn = filled(inner, own.batch), None if drawn is None else filled(drawn, own.batch)
                latents = self.autoencoder.encode(inner.permute(0, 3, 1, 2).float() / 127.5 - 1, drawn)
                parts.append(latents[:rows].flatten(1).to(torch.float16))
            if not parts:
                return np.empty((0, int(np.prod(own.latent_shape))), np.float16)
            made: npt.NDArray[np.float16] = torch.cat(parts).cpu().numpy()
            return made

    def _upload(self, pixels: npt.NDArray[np.uint8]) -> torch.Tensor:
        """The pixels on the device, copied while other pictures are computed there."""
        held = torch.from_numpy(pixels.copy())
        if self.autoencoder.device.type == "cpu":
            return held
        beside = torch.cuda.Stream()
        with torch.cuda.stream(beside):
            images = held.pin_memory().to(self.autoencoder.device, non_blocking=True)
        beside.synchronize()
        return images


def filled(rows: torch.Tensor, count: int) -> torch.Tensor:
    """The rows [B, ...], followed by rows of zeros until there are `count`."""
    if len(rows) >= count:
        return rows
    return torch.cat([rows, rows.new_zeros((count - len(rows), *rows.shape[1:]))])


def posterior_noise(seed: int, key: str, shape: Sequence[int]) -> npt.NDArray[np.float32]:
    """Standard normal float32 [C, h, w] of a sample: the same in any batch, shard, worker and run of this seed."""
    return philox("posterior", seed, key).standard_normal(tuple(shape), dtype=np.float32)


def not_finite(latents: npt.NDArray[np.float16]) -> npt.NDArray[np.int64]:
    """Rows of float16 [n, D] that hold infinity or NaN, as networks in half precision give for single pictures.

    >>> not_finite(np.array([[1, 2], [np.inf, 0], [0, np.nan]], np.float16)).tolist()
    [1, 2]
    """
    exponents = latents.view(np.uint16) & 0x7C00  # by bits: isfinite of float16 is far slower
    return np.flatnonzero((exponents == 0x7C00).any(axis=1))
