"""Weighted distillation losses, and the weight of each image in them.

Shapes: B images of a batch, n images of the distilled set, C classes, K images of a class.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

SCHEMES = ("counts", "sqrt", "uniform")
ACROSS = ("balanced", "empirical")
MEANS = ("none", "class", "set")
DIRECTIONS = ("teacher-student", "student-teacher")


def weighted_kl(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    weights: torch.Tensor,
    temperature: float,
    *,
    direction: str = DIRECTIONS[0],
) -> torch.Tensor:
    """`sum_i w_i KL(softmax(teacher_i / T) || softmax(student_i / T)) / B`.

    Source: Algorithm 4, line 7. Differences from the paper: it prints KL(student || teacher); D4M's and FKD's
    code, which the paper reuses, computes `KLDivLoss(log student, teacher)`, the default here. As there, no factor
    T^2 (Hinton et al. 2015) keeps the gradient's size as T grows. The sum is divided by the images, not by their
    weights, which would tie an image's share to those that it is drawn with.

    Args:
        student_logits: float [B, C].
        teacher_logits: float [B, C]; no gradient flows to them.
        weights: float [B], see `image_weights`.
        temperature: T, above 0.
        direction: "teacher-student" as above; "student-teacher" is KL(student || teacher), as printed.

    Returns:
        float32 scalar; computed in float32 under autocast too.

    Raises:
        ValueError: shapes that do not agree, temperature not above 0, or an unknown `direction`.
    """
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "expected student and teacher logits of one shape [B, C], got "
            f"{list(student_logits.shape)} and {list(teacher_logits.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    log_student = F.log_softmax(student_logits.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher_logits.detach().float() / temperature, dim=1)
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {DIRECTIONS}, got {direction!r}")
    given, of = (log_student, log_teacher) if direction == DIRECTIONS[0] else (log_teacher, log_student)
    loss = F.kl_div(given, of, reduction="none", log_target=True).sum(dim=1)
    return _weighted(loss, weights)


def weighted_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    *,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """`sum_i w_i CE(logits_i, targets_i) / B`.

    Args:
        logits: float [B, C].
        targets: int64 [B] class ids, or float [B, C] probabilities (for CutMix: lam of one class, 1 - lam of
            another).
        weights: float [B].
        label_smoothing: as in `torch.nn.functional.cross_entropy`.

    Returns:
        float32 scalar.

    Raises:
        ValueError: shapes that do not agree.
    """
    if logits.ndim != 2 or targets.shape not in (logits.shape[:1], logits.shape):
        raise ValueError(
            f"expected logits [B, C] and targets [B] or [B, C], got {list(logits.shape)} and {list(targets.shape)}"
        )
    targets = targets.float() if targets.ndim == 2 else targets
    loss = F.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=label_smoothing)
    return _weighted(loss, weights)


def image_weights(
    weights: npt.NDArray[np.float64],
    class_ids: npt.NDArray[np.int64],
    scheme: str = "counts",
    across: str = "balanced",
    class_mass: npt.NDArray[np.float64] | None = None,
    normalize: str = "none",
) -> npt.NDArray[np.float64]:
    """Weight of each distilled image in the loss, from the companion weights of the codebook.

    Within a class of K images:
        counts: K w_k, of mean 1 in the class (Algorithm 4, line 3).
        sqrt: sqrt(K) sqrt(w_k) (Eq. 33, with which the paper's tables were made). Not renormalised: its mean
            is below 1 unless the weights are equal, so uneven classes count for less.
        uniform: 1 (D4M).
    Across classes, with C classes present:
        balanced: nothing more; each image counts 1 on average, whatever its class.
        empirical: times C times the class's share of the mass, so frequent classes count for more.

    Args:
        weights: float64 [n], companion weights; they sum to 1 within each class.
        class_ids: int64 [n].
        scheme: "counts", "sqrt" or "uniform".
        across: "balanced" or "empirical".
        class_mass: float64, indexed by class id, images (or share) of each class in the source data; needed
            by "empirical" only. Classes without images are left out and the rest renormalised.
        normalize: "none" leaves them so; "class" makes their mean 1 in each class (before classes are made to
            count by their mass); "set" makes their mean 1 over the set (after that).

    Returns:
        float64 [n].

    Raises:
        ValueError: unknown names, weights that are negative or do not sum to 1 in some class, or mass that is
            missing.

    >>> image_weights(np.array([0.75, 0.25, 1.0]), np.array([0, 0, 1])).tolist()
    [1.5, 0.5, 1.0]
    """
    if scheme not in SCHEMES:
        raise ValueError(f"weight scheme must be one of {SCHEMES}, got {scheme!r}")
    if across not in ACROSS:
        raise ValueError(f"weights across classes must be one of {ACROSS}, got {across!r}")
    if normalize not in MEANS:
        raise ValueError(f"normalize must be one of {MEANS}, got {normalize!r}")
    weights = np.asarray(weights, dtype=np.float64)
    class_ids = np.asarray(class_ids, dtype=np.int64)
    if weights.ndim != 1 or weights.shape != class_ids.shape:
        raise ValueError(f"expected weights [n] and class_ids [n], got {weights.shape} and {class_ids.shape}")
    if weights.size == 0:
        return weights.copy()
    present, position, size = np.unique(class_ids, return_inverse=True, return_counts=True)
    _check_shares(weights, present, position)
    share = size[position] * weights
    out = {"counts": share, "sqrt": np.sqrt(share), "uniform": np.ones_like(weights)}[scheme]
    if normalize == "class":
        out = out / (np.bincount(position, weights=out) / size)[position]
    if across == "empirical":
        out = out * _class_factors(present, class_mass)[position]
    return out / out.mean() if normalize == "set" else out


def _check_shares(
    weights: npt.NDArray[np.float64], present: npt.NDArray[np.int64], position: npt.NDArray[np.intp]
) -> None:
    """Weights [n] of the classes present[position[n]] are shares: none below 0, and in each class they sum to 1."""
    if not (weights >= 0).all():
        raise ValueError("companion weights must be 0 or more, got a negative one or NaN")
    total = np.bincount(position, weights=weights)
    worst = np.abs(total - 1).argmax()
    if abs(total[worst] - 1) > 1e-5:  # float32 weights pass, counts do not
        raise ValueError(
            f"companion weights must sum to 1 within each class, got {total[worst]:g} for class {present[worst]}"
        )


def _class_factors(
    present: npt.NDArray[np.int64], class_mass: npt.NDArray[np.float64] | None
) -> npt.NDArray[np.float64]:
    """What images of each present class (ascending ids) count, by its share of the source data: of mean 1."""
    if class_mass is None:
        raise ValueError("weights across classes 'empirical' need class_mass, the images of each source class")
    mass = np.asarray(class_mass, dtype=np.float64)
    if mass.ndim != 1 or present[0] < 0 or present[-1] >= mass.size or not (mass[present] > 0).all():
        raise ValueError(f"class_mass must hold a number above 0 for each class id, got shape {mass.shape}")
    return mass[present] / mass[present].sum() * present.size


def _weighted(loss: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    if weights.shape != loss.shape:
        raise ValueError(f"expected one weight an image, [{loss.shape[0]}], got {list(weights.shape)}")
    return (weights.to(loss) * loss).sum() / loss.shape[0]
