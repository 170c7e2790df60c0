"""Centroids to pictures, the same ones in whichever process: every random number is keyed by the centroid it is for.

Shape suffixes: n images, M candidates, K centroids of a class, D = C h w values of a latent, H W image size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from ddoq_ray.core.rng import philox
from ddoq_ray.data.pictures import to_square
from ddoq_ray.models.candidates import Candidates
from ddoq_ray.models.priors.base import NonFiniteImages, Prior, Sampling, field_of
from ddoq_ray.storage.records import ClassInfo

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Asked:
    """The centroids whose images are wanted.

    Attributes:
        centroids: float32 [n, D].
        classes: the class of each.
        numbers: the centroid_id of each within its class.
    """

    centroids: Float32
    classes: Sequence[ClassInfo]
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.centroids)

    def __getitem__(self, rows: slice) -> Asked:
        return Asked(self.centroids[rows], self.classes[rows], self.numbers[rows])

    @property
    def keys(self) -> list[tuple[int, int]]:
        return [(info.class_id, k) for info, k in zip(self.classes, self.numbers, strict=True)]


@dataclass(frozen=True)
class Made:
    """Pictures of centroids.

    Attributes:
        pictures: uint8 [n, H, W, 3].
        losses: float32 [n], the judge's cross-entropy of those that were kept; None without candidates.
        kept: int64 [n], which candidate each is; None without candidates.
    """

    pictures: npt.NDArray[np.uint8]
    losses: Float32 | None = None
    kept: npt.NDArray[np.int64] | None = None

    @staticmethod
    def joined(parts: Sequence[Made]) -> Made:
        """One after another; all with candidates, or none."""
        pictures = np.concatenate([p.pictures for p in parts])
        if any(p.losses is None for p in parts):
            return Made(pictures)
        losses, kept = (np.concatenate([getattr(p, name) for p in parts]) for name in ("losses", "kept"))
        return Made(pictures, losses, kept)

    @property
    def facts(self) -> list[dict[str, float | int]]:
        """What each picture's sidecar says of its choice; nothing without candidates."""
        if self.losses is None or self.kept is None:
            return [{} for _ in self.pictures]
        pairs = zip(self.losses.tolist(), self.kept.tolist(), strict=True)
        return [{"judge_loss": round(loss, 6), "candidate": m} for loss, m in pairs]


class Synthesizer:
    """A prior, and how it is asked for the images of centroids.

    Attributes:
        prior: makes the images.
        seed: of the noise at the start and in each step.
        batch: images at once; a picture's bytes may depend on it.
        candidates: how many images are made of each centroid, and which is kept; None makes one.
        image_size: side of the pictures; None: as the prior makes them.
    """

    def __init__(
        self,
        prior: Prior,
        seed: int,
        batch: int,
        candidates: Candidates | None = None,
        image_size: int | None = None,
    ) -> None:
        """See the attributes."""
        self.prior, self.seed, self.batch, self.candidates = prior, seed, batch, candidates
        self.image_size = image_size or prior.image_size

    def pictures(self, asked: Asked, how: Sampling, codebooks: Mapping[int, Float32] | None = None) -> Made:
        """The pictures of centroids, in fixed inner batches.

        Args:
            asked: the centroids.
            how: start, strength, steps, guidance.
            codebooks: class_id -> float32 [K, D], all centroids of the class; only for candidates that keep to a cell.

        Returns:
            pictures uint8 [n, H, W, 3]; resized, where another size is asked for, as D4M does: antialiased, bicubic.

        Raises:
            ValueError: a centroid, or the image that is made of it, is not finite; it is named.
        """
        return Made.joined(list(self.batches(asked, how, codebooks)))

    def batches(self, asked: Asked, how: Sampling, codebooks: Mapping[int, Float32] | None = None) -> Iterator[Made]:
        """The parts of `pictures`, an inner batch each, one after another."""
        for first in range(0, len(asked), self.batch):
            rows = asked[first : first + self.batch]
            if self.candidates is None:
                made = Made(self._batch(rows, how, 0))
            else:
                made = self._best(rows, how, self.candidates, codebooks or {})
            yield replace(made, pictures=self._sized(made.pictures))

    def _sized(self, pictures: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        if self.image_size == self.prior.image_size:
            return pictures
        return np.stack([to_square(Image.fromarray(picture), self.image_size) for picture in pictures])

    def _best(self, asked: Asked, how: Sampling, candidates: Candidates, codebooks: Mapping[int, Float32]) -> Made:
        indices = np.asarray(field_of(asked.classes, "teacher_index"), np.int64)
        made = np.stack([self._batch(asked, how, m) for m in range(candidates.count)])
        losses = np.stack([candidates.losses(pictures, indices) for pictures in made])
        inside = np.ones(losses.shape, bool)
        if candidates.keep == "cell":
            inside = np.stack([self._inside(asked, pictures, codebooks) for pictures in made])
        kept = candidates.chosen(losses, inside)
        rows = np.arange(len(asked))
        return Made(made[kept, rows], losses[kept, rows], kept)

    def _inside(
        self, asked: Asked, pictures: npt.NDArray[np.uint8], codebooks: Mapping[int, Float32]
    ) -> npt.NDArray[np.bool_]:
        """Whether each picture's own latent is nearest to the centroid that it was made of, bool [n]."""
        x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        z = self.prior.encode(x).flatten(1).cpu().numpy()
        nearest = [
            int(np.square(codebooks[c] - row).sum(1).argmin()) for row, (c, _) in zip(z, asked.keys, strict=True)
        ]
        return np.asarray(nearest) == np.asarray(asked.numbers)

    def _batch(self, asked: Asked, how: Sampling, candidate: int) -> npt.NDArray[np.uint8]:
        shape = self.prior.latent_shape
        for info, k, centroid in zip(asked.classes, asked.numbers, asked.centroids, strict=True):
            if not np.isfinite(centroid).all():
                raise ValueError(
                    f"synthesize: class {info.class_id} ({info.prompt}), centroid {k}, is a centroid with NaN or "
                    "infinite values; make the codebook anew (overwrite=true) after checking the latents"
                )
        # The first candidate is the image that is made where there are no others.
        keys = [(c, k) if candidate == 0 else (c, k, candidate) for c, k in asked.keys]
        noise = [philox(self.seed, "noise", *key).standard_normal(shape).astype(np.float32) for key in keys]
        generators = [
            torch.Generator(self.prior.device).manual_seed(int(philox(self.seed, "steps", *key).integers(2**63)))
            for key in keys
        ]
        z = torch.from_numpy(asked.centroids.reshape(-1, *shape))
        condition = self.prior.conditioning(asked.classes)
        try:
            made = self.prior.synthesize(z, condition, torch.from_numpy(np.stack(noise)), how, generators)
        except NonFiniteImages as error:
            info, k = asked.classes[error.rows[0]], asked.numbers[error.rows[0]]
            raise ValueError(
                f"synthesize: the image of class {info.class_id} ({info.prompt}), centroid {k}, and "
                f"{len(error.rows) - 1} more of its batch became NaN or infinite; the prior is damaged, or "
                "guidance and strength are beyond what it bears: check prior.path, or lower synthesizer.guidance"
            ) from None
        return np.asarray(made.numpy())
