"""Views: crop, flip and CutMix as a pure function of (seed, epoch, image_id).

A soft label is only right for the exact pixels the teacher saw, so the teacher (label stage) and the student
(train stage) must render the same view of an image from its key alone: whatever the batch, the worker or the
order.

- Parameters are drawn on the CPU in float64. Each row has its own counter-based stream (Philox4x64-10, the
  generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), evaluated for all rows
  at once.
- Pixels are rendered by torch on the device that holds the images, row by row independent of each other.

Shapes: B views of a batch, N images of the set, H W stored image, S side of the view.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from ddoq_ray.core.rng import philox, philox_words, uniform

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]
Index = Int64 | torch.Tensor

# Words of a row's stream. The order is part of the format: a change here changes every view of every run.
_FLIP, _PARTNER, _LAMBDA, _MIX_ROW, _MIX_COLUMN, _CROP_ROW, _CROP_COLUMN = range(7)
_FIRST_ATTEMPT = 8  # then (area, aspect) for each attempt
_ATTEMPTS = 10  # as torchvision's RandomResizedCrop.get_params
_BLOCKS = (_FIRST_ATTEMPT + 2 * _ATTEMPTS) // 4  # a Philox block is four 64-bit words

# Float values in flight while rendering: bounds the memory of a batch without changing a bit of it.
_CPU_CHUNK, _ACCELERATOR_CHUNK = 2**24, 2**27


@dataclass(frozen=True)
class ViewSpec:
    """What a view may look like.

    Attributes:
        size: side S of the square view, in pixels.
        min_scale: smallest share of the image's area that a crop keeps (0.08 in FKD, SRe2L and D4M).
        max_scale: largest share.
        flip: mirror horizontally with probability 1/2.
        cutmix: paste a box of another image's view (Yun et al., ICCV 2019) into every view.
        cutmix_beta: lambda is drawn from Beta(cutmix_beta, cutmix_beta).
        ratio: smallest and largest aspect (width / height) of a crop.
        kind: "rrc" random resized crop; "none" the whole image, resized. `flip` and `cutmix` hold for both
            kinds.
    """

    size: int
    min_scale: float = 0.08
    max_scale: float = 1.0
    flip: bool = True
    cutmix: bool = True
    cutmix_beta: float = 1.0
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    kind: str = "rrc"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1 pixel, got {self.size}")
        if self.kind not in ("rrc", "none"):
            raise ValueError(f"kind must be 'rrc' or 'none', got {self.kind!r}")
        if not 0 < self.min_scale <= self.max_scale <= 1:
            raise ValueError(
                f"expected 0 < min_scale <= max_scale <= 1, got min_scale={self.min_scale}, max_scale={self.max_scale}"
            )
        if len(self.ratio) != 2 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio must be (smallest, largest) aspect, both above 0, got {self.ratio}")
        if not self.cutmix_beta > 0:
            raise ValueError(f"cutmix_beta must be above 0, got {self.cutmix_beta}; turn CutMix off by cutmix=False")


@dataclass(frozen=True)
class ViewParams:
    """Parameters of B views; row i depends only on (seed, epoch, image_ids[i]) and the set's size and shape.

    Attributes:
        boxes: float64 [B, 4], crop as (top, left, height, width) in pixels of the stored image (whole
            numbers).
        flip: bool [B].
        partner: int64 [B], image pasted by CutMix as an index into the set; -1 where nothing is pasted.
        lam: float64 [B], share of the view that the base image keeps, from the box as pasted; 1 where partner
            is -1.
        mix_box: int64 [B, 4], pasted box as (top, left, bottom, right) in pixels of the view, ends excluded.
    """

    boxes: Float64
    flip: npt.NDArray[np.bool_]
    partner: Int64
    lam: Float64
    mix_box: Int64


def view_params(
    spec: ViewSpec, seed: int, epoch: int, image_ids: Int64, num_images: int, height: int, width: int
) -> ViewParams:
    """Draw the parameters of the views (image_id, epoch).

    The crop follows torchvision's RandomResizedCrop: up to 10 attempts at (area, log-uniform aspect), sides
    rounded to whole pixels, the first that fits wins, else the largest centred crop of an allowed aspect. All
    attempts are drawn at once and the first fitting one picked, which is the same distribution.

    CutMix follows Yun et al.: sides are sqrt(1 - lambda) of the view, the centre is uniform, the box is
    clipped at the border, and lambda is then recomputed from the clipped box. The partner is uniform over
    the other images of the set. (FKD pairs images inside a batch and draws one box for all of it, which ties
    a label to the batch; one partner and one box for each image do not.)

    Args:
        spec: what views look like.
        seed: run seed, 0 or more.
        epoch: epoch, 0 or more.
        image_ids: int64 [B], indices into the set.
        num_images: N, size of the set.
        height: H of the stored images in pixels.
        width: W of the stored images in pixels.

    Returns:
        Parameters, one row for each id.

    Raises:
        ValueError: ids outside the set, or a negative seed or epoch.
    """
    ids = np.asarray(image_ids, dtype=np.int64)
    if ids.ndim != 1:
        raise ValueError(f"image_ids must be one-dimensional, got shape {ids.shape}")
    if height < 1 or width < 1:
        raise ValueError(f"stored images must be at least 1x1 pixel, got {height}x{width}")
    if ids.size and (ids.min() < 0 or ids.max() >= num_images):
        raise ValueError(f"image_ids must lie in 0..{num_images - 1}, got {ids.min()}..{ids.max()}")
    u = uniform(philox_words(_stream_key("views", seed, epoch), ids, _BLOCKS))  # [B, words], in [0, 1)
    partner, lam, mix_box = _cutmix(spec, u, ids, num_images)
    return ViewParams(
        boxes=_crop_boxes(spec, u, height, width),
        flip=(u[:, _FLIP] < 0.5) if spec.flip else np.zeros(ids.size, dtype=bool),
        partner=partner,
        lam=lam,
        mix_box=mix_box,
    )


def render(
    images: torch.Tensor,
    index: Index,
    size: int,
    params: ViewParams,
    params_of: Callable[[Int64], ViewParams],
) -> torch.Tensor:
    """Render views: crop and resize, flip, then paste the partner's own view of that epoch.

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
        params_of: gives the parameters of other ids of the same seed and epoch (the partners).

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
    looked_at, boxes, flip = rows[None], params.boxes[None], params.flip[None]
    mix = bool((params.partner >= 0).any())
    if mix:
        # Base images and partners go through one call: for small images the cost is the number of calls.
        # A row without a partner is its own, with an empty box.
        partners = np.where(params.partner >= 0, params.partner, rows)
        theirs = params_of(partners)
        looked_at = np.stack([rows, partners])
        boxes, flip = np.stack([params.boxes, theirs.boxes]), np.stack([params.flip, theirs.flip])

    out = torch.empty((len(rows), 3, size, size), dtype=torch.float32, device=images.device)
    side = size * int(_oversampling(boxes.reshape(-1, 4), size).max(initial=1))
    budget = _CPU_CHUNK if images.device.type == "cpu" else _ACCELERATOR_CHUNK
    step = max(1, budget // (2 * 3 * max(side * side, images.shape[2] * images.shape[3])))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        views = _crop_resize(
            images,
            looked_at[:, part].reshape(-1),
            boxes[:, part].reshape(-1, 4),
            flip[:, part].reshape(-1),
            size,
        )
        if mix:
            base, pasted = views.chunk(2)
            mask = torch.from_numpy(_box_mask(params.mix_box[part], size)).to(images.device)
            torch.where(mask, pasted, base, out=out[part])
        else:
            out[part] = views
    return out.div_(255).clamp_(0, 1)  # bilinear weights may sum to one ulp above 1


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
        pixels float32 [B, 3, S, S] in [0, 1] on the device of `images`; partner int64 [B] (numpy; -1 = no
        CutMix); lam float64 [B] (numpy), share of each view that its base image keeps.

    Raises:
        ValueError: as `view_params` and `render`.
    """
    if images.ndim != 4:
        raise ValueError(f"images must be uint8 [N, 3, H, W], got {images.dtype} {list(images.shape)}")
    num_images, _, height, width = images.shape

    def params_of(ids: Int64) -> ViewParams:
        return view_params(spec, seed, epoch, ids, num_images, height, width)

    params = params_of(_as_numpy(index))
    return render(images, index, spec.size, params, params_of), params.partner, params.lam


def epoch_order(seed: int, epoch: int, n: int) -> Int64:
    """Order in which an epoch visits the n images: a uniform permutation that depends only on (seed, epoch,
    n).

    Sorting one 64-bit word for each image keeps the order independent of the numpy version, which
    `Generator.permutation` does not promise.

    Args:
        seed: run seed.
        epoch: epoch.
        n: number of images.

    Returns:
        int64 [n].

    Raises:
        ValueError: negative n, seed or epoch.
    """
    if n < 0:
        raise ValueError(f"n must be 0 or more, got {n}")
    words = philox_words(_stream_key("epoch_order", seed, epoch), np.arange(n, dtype=np.int64), 1)
    return np.argsort(words[:, 0], kind="stable").astype(np.int64)


def _stream_key(purpose: str, seed: int, epoch: int) -> UInt64:
    """uint64 [2]: the key of one purpose's streams, one stream for each image."""
    if seed < 0 or epoch < 0:
        raise ValueError(f"seed and epoch must be 0 or more, got seed={seed}, epoch={epoch}")
    key: UInt64 = philox(purpose, seed, epoch).bit_generator.state["state"]["key"]
    return key


