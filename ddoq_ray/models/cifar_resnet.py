"""ResNets for CIFAR-sized images: three levels of 16, 32, 64 channels, shortcuts without parameters.

Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2, option A.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (16, 32, 64)


class CifarResNet(nn.Module):
    """ResNet of 6 n + 2 layers (20, 32, 44, 56, 110), without its head: [B, 3, S, S] to features [B, 64]."""

    def __init__(self, depth: int) -> None:
        """Raise a ValueError for a depth that is not 6 n + 2."""
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if blocks < 1 or rest:
            raise ValueError(f"classifier: resnet<depth>-cifar has 6 n + 2 layers (20, 32, 44, 56, 110), got {depth}")
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        planes = WIDTHS[0]
        for level, width in enumerate(WIDTHS):
            strides = [1 if level == 0 else 2] + [1] * (blocks - 1)
            layers = []
            for stride in strides:
                layers.append(_Block(planes, width, stride))
                planes = width
            self.add_module(f"layer{level + 1}", nn.Sequential(*layers))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Features, averaged over the image."""
        x = torch.relu(self.bn1(self.conv1(x)))
        for level in range(len(WIDTHS)):
            x = self.get_submodule(f"layer{level + 1}")(x)
        return x.mean(dim=(2, 3))


class _Block(nn.Module):
    def __init__(self, planes: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(planes, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.padding = stride, (width - planes) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1 or self.padding:
            # Option A: every other pixel, new channels of zeros on both sides.
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return torch.relu(out + x)
