"""Crops as torchvision draws them."""

from __future__ import annotations

import numpy as np
import torch
from torchvision.transforms import RandomResizedCrop

from ddoq_ray.core.crops import crop_box


def test_areas_and_places_have_torchvisions_distribution() -> None:
    rng = np.random.default_rng(0)
    ours = np.array([crop_box(rng, (40, 60), 0.2) for _ in range(4000)])
    picture = torch.zeros(3, 40, 60)
    torch.manual_seed(0)
    theirs = np.array([RandomResizedCrop.get_params(picture, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)])
    for column in range(4):
        spread = theirs[:, column].std() / np.sqrt(len(theirs))
        assert abs(ours[:, column].mean() - theirs[:, column].mean()) < 5 * spread
    top, left, h, w = ours.T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= 40).all() and (left + w <= 60).all()
    assert ((h > 0) & (w > 0)).all()


def test_what_never_fits_is_the_largest_crop_in_the_middle() -> None:
    rng = np.random.default_rng(0)
    assert crop_box(rng, (10, 100), 1.0, (1.0, 1.0)) == (0, 45, 10, 10)
    assert crop_box(rng, (100, 10), 1.0, (1.0, 1.0)) == (45, 0, 10, 10)
