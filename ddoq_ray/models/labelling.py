"""Soft labels of views, as a teacher actor makes them: seeded views of images to the bytes of a codec.

Shape suffixes: N images of a set, n of them, B inner batch, C outputs, H W stored size, S view size.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from ddoq_ray.config.training import ProtocolConfig
from ddoq_ray.core.labels import make_codec
from ddoq_ray.core.views.params import Int64, ViewSpec
from ddoq_ray.core.views.render import batch_views
from ddoq_ray.models.classifiers import Classifier


def view_spec(protocol: ProtocolConfig, size: int) -> ViewSpec:
    """The views of a protocol at `size` pixels; labels, students and the online teacher must agree on them."""
    return ViewSpec(size=size, min_scale=protocol.min_scale, flip=protocol.flip, cutmix=protocol.cutmix)


def for_teacher(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """Views [B, 3, S, S] at the teacher's own resolution; unchanged when the student's is the same."""
    if pixels.shape[-1] == size:
        return pixels
    return torch.nn.functional.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)


class Labeller:
    """A teacher that labels views in fixed inner batches.

    Attributes:
        codec: What its answers are packed by.
    """

    def __init__(self, teacher: Classifier, codec: str, spec: ViewSpec, *, seed: int, batch: int) -> None:
        """Make it ready.

        Args:
            teacher: In eval mode.
            codec: "logits" or "features".
            spec: What views look like.
            seed: Of the views.
            batch: Views of an inner batch; another gives some answers other last bits.
        """
        self.teacher, self.spec, self.seed, self.batch = teacher, spec, seed, batch
        self.codec = make_codec(codec, teacher.num_classes, teacher.head.in_features)

    def labels(self, images: torch.Tensor, index: Int64, epoch: int) -> npt.NDArray[np.uint8]:
        """Labels of the views of some images at an epoch.

        Args:
            images: uint8 [N, 3, H, W], the whole set, on the teacher's device: partners of CutMix are from all of it.
            index: int64 [n], one or more rows to label; cut into inner batches in this order.
            epoch: The epoch.

        Returns:
            uint8 [n, bytes of a label].

        Raises:
            ValueError: An answer is not finite, or does not fit the codec.
        """
        parts = (index[first : first + self.batch] for first in range(0, len(index), self.batch))
        return np.concatenate([self._inner(images, part, epoch) for part in parts])

    def _inner(self, images: torch.Tensor, index: Int64, epoch: int) -> npt.NDArray[np.uint8]:
        pixels, _, _ = batch_views(images, index, self.spec, self.seed, epoch)
        with torch.inference_mode():
            pixels = for_teacher(pixels, self.teacher.image_size)
            answers = self.teacher.features(pixels) if self.codec.packs_features else self.teacher(pixels)
            return self.codec.encode(answers)
