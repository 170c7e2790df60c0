"""What is done to each image: crops, flips, shuffled patches, what is cut out and what is mixed in, drawn for all rows
at once. Shapes as in `core.views`; P strips a side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from ddoq_ray.core.crops import ATTEMPTS, RATIO, largest_crop
from ddoq_ray.core.rng import philox_key, philox_words, uniform

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]

# Words of a row's stream. The order is part of the format: a change here changes every view of every run.
_FLIP, _PARTNER, _LAMBDA, _MIX_ROW, _MIX_COLUMN, _CROP_ROW, _CROP_COLUMN = range(7)
_FIRST_ATTEMPT = 8  # then (area, aspect) for each attempt
_BLOCKS = (_FIRST_ATTEMPT + 2 * ATTEMPTS) // 4  # a Philox block is four 64-bit words
_USUAL_BLOCKS = 3  # hold two attempts, one of which fits nearly always; the others are drawn where neither does
_COLOURS = 256


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
        mixup: blend another image's view into every view (Zhang et al., ICLR 2018), the image itself by lambda from
            Beta(mixup, mixup); 0: not. A view is mixed in one way: not with `cutmix`.
        patches: strips P into which the stored image is cut each way and shuffled before the crop, as RDED does with
            images made of P x P parts (Sun et al., CVPR 2024); 1: not.
        cutout: side of a box that is painted over in one random colour, as a share of the view's (DeVries and Taylor,
            2017, as ImageNet-21K's teachers have it); 0: none.
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
    ratio: tuple[float, float] = RATIO
    kind: str = "rrc"
    mixup: float = 0.0
    patches: int = 1
    cutout: float = 0.0

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
        if self.mixup < 0 or (self.mixup and self.cutmix):
            raise ValueError(f"mixup must be 0 or more, and 0 with cutmix, got {self.mixup} with cutmix={self.cutmix}")
        if self.patches < 1:
            raise ValueError(f"patches must be at least 1 strip a side, got {self.patches}")
        if not 0 <= self.cutout <= 1:
            raise ValueError(f"cutout must lie in [0, 1], got {self.cutout}")


@dataclass(frozen=True)
class ViewParams:
    """Parameters of B views; row i depends only on (seed, epoch, image_ids[i]) and the set's size and shape.

    Attributes:
        boxes: float64 [B, 4], crop as (top, left, height, width) in pixels of the stored image (whole
            numbers).
        flip: bool [B].
        partner: int64 [B], image mixed in as an index into the set; -1 where there is none.
        lam: float64 [B], share of the view that the base image keeps, from the box as pasted; 1 where partner
            is -1.
        mix_box: int64 [B, 4], pasted box as (top, left, bottom, right) in pixels of the view, ends excluded; empty
            where the partner's whole view is blended in (MixUp).
        patches: int64 [B, 2, P], which strip of the stored image comes first, second, ... from above, and from the
            left; [B, 2, 0] where nothing is shuffled.
        cutout: int64 [B, 7], painted box as `mix_box` has it, and its colour as red, green and blue of 0 to 255;
            [B, 0] where none is.
    """

    boxes: Float64
    flip: npt.NDArray[np.bool_]
    partner: Int64
    lam: Float64
    mix_box: Int64
    patches: Int64
    cutout: Int64

    def packed(self) -> bytes:
        """The parameters of one view after another, little-endian, in 72 bytes each and those of shuffled patches and
        cutout where there are any: a digest of them, taken where labels are made, tells later whether the same views
        are drawn."""
        shapes = {name: getattr(self, name).shape[1:] for name in ("patches", "cutout")}
        row = np.dtype(
            [("boxes", "<f8", 4), ("lam", "<f8"), ("partner", "<i8"), ("mix_box", "<i4", 4), ("flip", "<i8")]
            + [(name, "<i4", shape) for name, shape in shapes.items() if math.prod(shape)]
        )
        rows = np.empty(len(self.partner), row)
        for name in row.names or ():
            rows[name] = getattr(self, name)
        return rows.tobytes()

    def take(self, rows: Any) -> ViewParams:
        """Those of some rows, by an index or a slice."""
        return ViewParams(*(getattr(self, field.name)[rows] for field in fields(self)))

    def joined(self, other: ViewParams) -> ViewParams:
        """These, and then the other's."""
        return ViewParams(*(np.concatenate([getattr(p, f.name) for p in (self, other)]) for f in fields(self)))


