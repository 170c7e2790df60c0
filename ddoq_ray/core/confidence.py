"""Which samples of a class a classifier is surest of: of each Voronoi cell, or of all.

Shapes: n samples, K centroids.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]


def surest_of_cells(cells: I64, losses: npt.NDArray[np.float32], k: int) -> I64:
    """The sample of the lowest loss in each cell.

    Args:
        cells: int64 [n], the cell of each sample, 0 to K - 1.
        losses: float32 [n], a classifier's cross-entropy; one that is not a number is never the lowest.
        k: K.

    Returns:
        int64 [K], positions in `cells`, -1 where a cell is empty. Of equal losses the first counts.

    >>> surest_of_cells(np.array([0, 2, 0, 2]), np.array([0.3, 0.5, 0.2, 0.5], np.float32), 3).tolist()
    [2, -1, 1]
    """
    order = surest(losses, len(losses))[::-1]
    found = np.full(k, -1)
    found[cells[order]] = order  # the last that is written is the surest
    return found


def surest(losses: npt.NDArray[np.float32], count: int) -> I64:
    """Positions of the `count` lowest losses (or of all), lowest first; of equal ones the first comes first.

    >>> surest(np.array([0.3, np.nan, 0.1, 0.3], np.float32), 3).tolist()
    [2, 0, 3]
    """
    ranked = np.where(np.isnan(losses), np.inf, losses)
    return np.argsort(ranked, kind="stable")[:count]
