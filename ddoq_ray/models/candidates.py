"""Several images of each centroid, of which one is kept.

Shape suffixes: M candidates, n centroids, C classes, H W image size.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from ddoq_ray.models.classifiers import Classifier
from ddoq_ray.models.confidence import class_losses

Keep = Literal["confident", "cell"]


class Candidates:
    """How many images are made of a centroid, and who keeps which.

    Attributes:
        count: M.
        judge: a classifier in eval mode; it sees the images resized to its own size.
        keep: "confident": the image of the lowest cross-entropy for its class; "cell": the lowest of those inside the
            centroid's Voronoi cell, so that the set still covers the class as the quantizer means it; of all where
            none is inside.
    """

    def __init__(self, count: int, judge: Classifier, keep: Keep = "confident") -> None:
        """See the attributes."""
        if count < 2:
            raise ValueError(f"candidates: expected 2 or more to choose among, got {count}")
        self.count, self.judge, self.keep = count, judge, keep

    def losses(self, pictures: npt.NDArray[np.uint8], indices: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """The judge's cross-entropy in nats, float32 [n], of pictures uint8 [n, H, W, 3].

        Args:
            pictures: what is judged, at once.
            indices: int64 [n], the judge's output for each one's class.

        Raises:
            ValueError: an index that the judge has no output for.
        """
        return class_losses(self.judge, pictures, indices)

    def chosen(self, losses: npt.NDArray[np.float32], inside: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """Which candidate of each centroid is kept; the first of equal ones.

        Args:
            losses: [M, n].
            inside: [M, n], whether it lies in its centroid's cell; all true where that does not matter.

        Returns:
            int64 [n]. A loss that is not a number is never the lowest.
        """
        finite = np.where(np.isfinite(losses), losses, np.inf)
        within = np.where(inside | ~inside.any(axis=0), finite, np.inf)
        return np.argmin(within, axis=0)
