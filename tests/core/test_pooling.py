"""Pooled latents against a loop over squares."""

from __future__ import annotations

import numpy as np
import pytest

from ddoq_ray.core.pooling import Pooling


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_each_value_is_the_mean_of_its_square(dtype: type) -> None:
    shape, side = (3, 4, 6), 2
    x = np.random.default_rng(0).standard_normal((5, 72)).astype(dtype)
    pool = Pooling(shape, side)
    whole = x.reshape(5, *shape).astype(np.float64)
    expected = [
        [
            whole[n, c, i : i + side, j : j + side].mean()
            for c in range(3)
            for i in range(0, 4, 2)
            for j in range(0, 6, 2)
        ]
        for n in range(5)
    ]
    found = pool(x)
    assert found.shape == (5, pool.dim) == (5, 18) and found.dtype == dtype
    np.testing.assert_allclose(found, expected, atol=1e-3 if dtype is np.float16 else 1e-6)


def test_a_side_of_one_changes_nothing_and_needs_no_square() -> None:
    x = np.ones((2, 7), np.float16)
    assert Pooling((7,))(x) is x and Pooling((7,)).dim == 7


@pytest.mark.parametrize(("shape", "side"), [((3, 4, 6), 4), ((3, 6, 4), 4), ((72,), 2)])
def test_a_side_that_does_not_divide_is_refused(shape: tuple[int, ...], side: int) -> None:
    with pytest.raises(ValueError, match=f"quantizer.pool={side}: .* expected a side that divides the last two"):
        Pooling(shape, side)
