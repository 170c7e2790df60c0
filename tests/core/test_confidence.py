"""The surest samples, against a search through all."""

from __future__ import annotations

import numpy as np

from ddoq_ray.core.confidence import surest, surest_of_cells


def test_the_surest_of_each_cell_is_that_of_a_search() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        n, k = int(rng.integers(1, 60)), int(rng.integers(1, 8))
        cells, losses = rng.integers(0, k, n), rng.integers(0, 5, n).astype(np.float32)  # many ties
        found = surest_of_cells(cells, losses, k)
        for cell in range(k):
            mine = [i for i in range(n) if cells[i] == cell]
            assert found[cell] == (min(mine, key=lambda i: (losses[i], i)) if mine else -1)


def test_what_is_not_a_number_is_never_the_surest_unless_alone() -> None:
    losses = np.array([np.nan, 3.0, np.nan], np.float32)
    assert surest_of_cells(np.array([0, 0, 1]), losses, 2).tolist() == [1, 2]
    assert surest(losses, 5).tolist() == [1, 0, 2]
