"""Soft labels of views, as a teacher actor makes them: seeded views of images to the bytes of a codec.

Shape suffixes: N images of a set, n of them, B inner batch, C outputs, H W stored size, S view size.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from ddoq_ray.core.label_cost import relative_kl
from ddoq_ray.core.labels import codec_sizes, make_codec
from ddoq_ray.core.views.params import Int64, ViewSpec
from ddoq_ray.core.views.render import batch_views
from ddoq_ray.data.pixel_rows import MemoryRows
from ddoq_ray.models.classifiers import Classifier
from ddoq_ray.models.ensemble import Teacher, feature_dim, for_teacher
from ddoq_ray.models.training.images import Gathered, Images, Resident


class Labeller:
    """A teacher that labels views in fixed inner batches.

    Attributes:
        codec: What its answers are packed by.
        device: Where it is.
    """

    def __init__(self, teacher: Teacher, codec: str, spec: ViewSpec, *, seed: int, batch: int) -> None:
        """Make it ready.

        Args:
            teacher: In eval mode.
            codec: A name in `CODECS`.
            spec: What views look like.
            seed: Of the views.
            batch: Views of an inner batch; another gives some answers other last bits.
        """
        self.teacher, self.spec, self.seed, self.batch = teacher, spec, seed, batch
        self.codec = make_codec(codec, teacher.num_classes, feature_dim(teacher))
        self.device = next(teacher.parameters()).device
        self._looks: Resident | None = None

    def labels(self, images: torch.Tensor, index: Int64, epoch: int) -> tuple[npt.NDArray[np.uint8], bytes]:
        """Labels of the views of some images at an epoch, and what those views are.

        Args:
            images: uint8 [N, 3, H, W], the whole set, since partners are from all of it: on the teacher's device; or
                in host memory, from which each batch is then read, to the same labels.
            index: int64 [n], one or more rows to label; cut into inner batches in this order.
            epoch: The epoch.

        Returns:
            uint8 [n, bytes of a label]; `ViewParams.packed` of the views.

        Raises:
            ValueError: An answer is not finite, or does not fit the codec.
        """
        parts = (index[first : first + self.batch] for first in range(0, len(index), self.batch))
        rows, params = [], []
        with torch.inference_mode():
            for views in self._views(images, len(index)).views(parts, self.spec, self.seed, epoch):
                pixels = for_teacher(views.pixels, self.teacher.image_size)
                rows.append(self.codec.encode(self._answers(pixels, self.codec.packs_features)))
                params.append(views.params.packed())
        return np.concatenate(rows), b"".join(params)

    def codec_costs(self, images: torch.Tensor, index: Int64, temperature: float) -> dict[str, dict[str, float]]:
        """What each codec costs on views of some images: name -> bytes a label, `kl` in nats and `relative` to what
        the labels tell (`relative_kl`).

        Args:
            images: As for `labels`.
            index: int64 [n].
            temperature: Of the loss.
        """
        teacher, costs = self.teacher, {}
        with torch.inference_mode():
            views = batch_views(images, index, self.spec, self.seed, 0)[0].to(self.device)
            pixels = for_teacher(views, teacher.image_size)
            head = teacher.head if isinstance(teacher, Classifier) else None
            answers = torch.cat([self._answers(part, head is not None) for part in pixels.split(self.batch)])
            logits = answers if head is None else head(answers)
            for name, nbytes in codec_sizes(teacher.num_classes, feature_dim(teacher)).items():
                codec = make_codec(name, teacher.num_classes, feature_dim(teacher))
                packed = codec.encode(answers if codec.packs_features else logits)
                kl, relative = relative_kl(logits, codec.decode(packed, head, logits.device), temperature)
                costs[name] = {"nbytes": nbytes, "kl": kl, "relative": relative}
        return costs

    def _views(self, images: torch.Tensor, some: int) -> Images:
        """What a student that trains on the images sees; of a small set, several epochs are rendered at once.

        `some` of them are labelled here, and the rest by others: nobody renders a large epoch for a small part of it.
        """
        if images.device.type != self.device.type:
            return Gathered(MemoryRows(images.numpy()), self.device)
        shares = max(1, len(images) // some)
        if self._looks is None or self._looks.images is not images or self._looks.ranks != shares:
            self._looks = Resident(images, shares, room=0)
        return self._looks

    def _answers(self, pixels: torch.Tensor, features: bool) -> torch.Tensor:
        """Penultimate features, where they are wanted and there are any, or logits."""
        if features and isinstance(self.teacher, Classifier):
            return self.teacher.features(pixels)
        logits: torch.Tensor = self.teacher(pixels)
        return logits
