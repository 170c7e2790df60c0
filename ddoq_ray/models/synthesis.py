"""Centroids to pictures, the same ones in whichever process: every random number is keyed by the centroid it is for.

Shape suffixes: n images, D = C h w values of a latent, H W image size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from ddoq_ray.core.rng import philox
from ddoq_ray.data.pictures import to_square
from ddoq_ray.models.priors.base import NonFiniteImages, Prior, Sampling
from ddoq_ray.storage.records import ClassInfo


class Synthesizer:
    """A prior, and how it is asked for the images of centroids.

    Attributes:
        prior: makes the images.
        seed: of the noise at the start and in each step.
        batch: images at once; a picture's bytes may depend on it.
        image_size: side of the pictures; None: as the prior makes them.
    """

    def __init__(self, prior: Prior, seed: int, batch: int, image_size: int | None = None) -> None:
        """See the attributes."""
        self.prior, self.seed, self.batch = prior, seed, batch
        self.image_size = image_size or prior.image_size

    def pictures(
        self,
        centroids: npt.NDArray[np.float32],
        classes: Sequence[ClassInfo],
        centroid_ids: Sequence[int],
        how: Sampling,
    ) -> npt.NDArray[np.uint8]:
        """The pictures of centroids, in fixed inner batches.

        Args:
            centroids: float32 [n, D].
            classes: the class of each.
            centroid_ids: the number of each within its class.
            how: start, strength, steps, guidance.

        Returns:
            uint8 [n, H, W, 3]; resized, where another size is asked for, as D4M does: antialiased and bicubic.

        Raises:
            ValueError: a centroid, or the image that is made of it, is not finite; it is named.
        """
        made = []
        for first in range(0, len(centroids), self.batch):
            rows = slice(first, first + self.batch)
            made.append(self._batch(centroids[rows], classes[rows], centroid_ids[rows], how))
        pictures = np.concatenate(made)
        if self.image_size == self.prior.image_size:
            return pictures
        return np.stack([to_square(Image.fromarray(picture), self.image_size) for picture in pictures])

    def _batch(
        self, centroids: npt.NDArray[np.float32], classes: Sequence[ClassInfo], numbers: Sequence[int], how: Sampling
    ) -> npt.NDArray[np.uint8]:
        shape = self.prior.latent_shape
        keys = [(info.class_id, k) for info, k in zip(classes, numbers, strict=True)]
        for info, k, centroid in zip(classes, numbers, centroids, strict=True):
            if not np.isfinite(centroid).all():
                raise ValueError(
                    f"synthesize: class {info.class_id} ({info.prompt}), centroid {k}, is a centroid with NaN or "
                    "infinite values; make the codebook anew (overwrite=true) after checking the latents"
                )
        noise = [philox(self.seed, "noise", c, k).standard_normal(shape).astype(np.float32) for c, k in keys]
        generators = [
            torch.Generator(self.prior.device).manual_seed(int(philox(self.seed, "steps", c, k).integers(2**63)))
            for c, k in keys
        ]
        z = torch.from_numpy(centroids.reshape(-1, *shape))
        condition = self.prior.conditioning(classes)
        try:
            made = self.prior.synthesize(z, condition, torch.from_numpy(np.stack(noise)), how, generators)
        except NonFiniteImages as error:
            info, k = classes[error.rows[0]], numbers[error.rows[0]]
            raise ValueError(
                f"synthesize: the image of class {info.class_id} ({info.prompt}), centroid {k}, and "
                f"{len(error.rows) - 1} more of its batch became NaN or infinite; the prior is damaged, or "
                "guidance and strength are beyond what it bears: check prior.path, or lower synthesizer.guidance"
            ) from None
        return np.asarray(made.numpy())
