"""Stored soft labels as those who train read them: an epoch at a time, the next one ahead, decoded to logits.

Shapes: N images of the set, n of them, C outputs.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt

from ddoq_ray.core.labels import codec_class, make_codec
from ddoq_ray.core.views.params import ViewSpec, view_params
from ddoq_ray.storage import layout
from ddoq_ray.storage.artifact import digest_of
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.label_log import LabelStore

MEMORY_BYTES = 64 << 20  # of an epoch's labels that are held in memory; more go to a file of their own
KEPT_BYTES = 256 << 20  # of labels of past epochs: the next student of the set asks for them again

Packed = npt.NDArray[np.uint8]


class EpochFile:
    """Labels of an epoch in a file without a name: they take no memory, and rows are read as they are asked for."""

    def __init__(self, store: LabelStore, epoch: int) -> None:
        """Copy them, some megabytes at a time; Raises as `LabelStore.pieces`."""
        self._file, self._nbytes = tempfile.TemporaryFile(), store.grid.nbytes  # noqa: SIM115, it goes with this object
        for piece in store.pieces(epoch):
            self._file.write(piece.data)
        self._file.flush()

    def __getitem__(self, index: npt.NDArray[np.int64]) -> Packed:
        """uint8 [n, nbytes] of images int64 [n]."""
        rows = np.empty((len(index), self._nbytes), np.uint8)
        for row, image in zip(rows, index.tolist(), strict=True):
            row[:] = np.frombuffer(os.pread(self._file.fileno(), self._nbytes, image * self._nbytes), np.uint8)
        return rows


class SoftLabels:
    """The labels of one image set.

    Labels of an epoch, indexed by images int64 [n], are uint8 [n, nbytes]: an array while they are small, else an
    `EpochFile`. Beside the epoch that is asked for, the next one is read, after the last the first (for a training that
    sees them again); small ones are kept.

    Attributes:
        store: Where they are.
    """

    def __init__(self, labels: Folder) -> None:
        """Open them; Raises as `LabelStore`."""
        self.store = LabelStore(labels)
        self._threads = ThreadPoolExecutor(1)  # one reader: epochs come in order, and the store is its own
        self._read: dict[int, Future[Packed | EpochFile]] = {}
        self._decoder: tuple[Any, Any, Any] | None = None

    def epoch(self, epoch: int) -> Packed | EpochFile:
        """The packed labels of an epoch.

        Raises:
            ValueError: There are none of that epoch; or a file is gone, damaged or of other labels.
        """
        grid = self.store.grid
        kept = max(2, KEPT_BYTES // max(1, grid.images * grid.nbytes))
        wanted = [epoch, (epoch + 1) % grid.epochs]
        for old in [e for e in self._read if e not in wanted][: max(0, len({*self._read, *wanted}) - kept)]:
            del self._read[old]
        for e in wanted:
            if e not in self._read:
                self._read[e] = self._threads.submit(self._load, e)
        try:
            return self._read[epoch].result()
        except BaseException:
            del self._read[epoch]  # what was mended meanwhile is read
            raise

    def _load(self, epoch: int) -> Packed | EpochFile:
        small = self.store.grid.images * self.store.grid.nbytes <= MEMORY_BYTES
        return self.store.read(epoch) if small else EpochFile(self.store, epoch)

    def decode(self, packed: Packed, device: Any = None) -> Any:
        """float32 [n, C] logits on the device, by what is stored beside the labels: no teacher is needed."""
        import torch

        if self._decoder is None or self._decoder[0] != device:
            self._decoder = (device, *decoder(self.store.folder, self.store.manifest, device))
        _, codec, head = self._decoder
        with torch.no_grad():
            return codec.decode(packed, head, device=device)


def views_of(manifest: Mapping[str, Any]) -> tuple[ViewSpec, int, tuple[int, int, int]]:
    """What was labelled: how views look, their seed, and (N, H, W) of the images that they are cut from.

    Raises:
        ValueError: They look in a way that this version does not know.
    """
    told = manifest["views"]
    seed, (images, height, width), ratio = told["seed"], told["stored"], tuple(told["ratio"])
    look = {key: value for key, value in told.items() if key not in ("seed", "stored")}
    unknown = sorted(set(look) - {field.name for field in fields(ViewSpec)})
    if unknown:
        raise ValueError(
            f"these labels are of views with {', '.join(unknown)}, which this version of ddoq-ray does not know: use "
            "the version that made them, or label anew (stages=[label], overwrite=true)"
        )
    return ViewSpec(**look | {"ratio": ratio}), seed, (images, height, width)


def check_views(store: LabelStore) -> None:
    """Draw the views of an epoch again, and refuse labels of others.

    Raises:
        ValueError: They are not those that were labelled, as with another version of this project or of SciPy.
    """
    spec, seed, stored = views_of(store.manifest)
    opened = store.open(store.grid.file(0))
    digest = hashlib.sha256()
    for first, end in store.grid.groups(opened.file):
        digest.update(view_params(spec, seed, opened.file.first_epoch, np.arange(first, end), stored).packed())
    if digest.hexdigest() != opened.record.views[0]:
        raise ValueError(
            f"{store.folder.uri} holds labels of other views than are drawn now: they were made by another version "
            "(core/views/params.py, or SciPy with CutMix). Use that one, or label anew (stages=[label], "
            "overwrite=true)"
        )


def decoder(labels: Folder, manifest: Mapping[str, Any], device: Any = None) -> tuple[Any, Any]:
    """The codec of stored labels, and the teacher's head where it needs that; Raises as `load_head`."""
    name = manifest["codec"]
    if not codec_class(name).packs_features:
        return make_codec(name, manifest["outputs"], None), None
    head = load_head(labels, manifest["head"], device)
    return make_codec(name, head.out_features, head.in_features), head


def load_head(labels: Folder, digest: str, device: Any) -> Any:
    """The linear head that was saved with the features: that of the teacher that made them, wherever it is now.

    Args:
        digest: sha256 of its file.
        device: Where it is wanted.

    Raises:
        ValueError: It is missing or damaged.
    """
    import safetensors.numpy
    import torch

    mend = f"remove {labels.path(layout.MANIFEST)} and run the label stage again, which writes it"
    try:
        data = labels.read(layout.HEAD)
    except FileNotFoundError:
        raise ValueError(f"{labels.path(layout.HEAD)} is missing, which feature labels need; {mend}") from None
    if digest_of(data) != digest:
        raise ValueError(f"{labels.path(layout.HEAD)} is damaged: it has other bytes than were written; {mend}")
    tensors = {name: torch.from_numpy(values) for name, values in safetensors.numpy.load(data).items()}
    classes, features = tensors["weight"].shape
    head = torch.nn.Linear(features, classes, bias="bias" in tensors, device=device)
    head.load_state_dict(tensors)
    return head.requires_grad_(False)
