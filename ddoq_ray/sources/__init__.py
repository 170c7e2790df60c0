"""Labelled image collections that `prepare` turns into shards: one module a kind, and how a kind is found out."""

from __future__ import annotations

import posixpath

import fsspec

from ddoq_ray.config.dataset import DatasetConfig
from ddoq_ray.sources.digits import DIGIT_NAMES, DIGIT_SPLITS, digits
from ddoq_ray.sources.listing import Source, absolute, image_extension
from ddoq_ray.sources.tree import top, walk

__all__ = ["DIGIT_NAMES", "DIGIT_SPLITS", "digits", "kind_of", "open_source"]


def kind_of(dataset: DatasetConfig) -> str:
    """The kind of a collection: the one given, else what `dataset.path` shows.

    A path that is missing or shows nothing is taken for shards, whose reader says what it expected.

    Raises:
        ValueError: When the path could be read as several kinds; names them.
    """
    if dataset.kind is not None:
        return dataset.kind
    path = str(dataset.path)
    if path.endswith(".parquet"):
        return "parquet"
    if any(ch in path for ch in "*?[{") or path.endswith(".tar"):
        return "webdataset"
    found = _candidates(path)
    if len(found) > 1:
        choices = " or ".join(f"dataset.source={kind} ({why})" for kind, why in found.items())
        raise ValueError(f"dataset.path={path} can be read in several ways: {choices}; say which")
    return next(iter(found), "webdataset")


def _candidates(path: str) -> dict[str, str]:
    """kind -> what speaks for it: names of files and folders."""
    from ddoq_ray.sources.idx import FILES
    from ddoq_ray.sources.metadata import METADATA_FILES
    from ddoq_ray.sources.torchvision_sets import found_there

    fs, root = fsspec.core.url_to_fs(path)
    if not fs.isdir(root):
        return {}
    path = absolute(path)
    folders, files = top(path)
    found = {}
    tars = [f for f in files if f.endswith(".tar")]
    if tars:
        found["webdataset"] = f"{len(tars)} *.tar, such as {tars[0]}"
    parquet = [f for f in files if f.endswith(".parquet")]
    if not parquet and "data" in folders:
        parquet = [posixpath.basename(n) for n in fs.glob(f"{root.rstrip('/')}/data/*.parquet")]
    if parquet:
        found["parquet"] = f"{len(parquet)} *.parquet, such as {parquet[0]}"
    idx = [f for f in files if f.removesuffix(".gz") == FILES["train"][0]]
    if idx:
        found["idx"] = idx[0]
    sets = found_there(folders)
    if sets:
        found["torchvision"] = f"with dataset.torchvision={' or '.join(sets)}"
        return found
    tables = [f for f in files if f in METADATA_FILES]
    sign = tables[0] if tables else _image_below(path)
    if sign is not None:
        found["imagefolder"] = sign
    return found


def _image_below(root: str) -> str | None:
    """The first image file in a folder of this one, at any depth; None when there is none."""
    for here, _, files in walk(root):
        for name, _ in files:
            if here and image_extension(name) is not None:
                return posixpath.join(here, name)
    return None


def open_source(dataset: DatasetConfig) -> Source | None:
    """The collection to pack; None for digits, and for shards that are read where they are.

    Raises:
        ValueError: When it is missing or its kind is ambiguous.
    """
    kind = kind_of(dataset)
    path = str(dataset.path)
    if kind == "imagefolder":
        from ddoq_ray.sources.folders import ImageFolder

        return ImageFolder(path, dataset.val_path, dataset.classes, dataset.label_column)
    if kind == "torchvision":
        from ddoq_ray.sources.torchvision_sets import TorchvisionSet

        if dataset.torchvision is None:
            raise ValueError(
                f"dataset.path={path} holds files of torchvision's; add dataset=torchvision dataset.torchvision=NAME"
            )
        return TorchvisionSet(dataset.torchvision, dataset.path, dataset.classes)
    if kind == "idx":
        from ddoq_ray.sources.idx import Idx

        return Idx(path, dataset.classes)
    if kind == "parquet":
        from ddoq_ray.sources.parquet import Parquet

        return Parquet(path, dataset.val_path, dataset.classes, dataset.label_column)
    if kind == "webdataset" and dataset.resort:
        from ddoq_ray.sources.tars import Tars

        return Tars(path, dataset.val_path, dataset.classes)
    return None
