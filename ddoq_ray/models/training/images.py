"""The images of a student wherever they are kept, and the views it trains on, in the order of its epoch.

On the device: views are cut there. In host memory or in a file of this machine: the rows of a batch and of the partners
that are mixed in are read a batch ahead by a thread, and only these go to the device. The views are the same, bit for
bit.

Shape suffixes: N images, b of a batch on this rank, n rows that are read for it, S view size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ddoq_ray.core.transfers import on_device, pinned
from ddoq_ray.core.views.params import Float64, Int64, ViewParams, ViewSpec, view_params
from ddoq_ray.core.views.render import render, render_epochs
from ddoq_ray.data.pixel_rows import PixelRows

ParamsOf = Callable[[Int64], ViewParams]  # of images int64 [b], at one epoch
_AT_ONCE = 131_072  # images whose parameters are drawn for a whole epoch: some 13 MB
_SMALL = 2**20  # values of the views that are rendered in one call, where batches or whole epochs are smaller
_WHOLE = 2**24  # values of the views of an epoch, up to which they are rendered together: 64 MB
ROOM = 2**24  # values of the views of first epochs that wait for the next student of the set: 64 MB


@dataclass(frozen=True)
class Views:
    """Views of some images at an epoch.

    Attributes:
        pixels: float32 [b, 3, S, S] in [0, 1], on the device.
        index: int64 [b], the images.
        drawn: Parameters, of these views and maybe of others that were drawn with them.
        rows: Which of `drawn` are of these views, b of them: taking all of them each time would cost a small student
            as much as its labels.
    """

    pixels: Tensor
    index: Int64
    drawn: ViewParams
    rows: Int64 | slice

    @property
    def params(self) -> ViewParams:
        """What was drawn for these views."""
        return self.drawn.take(self.rows)

    @property
    def partner(self) -> Int64:
        """int64 [b], whose view is mixed in; -1 = none."""
        return self.drawn.partner[self.rows]

    @property
    def kept(self) -> Float64:
        """float64 [b], the share of each view that its own image keeps."""
        return self.drawn.lam[self.rows]


class Images(Protocol):
    """A set of N images, uint8."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def views(self, batches: Iterable[Int64], spec: ViewSpec, seed: int, epoch: int) -> Iterator[Views]:
        """The views of batches int64 [b], in their order."""


@dataclass(frozen=True)
class _Epochs:
    """Views of a whole set at epochs that follow each other.

    Attributes:
        first: The first of E epochs.
        pixels: float32 [E * N, 3, S, S], epoch after epoch.
        params: Of these.
    """

    first: int
    pixels: Tensor
    params: ViewParams


