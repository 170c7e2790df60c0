"""Oracles: numpy's Philox, torchvision's crop and resize, CutMix by hand, bit equality of any split."""

import dataclasses
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ddoq_ray.core import rng
from ddoq_ray.core.views import params as drawing
from ddoq_ray.core.views import render as rendering
from ddoq_ray.core.views.params import ViewSpec, epoch_orders, view_params
from ddoq_ray.core.views.render import batch_views, render, render_epochs


def make_images(n, height, width, seed=0):
    return torch.randint(
        0, 256, (n, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def test_philox_is_numpys():
    key = np.array([0x0123456789ABCDEF, 0xFEDCBA9876543210], dtype=np.uint64)
    ids = np.array([0, 1, 7, 2**31, 2**40 + 3])
    words = rng.philox_words(key, ids, 3)
    for row, image_id in zip(words, ids, strict=True):
        reference = np.random.Philox(key=key, counter=[0, int(image_id), 0, 0])
        np.testing.assert_array_equal(row, reference.random_raw(12))
        reference = np.random.Philox(key=key, counter=[0, int(image_id), 0, 0])
        np.testing.assert_array_equal(rng.uniform(row), np.random.Generator(reference).random(12))


@pytest.mark.parametrize("options", [{}, {"cutmix": False, "mixup": 0.8, "patches": 3, "cutout": 0.5}])
def test_a_row_depends_on_its_key_alone(options):
    spec, ids = ViewSpec(size=16, **options), np.arange(200)
    together = view_params(spec, 3, 5, ids, (200, 16, 16))
    shuffled = np.random.default_rng(0).permutation(200)
    again = view_params(spec, 3, 5, shuffled, (200, 16, 16))
    alone = [view_params(spec, 3, 5, ids[i : i + 1], (200, 16, 16)) for i in range(200)]
    for field in dataclasses.fields(together):
        value = getattr(together, field.name)
        np.testing.assert_array_equal(getattr(again, field.name), value[shuffled])
        np.testing.assert_array_equal(np.concatenate([getattr(p, field.name) for p in alone]), value)
    epochs = np.arange(200) % 3 * 5
    mixed = view_params(spec, 3, epochs, ids, (200, 16, 16))
    for field in dataclasses.fields(together):
        np.testing.assert_array_equal(
            getattr(mixed, field.name)[epochs == 5], getattr(together, field.name)[epochs == 5]
        )
    for seed, epoch in ((4, 5), (3, 6), (5, 3)):
        other = view_params(spec, seed, epoch, ids, (200, 16, 16))
        for field in ("boxes", "patches", "cutout", "lam"):
            value = getattr(together, field)
            assert not (value.size and np.array_equal(getattr(other, field), value)), field


def test_known_row_stays_the_same():
    """Pins the format: stored soft labels are only right while this holds."""
    params = view_params(ViewSpec(size=32), 42, 7, np.array([13]), (100, 48, 40))
    key = drawing._stream_key("views", 42, 7)
    u = np.random.Generator(np.random.Philox(key=key, counter=[0, 13, 0, 0])).random(28)
    assert params.flip[0] == (u[0] < 0.5)
    assert params.partner[0] == (13 + 1 + int(u[1] * 99)) % 100
    area, aspect = 48 * 40 * (0.08 + 0.92 * u[8]), np.exp(np.log(3 / 4) + u[9] * np.log(16 / 9))
    w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
    assert w <= 40 and h <= 48  # the first attempt fits, for this key
    np.testing.assert_array_equal(params.boxes[0], [int(u[5] * (49 - h)), int(u[6] * (41 - w)), h, w])
    assert [hex(k) for k in key.tolist()] == ["0xc3f4dcf02a73fa8b", "0xe0f88d7e94f3889b"]


def test_crop_distribution_is_torchvisions():
    transforms = pytest.importorskip("torchvision.transforms")
    torch.manual_seed(0)
    image = torch.zeros(3, 40, 64)
    reference = np.array(
        [transforms.RandomResizedCrop.get_params(image, (0.3, 1.0), (3 / 4, 4 / 3)) for _ in range(2000)]
    )
    boxes = view_params(ViewSpec(size=16, min_scale=0.3), 0, 0, np.arange(20000), (20000, 40, 64)).boxes
    assert (boxes == np.rint(boxes)).all() and (boxes >= 0).all()
    assert (boxes[:, 0] + boxes[:, 2] <= 40).all() and (boxes[:, 1] + boxes[:, 3] <= 64).all()
    stats = pytest.importorskip("scipy.stats")
    for column in range(4):
        # Whole-pixel values have ties, which make the KS p-value conservative.
        assert stats.ks_2samp(boxes[:, column], reference[:, column]).pvalue > 0.01


@pytest.mark.parametrize("height,width,expected", [(100, 10, (43, 0, 13, 10)), (10, 100, (0, 43, 10, 13))])
def test_centre_fallback(height, width, expected):
    # A crop of the whole area cannot have an allowed aspect: its fallback, by hand (10 / (3/4) = 13.3).
    spec = ViewSpec(size=8, min_scale=1.0)
    boxes = view_params(spec, 0, 0, np.arange(50), (50, height, width)).boxes
    assert {tuple(box) for box in boxes.tolist()} == {expected}


@pytest.mark.parametrize("height,width,size", [(16, 16, 16), (20, 14, 32), (40, 40, 56)])
def test_pixels_are_torchvisions(height, width, size):
    functional = pytest.importorskip("torchvision.transforms.functional")
    images = make_images(30, height, width)
    spec = ViewSpec(size=size, cutmix=False)
    params = view_params(spec, 1, 2, np.arange(30), (30, height, width))
    pixels, _, lam = batch_views(images, torch.arange(30), spec, 1, 2)
    assert pixels.dtype == torch.float32 and pixels.min() >= 0 and pixels.max() <= 1 and (lam == 1).all()
    for i in range(30):
        top, left, h, w = (int(v) for v in params.boxes[i])
        expected = functional.resized_crop(images[i].float() / 255, top, left, h, w, [size, size], antialias=False)
        expected = functional.hflip(expected) if params.flip[i] else expected
        torch.testing.assert_close(pixels[i], expected, atol=3e-5, rtol=0)
    assert 5 < params.flip.sum() < 25


@pytest.mark.parametrize(
    "height,width,ratio", [(32, 32, (3 / 4, 4 / 3)), (16, 200, (3 / 4, 4 / 3)), (64, 8, (0.1, 10.0))]
)
def test_attempts_that_are_drawn_only_where_needed_are_the_same(height, width, ratio, monkeypatch):
    """And the bytes by which views are known hold every parameter of every view."""
    spec, ids = ViewSpec(size=16, min_scale=0.5, ratio=ratio), np.arange(4000)
    few = view_params(spec, 1, 2, ids, (4000, height, width))
    monkeypatch.setattr(drawing, "_USUAL_BLOCKS", drawing._BLOCKS)
    whole = view_params(spec, 1, 2, ids, (4000, height, width))
    assert few.packed() == whole.packed() and len(few.packed()) == 72 * 4000
    more = view_params(dataclasses.replace(spec, patches=2, cutout=0.2), 1, 2, ids, (4000, height, width))
    assert len(more.packed()) == (72 + 4 * (4 + 7)) * 4000
    parts = [more.take(slice(0, 1000)), more.take(np.arange(1000, 4000))]
    assert b"".join(p.packed() for p in parts) == parts[0].joined(parts[1]).packed() == more.packed()
    for field in dataclasses.fields(few):
        # Options have streams of their own: without them, views are what they were before there were any.
        if (before := getattr(few, field.name)).size:
            np.testing.assert_array_equal(getattr(more, field.name), before)
        changed = np.array(getattr(more, field.name))
        changed.flat[-1] = not changed.flat[-1] if changed.dtype == bool else changed.flat[-1] + 1
        assert dataclasses.replace(more, **{field.name: changed}).packed() != more.packed(), field.name


def test_flip_is_an_exact_mirror():
    images = make_images(4, 20, 20)
    params = view_params(ViewSpec(size=16, patches=2), 0, 0, np.arange(4), (4, 20, 20))
    params = dataclasses.replace(params, boxes=np.array([[2.0, 3.0, 9.0, 11.0]] * 4))
    plain, mirrored = (
        rendering._crop_resize(images, np.arange(4), dataclasses.replace(params, flip=np.full(4, flip)), 16)
        for flip in (False, True)
    )
    assert torch.equal(mirrored, plain.flip(3))


@pytest.mark.parametrize(("height", "size"), [(16, 16), pytest.param(24, 16, marks=pytest.mark.slow), (40, 8)])
@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("options", [{}, {"cutmix": False, "mixup": 0.8, "patches": 3, "cutout": 0.5}])
def test_same_bits_for_any_split_and_order(height, size, threads, options, monkeypatch):
    images, spec = make_images(60, height, height + 3 * (height > 16)), ViewSpec(size=size, **options)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        index = torch.arange(60)
        whole, partner, lam = batch_views(images, index, spec, 9, 4)
        for step in (1, 7, 32):
            parts = [batch_views(images, part, spec, 9, 4) for part in index.split(step)]
            assert torch.equal(torch.cat([p[0] for p in parts]), whole)
            np.testing.assert_array_equal(np.concatenate([p[1] for p in parts]), partner)
            np.testing.assert_array_equal(np.concatenate([p[2] for p in parts]), lam)
        order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
        assert torch.equal(batch_views(images, order, spec, 9, 4)[0], whole[order])
        assert torch.equal(batch_views(images, order.numpy(), spec, 9, 4)[0], whole[order])
        monkeypatch.setattr(rendering, "_CPU_CHUNK", 30_000)  # several rendering chunks a batch
        assert torch.equal(batch_views(images, index, spec, 9, 4)[0], whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("height,size", [(16, 16), (40, 8)])
@pytest.mark.parametrize(
    "options", [{}, {"cutmix": False}, {"cutmix": False, "mixup": 0.8, "patches": 3, "cutout": 0.5}]
)
def test_epochs_of_a_whole_set_are_the_same_bits(height, size, options, monkeypatch):
    images, spec = make_images(30, height, height), ViewSpec(size=size, **options)
    index, epoch = np.tile(np.arange(30), 3), np.arange(5, 8).repeat(30)
    params = view_params(spec, 9, epoch, index, (30, height, height))
    monkeypatch.setattr(rendering, "_CPU_CHUNK", 30_000)  # chunks that end within an epoch
    views = render_epochs(images, size, params)
    one_by_one = torch.cat([batch_views(images, np.arange(30), spec, 9, e)[0] for e in range(5, 8)])
    assert torch.equal(views, one_by_one)


def test_whole_image_rows_do_not_change_with_their_batch():
    # Crops that are the whole image take another path; its choice must not depend on the neighbours.
    images, spec = make_images(400, 16, 16), ViewSpec(size=16, min_scale=0.9)
    boxes = view_params(spec, 0, 0, np.arange(400), (400, 16, 16)).boxes
    full = np.flatnonzero((boxes[:, 2:] == 16).all(axis=1))
    assert 20 < len(full) < 380
    whole = batch_views(images, np.arange(400), spec, 0, 0)[0]
    assert torch.equal(batch_views(images, full, spec, 0, 0)[0], whole[torch.from_numpy(full)])


@pytest.mark.parametrize("beta", [1.0, 0.4])
def test_cutmix_pastes_the_partners_own_view(beta):
    n, size = 40, 16
    images, spec = make_images(n, 20, 20), ViewSpec(size=size, cutmix_beta=beta)
    params = view_params(spec, 0, 3, np.arange(n), (n, 20, 20))
    pixels, partner, lam = batch_views(images, np.arange(n), spec, 0, 3)
    # Partners' views come from a separate call that knows nothing of CutMix.
    alone = batch_views(images, np.arange(n), dataclasses.replace(spec, cutmix=False), 0, 3)[0]
    for i in range(n):
        expected, kept = alone[i].clone(), torch.ones(size, size)
        if partner[i] >= 0:
            top, left, bottom, right = params.mix_box[i]
            expected[:, top:bottom, left:right] = alone[partner[i], :, top:bottom, left:right]
            kept[top:bottom, left:right] = 0
        assert torch.equal(pixels[i], expected)
        assert lam[i] == pytest.approx(kept.mean().item(), abs=1e-7)
        assert (lam[i] == 1) == (partner[i] == -1)
        assert partner[i] != i
    assert (partner >= 0).sum() > n / 2


def test_cutmix_statistics():
    stats = pytest.importorskip("scipy.stats")
    n = 20000
    params = view_params(ViewSpec(size=224), 0, 0, np.arange(n), (n, 224, 224))
    # Yun et al.'s rand_bbox, drawn by a loop with another generator.
    rng = np.random.default_rng(0)
    reference = []
    for lam in rng.uniform(size=4000):
        side, (cy, cx) = int(224 * np.sqrt(1 - lam)), rng.integers(224, size=2)
        y0, y1, x0, x1 = np.clip([cy - side // 2, cy + side // 2, cx - side // 2, cx + side // 2], 0, 224)
        reference.append(1 - (y1 - y0) * (x1 - x0) / 224**2)
    assert stats.ks_2samp(params.lam, reference).pvalue > 0.01
    mixed = params.partner >= 0
    distance = (params.partner[mixed] - np.arange(n)[mixed]) % n  # uniform over 1..n-1
    assert stats.kstest(distance / n, "uniform").pvalue > 0.01
    assert abs(params.flip.mean() - 0.5) < 0.015
    u = np.random.default_rng(1).uniform(size=5000)
    assert stats.kstest(drawing._beta(u, 0.3), stats.beta(0.3, 0.3).cdf).pvalue > 0.01


def test_a_set_of_one_image_has_no_partner():
    pixels, partner, lam = batch_views(make_images(1, 16, 16), np.zeros(3, dtype=np.int64), ViewSpec(size=16), 0, 0)
    assert (partner == -1).all() and (lam == 1).all() and torch.equal(pixels[0], pixels[2])


def test_no_augmentation_gives_the_image_back():
    images = make_images(5, 16, 16)
    spec = ViewSpec(size=16, kind="none", flip=False, cutmix=False)
    assert torch.equal(batch_views(images, np.arange(5), spec, 0, 0)[0], images.float().div(255))
    spec = ViewSpec(size=16, kind="none", cutmix=False)
    flip = torch.from_numpy(view_params(spec, 0, 0, np.arange(5), (5, 16, 16)).flip)
    assert flip.any() and not flip.all()
    expected = torch.where(flip[:, None, None, None], images.flip(3), images).float().div(255)
    assert torch.equal(batch_views(images, np.arange(5), spec, 0, 0)[0], expected)


def test_shrinking_does_not_skip_pixels():
    images = make_images(6, 64, 64)
    spec = ViewSpec(size=16, kind="none", flip=False, cutmix=False)
    # 64 -> 16 is a whole multiple: the exact area mean.
    expected = F.avg_pool2d(images.float() / 255, 4)
    torch.testing.assert_close(batch_views(images, np.arange(6), spec, 0, 0)[0], expected, atol=2e-5, rtol=0)
    # One-pixel stripes must turn grey, at any factor; plain bilinear sampling leaves moire.
    stripes = torch.zeros(1, 3, 50, 50, dtype=torch.uint8)
    stripes[..., ::2] = 255
    assert batch_views(stripes, np.array([0]), spec, 0, 0)[0].std() < 0.12
    plain = F.interpolate(stripes.float() / 255, size=(16, 16), mode="bilinear")
    assert plain.std() > 0.25


def test_epoch_orders():
    order = epoch_orders(1, [2], 1000)[0]
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    np.testing.assert_array_equal(order, epoch_orders(1, range(5), 1000)[2])
    assert not np.array_equal(order, epoch_orders(1, [3], 1000)[0])
    assert not np.array_equal(order, epoch_orders(2, [2], 1000)[0])
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.1
    assert epoch_orders(0, [0, 1], 0).shape == (2, 0)
    # All six orders of three images are equally likely (600 epochs, 100 each, 4.5 sigma).
    seen = np.unique(epoch_orders(0, range(600), 3), axis=0, return_counts=True)[1]
    assert len(seen) == 6 and abs(seen - 100).max() < 42


def test_empty_batch():
    pixels, partner, lam = batch_views(make_images(3, 8, 8), np.array([], dtype=np.int64), ViewSpec(size=8), 0, 0)
    assert pixels.shape == (0, 3, 8, 8) and partner.shape == lam.shape == (0,)


@pytest.mark.parametrize(
    "change",
    [
        {"size": 0},
        {"kind": "crop"},
        {"min_scale": 0.0},
        {"max_scale": 1.5},
        {"min_scale": 0.9, "max_scale": 0.5},
        {"ratio": (2.0, 1.0)},
        {"cutmix_beta": 0.0},
        {"mixup": -0.5, "cutmix": False},
        {"mixup": 0.5},
        {"patches": 0},
        {"cutout": 1.5},
    ],
)
def test_bad_spec_is_refused(change):
    with pytest.raises(ValueError):
        ViewSpec(**{"size": 16, **change})


def test_bad_input_is_refused():
    spec, images = ViewSpec(size=8), make_images(3, 8, 8)
    with pytest.raises(ValueError, match=r"0\.\.2"):
        batch_views(images, np.array([3]), spec, 0, 0)
    with pytest.raises(ValueError, match=r"0\.\.2"):
        batch_views(images, np.array([-1]), spec, 0, 0)
    with pytest.raises(ValueError, match="seed"):
        batch_views(images, np.array([0]), spec, -1, 0)
    with pytest.raises(ValueError, match="uint8"):
        batch_views(images.float(), np.array([0]), spec, 0, 0)
    with pytest.raises(ValueError, match="one row of params"):
        params = view_params(spec, 0, 0, np.array([0]), (3, 8, 8))
        render(images, np.array([0, 1]), 8, params, lambda ids: params)


def test_parameters_are_fast_enough():
    spec, ids = ViewSpec(size=224), np.arange(4096)
    view_params(spec, 0, 0, ids, (4096, 224, 224))
    start = time.process_time()
    view_params(spec, 0, 1, ids, (4096, 224, 224))
    assert 4096 / (time.process_time() - start) > 20_000  # rows a second of processor time
