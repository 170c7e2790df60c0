"""A set with its labels: the teacher's answers to exactly the views that are given; columns that say the same views."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import ddoq_ray
from ddoq_ray.core.views.params import ViewSpec
from ddoq_ray.data.image_set import NewImage, encode_picture, load_image_arrays, write_images
from ddoq_ray.data.labelled_set import LabelledDataset
from ddoq_ray.data.soft_labels import views_of
from ddoq_ray.models.classifiers import Classifier, build_classifier
from ddoq_ray.models.labelling import Labeller
from ddoq_ray.storage.artifact import Artifact, digest_of, with_check
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.label_grid import LabelGrid
from ddoq_ray.storage.label_log import Making, write_labels

SPEC, SEED, EPOCHS = ViewSpec(size=16, min_scale=0.3, patches=2, cutout=0.4), 5, 3
WEIGHTS = [0.5, 0.3, 0.2, 0.9, 0.1]


@pytest.fixture(scope="module")
def teacher() -> Classifier:
    return build_classifier("convnet3-w8", 4, 16).eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, teacher: Classifier) -> Path:
    """Five images of two classes, and logits of their views in three epochs."""
    place = tmp_path_factory.mktemp("labelled")
    images, rng = Folder(str(place / "images")), np.random.default_rng(0)
    made = [
        NewImage(int(i > 2), i % 3, w, "", 0, encode_picture(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)))
        for i, w in enumerate(WEIGHTS)
    ]
    shard = write_images(images, "images-000000", made)
    Artifact(images, "synthesize").finish({}, digest="of these images", shards=[shard])
    pixels = torch.from_numpy(load_image_arrays([images.path("images-000000.tar")], 16).images)
    labeller, labels = Labeller(teacher, "logits", SPEC, seed=SEED, batch=2), Folder(str(place / "labels/t-p-16px"))
    grid = LabelGrid.of((5, EPOCHS), 8, batch=2, file_bytes=1 << 20, file_labels=10)
    identity = {"images": "of these images", "views": {"stored": 16}}
    for file in grid.all():
        making = Making(grid, "logits", digest_of(identity), (5, 20, 24))
        write_labels(labels, file, making, lambda e, a, b: labeller.labels(pixels, np.arange(a, b), e))
    views = dataclasses.asdict(SPEC) | {"seed": SEED, "stored": [5, 20, 24]}
    facts = {"outputs": 4, "teacher_index": [3, 1], "grid": dataclasses.asdict(grid), "views": views}
    Artifact(labels, "label").finish(identity, codec="logits", **facts)
    return place


def test_views_labels_and_weights_of_an_epoch(run: Path, teacher: Classifier) -> None:
    data = ddoq_ray.load(str(run), labels=True)
    assert isinstance(data, LabelledDataset) and len(data) == 5 and data.epochs == EPOCHS
    assert data.class_ids.tolist() == [0, 0, 0, 1, 1] and data.teacher_index.tolist() == [3, 1]
    np.testing.assert_allclose(data.weights, [1.5, 0.9, 0.6, 1.8, 0.2])
    seen = []
    for epoch in range(EPOCHS + 1):
        data.set_epoch(epoch)
        view, label, weight = data[3]
        with torch.no_grad():
            torch.testing.assert_close(label, teacher(view[None])[0], rtol=2e-3, atol=2e-3)
        assert view.shape == (3, 16, 16) and weight == pytest.approx(1.8)
        seen.append(view)
    assert torch.equal(seen[0], seen[EPOCHS]) and not torch.equal(seen[0], seen[1])
    views, labels, _ = data.batch(np.array([4, 3]))
    assert torch.equal(views[1], seen[0]) and torch.equal(labels[1], data[3][1])


def test_it_goes_to_the_workers_of_a_loader(run: Path) -> None:
    data = ddoq_ray.load(str(run), labels="t-p-16px")
    data.set_epoch(1)
    alone = [data[i] for i in range(5)]
    loader = torch.utils.data.DataLoader(data, batch_size=5, num_workers=2)  # type: ignore[arg-type]
    (views, labels, weights) = next(iter(loader))
    assert torch.equal(views, torch.stack([v for v, _, _ in alone]))
    assert torch.equal(labels, torch.stack([t for _, t, _ in alone]))
    assert weights.tolist() == [w for _, _, w in alone]


def test_it_is_a_sequence_and_takes_a_path(run: Path) -> None:
    data = ddoq_ray.load(run, labels=True)
    assert len(list(data)) == 5 and torch.equal(data[-1][0], data[4][0])  # type: ignore[call-overload]
    with pytest.raises(IndexError):
        data[5]
    assert len(ddoq_ray.load(run)) == 5


@pytest.mark.processes
def test_workers_that_stay_follow_the_epoch(run: Path) -> None:
    data = ddoq_ray.load(str(run), labels=True)
    loader = DataLoader(data, 5, num_workers=1, persistent_workers=True)
    for epoch in (0, 2, 1):
        data.set_epoch(epoch)
        [(views, _, _)] = loader
        assert data.epoch == epoch and torch.equal(views, data.batch(np.arange(5))[0])


def test_columns_are_enough_to_replay_the_views(run: Path) -> None:
    """By torchvision alone: shuffle strips, crop, resize, flip, paint over, paste the partner's view."""
    from torchvision.transforms.v2.functional import resized_crop

    data = ddoq_ray.load(str(run), labels=True)
    data.set_epoch(2)
    told = data.columns(2)
    assert sorted(told) == sorted(
        ["image_id", "class_id", "weight", "flip", "partner", "lambda", "label"]
        + [f"crop_{x}" for x in ("top", "left", "height", "width")]
        + [f"box_{x}" for x in ("top", "left", "bottom", "right")]
        + [f"cutout_{x}" for x in ("top", "left", "bottom", "right", "red", "green", "blue")]
        + ["patches"]
    )

    def crop(i: int) -> torch.Tensor:
        box = [int(told[f"crop_{x}"][i]) for x in ("top", "left", "height", "width")]
        image = torch.from_numpy(data.images[i]).float() / 255
        for axis in (1, 2):
            strips = image.chunk(2, axis)
            image = torch.cat([strips[j] for j in told["patches"][i, axis - 1]], axis)
        view = resized_crop(image, *box, [16, 16], antialias=False)
        view = view.flip(2) if told["flip"][i] else view
        t, left, b, r = (int(told[f"cutout_{x}"][i]) for x in ("top", "left", "bottom", "right"))
        for channel, colour in enumerate(("red", "green", "blue")):
            view[channel, t:b, left:r] = told[f"cutout_{colour}"][i] / 255
        return view

    compared = 0
    for i in range(5):
        base, partner = crop(i), int(told["partner"][i])
        if partner >= 0:
            t, left, b, r = (int(told[f"box_{x}"][i]) for x in ("top", "left", "bottom", "right"))
            base[:, t:b, left:r] = crop(partner)[:, t:b, left:r]
            assert told["lambda"][i] == pytest.approx(1 - (b - t) * (r - left) / 256)
        whole = [i] if partner < 0 else [i, partner]
        if all(max(told["crop_height"][j], told["crop_width"][j]) <= 16 for j in whole):  # larger ones are averaged
            torch.testing.assert_close(data[i][0], base, atol=1e-4, rtol=0)
            compared += 1
    assert compared
    assert told["label"].view("<f2").astype(np.float32).tolist() == data.batch(np.arange(5))[1].tolist()


