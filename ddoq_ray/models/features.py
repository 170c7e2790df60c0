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
        """Feature maps of images [B, 3, S, S] in [0, 1], coarsest last; at S of the classifier's own if it differs.

        Raises:
            ValueError: the trunk gives no maps, as a transformer's.
        """
        size = self.classifier.image_size
        if images.shape[-1] != size:
            images = nn.functional.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
        self._maps = []
        self.classifier.features(images)
        last = {tuple(m.shape[-2:]): m for m in self._maps}
        self._maps = None
        if not last:
            raise ValueError(f"teacher: {self.classifier.arch} gives no feature maps; give a convolutional classifier")
        return list(last.values())

    def distance(self, images: Tensor, references: Tensor) -> Tensor:
        """Mean over levels of |f(x) - f(y)|^2 / |f(y)|^2, a mean over the batch: a scalar that x is differentiable by.

        Args:
            images: x [B, 3, S, S] in about [0, 1].
            references: y, of the same shape.
        """
        with torch.no_grad():
            expected = [m.float() for m in self.maps(references)]
        got = [m.float() for m in self.maps(images)]
        levels = [_relative(a, b) for a, b in zip(got, expected, strict=True)]
        return torch.stack(levels).mean()


def _relative(got: Tensor, expected: Tensor) -> Tensor:
    squared = (got - expected).square().flatten(1).sum(1)
    return (squared / expected.square().flatten(1).sum(1).clamp_min(1e-12)).mean()


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """The children of a network, and of the sequences it is made of."""
    for child in module.children():
        if isinstance(child, nn.Sequential):
            yield from _parts(child)
        yield child