def view_params(
    spec: ViewSpec, seed: int, epoch: int | Int64, image_ids: Int64, stored: tuple[int, int, int]
) -> ViewParams:
    """Draw the parameters of the views (image_id, epoch).

    The crop follows torchvision's RandomResizedCrop: up to 10 attempts at (area, log-uniform aspect), sides
    rounded to whole pixels, the first that fits wins, else the largest centred crop of an allowed aspect. All
    attempts are drawn at once and the first fitting one picked, which is the same distribution.

    CutMix follows Yun et al.: sides are sqrt(1 - lambda) of the view, the centre is uniform, the box is
    clipped at the border, and lambda is then recomputed from the clipped box. The partner is uniform over
    the other images of the set. (FKD pairs images inside a batch and draws one box for all of it, which ties
    a label to the batch; one partner and one box for each image do not.) MixUp takes partner and lambda alike.

    ShufflePatches follows RDED's code: whole strips from above are permuted, and whole strips from the left, not
    each of the P x P parts by itself. Cutout follows the code that ImageNet-21K's teachers and labels were made with
    (Alibaba-MIIL/ImageNet21K, `CutoutPIL`): side cutout * S, a uniform centre, clipped at the border, one uniform
    colour; PIL paints the box's last row and column too. A partner brings its own strips and box. Both have streams
    of their own, so that the other parameters are the same with and without them.

    Args:
        spec: what views look like.
        seed: run seed, 0 or more.
        epoch: epoch, 0 or more, of all rows or int64 [B] of each.
        image_ids: int64 [B], indices into the set.
        stored: (N, H, W), the size of the set, and height and width of its images in pixels.

    Returns:
        Parameters, one row for each id.

    Raises:
        ValueError: ids outside the set, or a negative seed or epoch.
    """
    num_images, height, width = stored
    ids = np.asarray(image_ids, dtype=np.int64)
    if ids.ndim != 1:
        raise ValueError(f"image_ids must be one-dimensional, got shape {ids.shape}")
    if height < 1 or width < 1:
        raise ValueError(f"stored images must be at least 1x1 pixel, got {height}x{width}")
    if ids.size and (ids.min() < 0 or ids.max() >= num_images):
        raise ValueError(f"image_ids must lie in 0..{num_images - 1}, got {ids.min()}..{ids.max()}")
    key = _stream_keys("views", seed, epoch)
    u = uniform(philox_words(key, ids, _USUAL_BLOCKS))  # [B, words], in [0, 1)
    boxes, found = _crop_boxes(spec, u, height, width)
    left = np.flatnonzero(~found)
    if left.size:
        of_left = key if key.shape[1] == 1 else key[:, left]
        boxes[left], _ = _crop_boxes(spec, uniform(philox_words(of_left, ids[left], _BLOCKS)), height, width)
    partner, lam, mix_box = _mixed(spec, u, ids, num_images)
    return ViewParams(
        boxes=boxes,
        flip=(u[:, _FLIP] < 0.5) if spec.flip else np.zeros(ids.size, dtype=bool),
        partner=partner,
        lam=lam,
        mix_box=mix_box,
        patches=_patches(spec, seed, epoch, ids),
        cutout=_cutout(spec, seed, epoch, ids),
    )


def epoch_orders(seed: int, epochs: Sequence[int], n: int) -> Int64:
    """Orders in which epochs visit the n images: uniform permutations, each of (seed, epoch, n) alone.

    Sorting one 64-bit word for each image keeps the order independent of the numpy version, which
    `Generator.permutation` does not promise.

    Args:
        seed: run seed.
        epochs: E of them, 1 or more: of few images a call costs more than its words.
        n: number of images.

    Returns:
        int64 [E, n].

    Raises:
        ValueError: negative n, seed or epoch.
    """
    if n < 0:
        raise ValueError(f"n must be 0 or more, got {n}")
    keys = np.stack([_stream_key("epoch_order", seed, epoch) for epoch in epochs], axis=1)
    rows = keys if len(epochs) == 1 else keys.repeat(n, axis=1)
    words = philox_words(rows, np.tile(np.arange(n, dtype=np.int64), len(epochs)), 1)
    return np.argsort(words[:, 0].reshape(len(epochs), n), axis=1, kind="stable").astype(np.int64)


def _stream_key(purpose: str, seed: int, epoch: int) -> UInt64:
    """uint64 [2]: the key of one purpose's streams at an epoch, one stream for each image."""
    if seed < 0 or epoch < 0:
        raise ValueError(f"seed and epoch must be 0 or more, got seed={seed}, epoch={epoch}")
    return philox_key(purpose, seed, epoch)


def _stream_keys(purpose: str, seed: int, epoch: int | Int64) -> UInt64:
    """uint64 [2, 1], or [2, B] where the rows are of epochs int64 [B]."""
    if isinstance(epoch, int | np.integer):
        return _stream_key(purpose, seed, int(epoch))[:, None]
    epochs, row = np.unique(epoch, return_inverse=True)
    return np.stack([_stream_key(purpose, seed, int(e)) for e in epochs], axis=1)[:, row]


