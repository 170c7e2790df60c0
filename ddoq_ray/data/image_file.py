"""Labelled images of one size in a file of bytes: written once, as they are read, and mapped afterwards.

Beside `<place>.pixels`, the bytes, lies `<place>.npz`: labels, an order, and what was read. It is published last, so
that pixels without it are no images yet.

Shape suffixes: N images, S image size.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_KEY_BYTES = 16
_AT_ONCE = 1 << 16  # images whose keys are in one piece of the digest


@dataclass(frozen=True)
class Images:
    """Labelled images, mapped: what is not looked at takes no memory.

    Attributes:
        images: uint8 [N, 3, S, S].
        class_ids: int64 [N].
        order: int64 [N], rows by class, then by content.
        digest: of labels and content in that order.
    """

    images: npt.NDArray[np.uint8]
    class_ids: npt.NDArray[np.int64]
    order: npt.NDArray[np.int64]
    digest: str


def image_key(image: npt.NDArray[np.uint8]) -> bytes:
    """The digest of one image's pixels."""
    return hashlib.blake2b(image.tobytes(), digest_size=_KEY_BYTES).digest()


def order_of(class_ids: npt.NDArray[Any], keys: bytes | bytearray) -> tuple[npt.NDArray[np.int64], str]:
    """An order that does not depend on the one in which images came.

    Args:
        class_ids: integers [N].
        keys: of `image_key`, one after another.

    Returns:
        (rows int64 [N] by class, then by key; a digest of both in that order).
    """
    halves = np.frombuffer(keys, ">u8").reshape(-1, 2)  # as numbers they sort as the bytes do
    rows = np.lexsort((halves[:, 1], halves[:, 0], class_ids))
    digest = hashlib.blake2b(digest_size=8)
    for first in range(0, len(rows), _AT_ONCE):
        some = rows[first : first + _AT_ONCE]
        pieces = np.empty((len(some), 3), "<u8")
        pieces[:, 0] = class_ids[some]
        pieces[:, 1:] = halves[some].view("<u8")  # the bytes as they are
        digest.update(pieces.tobytes())
    return rows, digest.hexdigest()


class ImageFile:
    """Images of a training in a folder that is kept while it lasts.

    Attributes:
        pixels, index: the two files.
        source: what the images are read from, and how; those of another source are not taken for them.
    """

    def __init__(self, place: Path, source: Mapping[str, Any]) -> None:
        """Name the files; nothing is read yet."""
        self.pixels, self.index = place.with_suffix(".pixels"), place.with_suffix(".npz")
        self.source = json.dumps(source, sort_keys=True)

    def of_another_source(self) -> bool:
        """Whether images are there, and are read from something else."""
        return self.index.exists() and self._index()["source"].item() != self.source

    def open(self) -> Images | None:
        """The images, where they were written from this source."""
        if not self.index.exists():
            return None
        there = self._index()
        n, size = len(there["class_ids"]), int(there["size"])
        if there["source"].item() != self.source or self.pixels.stat().st_size != n * 3 * size * size:
            return None
        mapped = np.memmap(self.pixels, np.uint8, "r", shape=(n, 3, size, size))
        return Images(mapped, there["class_ids"], there["order"], there["digest"].item())

    def _index(self) -> dict[str, npt.NDArray[Any]]:
        with np.load(self.index) as file:
            return dict(file)

    def write(self, pictures: Iterable[tuple[int, npt.NDArray[np.uint8]]], size: int) -> int:
        """Write images one by one; their number. Of no images nothing is written.

        Args:
            pictures: (label, uint8 [3, S, S]).
            size: S.
        """
        self.pixels.parent.mkdir(parents=True, exist_ok=True)
        self.index.unlink(missing_ok=True)
        class_ids, keys = array("q"), bytearray()
        work = self.pixels.with_suffix(".tmp")
        try:
            with open(work, "wb") as file:
                for class_id, image in pictures:
                    assert image.shape == (3, size, size) and image.dtype == np.uint8
                    file.write(image.tobytes())
                    class_ids.append(class_id)
                    keys += image_key(image)
            if class_ids:
                labels = np.frombuffer(class_ids, np.int64)
                order, digest = order_of(labels, keys)
                os.replace(work, self.pixels)
                with open(work, "wb") as file:
                    np.savez(file, class_ids=labels, order=order, digest=digest, size=size, source=self.source)
                os.replace(work, self.index)
        finally:
            with contextlib.suppress(FileNotFoundError):
                work.unlink()
        return len(class_ids)
