"""Classifiers of the images that a prior learns: one whose view it keeps, one that judges it.

Shape suffixes: N images, S image size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ddoq_ray.core.rng import philox
from ddoq_ray.models.autoencoder import Autoencoder
from ddoq_ray.models.classifiers import Classifier
from ddoq_ray.models.fidelity import generate, judge_autoencoder, judge_samples
from ddoq_ray.models.priors.base import Prior, Sampling
from ddoq_ray.models.training.data import TrainingSet
from ddoq_ray.storage.records import ClassInfo

LOOKED_AT = 1000  # images


@dataclass(frozen=True)
class Classifiers:
    """Classifiers of the images that a prior learns.

    Attributes:
        perceptual: the autoencoder keeps what this one sees (`feature_weight`).
        judge: what this one sees of the finished prior's images is recorded; by default `perceptual`, whose view of
            them is too kind, since they were made for it.
    """

    perceptual: Classifier | None = None
    judge: Classifier | None = None

    @property
    def any(self) -> bool:
        return self.perceptual is not None or self.judge is not None

    def judged_autoencoder(self, autoencoder: Autoencoder, data: TrainingSet) -> dict[str, Any]:
        """What the judge says of reconstructions; of held-out images where there are some."""
        judge = self.judge or self.perceptual
        assert judge is not None, "asked where a classifier was given"
        real, class_ids = _looked_at(data)
        judge.to(autoencoder.device)
        return {"held_out": data.held_out is not None, **judge_autoencoder(autoencoder, judge, real, class_ids)}

    def judged(self, prior: Prior, data: TrainingSet) -> dict[str, Any]:
        """What the judge says of reconstructions and of samples."""
        judge = self.judge or self.perceptual
        if judge is None:
            return {}
        judge.to(prior.device)
        real, class_ids = _looked_at(data)
        classes = [ClassInfo(int(c), data.classes[c], data.classes[c], int(c), int(c)) for c in class_ids]
        how = Sampling(1.0, 25, "noise", prior.guidance_of(None) if prior.has_null else 1.0)
        made = generate(prior, classes, how, seed=0)
        return {
            "judge": judge.id,
            "reconstructions": self.judged_autoencoder(prior.autoencoder, data),
            "samples": {"guidance": how.guidance, "steps": how.steps, **judge_samples(made, real, judge, class_ids)},
        }


def _looked_at(data: TrainingSet) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Some of the held-out images, else of those that are learnt, drawn once and for all; and their classes."""
    real, class_ids = data.held_out or (data.images, data.class_ids)
    rows = philox("judged").permutation(len(real))[:LOOKED_AT]
    return real[rows], np.asarray(class_ids[rows], np.int64)
