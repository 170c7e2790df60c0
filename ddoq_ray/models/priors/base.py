"""What a prior is: an encoder, a latent diffusion model and a decoder behind one small interface.

Shape suffixes: B batch, C latent channels, h w latent size, H W image size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Start = Literal["noised", "given", "inversion", "noise"]
STARTS: tuple[Start, ...] = ("noised", "given", "inversion", "noise")
PUBLISHED_GUIDANCE = 4.0  # of the works with DiT-XL/2-256


class NonFiniteImages(ValueError):
    """Rows of a batch whose images hold NaN or infinite values."""

    def __init__(self, rows: Sequence[int]) -> None:
        """Keep the rows for callers that know what they are."""
        super().__init__(f"prior: rows {list(rows)[:8]} of the batch became NaN or infinite while denoising")
        self.rows = list(rows)

    def __reduce__(self) -> tuple[type[NonFiniteImages], tuple[list[int]]]:
        """Carry the rows through a pickle."""
        return type(self), (self.rows,)


class Prior(ABC):
    """What the encode and synthesize stages need of a generative model.

    Attributes:
        latent_shape: (C, h, w) of one latent.
        image_size: H = W of the images it reads and makes.
        num_classes: labels are 0 .. num_classes - 1.
        has_null: whether there is a null label, which classifier-free guidance needs.
        classes: names in label order, or None if the folder holds none.
        id: content digest of configuration and weights; two priors with one id encode alike.
    """

    latent_shape: tuple[int, int, int]
    image_size: int
    num_classes: int
    has_null: bool
    classes: list[str] | None
    id: str
    device: torch.device

    @abstractmethod
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents of images, scaled to about unit standard deviation.

        Args:
            images: float32 [B, 3, H, W] in [-1, 1].
            noise: None takes the posterior's mode; standard normal float32 [B, C, h, w] its sample
                `mean + std * noise`.

        Returns:
            float32 [B, C, h, w] on the prior's device.
        """

    @abstractmethod
    def synthesize(
        self,
        latents: Tensor,
        labels: Tensor,
        noise: Tensor,
        generators: Sequence[torch.Generator] | None = None,
        *,
        start: Start = "noised",
        strength: float,
        steps: int,
        guidance: float = 1.0,
    ) -> Tensor:
        """Decode centroids through the diffusion model (Algorithm 4: x = D(U_t(z, y))).

        Args:
            latents: float32 [B, C, h, w], the centroids, scaled as `encode` gives them.
            labels: int64 [B].
            noise: float32 [B, C, h, w], standard normal; the noise of "noised" and the start of "noise".
            generators: one a row, for schedulers that add noise in each step (DDPM); may be None for others.
            start: "noised": noise the centroid to the strength's level and denoise (SDEdit); "given": the centroid is
                of that level already, as `noise_scales` gives it; "inversion": reach that level by deterministic DDIM
                inversion; "noise": ignore centroid and strength.
            strength: in [0, 1]; the last int(steps * strength) of `steps` timesteps are run, as in diffusers'
                img2img pipelines. 0 decodes the centroid as it is.
            steps: number of timesteps of the whole trajectory.
            guidance: classifier-free guidance scale; 1 means none.

        Returns:
            uint8 [B, H, W, 3] on the CPU. The same bytes for the same batch, device and thread count.

        Raises:
            ValueError: shapes or labels that do not fit, an unknown start, or a strength that runs no step.
        """

    def guidance_of(self, asked: float | None) -> float:
        """The guidance scale that is asked for; for None 4 (the published one) with a null label, 1 (none) without."""
        return asked if asked is not None else PUBLISHED_GUIDANCE if self.has_null else 1.0

    @abstractmethod
    def check_settings(self, start: Start, strength: float, steps: int, guidance: float) -> int:
        """How many steps `synthesize` would run with these settings, without running them.

        Raises:
            ValueError: settings that this model cannot run.
        """

    @abstractmethod
    def noise_scales(self, strength: float, steps: int) -> tuple[float, float]:
        """(signal, sigma) of the time at which `synthesize` starts: a latent z is there `signal * z + sigma * noise`.

        Raises:
            ValueError: a strength that runs no step.
        """
