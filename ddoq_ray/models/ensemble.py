"""Several teachers that label as one: the mean of their probabilities at the temperature of the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ddoq_ray.models.classifiers import Classifier, load_classifier
from ddoq_ray.storage.artifact import digest_of


class Ensemble(nn.Module):
    """Classifiers of the same classes, asked together; it has no linear head, so its labels are logits.

    Attributes:
        num_classes, image_size: C, and the largest S of the members; others see the same pixels at their own size.
        classes: names in label order, or None.
        arch: the members', joined.
        all: the members.
    """

    def __init__(self, members: Sequence[Classifier], temperature: float) -> None:
        """Join them.

        Raises:
            ValueError: their outputs are not the same classes.
        """
        super().__init__()
        first = members[0]
        for other in members[1:]:
            named = first.classes is not None and other.classes is not None
            if other.num_classes != first.num_classes or (named and other.classes != first.classes):
                raise ValueError(
                    f"teacher.path: the teachers of an ensemble must have the same classes in the same order; "
                    f"{first.arch} has {first.num_classes} ({', '.join((first.classes or ['unnamed'])[:3])}, ...) and "
                    f"{other.arch} {other.num_classes} ({', '.join((other.classes or ['unnamed'])[:3])}, ...)"
                )
        self.all: tuple[Classifier, ...] = tuple(members)
        self.members, self.temperature = nn.ModuleList(members), temperature
        self.num_classes, self.image_size = first.num_classes, max(m.image_size for m in members)
        self.classes = next((m.classes for m in members if m.classes is not None), None)
        self.arch = "+".join(m.arch for m in members)

    def forward(self, x: Tensor) -> Tensor:
        """Map float [B, 3, S, S] in [0, 1] to T log mean_m softmax(logits_m / T) [B, C].

        These are logits whose softmax at T is the mean of the members' probabilities at T.
        """
        temperature = self.temperature
        told = [(m(for_teacher(x, m.image_size)).float() / temperature).log_softmax(1) for m in self.all]
        return temperature * (torch.stack(told).logsumexp(0) - math.log(len(told)))

    @property
    def id(self) -> str:
        """Digest of the members' own; their order does not matter to the mean, and is left out."""
        return digest_of(sorted(m.id for m in self.all))


Teacher = Classifier | Ensemble


def load_teacher(paths: str | Sequence[str], device: torch.device | str = "cpu", temperature: float = 1.0) -> Teacher:
    """The teacher of `teacher.path`: one classifier, or an ensemble of several.

    Args:
        paths: As `load_classifier` has them.
        temperature: Of the loss; an ensemble's probabilities are taken at it.

    Raises:
        ValueError: One cannot be loaded, or they do not fit together.
    """
    given = [paths] if isinstance(paths, str) else list(paths)
    members = [load_classifier(path, device) for path in given]
    return members[0] if len(members) == 1 else Ensemble(members, temperature).eval()


def feature_dim(teacher: Teacher) -> int | None:
    """d of a teacher's penultimate features; None where it has no linear head."""
    return teacher.head.in_features if isinstance(teacher, Classifier) else None


def first_of(teacher: Teacher) -> Classifier:
    """The classifier, or the first member of an ensemble."""
    return teacher if isinstance(teacher, Classifier) else teacher.all[0]


def for_teacher(pixels: Tensor, size: int) -> Tensor:
    """Views [B, 3, S, S] at the teacher's own resolution; unchanged when the student's is the same."""
    if pixels.shape[-1] == size:
        return pixels
    return nn.functional.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