def _crop_boxes(spec: ViewSpec, u: Float64, height: int, width: int) -> tuple[Float64, npt.NDArray[np.bool_]]:
    """float64 [B, 4] crops as (top, left, height, width), in whole pixels; bool [B], whether an attempt fits.

    Where none of the attempts that `u` holds does, the crop is the largest one.
    """
    boxes = np.empty((len(u), 4))
    if spec.kind == "none":
        boxes[:] = (0, 0, height, width)
        return boxes, np.ones(len(u), bool)
    attempts = u[:, _FIRST_ATTEMPT:].reshape(len(u), (u.shape[1] - _FIRST_ATTEMPT) // 2, 2)
    area = height * width * (spec.min_scale + attempts[..., 0] * (spec.max_scale - spec.min_scale))
    log_low, log_high = math.log(spec.ratio[0]), math.log(spec.ratio[1])
    aspect = np.exp(log_low + attempts[..., 1] * (log_high - log_low))
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    pick = (np.arange(len(u)), fits.argmax(axis=1))  # the first attempt that fits
    found = fits[pick]
    fallback = largest_crop((height, width), spec.ratio)
    crop_h, crop_w = np.where(found, h[pick], fallback[0]), np.where(found, w[pick], fallback[1])
    top = np.floor(u[:, _CROP_ROW] * (height - crop_h + 1))
    left = np.floor(u[:, _CROP_COLUMN] * (width - crop_w + 1))
    boxes[:, 0] = np.where(found, top, (height - fallback[0]) // 2)
    boxes[:, 1] = np.where(found, left, (width - fallback[1]) // 2)
    boxes[:, 2], boxes[:, 3] = crop_h, crop_w
    return boxes, found


def _mixed(spec: ViewSpec, u: Float64, ids: Int64, num_images: int) -> tuple[Int64, Float64, Int64]:
    """partner int64 [B], lam float64 [B], mix_box int64 [B, 4], of CutMix or MixUp."""
    size, no_box = spec.size, np.zeros((ids.size, 4), dtype=np.int64)
    if not (spec.cutmix or spec.mixup) or num_images < 2:
        return np.full(ids.size, -1, dtype=np.int64), np.ones(ids.size), no_box
    partner = (ids + 1 + np.floor(u[:, _PARTNER] * (num_images - 1)).astype(np.int64)) % num_images
    if spec.mixup:
        return partner, _beta(u[:, _LAMBDA], spec.mixup), no_box
    side = np.floor(size * np.sqrt(1 - _beta(u[:, _LAMBDA], spec.cutmix_beta))).astype(np.int64)
    centre = np.floor(u[:, [_MIX_ROW, _MIX_COLUMN]] * size).astype(np.int64)
    low = centre - (side // 2)[:, None]
    # As published, both ends are centre -+ side // 2, so that an odd side loses a pixel.
    high = centre + (side // 2)[:, None]
    box = np.concatenate([low.clip(0, size), high.clip(0, size)], axis=1)
    area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
    return np.where(area > 0, partner, -1), 1 - area / (size * size), box * (area > 0)[:, None]


def _patches(spec: ViewSpec, seed: int, epoch: int | Int64, ids: Int64) -> Int64:
    """int64 [B, 2, P], or [B, 2, 0]: orders of strips."""
    count = spec.patches
    if count == 1:
        return np.empty((ids.size, 2, 0), dtype=np.int64)
    words = philox_words(_stream_keys("views: patches", seed, epoch), ids, -(-2 * count // 4))
    return words[:, : 2 * count].reshape(ids.size, 2, count).argsort(axis=2, kind="stable").astype(np.int64)


def _cutout(spec: ViewSpec, seed: int, epoch: int | Int64, ids: Int64) -> Int64:
    """int64 [B, 7], or [B, 0]: boxes and colours."""
    if not spec.cutout:
        return np.empty((ids.size, 0), dtype=np.int64)
    u, size = uniform(philox_words(_stream_keys("views: cutout", seed, epoch), ids, 2)), spec.size
    centre = np.floor(u[:, :2] * size).astype(np.int64)
    half = int(spec.cutout * size + 0.5) // 2
    low, high = (centre - half).clip(0, size), (centre + half + 1).clip(0, size)
    return np.concatenate([low, high, np.floor(u[:, 2:5] * _COLOURS).astype(np.int64)], axis=1)


def _beta(u: Float64, concentration: float) -> Float64:
    """Beta(a, a) by inversion: one uniform number a draw, where rejection would use an unknown count."""
    if concentration == 1:
        return u
    # Loaded only when needed: it takes longer than a whole epoch's views.
    from scipy.special import betaincinv

    return np.asarray(betaincinv(concentration, concentration, u), dtype=np.float64)
