"""Labelled image collections that `prepare` turns into shards: one module a kind, and how a kind is found out."""

from __future__ import annotations

import posixpath

import fsspec

from ddoq_ray.config.dataset import DatasetConfig
from ddoq_ray.data.collections.archives import refuse_archive
from ddoq_ray.data.collections.contents import not_images
from ddoq_ray.data.collections.digits import DIGIT_NAMES, DIGIT_SPLITS, digits
from ddoq_ray.data.collections.listing import Source, Survey, absolute, image_extension, looking_at
from ddoq_ray.data.collections.metadata import is_metadata
from ddoq_ray.data.collections.table_files import is_table
from ddoq_ray.data.collections.tree import leftover, top, walk
from ddoq_ray.data.collections.unread_places import refuse_unread

__all__ = ["DIGIT_NAMES", "DIGIT_SPLITS", "digits", "kind_of", "open_source", "places_of", "survey_of"]


def kind_of(dataset: DatasetConfig) -> str:
    """The kind of a collection: the one given, else what `dataset.path` shows.

    A path that is missing or shows nothing is taken for shards, whose reader says what it expected.

    Raises:
        ValueError: When it cannot be looked at, or could be read as several kinds; names them.
    """
    if dataset.kind is not None:
        return dataset.kind
    with looking_at(places_of(dataset)):
        return _kind_shown(str(dataset.path))


def places_of(dataset: DatasetConfig) -> str:
    """The keys that say where the images are, for an error."""
    held = "" if dataset.val_path is None else f", dataset.val_path={dataset.val_path}"
    return f"dataset.path={dataset.path}{held}"


def _kind_shown(path: str) -> str:
    fs, root = fsspec.core.url_to_fs(absolute(path))
    there = "://" not in absolute(path) and fs.exists(root)  # brackets and braces may be part of a name
    if not there or not fs.isdir(root):
        if path.lower().endswith((".parquet", ".arrow")):
            return "parquet"
        if there or "://" in path:
            refuse_archive(path, root if there else path)
    if (not there and any(ch in path for ch in "*?[{")) or path.endswith(".tar"):
        return "webdataset"
    found = _candidates(path)
    if len(found) > 1:
        choices = " or ".join(f"dataset.source={kind} ({why})" for kind, why in found.items())
        raise ValueError(f"dataset.path={path} can be read in several ways: {choices}; say which")
    return next(iter(found), "webdataset")


def _candidates(path: str) -> dict[str, str]:
    """kind -> what speaks for it: names of files and folders."""
    from ddoq_ray.data.collections.idx import is_training_idx
    from ddoq_ray.data.collections.torchvision_sets import found_there

    path = absolute(path)
    fs, root = fsspec.core.url_to_fs(path)
    if not fs.isdir(root):
        return {}
    folders, files = top(path)
    found = {}
    tars = [f for f in files if f.endswith(".tar")]
    if tars:
        if "classes.json" not in files:
            refuse_archive(path, posixpath.join(path, tars[0]))
        found["webdataset"] = f"{len(tars)} *.tar, such as {tars[0]}"
    parquet = [f for f in files if is_table(f)]
    if not parquet and "data" in folders:
        parquet = [f for f in top(posixpath.join(path, "data"))[1] if is_table(f)]
    if parquet:
        found["parquet"] = f"{len(parquet)} {'*.arrow' if parquet[0].endswith('.arrow') else '*.parquet'}, such as "
        found["parquet"] += parquet[0]
    idx = [name for name in (*files, *folders) if is_training_idx(name)]
    if idx:
        found["idx"] = idx[0]
    sets = found_there(folders)
    if sets:
        found["torchvision"] = f"with dataset.torchvision={' or '.join(sets)}"
        return found
    tables = [f for f in files if is_metadata(f)]
    if tables:
        found["imagefolder"] = tables[0]
    elif (below := _first_below(path)) is not None and (below[0] != "parquet" or "parquet" not in found):
        found.setdefault(*below)
    return found


def _first_below(root: str) -> tuple[str, str] | None:
    """(kind, the file that shows it): the first image, or file of many, in a folder of this one, at any depth."""
    unknown: list[tuple[str, int]] = []
    for here, _, files in walk(root):
        for name, size in files:
            if here and not leftover(name):
                where = posixpath.join(here, name)
                if is_table(name):
                    return "parquet", where
                if image_extension(name) is not None or is_metadata(name):
                    return "imagefolder", where
                if len(unknown) < 100:
                    unknown.append((where, size))
    none = not_images(root, unknown)
    images = [name for name, _ in unknown if name not in none or " pictures are not read" in none[name]]
    return ("imagefolder", images[0]) if images else None


def open_source(dataset: DatasetConfig) -> Source | None:
    """The collection to pack; None for digits, and for shards that are read where they are.

    Raises:
        ValueError: When it is missing, cannot be looked at, or its kind is ambiguous.
    """
    kind = kind_of(dataset)
    with looking_at(places_of(dataset)):
        return _opened(kind, dataset)


def survey_of(source: Source, asked: str) -> Survey:
    """The survey of a collection.

    Args:
        asked: The key and the place, for the error.

    Raises:
        ValueError: When it is missing, empty or ambiguous, or cannot be looked at.
    """
    with looking_at(asked):
        return source.survey()


def _opened(kind: str, dataset: DatasetConfig) -> Source | None:
    path = str(dataset.path)
    if kind == "imagefolder":
        from ddoq_ray.data.collections.folders import ImageFolder

        return ImageFolder(path, dataset.val_path, dataset.classes, dataset.label_column)
    if kind == "torchvision":
        from ddoq_ray.data.collections.torchvision_sets import TorchvisionSet, found_there

        if dataset.torchvision is None:
            names = " or ".join(f"dataset.torchvision={name}" for name in found_there(top(absolute(path))[0]))
            raise ValueError(f"dataset.path={path} holds files of torchvision's; add dataset=torchvision {names}")
        return TorchvisionSet(dataset.torchvision, dataset.path, dataset.classes)
    if kind == "idx":
        from ddoq_ray.data.collections.idx import Idx

        return Idx(path, dataset.classes)
    if kind == "parquet":
        from ddoq_ray.data.collections.parquet import Parquet

        return Parquet(path, dataset.val_path, dataset.classes, dataset.label_column, dataset.image_column)
    if kind == "webdataset" and dataset.resort:
        from ddoq_ray.data.collections.tars import Tars

        return Tars(path, dataset.val_path, dataset.classes)
    if kind == "webdataset" and dataset.kind is None:
        refuse_unread(path)
    return None
