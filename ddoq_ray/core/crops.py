"""Random resized crops: one, from a generator that is given, and what is taken where none fits."""

from __future__ import annotations

import math

import numpy as np

ATTEMPTS = 10  # as torchvision's RandomResizedCrop.get_params
RATIO = (3 / 4, 4 / 3)


def crop_box(
    rng: np.random.Generator, shape: tuple[int, int], least_area: float, ratio: tuple[float, float] = RATIO
) -> tuple[int, int, int, int]:
    """A crop as torchvision's RandomResizedCrop draws it.

    Up to 10 attempts at (area, log-uniform aspect), sides rounded to whole pixels; the first that fits is placed
    uniformly; else the largest centred crop of an allowed aspect.

    Args:
        rng: Draws area, aspect, row and column.
        shape: (H, W) of the picture.
        least_area: Smallest share of its area that the crop keeps; the largest is 1.
        ratio: Smallest and largest width / height.

    Returns:
        (top, left, height, width) in pixels.

    >>> crop_box(np.random.default_rng(0), (8, 8), 1.0, (1.0, 1.0))
    (0, 0, 8, 8)
    """
    height, width = shape
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(ATTEMPTS):
        area = height * width * rng.uniform(least_area, 1.0)
        aspect = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    h, w = largest_crop(shape, ratio)
    return (height - h) // 2, (width - w) // 2, h, w


def largest_crop(shape: tuple[int, int], ratio: tuple[float, float] = RATIO) -> tuple[int, int]:
    """(height, width) of the largest crop of an allowed aspect: torchvision's fallback. Arguments as of `crop_box`.

    >>> largest_crop((100, 10)), largest_crop((10, 100)), largest_crop((10, 12))
    ((13, 10), (10, 13), (10, 12))
    """
    height, width = shape
    if width / height < ratio[0]:
        return min(height, max(1, round(width / ratio[0]))), width
    if width / height > ratio[1]:
        return height, min(width, max(1, round(height * ratio[1])))
    return height, width