class Resident:
    """Images uint8 [N, 3, H, W] on the device that trains.

    Of more than two `ranks`, none renders a whole epoch for its share, unless that is tiny. All students of a set see
    the same views, so those of its first epochs are kept for the next student, as many as `room` values hold.
    """

    def __init__(self, images: Tensor, ranks: int = 1, *, room: int = ROOM) -> None:
        self.images, self.ranks, self.room = images, ranks, room
        self._ready: dict[tuple[ViewSpec, int, int], _Epochs] = {}  # the last one may be beyond what is kept

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.images.shape)

    def __len__(self) -> int:
        return len(self.images)

    def views(self, batches: Iterable[Int64], spec: ViewSpec, seed: int, epoch: int) -> Iterator[Views]:
        most = _SMALL // (3 * spec.size**2)
        if len(self) * 3 * spec.size**2 <= (_WHOLE if self.ranks <= 2 else _SMALL // 2):
            yield from self._of_ready(batches, spec, seed, epoch, max(1, most // len(self)))
            return
        params_of = epoch_params(spec, seed, epoch, self.images.shape)
        for group in _grouped(batches, most):
            index = np.concatenate(group)
            params = params_of(index)
            pixels = render(self.images, index, spec.size, params, params_of)
            ends = np.cumsum([len(part) for part in group])
            for part, end in zip(group, ends, strict=True):
                rows = slice(end - len(part), end)
                yield Views(pixels[rows], part, params, rows)

    def _of_ready(self, batches: Iterable[Int64], spec: ViewSpec, seed: int, epoch: int, ahead: int) -> Iterator[Views]:
        """Views of a set that is so small that epochs of it, `ahead` of them, are rendered in one call."""
        key = (spec, seed, epoch // ahead)
        ready = self._ready.get(key)
        if ready is None:
            if sum(held.pixels.numel() for held in self._ready.values()) > self.room:
                self._ready.popitem()
            first = epoch // ahead * ahead
            self._ready[key] = ready = self._rendered(spec, seed, range(first, first + ahead))
        start = (epoch - ready.first) * len(self)
        for part in batches:
            rows = start + part
            pixels = ready.pixels.index_select(0, on_device(rows, ready.pixels.device))
            yield Views(pixels, part, ready.params, rows)

    def _rendered(self, spec: ViewSpec, seed: int, epochs: range) -> _Epochs:
        count, _, height, width = self.images.shape
        index, epoch = np.tile(np.arange(count), len(epochs)), np.arange(epochs.start, epochs.stop).repeat(count)
        params = view_params(spec, seed, epoch, index, (count, height, width))
        return _Epochs(epochs.start, render_epochs(self.images, spec.size, params), params)


def _grouped(batches: Iterable[Int64], rows: int) -> Iterator[list[Int64]]:
    """Batches that follow each other, as many as have at most `rows` rows together; a larger one alone.

    A render of few small views is as long as its number of calls, not as its pixels.
    """
    group: list[Int64] = []
    for index in batches:
        if group and sum(map(len, group)) + len(index) > rows:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


@dataclass(frozen=True)
class _Read:
    """What one batch needs: its parameters, and the rows of it and of its partners, each once, ascending."""

    index: Int64
    params: ViewParams
    rows: Int64
    pixels: Tensor


class Gathered:
    """Images in host memory or in a file, from which each batch is read."""

    def __init__(self, rows: PixelRows, device: torch.device | str) -> None:
        self.rows, self.device = rows, torch.device(device)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows.shape

    def __len__(self) -> int:
        return self.rows.shape[0]

    def views(self, batches: Iterable[Int64], spec: ViewSpec, seed: int, epoch: int) -> Iterator[Views]:
        params_of = epoch_params(spec, seed, epoch, self.shape)
        with ThreadPoolExecutor(1) as thread:
            ahead: Future[_Read] | None = None
            for index in batches:
                coming = thread.submit(self._read, index, params_of)
                if ahead is not None:
                    yield self._render(ahead.result(), params_of, spec.size)
                ahead = coming
            if ahead is not None:
                yield self._render(ahead.result(), params_of, spec.size)

    def _read(self, index: Int64, params_of: ParamsOf) -> _Read:
        params = params_of(index)
        rows = with_partners(index, params)
        pixels = torch.empty((len(rows), *self.rows.shape[1:]), dtype=torch.uint8, pin_memory=pinned(self.device))
        self.rows.take(rows, pixels.numpy())
        return _Read(index, params, rows, pixels)

    def _render(self, read: _Read, params_of: ParamsOf, size: int) -> Views:
        pixels = read.pixels.to(self.device, non_blocking=True)
        return views_among(pixels, read.rows, read.index, read.params, params_of, size)


def epoch_params(spec: ViewSpec, seed: int, epoch: int, shape: Sequence[int]) -> ParamsOf:
    """Parameters of the views of an epoch, by images int64 [b] of a set of `shape` (N, 3, H, W).

    Those of a small set are drawn at once: one by one batch they would take longer than its pixels.
    """
    stored = (shape[0], shape[2], shape[3])
    if shape[0] > _AT_ONCE:
        return partial(view_params, spec, seed, epoch, stored=stored)
    return view_params(spec, seed, epoch, np.arange(shape[0]), stored).take


def with_partners(index: Int64, params: ViewParams) -> Int64:
    """int64 [n], each once, ascending: the images of views int64 [b], and those that are mixed into them."""
    return np.unique(np.concatenate([index, params.partner[params.partner >= 0]]))


def views_among(
    pixels: Tensor,
    rows: Int64,
    index: Int64,
    params: ViewParams,
    params_of: ParamsOf,
    size: int,
) -> Views:  # fmt: skip
    """Views of images where only those that are looked at are on the device.

    Args:
        pixels: uint8 [n, 3, H, W].
        rows: int64 [n], what images these are, ascending: `with_partners`.
        index: int64 [b], the images of the views.
        params: of these views.
        params_of: gives the parameters of other images.
        size: S.
    """
    here = replace(params, partner=np.where(params.partner >= 0, np.searchsorted(rows, params.partner), -1))
    views = render(pixels, np.searchsorted(rows, index), size, here, lambda local: params_of(rows[local]))
    return Views(views, index, params, slice(None))
