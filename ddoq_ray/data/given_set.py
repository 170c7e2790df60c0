"""A distilled set that another method made: class folders, WebDataset or Parquet files, with weights or without.

It is read as any labelled collection is. Its classes are found among the data's by name, else by number: never by the
order of its folders.

Weights lie where each form has room for them: `weight` in a sample's .json (as this package's own sets have it), a
column `weight`, or, beside class folders, a ``weights.json`` of {"folder/file.png": weight}.
"""

from __future__ import annotations

import json
import math
import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ddoq_ray.config.dataset import DatasetConfig
from ddoq_ray.data.collections import open_source, survey_of
from ddoq_ray.data.collections.classes import shown
from ddoq_ray.data.collections.containers import row_names
from ddoq_ray.data.collections.folders import ImageFolder
from ddoq_ray.data.collections.listing import Listing, Source, harmless
from ddoq_ray.data.collections.parquet import Parquet
from ddoq_ray.data.collections.table_columns import read_images, schema_of
from ddoq_ray.data.collections.tars import Tars
from ddoq_ray.data.tar_samples import labelled, open_samples
from ddoq_ray.storage.records import ClassInfo
from ddoq_ray.storage.transport import open_shard, read_file

WEIGHT = "weight"
WEIGHTS_FILE = "weights.json"
_NUMBER = re.compile(r"(?:new|class)?[_-]?0*(\d+)")  # 00007 (RDED), 7 (D4M), new007 (SRe2L)


@dataclass(frozen=True)
class GivenSet:
    """The images of a set, class by class, in the order of their names within each.

    Attributes:
        source: What reads them.
        names: Of each image, as the source calls it.
        class_ids: int64 [N], the data's.
        weights: float64 [N], which sum to 1 in a class.
        weighted: Whether the set has weights of its own; else all of a class are alike.
    """

    source: Source
    names: list[str]
    class_ids: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float64]
    weighted: bool

    @property
    def counts(self) -> dict[int, int]:
        """class_id -> images."""
        found, counts = np.unique(self.class_ids, return_counts=True)
        return dict(zip(found.tolist(), counts.tolist(), strict=True))


def given_set(path: str, classes: Sequence[ClassInfo], class_list: str) -> GivenSet:
    """Look at the set in a folder (or at a glob or brace pattern of shards or tables).

    Args:
        path: Where it is.
        classes: The data's.
        class_list: Path of the data's class list, for shards that have none beside them.

    Raises:
        ValueError: Nothing is there, it cannot be told what it is, its classes are not the data's, an image has no
            label, or its weights are none.
    """
    try:
        source = _source(path, class_list)
        survey = survey_of(source, f"images.path={path}")
    except ValueError as error:
        told = str(error).replace("dataset.path", "images.path")
        if "dataset." in told:  # as of the data, whose keys say nothing of this set
            told += "; but dataset's keys are the data's: name the set's own columns or classes so that they are known"
        raise ValueError(told if "images.path" in told else f"images.path={path}: {told}") from error
    if survey.val is not None and survey.val.names:
        raise ValueError(
            f"images.path={path} holds a training and a validation part ({len(survey.train.names):,} and "
            f"{len(survey.val.names):,} images); a distilled set is one: give the folder of its training part"
        )
    listing = survey.train
    lost = [r for r in listing.refused if not harmless(r)]
    if lost:
        raise ValueError(
            f"images.path={path}: {len(lost):,} images cannot be used, and a set is used whole; the first is "
            f"{lost[0].name}: {lost[0].reason}"
        )
    ids = np.asarray(class_places([c.name for c in survey.classes], classes, path), np.int64)[listing.class_ids]
    order = np.argsort(ids, kind="stable")
    names = [listing.names[i] for i in order.tolist()]
    ids = ids[order]
    own = _weights(source, listing)
    raw = None if own is None else np.asarray([own.get(name, math.nan) for name in names])
    return GivenSet(source, names, ids, _normalised(raw, ids, names, path), raw is not None)


def _source(path: str, class_list: str) -> Source:
    found = open_source(DatasetConfig(source=None, path=path))
    if found is not None:
        return found
    shards = open_source(DatasetConfig(source="webdataset", path=path, resort=True))
    assert isinstance(shards, Tars)
    try:
        read_file(shards.classes)
    except FileNotFoundError:
        shards.classes = class_list
    return shards


