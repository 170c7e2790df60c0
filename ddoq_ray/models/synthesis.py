"""Centroids to pictures, the same ones in whichever process: every random number is keyed by the centroid it is for.

Shape suffixes: n images, M candidates, K centroids of a class, D = C h w values of a latent, H W image size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

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
MOST = float(np.finfo(np.float32).max)


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
        attempts: int64 [n], how often each was made anew; None: never.
    """

    pictures: npt.NDArray[np.uint8]
    losses: Float32 | None = None
    kept: npt.NDArray[np.int64] | None = None
    attempts: npt.NDArray[np.int64] | None = None

    @staticmethod
    def joined(parts: Sequence[Made]) -> Made:
        """One after another; all with candidates, or none."""
        columns = ((f.name, [getattr(part, f.name) for part in parts]) for f in fields(Made))
        return Made(**{name: np.concatenate(arrays) for name, arrays in columns if arrays[0] is not None})

    @property
    def facts(self) -> list[dict[str, float | int]]:
        """What each picture's sidecar says of its choice, where there are candidates, and of its attempts, if any."""
        facts: list[dict[str, float | int]] = [{} for _ in self.pictures]
        for i, fact in enumerate(facts):
            if self.losses is not None and self.kept is not None:
                fact |= {"judge_loss": round(float(self.losses[i]), 6), "candidate": int(self.kept[i])}
            if self.attempts is not None and self.attempts[i]:
                fact["attempt"] = int(self.attempts[i])
        return facts


