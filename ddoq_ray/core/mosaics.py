"""One image of several: tiles on a square grid.

Shapes: F tiles along an edge, S side of an image, s = S // F side of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]


def mosaic(tiles: Sequence[U8], factor: int, side: int) -> U8:
    """Tiles laid on a grid, row by row.

    Where S is no multiple of F, the first S mod F rows and columns are one pixel larger, and their tiles are enlarged
    by the nearest pixel.

    Args:
        tiles: F^2 pictures uint8 [s, s, 3].
        factor: F.
        side: S.

    Returns:
        uint8 [S, S, 3].

    Raises:
        ValueError: Another number of tiles, or another shape.

    Source: Sun et al., "On the Diversity and Realism of Distilled Dataset", CVPR 2024 (RDED), released code
    (synthesize/utils.py, mix_images).

    >>> mosaic([np.full((1, 1, 3), v, np.uint8) for v in (1, 2, 3, 4)], 2, 3)[..., 0].tolist()
    [[1, 1, 2], [1, 1, 2], [3, 3, 4]]
    """
    s = side // factor
    if len(tiles) != factor**2 or any(t.shape != (s, s, 3) for t in tiles):
        shapes = sorted({t.shape for t in tiles})
        raise ValueError(f"expected {factor**2} tiles of {(s, s, 3)}, got {len(tiles)} of {shapes}")
    lengths = [s + (i < side % factor) for i in range(factor)]
    rows = []
    for i, height in enumerate(lengths):
        line = [_enlarged(tiles[i * factor + j], height, width) for j, width in enumerate(lengths)]
        rows.append(np.concatenate(line, axis=1))
    return np.concatenate(rows, axis=0)


def tiled(centroids: int, tiles: int) -> npt.NDArray[np.int64]:
    """Which centroids of a class each of its images is made of: int64 [K, T], K = M / T, rounded up.

    Image i has centroid (i + j K) mod M in tile j; of the first centroids some are in two images where T does not
    divide M = `centroids`.

    >>> tiled(8, 4).tolist()
    [[0, 2, 4, 6], [1, 3, 5, 7]]
    """
    images = -(-centroids // tiles)
    return (np.arange(images)[:, None] + images * np.arange(tiles)) % centroids


def tile_masses(weights: npt.NDArray[np.float64], tiles: int) -> npt.NDArray[np.float64]:
    """The masses of images of tiles: float64 [K] of weights float64 [M], the mass of a centroid dealt to its tiles.

    >>> tile_masses(np.array([0.5, 0.2, 0.2, 0.1, 0.0]), 4).round(2).tolist()
    [0.45, 0.55]
    """
    of = tiled(len(weights), tiles)
    times = np.bincount(of.ravel(), minlength=len(weights))
    return np.asarray((weights / times)[of].sum(axis=1))


def _enlarged(tile: U8, height: int, width: int) -> U8:
    """By the nearest pixel, as torch's `interpolate` without a mode takes it."""
    rows = np.arange(height) * len(tile) // height
    columns = np.arange(width) * tile.shape[1] // width
    return tile[rows[:, None], columns]
