"""What a classifier sees in an image: its feature maps, one for each resolution it passes through.

Shape suffixes: B batch, S image size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ddoq_ray.models.classifiers import Classifier


class FeatureLevels:
    """The last feature map of each resolution of a classifier's trunk, and distances in them.

    For a ResNet these are its levels. Between two images they tell what pixels do not: a reconstruction of 24.7 dB can
    look right and be wrong for a classifier (Zhang et al., CVPR 2018, arXiv 1801.03924, for the use of such distances).

    Attributes:
        classifier: in eval mode, its weights fixed.
    """

    def __init__(self, classifier: Classifier) -> None:
        """Listen to the trunk's parts."""
        self.classifier = classifier.eval().requires_grad_(False)
        self._maps: list[Tensor] | None = None  # while it listens: others look through the classifier, too
        for part in _parts(classifier.trunk):
            part.register_forward_hook(self._keep)

    def _keep(self, part: nn.Module, inputs: object, output: object) -> None:
        if self._maps is not None and isinstance(output, Tensor) and output.ndim == 4:
            self._maps.append(output)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Feature maps of images [B, 3, S, S] in [0, 1], coarsest last; at S of the classifier's own if it differs."""
        return self.seen(images)[0]

    def seen(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """The feature maps and the logits [B, C] of images, as `maps`.

        Raises:
            ValueError: the trunk gives no maps, as a transformer's.
        """
        size = self.classifier.image_size
        if images.shape[-1] != size:
            images = nn.functional.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
        self._maps = []
        logits = self.classifier(images)
        last = {tuple(m.shape[-2:]): m for m in self._maps}
        self._maps = None
        if not last:
            raise ValueError(f"teacher: {self.classifier.arch} gives no feature maps; give a convolutional classifier")
        return list(last.values()), logits

    def distance(self, images: Tensor, references: Tensor) -> Tensor:
        """The first of `distances`."""
        return self.distances(images, references)[0]

    def distances(self, images: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
        """How differently the classifier sees two images and answers them: scalars that x is differentiable by.

        Args:
            images: x [B, 3, S, S] in about [0, 1].
            references: y, of the same shape.

        Returns:
            Of the maps, the mean over levels of |f(x) - f(y)|^2 / |f(y)|^2; of the logits less their mean, the same
            for one level. The logits are what soft labels are made of: at a high temperature a label's divergence is
            their squared distance (Hinton et al., 2015, arXiv 1503.02531, section 2.1).
        """
        with torch.no_grad():
            expected, right = self.seen(references)
        got, answers = self.seen(images)
        levels = [_relative(a.float(), b.float()) for a, b in zip(got, expected, strict=True)]
        centred = (logits.float() - logits.float().mean(1, keepdim=True) for logits in (answers, right))
        return torch.stack(levels).mean(), _relative(*centred)


def _relative(got: Tensor, expected: Tensor) -> Tensor:
    squared = (got - expected).square().flatten(1).sum(1)
    return (squared / expected.square().flatten(1).sum(1).clamp_min(1e-12)).mean()


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """The children of a network, and of the sequences it is made of."""
    for child in module.children():
        if isinstance(child, nn.Sequential):
            yield from _parts(child)
        yield child