def test_labels_of_something_else_are_refused(run: Path, tmp_path: Path) -> None:
    manifest = run / "images/manifest.json"
    text = manifest.read_text()
    try:
        manifest.write_text(json.dumps(with_check(json.loads(text.replace("of these images", "of others")))))
        with pytest.raises(ValueError, match=r"labels of another image set \(of these images\) .*\(of others\)"):
            ddoq_ray.load(str(run), labels=True)
        manifest.write_text("")
        with pytest.raises(ValueError, match="is damaged"):
            ddoq_ray.load(str(run), labels=True)
    finally:
        manifest.write_text(text)
    told = run / "labels/t-p-16px/manifest.json"
    text = told.read_text()
    try:
        told.write_text(json.dumps(with_check(json.loads(text.replace('"min_scale": 0.3', '"min_scale": 0.6')))))
        with pytest.raises(ValueError, match="other views than are drawn now"):
            ddoq_ray.load(str(run), labels=True)
    finally:
        told.write_text(text)
    with pytest.raises(ValueError, match="no finished labels: expected a run directory"):
        ddoq_ray.load(str(tmp_path), labels=True)
    with pytest.raises(ValueError, match="leave transform and cache out"):
        ddoq_ray.load(str(run), transform=lambda p: p, labels=True)
    assert json.loads(told.read_text())["codec"] == "logits"


def test_labels_of_views_that_a_newer_version_draws_are_told_apart() -> None:
    views = dataclasses.asdict(SPEC) | {"seed": SEED, "stored": [5, 20, 24]}
    assert views_of({"views": views}) == (SPEC, SEED, (5, 20, 24))
    with pytest.raises(ValueError, match="views with rotate, which this version of ddoq-ray does not know"):
        views_of({"views": views | {"rotate": 0.5}})
