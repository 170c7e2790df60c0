"""What is distilled: any labelled image collection, as shards or on its way to them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from ddoq_ray.config.schema import option, require
from ddoq_ray.config.split_words import is_split

# Collections that are packed into shards of the run's own; digits are too, in their own way.
PACKED = ("imagefolder", "torchvision", "idx", "parquet")


@dataclass(frozen=True)
class DatasetConfig:
    name: str | None = option(None, "a word for it in paths and tables; by default the source's or the folder's")
    source: Literal["digits", "imagefolder", "torchvision", "idx", "webdataset", "parquet"] | None = option(
        "digits",
        "the kind of collection: digits, imagefolder, torchvision, idx, webdataset, parquet; found out from "
        "dataset.path when that is given alone",
    )
    path: str | None = option(
        None,
        "folder, glob or brace pattern of what is distilled; for torchvision, where its files are or are downloaded to",
    )
    val_path: str | None = option(None, "the same for the real validation images; only ever used to measure")
    classes: str | None = option(None, "classes.json; by default the one beside the shards, or in the folder")
    torchvision: Literal["CIFAR10", "CIFAR100", "FashionMNIST", "Imagenette", "ImageNet", "Flowers102"] | None = option(
        None, "which of torchvision's: CIFAR10, CIFAR100, FashionMNIST, Imagenette, ImageNet, Flowers102"
    )
    label_column: str | None = option(None, "the label's column in parquet files or metadata; needed where several are")
    image_column: str | None = option(None, "the image's column in parquet files; needed where several are")
    heldout: float = option(
        0.0, "training images to hold out for validation where the source has none: a part (0.1) or a number a class"
    )
    resort: bool = option(False, "write given WebDataset shards anew, sorted by class and shuffled within each")
    shard_samples: int = option(
        10_000, "samples in a shard that is written, at most; fewer where 32 shards of 500 or more can be made"
    )
    shard_mb: int = option(256, "megabytes in a shard that is written, at most (but always one sample)")

    def __post_init__(self) -> None:
        require(
            self.path is not None or self.source in ("digits", "torchvision"),
            "dataset.path is not set: give a folder or pattern of WebDataset shards, a folder of images, parquet or "
            "IDX files, or use dataset=digits",
        )
        require(
            (self.source == "torchvision") == (self.torchvision is not None),
            "dataset=torchvision and dataset.torchvision=NAME belong together: give both, for example "
            "dataset=torchvision dataset.torchvision=CIFAR10",
        )
        require(
            self.heldout >= 0 and (self.heldout < 1 or self.heldout % 1 == 0),
            f"dataset.heldout={self.heldout}: expected a part of the images (0 to 1), or a whole number a class",
        )
        require(self.shard_samples >= 1, f"dataset.shard_samples={self.shard_samples}: expected 1 or more")
        require(self.shard_mb >= 1, f"dataset.shard_mb={self.shard_mb}: expected 1 or more")

    @property
    def kind(self) -> str | None:
        """The kind of collection that was named; None where dataset.path is to tell."""
        return None if self.path is not None and self.source == "digits" else self.source

    @property
    def title(self) -> str:
        """A word for the data: the name given, else the source's, else the last folder that says more than a split."""
        if self.name:
            return self.name
        if self.torchvision is not None:
            return self.torchvision.lower()
        if self.path is None:
            return str(self.source)
        parts = [p for p in PurePosixPath(self.path.split("://")[-1]).parts if not set(p) & set("*?[{") and p != "/"]
        folders = [p for p in parts if not p.endswith((".tar", ".parquet", ".arrow"))]
        telling = [p for p in folders if p.lower() != "data" and not is_split(p)]
        return (telling or folders or ["data"])[-1]
