"""What single methods of a comparison are made by, each as its authors published it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ddoq_ray.config.schema import option, require

SMALL_SIDE = 64  # pixels: up to here RDED cuts whole images, and SRe2L shifts by 4 pixels


@dataclass(frozen=True)
class ImagesConfig:
    """A distilled set that another method made."""

    path: str | None = option(
        None,
        "a distilled set that another method made, judged as a method of its own: class folders, WebDataset shards or "
        "Parquet files (a folder, a glob or a brace pattern), with weights or without",
    )
    name: str = option("given", "the word of that method in tables and folders")

    def __post_init__(self) -> None:
        require(
            re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name) is not None,
            f"images.name={self.name}: expected letters, digits, dots and dashes",
        )


@dataclass(frozen=True)
class RdedConfig:
    """Sun et al., CVPR 2024; the released code (LINs-lab/RDED@3f6453d, scripts/*_cr5.sh)."""

    crops: int = option(5, "random crops of each real image, of which the teacher's surest is kept (num-crop)")
    pool: int = option(300, "real images of each class that are looked at, drawn at random (mipc)")
    factor: int | None = option(
        None, "tiles along an edge of an image; null: as published, 2, and 1 where the teacher sees at most 64 pixels"
    )

    def __post_init__(self) -> None:
        for key in ("crops", "pool"):
            require(getattr(self, key) >= 1, f"rded.{key}={getattr(self, key)}: expected 1 or more")
        require(self.factor is None or self.factor >= 1, f"rded.factor={self.factor}: expected 1 or more, or null")

    def tiles_along(self, side: int) -> int:
        """Tiles along an edge of images of this side."""
        return self.factor if self.factor is not None else 1 if side <= SMALL_SIDE else 2


@dataclass(frozen=True)
class RecoveryConfig:
    """Yin et al., NeurIPS 2023 (SRe2L) and Yin & Shen, TMLR 2024 (CDA), which differ in the crops alone; the released
    code's settings for ImageNet-1K (VILA-Lab/SRe2L@8d00cba, SRe2L/recover/recover.sh and CDA/README.md).
    """

    iterations: int = option(4000, "gradient steps of each image")
    lr: float = option(0.25, "learning rate of Adam at the start; it falls to 0 by a half cosine")
    bn: float = option(0.01, "coefficient of the loss of the batch norms' statistics")
    first_bn: float = option(10.0, "the first batch norm counts so many times")
    batch: int = option(100, "images of different classes that are optimized together, and share statistics")
    min_crop: float = option(0.08, "smallest area of the random crop of each step; 1: none (the code for CIFAR)")
    flip: bool = option(True, "flip the batch left to right in half of the steps")
    jitter: int | None = option(
        None, "largest circular shift of each step, in pixels; null: as published, 32, and 4 for images up to 64 pixels"
    )

    def __post_init__(self) -> None:
        for key in ("iterations", "batch"):
            require(getattr(self, key) >= 1, f"recovery.{key}={getattr(self, key)}: expected 1 or more")
        require(self.lr > 0, f"recovery.lr={self.lr}: expected more than 0")
        for key in ("bn", "first_bn"):
            require(getattr(self, key) >= 0, f"recovery.{key}={getattr(self, key)}: expected 0 or more")
        require(0 < self.min_crop <= 1, f"recovery.min_crop={self.min_crop}: expected above 0, at most 1")
        require(self.jitter is None or self.jitter >= 0, f"recovery.jitter={self.jitter}: expected 0 or more, or null")

    def shift(self, side: int) -> int:
        """The largest shift of images of this side, in pixels."""
        return self.jitter if self.jitter is not None else 4 if side <= SMALL_SIDE else 32
