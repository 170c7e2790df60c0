"""`ddoq_ray.load`: a distilled dataset, with its stored soft labels where they are wanted."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal, overload

from ddoq_ray.data.image_set import DistilledDataset, image_tars
from ddoq_ray.data.labelled_set import LabelledDataset
from ddoq_ray.storage.folder import Folder


@overload
def load(
    path: str | os.PathLike[str],
    transform: Callable[[Any], Any] | None = None,
    cache: str | os.PathLike[str] | None = None,
    *,
    labels: Literal[False] = False,
) -> DistilledDataset: ...
@overload
def load(path: str | os.PathLike[str], *, labels: Literal[True] | str) -> LabelledDataset: ...
def load(
    path: str | os.PathLike[str],
    transform: Callable[[Any], Any] | None = None,
    cache: str | os.PathLike[str] | None = None,
    *,
    labels: bool | str = False,
) -> DistilledDataset | LabelledDataset:
    """Load a distilled dataset.

    Args:
        path: A run directory, its images/ folder, or a glob of image shards; local or a URL. With `labels` a folder
            that has images/ and labels/: a run directory, or that of another method below its compare/.
        transform: Applied to each PIL picture; by default it becomes a uint8 tensor [3, H, W].
        cache: Of shards in a store: a folder for their copies, which the next `load` finds there. By default they are
            removed with the dataset.
        labels: True: with the stored soft labels and the views that they are of; a word: those in labels/<word>, where
            there are several. Neither `transform` nor `cache` is for them.

    Raises:
        ValueError: When there are no image shards or no labels, or labels of something else.
    """
    path = os.fspath(path)
    if labels is False:
        return DistilledDataset(image_tars(path), transform, None if cache is None else os.fspath(cache))
    if transform is not None or cache is not None:
        raise ValueError("load(labels=True) gives views as they were labelled: leave transform and cache out")
    return LabelledDataset(Folder(path), None if labels is True else labels)
