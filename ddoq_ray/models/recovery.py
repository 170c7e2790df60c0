"""Images found in a classifier by gradients: it names them rightly, and its batch norms see what they saw in training.

Shape suffixes: n images, S their side, C channels of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ddoq_ray.config.baselines import RecoveryConfig
from ddoq_ray.core.crops import crop_box
from ddoq_ray.core.rng import philox
from ddoq_ray.models.classifiers import Classifier

BETAS = (0.5, 0.9)


def norm_loss(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """How far a batch is from what a batch norm has averaged: |running_var - var| + |running_mean - mean|, L2 norms.

    Args:
        x: float32 [n, C, H, W], the layer's input; its variance is the biased one.

    Source: Yin et al., "Squeeze, Recover and Relabel", NeurIPS 2023, Eq. 6; released code (BNFeatureHook).
    """
    assert norm.running_mean is not None and norm.running_var is not None
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    return torch.linalg.vector_norm(norm.running_var - var) + torch.linalg.vector_norm(norm.running_mean - mean)


@contextmanager
def norm_losses(network: nn.Module) -> Iterator[dict[nn.Module, Tensor]]:
    """`norm_loss` of every batch norm in the last forward pass, as each layer is asked."""
    found: dict[nn.Module, Tensor] = {}

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.BatchNorm2d)
        found[module] = norm_loss(inputs[0], module)

    hooks = [m.register_forward_pre_hook(look) for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Recovery:
    """How images are recovered.

    Attributes:
        config: Steps, rates, coefficients.
        curriculum: Whether the smallest crop begins as the whole image and falls to `min_crop` by a half cosine (CDA).
    """

    config: RecoveryConfig
    curriculum: bool = False

    def least_area(self, step: int) -> float:
        """The smallest area of the crop of a step.

        Source: Yin & Shen, "Dataset Distillation via Curriculum Data Synthesis in Large Data Era", TMLR 2024; released
        code (recover_cda_in1k.py, easy2hard_mode=cosine, milestone=1).
        """
        least = self.config.min_crop
        if not self.curriculum:
            return least
        return least + (1 - least) * (1 + math.cos(math.pi * step / self.config.iterations)) / 2


def recovered(
    teacher: Classifier, indices: npt.NDArray[np.int64], how: Recovery, key: Sequence[int | str]
) -> npt.NDArray[np.uint8]:
    """Images of some of a classifier's classes, optimized together from noise.

    Each step crops, flips and shifts the whole batch by one draw, and lowers
    `cross entropy + bn * (first_bn * norm_loss_1 + norm_loss_2 + ...)` by Adam; then pixels are clipped to their range.

    Args:
        teacher: in eval mode, with batch norm.
        indices: int64 [n], the output that each image is to be named by.
        how: settings.
        key: of the batch's random numbers.

    Returns:
        uint8 [n, S, S, 3], cut to whole values as the released code does. The same bytes for the same batch, device
        and thread count.

    Source: Yin et al., NeurIPS 2023 (SRe2L); Yin & Shen, TMLR 2024 (CDA); VILA-Lab/SRe2L@8d00cba, recover/ and CDA/.

    Differences: random numbers by keys; the teacher's own normalisation and size; a batch is one image of each of
    `recovery.batch` classes, as there, also for the last, smaller one.
    """
    own, size, device = how.config, teacher.image_size, teacher.mean.device
    rng = philox(*key)
    start = rng.standard_normal((len(indices), 3, size, size)).astype(np.float32)
    z = torch.from_numpy(start).to(device).requires_grad_()
    targets = torch.from_numpy(indices).to(device)
    low, high = -teacher.mean / teacher.std, (1 - teacher.mean) / teacher.std
    optimizer = torch.optim.Adam([z], lr=own.lr, betas=BETAS, eps=1e-8)
    frozen = [p for p in teacher.parameters() if p.requires_grad]
    for p in frozen:
        p.requires_grad_(False)
    try:
        with norm_losses(teacher) as norms:
            for step in range(own.iterations):
                optimizer.param_groups[0]["lr"] = 0.5 * (1 + math.cos(math.pi * step / own.iterations)) * own.lr
                optimizer.zero_grad()
                logits = teacher.head(teacher.trunk(_seen(z, how, step, rng)))
                weighed = [own.first_bn * n if i == 0 else n for i, n in enumerate(norms.values())]
                loss = nn.functional.cross_entropy(logits, targets) + own.bn * torch.stack(weighed).sum()
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    z.clamp_(low, high)
    finally:
        for p in frozen:
            p.requires_grad_(True)
    pixels = (z.detach() * teacher.std + teacher.mean).clamp(0, 1) * 255
    return pixels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _seen(z: Tensor, how: Recovery, step: int, rng: np.random.Generator) -> Tensor:
    """The batch as a step sees it: cropped and resized, flipped, shifted."""
    own, size = how.config, z.shape[-1]
    if own.min_crop < 1:
        top, left, h, w = crop_box(rng, (size, size), how.least_area(step))
        part = z[:, :, top : top + h, left : left + w]
        z = nn.functional.interpolate(part, size=(size, size), mode="bilinear", align_corners=False)
    if own.flip and rng.random() < 0.5:
        z = z.flip(3)
    shift = own.shift(size)
    down, right = rng.integers(shift + 1, size=2).tolist()
    return torch.roll(z, (down, right), (2, 3))
