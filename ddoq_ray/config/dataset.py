"""What is distilled: shards of labelled images and their class list."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from ddoq_ray.config.schema import option, require


@dataclass(frozen=True)
class DatasetConfig:
    name: str | None = option(None, "a word for it in paths and tables; by default the source's or the folder's")
    source: Literal["digits"] | None = option(None, "a built-in collection to prepare when no path is given")
    path: str | None = option(None, "folder, glob or brace pattern of WebDataset shards to distil")
    val_path: str | None = option(None, "the same for the real validation images; only ever used to measure")
    classes: str | None = option(None, "classes.json; by default the one beside the shards")

    def __post_init__(self) -> None:
        require(
            self.path is not None or self.source is not None,
            "dataset.path is not set: give a folder or pattern of WebDataset shards, or use dataset=digits",
        )
        require(
            self.path is not None or (self.val_path is None and self.classes is None),
            "dataset.val_path and dataset.classes have no effect without dataset.path; set dataset.path too",
        )

    @property
    def title(self) -> str:
        if self.name:
            return self.name
        if self.path is None:
            return str(self.source)
        parts = [p for p in PurePosixPath(self.path.split("://")[-1]).parts if not set(p) & set("*?[{") and p != "/"]
        folders = [p for p in parts if not p.endswith(".tar")]
        return folders[-1] if folders else "data"
