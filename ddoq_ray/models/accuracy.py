"""What a classifier says of real images, and how often it is right: for teachers, students and their check alike.

Shape suffixes: N images, B batch, C outputs, S image size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ddoq_ray.core.metrics import top_pct, topk_correct


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """float [B, C] of uint8 images [B, 3, S, S], which go to the model's device; the model is in eval mode."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        logits: Tensor = model(images.to(device).float() / 255)
        return logits


def correct_counts(
    model: nn.Module, images: Tensor, class_ids: Tensor, columns: Tensor | None = None, batch: int = 500
) -> Tensor:
    """How many of the images are right, and right among five; the model is left in eval mode.

    Args:
        model: a classifier of S px images in [0, 1].
        images: uint8 [N, 3, S, S], any number.
        class_ids: int64 [N].
        columns: int64 [number of classes], the output that means each class; None where they are in order of class_id.
        batch: images of a forward pass; only these go to the model's device at once.

    Returns:
        int64 [2] on the model's device: top-1 and top-5, to be added over parts of the images and read once. With
        fewer than five classes, top-5 counts all of them.
    """
    model.eval()
    correct = torch.zeros(2, dtype=torch.int64, device=next(model.parameters()).device)
    for first in range(0, len(images), batch):
        logits = logits_of(model, images[first : first + batch])
        if columns is not None:
            logits = logits[:, columns]
        target = class_ids[first : first + batch].to(logits.device)
        correct += torch.stack([topk_correct(logits, target, k) for k in (1, min(5, logits.shape[1]))])
    return correct


def top1_top5(
    model: nn.Module, images: Tensor, class_ids: Tensor, columns: Tensor | None = None, batch: int = 500
) -> tuple[float, float]:
    """(top-1, top-5) accuracy in % of at least one image; see `correct_counts`."""
    top1, top5 = correct_counts(model, images, class_ids, columns, batch).tolist()
    return top_pct(top1, len(images)), top_pct(top5, len(images))
