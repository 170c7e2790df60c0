"""What is distilled: any labelled image collection, as shards or on its way to them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from ddoq_ray.config.schema import option, require

# Collections that are packed into shards of the run's own; digits are too, in their own way.
PACKED = ("imagefolder", "torchvision", "idx", "parquet")


@dataclass(frozen=True)
class DatasetConfig:
    name: str | None = option(None, "a word for it in paths and tables; by default the source's or the folder's")
    source: Literal["digits", "imagefolder", "torchvision", "idx", "webdataset", "parquet"] | None = option(
        None,
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
    shard_samples: int = option(10_000, "samples in a shard that is written, at most")
    shard_mb: int = option(256, "megabytes in a shard that is written, at most (but always one sample)")

    def __post_init__(self) -> None:
        require(
            self.path is not None or self.source in ("digits", "torchvision"),
            "dataset.path is not set: give a folder or pattern of WebDataset shards, a folder of images, parquet or "
            "IDX files, or use dataset=digits",
        )
        require(
            self.path is not None or self.source == "torchvision" or (self.val_path is None and self.classes is None),
            "dataset.val_path and dataset.classes have no effect without dataset.path; set dataset.path too",
        )
        require(
            (self.source == "torchvision") == (self.torchvision is not None),
            "dataset=torchvision and dataset.torchvision=NAME belong together: give both, for example "
            "dataset=torchvision dataset.torchvision=CIFAR10",
        )
        require(
            self.source not in ("torchvision", "idx") or self.val_path is None,
            f"dataset.val_path has no effect with dataset.source={self.source}, which has its own validation part",
        )
        require(
            self.heldout >= 0 and (self.heldout < 1 or self.heldout == int(self.heldout)),
            f"dataset.heldout={self.heldout}: expected a part of the images (0 to 1), or a whole number a class",
        )
        require(
            not self.heldout or self.val_path is None,
            "dataset.heldout has no effect with dataset.val_path; leave one of the two out",
        )
        require(self.shard_samples >= 1, f"dataset.shard_samples={self.shard_samples}: expected 1 or more")
        require(self.shard_mb >= 1, f"dataset.shard_mb={self.shard_mb}: expected 1 or more")
        packing = [
            key
            for key, set_ in (
                ("heldout", self.heldout > 0),
                ("resort", self.resort),
                ("label_column", self.label_column is not None),
                ("image_column", self.image_column is not None),
                ("shard_samples", self.shard_samples != 10_000),
                ("shard_mb", self.shard_mb != 256),
            )
            if set_
        ]
        for key in packing:
            kinds = {
                "resort": (None, "webdataset"),
                "label_column": (None, "imagefolder", "parquet"),
                "image_column": (None, "parquet"),
            }.get(key)
            wrong = self.kind == "digits" or (kinds is not None and self.kind not in kinds)
            require(not wrong, f"dataset.{key} has no effect with dataset.source={self.kind}; leave it out")
            require(
                self.kind != "webdataset" or self.resort,
                f"dataset.{key} has no effect on shards that are read where they are; set dataset.resort=true to "
                "write them anew",
            )

    @property
    def kind(self) -> str | None:
        """The kind of collection that the person named; None where dataset.path is to tell."""
        return None if self.path is not None and self.source == "digits" else self.source

    @property
    def title(self) -> str:
        if self.name:
            return self.name
        if self.torchvision is not None:
            return self.torchvision.lower()
        if self.path is None:
            return str(self.source)
        parts = [p for p in PurePosixPath(self.path.split("://")[-1]).parts if not set(p) & set("*?[{") and p != "/"]
        folders = [p for p in parts if not p.endswith((".tar", ".parquet", ".arrow"))]
        return folders[-1] if folders else "data"
