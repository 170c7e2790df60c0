"""What a prior is: an encoder, a generative model and a decoder behind one small interface.

Shape suffixes: B batch, C latent channels, h w latent size, H W image size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ddoq_ray.models.autoencoder import Autoencoder
from ddoq_ray.storage.records import ClassInfo

Start = Literal["noised", "given", "inversion", "noise", "guided"]
STARTS: tuple[Start, ...] = ("noised", "given", "inversion", "noise", "guided")
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


@dataclass(frozen=True)
class Sampling:
    """How centroids become images (Algorithm 4: x = D(U_t(z, y))).

    Attributes:
        strength: in [0, 1]; the last int(steps * strength) of `steps` timesteps are run, as in diffusers' img2img
            pipelines. 0 decodes the centroid as it is.
        steps: number of timesteps of the whole trajectory.
        start: "noised": noise the centroid to the strength's level and denoise (SDEdit); "given": the centroid is of
            that level already, as `noise_scales` gives it; "inversion": reach that level by deterministic DDIM
            inversion; "noise": ignore centroid and strength; "guided": start from noise, and pull what the model takes
            for the clean latent towards the centroid while there is more noise than `guide_until`; strength is ignored.
        guidance: classifier-free guidance scale; 1 means none.
        guide_until: in [0, 1]: the noise's share sigma of a latent `signal * clean + sigma * noise`, with
            signal^2 + sigma^2 = 1, down to which "guided" pulls; 0 pulls to the end, 1 never.
        guide_scale: in [0, 1]: the part of the way to the centroid that one pull goes.
        guide_pool: side of the squares of latent pixels whose mean is pulled; 1 pulls every value. A centroid is the
            mean of its cell: right in what is coarse, and blurred in what is fine.
    """

    strength: float
    steps: int
    start: Start = "noised"
    guidance: float = 1.0
    guide_until: float = 0.5
    guide_scale: float = 0.3
    guide_pool: int = 1


class Prior(ABC):
    """What the encode and synthesize stages need of a generative model.

    A kind of prior is a module with a subclass of this and a row in `load.LOADERS`.

    Attributes:
        autoencoder: images to latents and back.
        latent_shape: (C, h, w) of one latent.
        image_size: H = W of the images it reads and makes.
        needs: the fields of `ClassInfo` that `conditioning` reads and that must be known of every class.
        num_classes: where it takes labels, they are 0 .. num_classes - 1; 0 where it takes none.
        has_null: whether there is a null condition (a label, an empty text), which classifier-free guidance needs.
        classes: names in label order, or None if the folder holds none.
        id: content digest of configuration and weights; two priors with one id encode alike.
        latents_id: the id of the prior whose latents these are: its own, or, of a copy with another decoder, the
            original's.
    """

    autoencoder: Autoencoder
    latent_shape: tuple[int, int, int]
    image_size: int
    needs: tuple[str, ...] = ()
    num_classes: int = 0
    has_null: bool = False
    classes: list[str] | None = None
    id: str
    _latents_id: str | None = None

    @property
    def latents_id(self) -> str:
        """See the attributes."""
        return self._latents_id or self.id

    @property
    def device(self) -> torch.device:
        """Where all its networks are."""
        return self.autoencoder.device

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents of images, scaled to about unit standard deviation.

        Args:
            images: float32 [B, 3, H, W] in [-1, 1].
            noise: None takes the posterior's mode; standard normal float32 [B, C, h, w] its sample
                `mean + std * noise`.

        Returns:
            float32 [B, C, h, w] on the prior's device.
        """
        expected = (3, self.image_size, self.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(f"prior.encode: expected images [B, {expected}], got {tuple(images.shape)}")
        return self.autoencoder.encode(images, noise)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures of latents float32 [B, C, h, w]: uint8 [B, H, W, 3] on the CPU.

        Raises:
            NonFiniteImages: some rows hold NaN or infinite values, of which uint8 would make black.
        """
        pixels = self.autoencoder.decode(latents)
        # No row is named here: callers know whose they are.
        if bad := (~torch.isfinite(pixels).flatten(1).all(1)).nonzero()[:, 0].tolist():  # one wait for a GPU
            raise NonFiniteImages(bad)
        pixels = (pixels / 2 + 0.5).clamp(0, 1)
        return (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()

    @abstractmethod
    def conditioning(self, classes: Sequence[ClassInfo]) -> Tensor | None:
        """What images of these classes are conditioned on: a row a class, on the CPU; None where nothing is.

        A row follows from its class alone, whatever the others are, so that rows may be made once, pickled and put
        together in any batch. Labels are int64 [N]; other kinds choose their own dtype and shape.

        Raises:
            ValueError: a class lacks a field of `needs`.
        """

    @abstractmethod
    def synthesize(
        self,
        latents: Tensor,
        condition: Tensor | None,
        noise: Tensor,
        how: Sampling,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """Decode centroids through the generative model.

        Args:
            latents: float32 [B, C, h, w], the centroids, scaled as `encode` gives them.
            condition: rows of `conditioning`, one an image.
            noise: float32 [B, C, h, w], standard normal; the noise of "noised" and the start of "noise".
            how: start, strength, steps, guidance.
            generators: one a row, for schedulers that add noise in each step (DDPM); may be None for others.

        Returns:
            uint8 [B, H, W, 3] on the CPU. The same bytes for the same batch, device and thread count.

        Raises:
            ValueError: shapes or conditions that do not fit, or settings that `check_settings` refuses.
        """

    def guidance_of(self, asked: float | None) -> float:
        """The guidance scale that is asked for; for None 4 (the published one) with a null label, 1 (none) without."""
        return asked if asked is not None else PUBLISHED_GUIDANCE if self.has_null else 1.0

    @abstractmethod
    def check_settings(self, how: Sampling) -> int:
        """How many steps `synthesize` would run with these settings, without running them.

        Raises:
            ValueError: settings that this model cannot run.
        """

    @abstractmethod
    def noise_scales(self, strength: float, steps: int) -> tuple[float, float]:
        """(signal, sigma) of the time at which `synthesize` starts: a latent z is there `signal * z + sigma * noise`.

        Raises:
            ValueError: a strength that runs no step, or a model that denoises nothing.
        """

    def check_batch(self, latents: Tensor, noise: Tensor, generators: Sequence[torch.Generator] | None) -> None:
        """Raise a ValueError unless latents, noise and generators are one batch of this prior's latents."""
        if latents.ndim != 4 or tuple(latents.shape[1:]) != self.latent_shape:
            raise ValueError(f"prior: expected latents [B, {self.latent_shape}], got {tuple(latents.shape)}")
        if noise.shape != latents.shape:
            raise ValueError(f"prior: expected noise {tuple(latents.shape)}, got {tuple(noise.shape)}")
        if generators is not None and len(generators) != len(latents):
            raise ValueError(f"prior: expected {len(latents)} generators, one a row, got {len(generators)}")


def field_of(classes: Sequence[ClassInfo], field: str) -> list[object]:
    """A field of every class, in their order.

    Raises:
        ValueError: it is None for some.
    """
    lost = [c.name for c in classes if getattr(c, field) is None]
    if lost:
        more = ", ..." if len(lost) > 5 else ""
        raise ValueError(
            f"prior: {len(lost)} of {len(classes)} classes have no {field}, which this prior needs "
            f"({', '.join(lost[:5])}{more}); give it for each in classes.json"
        )
    return [getattr(c, field) for c in classes]
