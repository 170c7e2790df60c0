"""Mosaics against slices, and masses of images of tiles."""

from __future__ import annotations

import numpy as np
import pytest

from ddoq_ray.core.mosaics import mosaic, tile_masses, tiled


def test_tiles_lie_row_by_row() -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (9, 5, 5, 3), np.uint8)
    whole = mosaic(list(tiles), 3, 15)
    for i in range(3):
        for j in range(3):
            assert (whole[5 * i : 5 * i + 5, 5 * j : 5 * j + 5] == tiles[3 * i + j]).all()
    assert (mosaic([tiles[0]], 1, 5) == tiles[0]).all()


def test_what_is_left_over_goes_to_the_first_tiles_by_the_nearest_pixel() -> None:
    """As torch's interpolate does it, which the released code calls."""
    import torch

    tiles = np.random.default_rng(1).integers(0, 256, (9, 5, 5, 3), np.uint8)
    whole = mosaic(list(tiles), 3, 17)
    assert whole.shape == (17, 17, 3)
    first = torch.from_numpy(tiles[1]).permute(2, 0, 1)[None].float()
    enlarged = torch.nn.functional.interpolate(first, size=(6, 6))[0].permute(1, 2, 0).numpy()
    assert (whole[:6, 6:12] == enlarged).all() and (whole[12:, 12:] == tiles[8]).all()


def test_wrong_tiles_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 4 tiles"):
        mosaic([np.zeros((2, 2, 3), np.uint8)] * 3, 2, 4)
    with pytest.raises(ValueError, match=r"\(2, 2, 3\)"):
        mosaic([np.zeros((3, 3, 3), np.uint8)] * 4, 2, 4)


@pytest.mark.parametrize("centroids", [1, 3, 4, 7, 40])
def test_every_centroid_is_in_an_image_and_its_mass_is_dealt_once(centroids: int) -> None:
    of = tiled(centroids, 4)
    assert len(of) == -(-centroids // 4) and set(of.ravel().tolist()) == set(range(centroids))
    weights = np.random.default_rng(2).dirichlet(np.ones(centroids))
    masses = tile_masses(weights, 4)
    times = np.bincount(of.ravel())
    assert np.allclose(masses, [sum(weights[c] / times[c] for c in row) for row in of]) and np.isclose(masses.sum(), 1)
    assert (tile_masses(weights, 1) == weights).all()