def class_places(names: Sequence[str], classes: Sequence[ClassInfo], path: str) -> list[int]:
    """The data's class_id of each of a set's classes: by name, else by number.

    Raises:
        ValueError: Some are neither.

    >>> class_places(["new001", "new000"], [ClassInfo(0, "cat", "cat"), ClassInfo(1, "dog", "dog")], "set")
    [1, 0]
    """
    by_name = {c.name: c.class_id for c in classes}
    if all(name in by_name for name in names):
        return [by_name[name] for name in names]
    numbers = [_NUMBER.fullmatch(name) for name in names]
    places = [int(n[1]) for n in numbers if n is not None]
    if len(places) == len(names) == len(set(places)) and max(places, default=0) < len(classes):
        return places
    foreign = [name for name in names if name not in by_name]
    raise ValueError(
        f"images.path={path}: {len(foreign)} of its {len(names)} classes are not the data's: {shown(foreign)}; the "
        f"data has {shown([c.name for c in classes])}. Name the folders (or the labels) as classes.json of the run's "
        f"data names its classes, or by their numbers there, 0 to {len(classes) - 1}"
    )


def _normalised(
    raw: npt.NDArray[np.float64] | None, ids: npt.NDArray[np.int64], names: Sequence[str], path: str
) -> npt.NDArray[np.float64]:
    if raw is None:
        raw = np.ones(len(ids))
    bad = np.flatnonzero(~(np.isfinite(raw) & (raw >= 0)))
    if len(bad):
        what = "none that is a number" if np.isnan(raw[bad[0]]) else f"{raw[bad[0]]}"
        raise ValueError(
            f"images.path={path}: {len(bad):,} of {len(raw):,} images have no usable weight; the first is "
            f"{names[int(bad[0])]}, with {what}: expected a number, 0 or more, for each image, or for none"
        )
    totals = np.bincount(ids, raw)
    if not ((totals[np.unique(ids)] > 0) & np.isfinite(totals[np.unique(ids)])).all():
        raise ValueError(
            f"images.path={path}: the weights of a class are 0 alone, or their sum is infinite; expected one above 0 "
            "in each class"
        )
    return np.asarray(raw / totals[ids])


def _weights(source: Source, listing: Listing) -> dict[str, float] | None:
    """Name -> weight, as far as the set has them; None where it has none."""
    if isinstance(source, Tars):
        pairs: Iterable[tuple[str, Any]] = _tar_weights(source)
    elif isinstance(source, Parquet):
        pairs = _table_weights(source)
    elif isinstance(source, ImageFolder):
        pairs = _folder_weights(source)
    else:
        pairs = ()
    there = {name: value for name, value in pairs if value is not None}
    if not there:
        return None
    if not any(name in there for name in listing.names):
        raise ValueError(
            f"images.path: {WEIGHTS_FILE} names none of the set's images: it has {shown(list(there))}, and they are "
            f"called {shown(listing.names)}; name them so, or take the file away for equal weights"
        )
    gone = list(there.keys() - set(listing.names)) if isinstance(source, ImageFolder) else []
    if gone:
        raise ValueError(
            f"images.path: {WEIGHTS_FILE} has weights of {len(gone):,} images that are not there, such as "
            f"{shown(sorted(gone))}; bring them, or take them out of the file"
        )
    return {name: _number(value) for name, value in there.items()}


def _number(value: Any) -> float:
    """A weight as it is given; NaN for what is none."""
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:  # a whole number of hundreds of digits
        return math.nan


def _facts(extension: str, size: int) -> bool:
    return extension in ("cls", "json")


def _tar_weights(source: Tars) -> Iterator[tuple[str, Any]]:
    for container, shard in enumerate(source.containers()):
        with open_shard(shard) as f:
            tar = open_samples(f, lambda bad: None)
            for row, (group, _) in enumerate(labelled(tar, lambda bad: None, _facts) if tar is not None else ()):
                try:
                    facts = json.loads(group.members.get("json") or b"{}")
                except ValueError:
                    facts = {}
                yield row_names(container, [row])[0], facts.get(WEIGHT) if isinstance(facts, dict) else None


def _table_weights(source: Parquet) -> Iterator[tuple[str, Any]]:
    for container, file in enumerate(source.containers()):
        if WEIGHT in schema_of(file)[0].names:
            for row, value in enumerate(read_images(file, WEIGHT)):
                yield row_names(container, [row])[0], value


def _folder_weights(source: ImageFolder) -> Iterator[tuple[str, Any]]:
    place = posixpath.join(source.root, WEIGHTS_FILE)
    try:
        rows = json.loads(read_file(place))
    except FileNotFoundError:
        return
    except OSError as error:
        raise ValueError(f"{place} cannot be read: {error.strerror or error}; mend it, or move it away") from None
    except (ValueError, RecursionError) as error:  # the latter of brackets without end
        raise ValueError(f"{place} is not JSON: {error}; expected an object of file names and weights") from None
    if not isinstance(rows, dict):
        raise ValueError(f"{place}: expected a JSON object of file names and weights, got a {type(rows).__name__}")
    yield from rows.items()
