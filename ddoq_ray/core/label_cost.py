"""What the rounding of a codec costs: KL of the labels that come back to those of the teacher."""

from __future__ import annotations

import math

import torch


def relative_kl(exact: torch.Tensor, decoded: torch.Tensor, temperature: float) -> tuple[float, float]:
    """What a codec costs: mean KL(softmax(exact / T) || softmax(decoded / T)) over rows, in nats; and as a share.

    Args:
        exact: float [B, C] logits of the teacher.
        decoded: float [B, C], the same as a codec gives them back.
        temperature: T.

    Returns:
        The KL, and the KL over that of the same labels to the uniform distribution, which is how much they tell: at a
        high temperature both are small.

    >>> import torch
    >>> relative_kl(torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 0.0]]), 1.0)[1]  # all of it is lost
    1.0
    """
    told = (exact.double() / temperature).log_softmax(1)
    found = (decoded.double() / temperature).log_softmax(1)
    kl = float((told.exp() * (told - found)).sum(1).mean())
    uniform = float((told.exp() * (told + math.log(exact.shape[1]))).sum(1).mean())
    return kl, kl / uniform if uniform > 0 else 0.0