class Synthesizer:
    """A prior, and how it is asked for the images of centroids.

    Attributes:
        prior: makes the images.
        seed: of the noise at the start and in each step.
        batch: images at once; a picture's bytes may depend on it.
        candidates: how many images are made of each centroid, and which is kept; None makes one.
        image_size: side of the pictures; None: as the prior makes them.
        retries: how often an image of one colour, or of NaN or infinite values, is made anew from other noise.
    """

    def __init__(
        self,
        prior: Prior,
        seed: int,
        batch: int,
        candidates: Candidates | None = None,
        image_size: int | None = None,
        retries: int = 0,
    ) -> None:
        """See the attributes."""
        self.retries = retries
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
            ValueError: a centroid, or every image that is made of it, is not finite; it is named.
        """
        return Made.joined(list(self.batches(asked, how, codebooks)))

    def batches(self, asked: Asked, how: Sampling, codebooks: Mapping[int, Float32] | None = None) -> Iterator[Made]:
        """The parts of `pictures`, an inner batch each, one after another."""
        for first in range(0, len(asked), self.batch):
            rows = asked[first : first + self.batch]
            tried, attempts = self._tried(rows, how)
            if self.candidates is None:
                made = Made(tried.pictures[0], attempts=attempts)
            else:
                made = self._best(rows, tried, self.candidates, codebooks or {})
                made = replace(made, attempts=attempts)
            yield replace(made, pictures=self._sized(made.pictures))

    def _sized(self, pictures: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        if self.image_size == self.prior.image_size:
            return pictures
        return np.stack([to_square(Image.fromarray(picture), self.image_size) for picture in pictures])

    def _best(self, asked: Asked, tried: _Tried, candidates: Candidates, codebooks: Mapping[int, Float32]) -> Made:
        indices = np.asarray(field_of(asked.classes, "teacher_index"), np.int64)
        losses = np.stack([candidates.losses(pictures, indices) for pictures in tried.pictures])
        fit = np.where(tried.good.any(axis=0), tried.good, tried.finite)
        # Those that the judge has no number for come last of the fit ones.
        ranked = np.where(fit, np.nan_to_num(losses, nan=MOST, posinf=MOST), np.inf).astype(np.float32)
        inside = fit
        if candidates.keep == "cell":
            inside = fit & np.stack([self._inside(asked, pictures, codebooks) for pictures in tried.pictures])
        kept = candidates.chosen(ranked, inside)
        rows = np.arange(len(asked))
        return Made(tried.pictures[kept, rows], losses[kept, rows], kept)

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

    def _tried(self, asked: Asked, how: Sampling) -> tuple[_Tried, npt.NDArray[np.int64]]:
        """The images of a batch, all candidates of each, and how often each row was made anew.

        A row is made anew when none of its images is good, at its own place in the same batch, which the other rows
        fill as before: its bytes follow from its own keys, whatever became of the others.

        Raises:
            ValueError: a centroid is not finite, or no image of it is after the last attempt.
        """
        for info, k, centroid in zip(asked.classes, asked.numbers, asked.centroids, strict=True):
            if not np.isfinite(centroid).all():
                raise ValueError(
                    f"synthesize: class {info.class_id} ({info.prompt}), centroid {k}, is a centroid with NaN or "
                    "infinite values; make the codebook anew (overwrite=true) after checking the latents"
                )
        attempts = np.zeros(len(asked), np.int64)
        tried = self._all(asked, how, attempts)
        # What is decoded as it is has no noise that could be other.
        retries = self.retries if how.strength > 0 or how.start in ("noise", "guided") else 0
        for attempt in range(1, retries + 1):
            poor = ~tried.good.any(axis=0)
            if not poor.any():
                break
            again = self._all(asked, how, np.where(poor, attempt, attempts))
            better = np.asarray(
                poor & (again.good.any(axis=0) | (again.finite.any(axis=0) & ~tried.finite.any(axis=0)))
            )
            attempts[better] = attempt
            tried = tried.taking(again, better)
        lost = np.flatnonzero(~tried.finite.any(axis=0))
        if len(lost):
            info, k = asked.classes[lost[0]], asked.numbers[lost[0]]
            also = f", in {retries} more attempts too" if retries else ""
            raise ValueError(
                f"synthesize: the image of class {info.class_id} ({info.prompt}), centroid {k}, and {len(lost) - 1} "
                f"more of its batch became NaN or infinite{also}; the prior is damaged, or guidance and strength are "
                "beyond what it bears: check prior.path, or lower synthesizer.guidance"
            )
        return tried, attempts

    def _all(self, asked: Asked, how: Sampling, attempts: npt.NDArray[np.int64]) -> _Tried:
        """Every candidate of every row, each by its row's attempt."""
        count = self.candidates.count if self.candidates is not None else 1
        made = [self._finite(asked, how, candidate, attempts) for candidate in range(count)]
        pictures, finite = np.stack([p for p, _ in made]), np.stack([f for _, f in made])
        return _Tried(pictures, finite, finite & ~(pictures == pictures[:, :, :1, :1]).all(axis=(2, 3, 4)))

    def _finite(
        self, asked: Asked, how: Sampling, candidate: int, attempts: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
        """The pictures of a batch, and which of them are any: those that became NaN or infinite are none.

        A batch with such rows gives no pictures at all, so it is run again with copies of a good row in their places.
        """
        finite = np.ones(len(asked), bool)
        while finite.any():
            rows = np.where(finite, np.arange(len(asked)), np.flatnonzero(finite)[0])
            try:
                return self._batch(asked, how, candidate, attempts, rows), finite
            except NonFiniteImages as error:
                finite[rows[error.rows]] = False
        size = self.prior.image_size
        return np.zeros((len(asked), size, size, 3), np.uint8), finite

    def _batch(
        self,
        asked: Asked,
        how: Sampling,
        candidate: int,
        attempts: npt.NDArray[np.int64],
        rows: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.uint8]:
        """One forward pass over `rows` of what is asked."""
        shape = self.prior.latent_shape
        keys: list[tuple[int, ...]] = []
        for row in rows.tolist():
            c, k = asked.classes[row].class_id, asked.numbers[row]
            # The first candidate at its first attempt is the image that is made where there are no others.
            last = int(attempts[row])
            keys.append((c, k, candidate, last) if last else (c, k, candidate) if candidate else (c, k))
        noise = [philox(self.seed, "noise", *key).standard_normal(shape).astype(np.float32) for key in keys]
        generators = [
            torch.Generator(self.prior.device).manual_seed(int(philox(self.seed, "steps", *key).integers(2**63)))
            for key in keys
        ]
        z = torch.from_numpy(asked.centroids[rows].reshape(-1, *shape))
        condition = self.prior.conditioning([asked.classes[row] for row in rows.tolist()])
        made = self.prior.synthesize(z, condition, torch.from_numpy(np.stack(noise)), how, generators)
        return np.asarray(made.numpy())


@dataclass(frozen=True)
class _Tried:
    """The images that were made of n centroids.

    Attributes:
        pictures: uint8 [M, n, H, W, 3].
        finite: bool [M, n], whether each is a picture at all.
        good: bool [M, n], whether it is one of more than one colour.
    """

    pictures: npt.NDArray[np.uint8]
    finite: npt.NDArray[np.bool_]
    good: npt.NDArray[np.bool_]

    def taking(self, other: _Tried, rows: npt.NDArray[np.bool_]) -> _Tried:
        """With these rows of another attempt."""
        pictures = np.where(rows[:, None, None, None], other.pictures, self.pictures)
        return _Tried(pictures, np.where(rows, other.finite, self.finite), np.where(rows, other.good, self.good))
