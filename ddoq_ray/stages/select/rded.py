"""`rded`: mosaics of crops of real images that the teacher is surest of (Sun et al., CVPR 2024).

As the released code does it (LINs-lab/RDED@3f6453d, synthesize/main.py and utils.py): of each class `rded.pool` images
are drawn at random; of each `rded.crops` random square crops are taken (8 to 100 % of the area), at the side of a tile;
the teacher sees each in the middle of an otherwise empty picture of its own size, and of each image the crop of the
lowest cross-entropy is kept; of these the lowest factor^2 K are laid out, K at a time for each tile.

Differs: crops are drawn by keys, not by a worker's generator; pixels are resized as 8-bit values by Pillow, and stored
as PNG; normalisation and size are the teacher's own; the pool has at least factor^2 K images; where a class has fewer,
crops come again.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ddoq_ray.config import RunConfig
from ddoq_ray.config.schema import plain
from ddoq_ray.core.confidence import surest
from ddoq_ray.core.crops import crop_box
from ddoq_ray.core.rng import philox
from ddoq_ray.data.picked_samples import picked_pictures
from ddoq_ray.data.samples import decode_rgb
from ddoq_ray.stages.select.choice import Choice, Mosaic, Picks, Selection
from ddoq_ray.stages.select.images import cropped, not_encoded, where
from ddoq_ray.stages.select.scoring import Looking, Rows, Shard, scored, shards_of

LEAST_AREA = 0.08


def settings(config: RunConfig) -> dict[str, Any]:
    """What the set follows from beside what every choice does."""
    return {"rded": plain(config.rded)}


def choose(choice: Choice) -> Selection:
    run, own, wanted = choice.run, choice.run.config.rded, choice.wanted
    side = run.networks.scorer_side
    factor = own.tiles_along(side)
    tiles = factor**2
    pool: Picks = {}
    for c, images in wanted.items():
        size = min(choice.counts[c], max(own.pool, tiles * images))
        rng = philox(run.config.seed, "rded", c)
        pool[c] = np.sort(rng.choice(choice.counts[c], size=size, replace=False))
    asked = dict(where(choice.index, pool))
    ask = partial(_look, len(run.data.classes), (run.config.seed, own.crops, side // factor))
    losses = {c: np.full(len(p), np.inf, np.float32) for c, p in pool.items()}
    boxes = {c: np.zeros((len(p), 4), np.int64) for c, p in pool.items()}
    for _, rows in scored(choice, shards_of(choice, asked, not_encoded(run.latents)), ask):
        for c, rank, loss, *box in rows:
            losses[c][rank], boxes[c][rank] = loss, box
    best = {c: surest(losses[c], tiles * images) for c, images in wanted.items()}
    mosaic = Mosaic(factor, side, wanted, {c: boxes[c][at] for c, at in best.items()})
    return Selection({c: pool[c][at] for c, at in best.items()}, mosaic=mosaic)


def crop_boxes(size: tuple[int, int], seed: int, key: tuple[int, ...], count: int) -> npt.NDArray[np.int64]:
    """Random square crops of a picture: int64 [count, 4], left, upper, right, lower pixel.

    Args:
        size: Width and height.
        seed: The run's.
        key: Which picture it is.
    """
    width, height = size
    made = []
    for number in range(count):
        rng = philox(seed, "rded-crop", *key, number)
        made.append(crop_box(rng, (height, width), LEAST_AREA, (1.0, 1.0)))
    return np.asarray([[left, top, left + w, top + h] for top, left, h, w in made], np.int64).reshape(-1, 4)


def _look(num_classes: int, how: tuple[int, int, int], looking: Looking, shard: Shard) -> Rows:
    """[class_id, rank in the pool, loss, box] of the surest crop of each of a shard's pooled images.

    Args:
        how: The seed, the crops of an image, the side of a tile.
    """
    seed, crops, side = how
    picks = {(p.class_id, p.position): p for p in shard.asked}
    keys, boxes, pictures = [], [], []
    for position, data in picked_pictures(shard.url, num_classes, picks, shard.passed_over):
        picture, pick = decode_rgb(data), picks[position]
        # By its place in the data: the same whatever else the pool holds.
        own = crop_boxes(picture.size, seed, (shard.index, *position), crops)
        keys.append((pick.class_id, pick.rank))
        boxes.append(own)
        pictures += [cropped(picture, tuple(box), side) for box in own.tolist()]
    if not keys:
        return []
    losses = looking.losses(pictures, [c for c, _ in keys for _ in range(crops)], pad=True).reshape(-1, crops)
    at = [int(surest(row, 1)[0]) for row in losses]
    return [[*key, float(row[i]), *own[i].tolist()] for key, row, own, i in zip(keys, losses, boxes, at, strict=True)]
