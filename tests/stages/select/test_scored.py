"""What a teacher is asked of a shard, without Ray: the surest image of each cell, the surest crops of a pool."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddoq_ray.core.distortion import assign
from ddoq_ray.data.picked_samples import PassedOver
from ddoq_ray.data.samples import read_samples, to_square
from ddoq_ray.models.classifiers import load_classifier
from ddoq_ray.models.confidence import class_losses
from ddoq_ray.stages.select import confident, rded
from ddoq_ray.stages.select.choice import Mosaic, Selection
from ddoq_ray.stages.select.excerpts import Excerpts, Pick, finished_excerpts, write_excerpt
from ddoq_ray.stages.select.images import cropped
from ddoq_ray.stages.select.scoring import Looking, Shard
from ddoq_ray.storage.folder import Folder

SAMPLES, CLASSES = 60, range(10)
BAD = 4  # its picture is passed over


@pytest.fixture(scope="module")
def looking() -> Looking:
    return Looking(load_classifier("shipped:digits-teacher"), 7, np.arange(10))


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory, write_corpus: Callable[..., Path]) -> Shard:
    base = tmp_path_factory.mktemp("scored")
    write_corpus(base / "shards", 1, SAMPLES)
    url = str(base / "shards/digits-000.tar")
    key = list(read_samples(url, 10, lambda bad: None))[BAD].key
    return Shard(0, url, PassedOver(keys=frozenset([key])), None, Folder(str(base / "scores")), "")


def usable(shard: Shard) -> dict[int, list[np.ndarray]]:
    found: dict[int, list[np.ndarray]] = {c: [] for c in CLASSES}
    for i, sample in enumerate(read_samples(shard.url, 10, lambda bad: None)):
        if i != BAD:
            found[sample.class_id].append(np.asarray(sample.image))
    return found


def test_losses_are_those_of_each_usable_image_in_its_order(shard: Shard, looking: Looking) -> None:
    losses = confident._losses(shard, 10, "squash", looking, {2, 5})
    for c in (2, 5):
        seen = np.stack([to_square(Image.fromarray(x), 16) for x in usable(shard)[c]])
        assert losses[c] == pytest.approx(class_losses(looking.judge, seen, np.full(len(seen), c)), abs=1e-4)


def test_the_best_of_several_shards_is_the_best_of_all() -> None:
    rng = np.random.default_rng(0)
    x, centroids = rng.normal(size=(40, 3)), rng.normal(size=(5, 3))
    losses, cells = rng.integers(0, 6, 40).astype(np.float32), assign(x, centroids)[0]
    cells[cells == 2] = 3  # a cell without an image
    best = confident._Best.of(np.full(5, 0.2))
    for first in (20, 0, 30, 10):  # shards come in any order
        mine = range(first, first + 10)
        rows = []
        for cell in range(5):
            inside = [i for i in mine if cells[i] == cell]
            if inside:
                at = min(inside, key=lambda i: (losses[i], i))
                rows.append([cell, float(losses[at]), at - first])
        best.take(rows, first)
        best.keep([[float(losses[i]), i - first] for i in mine], first)
    found = best.positions().tolist()
    for cell in (0, 1, 3, 4):
        assert found[cell] == min(np.flatnonzero(cells == cell).tolist(), key=lambda i: (losses[i], i))
    left = [i for i in range(40) if i not in set(found) - {found[2]}]
    assert found[2] == min(left, key=lambda i: (losses[i], i)) and len(set(found)) == 5


def test_spare_images_are_kept_as_far_as_cells_can_ask_for_them() -> None:
    losses = np.random.default_rng(0).integers(0, 300, 3000)
    best = confident._Best.of(np.full(4, 0.25))
    for first in np.random.default_rng(1).permutation(300) * 10:
        mine = sorted((float(losses[i]), int(i - first)) for i in range(first, first + 10))
        best.keep([list(pair) for pair in mine[:8]], int(first))
        assert len(best.spare) < 100, "however many shards hold the class"
    surest = np.lexsort((np.arange(3000), losses)).tolist()
    best.take([[0, 0.0, surest[0]], [3, 0.0, surest[2]]], 0)
    assert best.positions().tolist() == [surest[0], surest[1], surest[3], surest[2]]


def test_an_image_that_the_teacher_has_no_number_for_comes_last(shard: Shard) -> None:
    judge = load_classifier("shipped:digits-teacher")
    with torch.no_grad():
        judge.head.bias[3] = torch.nan
    losses = Looking(judge, 2, np.arange(10)).losses([np.zeros((16, 16, 3), np.uint8)] * 3, [0, 1, 2])
    json.dumps(losses.tolist(), allow_nan=False)
    assert (losses > 1e30).all()


def test_the_surest_crop_of_each_pooled_image(shard: Shard, looking: Looking) -> None:
    real = usable(shard)
    picks = [Pick(3, 2, 0), Pick(3, 0, 1), Pick(8, 1, 0)]
    asked = Shard(0, shard.url, shard.passed_over, picks, shard.scores, "")
    rows = {(c, rank): (loss, box) for c, rank, loss, *box in rded._look(10, (5, 4, 8), looking, asked)}
    assert set(rows) == {(p.class_id, p.rank) for p in picks}
    for pick in picks:
        picture = Image.fromarray(real[pick.class_id][pick.position])
        boxes = rded.crop_boxes(picture.size, 5, (0, pick.class_id, pick.position), 4)
        crops = np.stack([cropped(picture, tuple(box), 8) for box in boxes.tolist()])
        losses = class_losses(looking.judge, crops, np.full(4, pick.class_id), pad=True)
        loss, box = rows[pick.class_id, pick.rank]
        assert loss == pytest.approx(float(losses.min()), abs=1e-4) and box == boxes[losses.argmin()].tolist()


def test_crops_are_square_and_their_own_whatever_the_pool_holds() -> None:
    boxes = rded.crop_boxes((40, 30), 0, (1, 2, 3), 200)
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (width == height).all() and (boxes >= 0).all() and (boxes[:, 2] <= 40).all() and (boxes[:, 3] <= 30).all()
    areas = width * height / 1200
    assert areas.min() > 0.07 and areas.max() <= 0.75  # the largest square of 40 x 30
    assert (rded.crop_boxes((40, 30), 0, (1, 2, 3), 5) == boxes[:5]).all()
    assert (rded.crop_boxes((40, 30), 0, (1, 2, 4), 5) != boxes[:5]).any()


def test_nothing_beside_a_crop_is_in_it() -> None:
    pixels = np.zeros((20, 20, 3), np.uint8)
    pixels[5:15, 5:15] = 200
    assert (cropped(Image.fromarray(pixels), (5, 5, 15, 15), 4) == 200).all()


def test_crops_are_dealt_to_images_as_published_and_come_again_where_there_are_few() -> None:
    mosaic = Mosaic(2, 16, {0: 3, 1: 3}, {0: np.zeros((12, 4), np.int64), 1: np.zeros((5, 4), np.int64)})
    assert [mosaic.parts(0, i) for i in range(3)] == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    assert [mosaic.parts(1, i) for i in range(3)] == [[0, 3, 1, 4], [1, 4, 2, 0], [2, 0, 3, 1]]
    chosen = Selection({0: np.arange(12), 1: np.arange(5)}, mosaic=mosaic)
    assert chosen.images == {0: 3, 1: 3} and chosen.weight(0, 2) == 1 / 3
    plain = Selection({4: np.array([7, 1])}, {4: np.array([0.25, 0.75])})
    assert plain.images == {4: 2} and plain.parts(4, 1) == [1] and plain.weight(4, 1) == 0.75


def test_excerpts_are_kept_by_what_they_are_made_from_and_damage_is_told(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "excerpts"))
    assert finished_excerpts(folder, {0: "a"}) == set()
    pictures = [(Pick(0, 5, 1), b"one"), (Pick(2, 0, 0), b"three")]
    assert write_excerpt(folder, 3, "a", pictures) == 2
    assert finished_excerpts(folder, {3: "a", 4: "a"}) == {3} and finished_excerpts(folder, {3: "b"}) == set()
    assert Excerpts(folder).picture(3, 2, 0) == b"three" and Excerpts(folder).picture(3, 0, 1) == b"one"
    (tmp_path / "excerpts/shard-000003.bin").write_bytes(b"onethreX")
    with pytest.raises(ValueError, match="bytes 3 to 8 are not what was written"):
        Excerpts(folder).picture(3, 2, 0)
    (tmp_path / "excerpts/shard-000003.json").write_bytes(b"{}")
    assert finished_excerpts(folder, {3: "a"}) == set()