def _crop_boxes(spec: ViewSpec, u: Float64, height: int, width: int) -> Float64:
    """float64 [B, 4] crops as (top, left, height, width), in whole pixels."""
    boxes = np.empty((len(u), 4))
    if spec.kind == "none":
        boxes[:] = (0, 0, height, width)
        return boxes
    attempts = u[:, _FIRST_ATTEMPT:].reshape(-1, _ATTEMPTS, 2)
    area = height * width * (spec.min_scale + attempts[..., 0] * (spec.max_scale - spec.min_scale))
    log_low, log_high = math.log(spec.ratio[0]), math.log(spec.ratio[1])
    aspect = np.exp(log_low + attempts[..., 1] * (log_high - log_low))
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    pick = (np.arange(len(u)), fits.argmax(axis=1))  # the first attempt that fits
    found = fits[pick]
    fallback = _largest_crop(spec.ratio, height, width)
    crop_h, crop_w = np.where(found, h[pick], fallback[0]), np.where(found, w[pick], fallback[1])
    top = np.floor(u[:, _CROP_ROW] * (height - crop_h + 1))
    left = np.floor(u[:, _CROP_COLUMN] * (width - crop_w + 1))
    boxes[:, 0] = np.where(found, top, (height - fallback[0]) // 2)
    boxes[:, 1] = np.where(found, left, (width - fallback[1]) // 2)
    boxes[:, 2], boxes[:, 3] = crop_h, crop_w
    return boxes


def _largest_crop(ratio: tuple[float, float], height: int, width: int) -> tuple[int, int]:
    """(height, width) of the largest crop of an allowed aspect: torchvision's fallback."""
    if width / height < ratio[0]:
        return min(height, max(1, round(width / ratio[0]))), width
    if width / height > ratio[1]:
        return height, min(width, max(1, round(height * ratio[1])))
    return height, width


def _cutmix(spec: ViewSpec, u: Float64, ids: Int64, num_images: int) -> tuple[Int64, Float64, Int64]:
    """partner int64 [B], lam float64 [B], mix_box int64 [B, 4]."""
    size = spec.size
    if not spec.cutmix or num_images < 2:
        return (
            np.full(ids.size, -1, dtype=np.int64),
            np.ones(ids.size),
            np.zeros((ids.size, 4), dtype=np.int64),
        )
    partner = (ids + 1 + np.floor(u[:, _PARTNER] * (num_images - 1)).astype(np.int64)) % num_images
    side = np.floor(size * np.sqrt(1 - _beta(u[:, _LAMBDA], spec.cutmix_beta))).astype(np.int64)
    centre = np.floor(u[:, [_MIX_ROW, _MIX_COLUMN]] * size).astype(np.int64)
    low = centre - (side // 2)[:, None]
    # As published, both ends are centre -+ side // 2, so that an odd side loses a pixel.
    high = centre + (side // 2)[:, None]
    box = np.concatenate([low.clip(0, size), high.clip(0, size)], axis=1)
    area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
    return np.where(area > 0, partner, -1), 1 - area / (size * size), box * (area > 0)[:, None]


def _beta(u: Float64, concentration: float) -> Float64:
    """Beta(a, a) by inversion: one uniform number a draw, where rejection would use an unknown count."""
    if concentration == 1:
        return u
    # Loaded only when needed: it takes longer than a whole epoch's views.
    from scipy.special import betaincinv

    return np.asarray(betaincinv(concentration, concentration, u), dtype=np.float64)


def _oversampling(boxes: Float64, size: int) -> Int64:
    """int64 [B]: samples a side for each pixel of a view, so that none is skipped in the stored image."""
    factors: Int64 = np.maximum(1, np.ceil(boxes[:, 2:].max(axis=1, initial=1) / size)).astype(np.int64)
    return factors


def _crop_resize(
    images: torch.Tensor, rows: Int64, boxes: Float64, flip: npt.NDArray[np.bool_], size: int
) -> torch.Tensor:
    """float32 [B, 3, S, S] in [0, 255]: views without CutMix."""
    factors = _oversampling(boxes, size)
    if tuple(images.shape[2:]) == (size, size):
        # Whole images at their own size are copied, since sampling would only add rounding. Decided row by
        # row: what else is in the batch must not change a bit.
        factors[(boxes[:, 2:] == size).all(axis=1)] = 0
    groups = np.unique(factors)
    if len(groups) == 1:
        return _sample(images, rows, boxes, flip, size, int(groups[0]))
    out = torch.empty((len(rows), 3, size, size), dtype=torch.float32, device=images.device)
    for factor in groups:
        chosen = np.flatnonzero(factors == factor)
        part = _sample(images, rows[chosen], boxes[chosen], flip[chosen], size, int(factor))
        out[torch.from_numpy(chosen).to(images.device)] = part
    return out


def _sample(
    images: torch.Tensor, rows: Int64, boxes: Float64, flip: npt.NDArray[np.bool_], size: int, factor: int
) -> torch.Tensor:
    """float32 [B, 3, S, S] in [0, 255]: views that share an oversampling factor; 0 copies."""
    height, width = images.shape[2:]
    device = images.device
    source = images[torch.from_numpy(rows).to(device)].to(torch.float32)  # index first: the set stays uint8
    if factor == 0:
        mirror = torch.from_numpy(flip).to(device).view(-1, 1, 1, 1)
        return torch.where(mirror, source.flip(3), source)
    samples = size * factor
    offset = (np.arange(samples) + 0.5) / samples
    y = _grid_axis(boxes[:, 0], boxes[:, 2], offset, height)
    x = _grid_axis(boxes[:, 1], boxes[:, 3], offset, width)
    x = np.where(flip[:, None], x[:, ::-1], x)  # mirroring the coordinates mirrors the view bit for bit
    grid = torch.empty((len(rows), samples, samples, 2), dtype=torch.float32, device=device)
    grid[..., 0] = torch.from_numpy(x).to(device)[:, None, :]
    grid[..., 1] = torch.from_numpy(y).to(device)[:, :, None]
    views = F.grid_sample(source, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return F.avg_pool2d(views, factor) if factor > 1 else views


def _grid_axis(start: Float64, length: Float64, offset: Float64, extent: int) -> npt.NDArray[np.float32]:
    """float32 [B, samples]: positions along an axis in grid_sample's [-1, 1] units, clamped to the crop."""
    position = start[:, None] + offset * length[:, None]  # pixel j covers [j, j + 1)
    position = position.clip(start[:, None] + 0.5, (start + length)[:, None] - 0.5)
    return (2 * position / extent - 1).astype(np.float32)


def _box_mask(mix_box: Int64, size: int) -> npt.NDArray[np.bool_]:
    """bool [B, 1, S, S]: True inside the box."""
    line = np.arange(size)
    in_rows = (line >= mix_box[:, 0, None]) & (line < mix_box[:, 2, None])
    in_columns = (line >= mix_box[:, 1, None]) & (line < mix_box[:, 3, None])
    return np.asarray((in_rows[:, :, None] & in_columns[:, None, :])[:, None])


def _as_numpy(index: Any) -> Int64:
    if isinstance(index, torch.Tensor):
        index = index.detach().cpu().numpy()
    return np.ascontiguousarray(index, dtype=np.int64)
