"""Pixels of views, on the device that holds the images. Shapes as in `core.views`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from ddoq_ray.core.transfers import on_device
from ddoq_ray.core.views.params import Float64, Int64, ViewParams, ViewSpec, view_params

Index = Int64 | torch.Tensor


# Float values in flight while rendering: bounds the memory of a batch without changing a bit of it.
_CPU_CHUNK, _ACCELERATOR_CHUNK = 2**24, 2**27
_CACHED, _ROWS = 2**20, 16  # of small views fewer, which a processor's caches hold; so many rows pay for the calls
_MOST = 0.9  # of the views of a call are sampled alike: then all are, and the others once more


def render(
    images: torch.Tensor,
    index: Index,
    size: int,
    params: ViewParams,
    params_of: Callable[[Int64], ViewParams],
) -> torch.Tensor:
    """Render views: shuffle patches, crop and resize, flip, cut out, then mix in the partner's own view of that epoch.

    Bilinear, align_corners=False, clamped at the crop's border: where the crop is not larger than the view
    this is torchvision's `resized_crop`. Where a side of the crop is f > 1 times the view's, the view is
    sampled at ceil(f) times its size and averaged down, so that no stored pixel is skipped (a box filter;
    torchvision's antialias uses a triangle, and differs a little). A crop that is exactly a whole multiple of
    the view becomes the exact area mean.

    Args:
        images: uint8 [N, 3, H, W], the whole set, on any device.
        index: int64 [B], rows to look at.
        size: S, side of the view.
        params: parameters of those rows.
        params_of: gives the parameters of the partners int64 [B], each of the seed and epoch of its row. It is
            called once, with a row's own id where it has no partner.

    Returns:
        float32 [B, 3, S, S] in [0, 1], on the device of `images`; the same bits for any split or order of
        `index`.

    Raises:
        ValueError: `images` is not uint8 [N, 3, H, W], or `index` and `params` differ in length.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8 [N, 3, H, W], got {images.dtype} {list(images.shape)}")
    rows = _as_numpy(index)
    if len(rows) != len(params.partner):
        raise ValueError(f"expected one row of params for each of {len(rows)} indices, got {len(params.partner)}")
    mix = bool((params.partner >= 0).any())
    if mix:
        # A row without a partner is its own, and keeps all of its view.
        partners = np.where(params.partner >= 0, params.partner, rows)
        theirs = params_of(partners)

    out = torch.empty((len(rows), 3, size, size), dtype=torch.float32, device=images.device)
    step = _rows_at_once(images, np.concatenate([params.boxes, theirs.boxes]) if mix else params.boxes, size)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        own = params.take(part)
        if not mix:
            out[part] = _views(images, rows[part], own, size)
            continue
        # Base images and partners go through one call: for small images the cost is the number of calls.
        both = np.concatenate([rows[part], partners[part]])
        base, other = _views(images, both, own.joined(theirs.take(part)), size).chunk(2)
        _mix(base, other, own, out[part])
    return _in_unit_range(out)


def render_epochs(images: torch.Tensor, size: int, params: ViewParams) -> torch.Tensor:
    """The views of a whole set at several epochs; the same bits as `render` gives.

    A partner's own view of the epoch is among them, so that each is sampled once and not twice.

    Args:
        images: uint8 [N, 3, H, W], on any device.
        size: S, side of the view.
        params: of the N images at the first of E epochs, then at the next one, ...

    Returns:
        float32 [E * N, 3, S, S] in [0, 1], on the device of `images`.
    """
    count, total = len(images), len(params.partner)
    rows = np.tile(np.arange(count), total // count)
    own = torch.empty((total, 3, size, size), dtype=torch.float32, device=images.device)
    step = _rows_at_once(images, params.boxes, size)
    for start in range(0, total, step):
        part = slice(start, start + step)
        own[part] = _views(images, rows[part], params.take(part), size)
    if not (params.partner >= 0).any():
        return _in_unit_range(own)
    place = np.arange(total)
    partners = np.where(params.partner >= 0, place - rows + params.partner, place)
    out = torch.empty_like(own)
    for start in range(0, total, step):
        part = slice(start, start + step)
        theirs = own.index_select(0, on_device(partners[part], own.device))
        _mix(own[part], theirs, params.take(part), out[part])
    return _in_unit_range(out)


def _in_unit_range(views: torch.Tensor) -> torch.Tensor:
    """[0, 255] to [0, 1], in place; bilinear weights may sum to one ulp above 1."""
    return views.div_(255).clamp_(0, 1)


def _mix(base: torch.Tensor, other: torch.Tensor, params: ViewParams, out: torch.Tensor) -> None:
    """Into float32 [B, 3, S, S]: the partner's view in the box; where there is no box, blended in by lambda.

    `other` may be overwritten.
    """
    boxed = params.mix_box[:, 2] > params.mix_box[:, 0]
    if (boxed | (params.partner < 0)).all():
        torch.where(_inside(params.mix_box, base), other, base, out=out)
        return
    # Two products and a sum, each rounded by itself: a fused operation would not round every row of a batch alike.
    kept = params.lam.astype(np.float32)[:, None, None, None]
    torch.add(base * on_device(kept, base.device), other.mul_(on_device(1 - kept, base.device)), out=out)


def _rows_at_once(images: torch.Tensor, boxes: Float64, size: int) -> int:
    """How many rows, each with its partner, are rendered at a time, by the finest sampling that any crop asks."""
    side = size * int(_oversampling(boxes, size).max(initial=1))
    row = 2 * 3 * max(side * side, images.shape[2] * images.shape[3])
    if images.device.type != "cpu":
        return max(1, _ACCELERATOR_CHUNK // row)
    return max(1, min(_CPU_CHUNK // row, max(_CACHED // row, _ROWS)))


def batch_views(
    images: torch.Tensor, index: Index, spec: ViewSpec, seed: int, epoch: int
) -> tuple[torch.Tensor, Int64, Float64]:
    """Views of some rows of a set at an epoch, ready for a network.

    Args:
        images: uint8 [N, 3, H, W], the whole set, on any device.
        index: int64 [B], rows to look at (numpy or torch).
        spec: what views look like.
        seed: run seed.
        epoch: epoch.

    Returns:
        pixels float32 [B, 3, S, S] in [0, 1] on the device of `images`; partner int64 [B] (numpy; -1 =
        none); lam float64 [B] (numpy), share of each view that its base image keeps.

    Raises:
        ValueError: as `view_params` and `render`.
    """
    if images.ndim != 4:
        raise ValueError(f"images must be uint8 [N, 3, H, W], got {images.dtype} {list(images.shape)}")
    num_images, _, height, width = images.shape

    def params_of(ids: Int64) -> ViewParams:
        return view_params(spec, seed, epoch, ids, (num_images, height, width))

    params = params_of(_as_numpy(index))
    return render(images, index, spec.size, params, params_of), params.partner, params.lam


def _oversampling(boxes: Float64, size: int) -> Int64:
    """int64 [B]: samples a side for each pixel of a view, so that none is skipped in the stored image."""
    factors: Int64 = np.maximum(1, np.ceil(boxes[:, 2:].max(axis=1, initial=1) / size)).astype(np.int64)
    return factors


def _views(images: torch.Tensor, rows: Int64, params: ViewParams, size: int) -> torch.Tensor:
    """float32 [B, 3, S, S] in [0, 255]: views of images int64 [B], before anything is mixed in."""
    views = _crop_resize(images, rows, params, size)
    if not params.cutout.size:
        return views
    inside = _inside(params.cutout[:, :4], views)
    colour = on_device(params.cutout[:, 4:].astype(np.float32), images.device)
    return torch.where(inside, colour[:, :, None, None], views)


def _crop_resize(images: torch.Tensor, rows: Int64, params: ViewParams, size: int) -> torch.Tensor:
    """float32 [B, 3, S, S] in [0, 255]: crops of images, at the size of views and mirrored."""
    factors = _oversampling(params.boxes, size)
    if tuple(images.shape[2:]) == (size, size):
        # Whole images at their own size are copied, since sampling would only add rounding. Decided row by
        # row: what else is in the batch must not change a bit.
        factors[(params.boxes[:, 2:] == size).all(axis=1)] = 0
    groups, counts = np.unique(factors, return_counts=True)
    usual = groups[counts.argmax()]
    if counts.max() >= _MOST * len(rows):
        # All rows as most of them are, and the others anew: a few views in vain cost less than putting all in place.
        out = _sample(images, rows, params, size, int(usual))
        groups = groups[groups != usual]
    else:
        out = torch.empty((len(rows), 3, size, size), dtype=torch.float32, device=images.device)
    for factor in groups:
        chosen = np.flatnonzero(factors == factor)
        out[on_device(chosen, images.device)] = _sample(images, rows[chosen], params.take(chosen), size, int(factor))
    return out


def _sample(images: torch.Tensor, rows: Int64, params: ViewParams, size: int, factor: int) -> torch.Tensor:
    """float32 [B, 3, S, S] in [0, 255]: views that share an oversampling factor; 0 copies."""
    height, width = images.shape[2:]
    device, boxes, flip = images.device, params.boxes, params.flip
    source = images.index_select(0, on_device(rows, device))  # index first: the set stays uint8
    source = _shuffled(source, params.patches).to(torch.float32)
    if factor == 0:
        return torch.where(on_device(flip, device).view(-1, 1, 1, 1), source.flip(3), source)
    samples = size * factor
    offset = (np.arange(samples) + 0.5) / samples
    y = _grid_axis(boxes[:, 0], boxes[:, 2], offset, height)
    x = _grid_axis(boxes[:, 1], boxes[:, 3], offset, width)
    x = np.where(flip[:, None], x[:, ::-1], x)  # mirroring the coordinates mirrors the view bit for bit
    grid = torch.empty((len(rows), samples, samples, 2), dtype=torch.float32, device=device)
    grid[..., 0] = on_device(x, device)[:, None, :]
    grid[..., 1] = on_device(y, device)[:, :, None]
    views = F.grid_sample(source, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return F.avg_pool2d(views, factor) if factor > 1 else views


def _shuffled(source: torch.Tensor, patches: Int64) -> torch.Tensor:
    """uint8 [B, 3, H, W] with its strips in the order of patches int64 [B, 2, P]."""
    for axis in (2, 3) if patches.size else ():
        order = _strips(patches[:, axis - 2], source.shape[axis])
        shape = (len(order), 1, -1, 1) if axis == 2 else (len(order), 1, 1, -1)
        source = source.take_along_dim(on_device(order, source.device).view(shape), axis)
    return source


def _strips(order: Int64, extent: int) -> Int64:
    """int64 [B, extent]: the pixel that comes to each place along an axis that is cut into P strips.

    They are as even as they can be; RDED's code asks for an extent that P divides.
    """
    count = order.shape[1]
    bounds = np.arange(count + 1) * extent // count
    strip = np.repeat(np.arange(count), np.diff(bounds))  # of each pixel
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.arange(count), axis=1)
    return place[:, strip].argsort(axis=1, kind="stable")


def _grid_axis(start: Float64, length: Float64, offset: Float64, extent: int) -> npt.NDArray[np.float32]:
    """float32 [B, samples]: positions along an axis in grid_sample's [-1, 1] units, clamped to the crop."""
    position = start[:, None] + offset * length[:, None]  # pixel j covers [j, j + 1)
    position = position.clip(start[:, None] + 0.5, (start + length)[:, None] - 0.5)
    return (2 * position / extent - 1).astype(np.float32)


def _inside(boxes: Int64, views: torch.Tensor) -> torch.Tensor:
    """bool [B, 1, S, S] for views [B, 3, S, S], where they are: True inside the boxes int64 [B, 4]."""
    ends = on_device(np.ascontiguousarray(boxes.T), views.device)[:, :, None]  # [4, B, 1]
    line = torch.arange(views.shape[-1], device=views.device)
    in_rows, in_columns = (line >= ends[:2]) & (line < ends[2:])
    return (in_rows[:, :, None] & in_columns[:, None, :]).unsqueeze(1)


def _as_numpy(index: Any) -> Int64:
    if isinstance(index, torch.Tensor):
        index = index.detach().cpu().numpy()
    return np.ascontiguousarray(index, dtype=np.int64)
