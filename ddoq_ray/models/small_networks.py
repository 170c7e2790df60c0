"""Networks of the distillation literature for small images and hard labels, each without its head.

Shape suffixes: B batch, d features, S image size.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

NORMS = ("instance", "group", "batch")


def norm_of(kind: str, channels: int) -> nn.Module:
    """The norm layer of a kind in `NORMS`; "group" has four groups, as in the dataset-condensation benchmark."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    # One group a channel is instance norm with a learned scale and offset.
    return nn.GroupNorm(channels if kind == "instance" else 4, channels)


def _initialise(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class ConvNet(nn.Module):
    """ConvNet-D of the dataset-condensation benchmark: D of conv 3x3, norm, ReLU, average pool.

    Source: Zhao et al., Dataset Condensation with Gradient Matching (VICO-UoE/DatasetCondensation).
    """

    def __init__(self, depth: int, width: int, norm: str) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for i in range(depth):
            blocks += [
                nn.Conv2d(3 if i == 0 else width, width, 3, padding=1),
                norm_of(norm, width),
                nn.ReLU(inplace=True),
                nn.AvgPool2d(2),
            ]
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, S, S] to [B, width x (S // 2^D)^2]."""
        return self.blocks(x).flatten(1)


class SmallResNet18(nn.Module):
    """ResNet-18 for small images: 3x3 stem of stride 1, no max-pool; parameter names as torchvision's."""

    def __init__(self, width: int, norm: str) -> None:
        from torchvision.models.resnet import BasicBlock  # see architectures.py

        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = norm_of(norm, width)
        self.relu = nn.ReLU(inplace=True)
        planes = width
        layer = lambda channels: norm_of(norm, channels)
        for i in range(4):
            out, stride = width * 2**i, 1 if i == 0 else 2
            shortcut = None
            if stride != 1:
                shortcut = nn.Sequential(nn.Conv2d(planes, out, 1, stride, bias=False), layer(out))
            self.add_module(
                f"layer{i + 1}",
                nn.Sequential(
                    BasicBlock(planes, out, stride, shortcut, norm_layer=layer), BasicBlock(out, out, norm_layer=layer)
                ),
            )
            planes = out
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, S, S] to [B, 8 width]."""
        x = self.relu(self.bn1(self.conv1(x)))
        for i in range(4):
            x = self.get_submodule(f"layer{i + 1}")(x)
        return x.mean(dim=(2, 3))


class ResNetAP10(nn.Module):
    """ResNet of one block a level that halves the side by average pooling instead of strides.

    Its stem follows the image size: 7x7 and a pool of 4 above 128 px, 3x3 and a pool of 2 above 64 px, else 3x3 alone.
    Source: Kim et al., Dataset Condensation via Efficient Synthetic-Data Parameterization, ICML 2022.
    """

    def __init__(self, image_size: int, width: int, norm: str) -> None:
        super().__init__()
        kernel, pool = (7, 4) if image_size > 128 else (3, 2 if image_size > 64 else 1)
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, kernel, padding=kernel // 2, bias=False),
            norm_of(norm, width),
            nn.ReLU(inplace=True),
            nn.AvgPool2d(pool) if pool > 1 else nn.Identity(),
        )
        widths = [width * 2**i for i in range(4)]
        pairs = zip([width, *widths[:-1]], widths, strict=True)
        self.levels = nn.Sequential(*(_PooledBlock(a, b, 1 if i == 0 else 2, norm) for i, (a, b) in enumerate(pairs)))
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, S, S] to [B, 8 width]."""
        return self.levels(self.stem(x)).mean(dim=(2, 3))


class _PooledBlock(nn.Module):
    def __init__(self, planes: int, width: int, pool: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(planes, width, 3, padding=1, bias=False)
        self.bn1 = norm_of(norm, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = norm_of(norm, width)
        self.pool = nn.AvgPool2d(pool) if pool > 1 else nn.Identity()
        self.shortcut: nn.Module = nn.Identity()
        if pool > 1 or planes != width:
            self.shortcut = nn.Sequential(nn.Conv2d(planes, width, 1, bias=False), self.pool, norm_of(norm, width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.pool(F.relu(self.bn1(self.conv1(x))))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))
