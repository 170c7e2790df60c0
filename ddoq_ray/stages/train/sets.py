"""What a training worker holds: one image set at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ddoq_ray.config import RunConfig
from ddoq_ray.data.image_set import load_image_arrays
from ddoq_ray.data.pixel_rows import (
    FileRows,
    Labelled,
    MemoryRows,
    Shards,
    common_shape,
    decode_set,
    decode_shards,
    read_record,
    record_of,
    write_record,
)
from ddoq_ray.execution.workers import say
from ddoq_ray.stages.train.memory import GB, PLACES, Room, Where
from ddoq_ray.stages.train.ranks import Ranks
from ddoq_ray.storage import layout
from ddoq_ray.storage.artifact import Artifact, digest_of
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.quarantine import Refusal

if TYPE_CHECKING:  # torch: only in the worker
    from ddoq_ray.models.training.images import Images

LOOK_SECONDS = 0.5  # between two looks for the file that the node's first worker writes


@dataclass(frozen=True)
class Set:
    """An image set as a student sees it.

    Attributes:
        images: uint8 [N, 3, H, W], wherever they are kept.
        class_ids: int64 [N].
        weights: float64 [N], companion weights; they sum to 1 within each class.
        refused: Real images that could not be read; those of a distilled set are an error.
    """

    images: Images
    class_ids: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float64]
    refused: int = 0


@dataclass(frozen=True)
class Real:
    """The shards of all the real images, with the samples of each by their index, and its digest where it is known."""

    urls: tuple[str, ...] = ()
    samples: tuple[int, ...] = ()
    digests: tuple[str, ...] = ()


class Sets:
    """The image set of the current row, decoded once: rows of a set follow one another."""

    # One worker's seat: what it reads, and where it is.
    def __init__(
        self, run: Folder, config: RunConfig, num_classes: int, ranks: Ranks, room: Room, group: int = 0
    ) -> None:
        """`group`: of those that are trained side by side, each of which has files of its own."""
        self.group = group
        self.run, self.config, self.num_classes, self.ranks, self.room = run, config, num_classes, ranks, room
        self._held: tuple[str | None, Set] | None = None
        self._file: str | None = None

    def get(self, name: str | None, real: Real, digest: object = None) -> Set:
        """The set in the folder `name`, or all the real images for None; `digest` is that of the set's bytes."""
        if self._held is None or self._held[0] != name:
            self.close()  # the old one goes first
            self._held = (name, self._real(real, digest) if name is None else self._distilled(name, digest))
        return self._held[1]

    def close(self) -> None:
        """Let the set go, with its file."""
        self._held = None
        if self._file is not None and self.room.first:
            for path in (record_of(self._file), self._file):
                if os.path.exists(path):
                    os.unlink(path)
        self._file = None

    @property
    def _side(self) -> int:
        return self.config.protocol.stored_side(self.config.student.image_size)

    def _distilled(self, name: str, digest: object) -> Set:
        images, size = self.run / name, self.config.student.image_size
        manifest = Artifact(images, "synthesize").manifest() or {}
        # By the manifest: on NFS a listing may be of a time when some of them were not there yet.
        names = [layout.image_tar(s["name"]) for s in manifest.get("shards", ())] or images.names(layout.IMAGE_SHARDS)
        shards = [images.path(n) for n in sorted(names)]
        where = self._place(name, int(manifest.get("items", 0)) * 3 * max(size, self._side) ** 2)
        if where == "file":
            shape = common_shape(shards, size, self._side)
            found = self._in_file((name, digest, shape), shape, lambda rows: decode_set(shards, rows))
        else:
            arrays = load_image_arrays(shards, size, self._side)
            found = Labelled(MemoryRows(arrays.images), arrays.class_ids, arrays.weights)
        return Set(self._images(found, where), found.class_ids, found.weights)

    def _real(self, real: Real, digest: object) -> Set:
        resize = self.config.encoder.resize
        shards = Shards(real.urls, real.samples, self.num_classes, self._side, resize, real.digests)
        where = self._place("full", int(np.prod(shards.shape)))
        threads = max(1, int(self.config.cluster.trainer.num_cpus))
        if where == "file":
            key = ("full", digest, shards.shape, resize)
            found = self._in_file(key, shards.shape, lambda rows: decode_shards(shards, rows, threads))
        else:
            found = decode_shards(shards, MemoryRows(np.empty(shards.shape, np.uint8)), threads)
        self._check_refused(found.refused, len(found.class_ids))
        per_class = np.bincount(found.class_ids, minlength=self.num_classes)
        weights = 1.0 / per_class[found.class_ids]
        return Set(self._images(found, where), found.class_ids, weights, len(found.refused))

    def _check_refused(self, bad: Sequence[Refusal], usable: int) -> None:
        if len(bad) > self.config.max_bad_fraction * (len(bad) + usable):
            raise ValueError(
                f"{len(bad)} of {len(bad) + usable} training images cannot be read for the row `full`, more "
                f"than max_bad_fraction={self.config.max_bad_fraction}; the first is {bad[0].name}: {bad[0].reason}"
            )

    def fits_device(self, nbytes: int) -> bool:
        """Whether so many bytes more may be kept on this rank's device."""
        return self._room().place(nbytes) == "device"

    def _room(self) -> Room:
        import torch

        device = torch.device(self.ranks.device)
        if device.type == "cuda" and torch.cuda.is_available():
            return replace(self.room, device=float(torch.cuda.mem_get_info(device)[0]))
        return self.room

    def _place(self, what: str, nbytes: int) -> Where:
        """The same on all ranks: the worst of theirs."""
        where = PLACES[self.ranks.most(PLACES.index(self._room().place(nbytes)))]
        if self.ranks.rank == 0 and where == "file":
            say(f"train      the images of {what} ({nbytes / GB:,.1f} GB) are kept in a file on each node's disk")
        return where

    def _in_file(self, key: object, shape: tuple[int, ...], fill: Callable[[FileRows], Labelled]) -> Labelled:
        """Of what `fill` makes, one file a node: written by the node's first worker, whole before others see it."""
        n, channels, height, width = shape
        nbytes = n * channels * height * width
        name = f"ddoq_ray-{digest_of([self.run.uri, self.group, repr(key)])[:16]}.pixels"
        self._file = path = os.path.join(self.room.folder(0), name)
        while not self.room.first and not os.path.exists(record_of(path)):
            time.sleep(LOOK_SECONDS)
        if not os.path.exists(record_of(path)):  # else it is there, or was left by a run that was cut off
            self.room.folder(nbytes)
            write_record(path, fill(FileRows(path, (n, channels, height, width))))
        return read_record(path)

    def _images(self, found: Labelled, where: Where) -> Images:
        import torch

        from ddoq_ray.models.training.images import Gathered, Resident

        device, rows = torch.device(self.ranks.device), found.rows
        if isinstance(rows, MemoryRows) and (where == "device" or device.type == "cpu"):
            return Resident(torch.from_numpy(rows.array).to(device), self.ranks.world)
        return Gathered(rows, device)
