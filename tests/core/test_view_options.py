"""MixUp, shuffled patches and cutout. Oracles: the published codes, with their draws given."""

import dataclasses

import numpy as np
import pytest
import torch

from ddoq_ray.core.views import render as rendering
from ddoq_ray.core.views.params import ViewSpec, view_params
from ddoq_ray.core.views.render import batch_views


def make_images(n, height, width, seed=0):
    return torch.randint(
        0, 256, (n, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def test_mixup_blends_the_partners_own_view():
    n, size = 40, 16
    images, spec = make_images(n, 20, 20), ViewSpec(size=size, cutmix=False, mixup=0.8, cutout=0.3)
    pixels, partner, lam = batch_views(images, np.arange(n), spec, 0, 3)
    alone = batch_views(images, np.arange(n), dataclasses.replace(spec, mixup=0.0), 0, 3)[0]
    kept = torch.from_numpy(lam).float().view(-1, 1, 1, 1)
    torch.testing.assert_close(pixels, kept * alone + (1 - kept) * alone[partner], atol=1e-6, rtol=0)
    assert (partner >= 0).all() and (partner != np.arange(n)).all()
    stats = pytest.importorskip("scipy.stats")
    params = view_params(spec, 0, 0, np.arange(5000), (5000, 16, 16))
    assert stats.kstest(params.lam, stats.beta(0.8, 0.8).cdf).pvalue > 0.01
    assert stats.kstest((params.partner - np.arange(5000)) % 5000 / 5000, "uniform").pvalue > 0.01
    assert not params.mix_box.any()


def rdeds_shuffle(image, columns, rows):
    """RDED's ShufflePatches (LINs-lab/RDED, validation/utils.py) with given orders for its two shuffles."""
    for order in (columns, rows):
        width = image.shape[2] // len(order)
        strips = [image[..., i * width : (i + 1) * width] for i in range(len(order))]
        image = torch.cat([strips[i] for i in order], -1).permute(0, 2, 1)
    return image


@pytest.mark.parametrize("patches", [2, 3])
def test_patches_are_shuffled_as_rded_does_before_the_crop(patches):
    images, ids = make_images(30, 24, 36), np.arange(30)
    spec = ViewSpec(size=16, patches=patches, min_scale=0.5)
    params = view_params(spec, 0, 1, ids, (30, 24, 36))
    shuffled = [rdeds_shuffle(image, o[1], o[0]) for image, o in zip(images, params.patches, strict=True)]
    expected = batch_views(torch.stack(shuffled), ids, dataclasses.replace(spec, patches=1), 0, 1)[0]
    assert torch.equal(batch_views(images, ids, spec, 0, 1)[0], expected)
    # Whole images at their own size are copied, and shuffled too.
    square, whole = make_images(8, 12, 12), ViewSpec(size=12, kind="none", cutmix=False, flip=False, patches=patches)
    orders = view_params(whole, 0, 1, np.arange(8), (8, 12, 12)).patches
    copied = torch.stack([rdeds_shuffle(image, o[1], o[0]) for image, o in zip(square, orders, strict=True)])
    assert torch.equal(batch_views(square, np.arange(8), whole, 0, 1)[0], copied.float().div(255))


def test_patches_of_a_side_that_they_do_not_divide_keep_every_pixel():
    image = torch.arange(3 * 7 * 10, dtype=torch.uint8).view(1, 3, 7, 10)
    moved = rendering._shuffled(image, np.array([[[1, 0], [0, 1]]]))  # rows swapped
    assert sorted(moved.flatten().tolist()) == sorted(image.flatten().tolist())
    assert torch.equal(moved[0], torch.cat([image[0, :, 3:], image[0, :, :3]], 1))  # strips of 3 and 4
    moved = rendering._shuffled(image, np.array([[[0, 1, 2], [2, 0, 1]]]))  # columns in strips of 3, 3 and 4
    assert torch.equal(moved[0], torch.cat([image[0, ..., 6:], image[0, ..., :3], image[0, ..., 3:6]], -1))


def test_orders_of_patches_are_uniform():
    orders = view_params(ViewSpec(size=8, patches=3), 0, 0, np.arange(7200), (7200, 8, 8)).patches
    for axis in range(2):
        seen = np.unique(orders[:, axis], axis=0, return_counts=True)[1]
        assert len(seen) == 6 and abs(seen - 1200).max() < 143  # 4.5 sigma
    assert abs(np.corrcoef(orders[:, 0, 0], orders[:, 1, 0])[0, 1]) < 0.05
    assert (view_params(ViewSpec(size=8), 0, 0, np.arange(3), (3, 8, 8)).patches).shape == (3, 2, 0)


def pils_cutout(view, cutout, centre, colour):
    """CutoutPIL (Alibaba-MIIL/ImageNet21K) with a given centre and colour."""
    from PIL import Image, ImageDraw

    picture = Image.fromarray(view)
    side, half = picture.size[0], int(cutout * picture.size[0] + 0.5) // 2
    (x1, y1), (x2, y2) = (np.clip([c + d for c in centre], 0, side).tolist() for d in (-half, half))
    ImageDraw.Draw(picture).rectangle([x1, y1, x2, y2], fill=colour)
    return np.array(picture)


@pytest.mark.parametrize("cutout", [0.5, 0.3])
def test_cutout_paints_what_the_published_code_paints(cutout):
    n, size = 4000, 17
    images, spec = make_images(60, 17, 17), ViewSpec(size=size, kind="none", flip=False, cutmix=False, cutout=cutout)
    params = view_params(spec, 0, 2, np.arange(n), (n, 17, 17))
    pixels = batch_views(images, np.arange(60), spec, 0, 2)[0]
    half = int(cutout * size + 0.5) // 2
    for i in range(60):
        top, left, bottom, right, *colour = params.cutout[i].tolist()
        # Of a clipped box the centre is told by the end that is not.
        centre = [low + half if low > 0 else high - 1 - half for low, high in ((left, right), (top, bottom))]
        expected = pils_cutout(images[i].permute(1, 2, 0).numpy(), cutout, centre, tuple(colour))
        assert torch.equal(pixels[i], torch.from_numpy(expected).permute(2, 0, 1).float().div(255))
    # Boxes by the published draw, with another generator.
    stats, rng = pytest.importorskip("scipy.stats"), np.random.default_rng(0)
    centres = rng.integers(size, size=(n, 2))
    low, high = (centres - half).clip(0, size), np.minimum(centres + half, size - 1) + 1
    assert stats.ks_2samp(np.prod(params.cutout[:, 2:4] - params.cutout[:, :2], 1), (high - low).prod(1)).pvalue > 0.01
    for column in range(2):
        assert stats.ks_2samp(params.cutout[:, column], low[:, column]).pvalue > 0.01
    assert stats.kstest((params.cutout[:, 4:] + 0.5).ravel() / 256, "uniform").pvalue > 0.01


def test_a_partner_brings_its_own_patches_and_box():
    n = 30
    images, spec = make_images(n, 20, 20), ViewSpec(size=16, patches=2, cutout=0.4)
    params = view_params(spec, 0, 3, np.arange(n), (n, 20, 20))
    pixels = batch_views(images, np.arange(n), spec, 0, 3)[0]
    alone = batch_views(images, np.arange(n), dataclasses.replace(spec, cutmix=False), 0, 3)[0]
    for i in np.flatnonzero(params.partner >= 0):
        top, left, bottom, right = params.mix_box[i]
        alone_i = alone[i].clone()
        alone_i[:, top:bottom, left:right] = alone[params.partner[i], :, top:bottom, left:right]
        assert torch.equal(pixels[i], alone_i)
