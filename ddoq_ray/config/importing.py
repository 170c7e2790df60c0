"""The keys of ``import-teacher``: weights that others trained, and what their network expects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ddoq_ray.config.schema import option, require


@dataclass(frozen=True)
class ImportTeacherConfig:
    source: str | None = option(
        None,
        "a file of tensors (.safetensors, .pth, .pt, .bin), a folder or hub id with one (timm's config.json is read), "
        "or torchvision:NAME",
    )
    arch: str | None = option(
        None, "the network, as student.arch: resnet20-cifar, resnet18, efficientnet_b0; null: what the folder says"
    )
    out: str = option("model", "folder to write")
    image_size: int | None = option(None, "side of the images that it expects, in pixels; null: what the folder says")
    classes: str | None = option(
        None, "a classes.json, the list of class names in the order of its outputs; null: outputs without names"
    )
    mean: tuple[float, ...] | None = option(
        None, "what it subtracts from pixels in [0, 1], a channel each; null: what the folder says, else ImageNet's"
    )
    std: tuple[float, ...] | None = option(None, "what it then divides by; see mean")
    match: Literal["names", "order"] = option(
        "names",
        "names: tensors are found by their names, as torchvision's and CIFAR ResNets'; order: by their order and "
        "shapes, where another library names the same layers otherwise (timm's EfficientNet): check its accuracy then",
    )
    dtype: Literal["float32", "float16"] = option("float32", "of the saved weights")
    overwrite: bool = option(False, "replace the folder when it exists")

    def __post_init__(self) -> None:
        require(self.image_size is None or self.image_size >= 1, f"image_size={self.image_size}: expected 1 or more")
        require(
            (self.mean is None) == (self.std is None),
            "mean and std belong together: give both, of three channels each, or neither",
        )

    @property
    def folder(self) -> str:
        return self.out
