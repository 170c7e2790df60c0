"""The validation images: all who score read the same ones, and what cannot be read is counted and named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddoq_ray.config.compose import load_config
from ddoq_ray.data.pictures import encode_png, to_square
from ddoq_ray.data.samples import load_arrays
from ddoq_ray.data.shard_index import index_shard
from ddoq_ray.data.tar_writing import write_tar
from ddoq_ray.stages.evaluate.validation import (
    Refused,
    Validation,
    check_refused,
    load_scored,
    middle_square,
    scored_images,
    teacher_columns,
)
from ddoq_ray.stages.label.teacher import teacher_crop
from ddoq_ray.stages.prepare.step import Data
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.records import ClassInfo, ShardInfo


def members(key: str, label: int, broken: bool = False) -> list[tuple[str, bytes]]:
    png = encode_png(np.full((8, 8, 3), 10 * label + 1, np.uint8))
    return [(f"{key}.png", png[: len(png) // 2] if broken else png), (f"{key}.cls", str(label).encode())]


@pytest.fixture
def shards(tmp_path: Path) -> list[ShardInfo]:
    """Two shards of 12 samples; half of the second cannot be decoded."""
    for shard in (0, 1):
        samples = [members(f"s{i}", i % 3, broken=shard == 1 and i % 2 == 1) for i in range(12)]
        (tmp_path / f"v-{shard}.tar").write_bytes(write_tar([m for s in samples for m in s]))
    return [index_shard(str(tmp_path / f"v-{shard}.tar"), 3) for shard in (0, 1)]


def validation(shards: list[ShardInfo]) -> Validation:
    return Validation(tuple(s.path for s in shards), tuple(s.samples for s in shards), 3, 1.0)


def test_refused_images_are_counted_and_named(shards: list[ShardInfo], tmp_path: Path) -> None:
    refused, run = Refused(), Folder(str(tmp_path / "run"))
    images, class_ids = load_scored(validation(shards), 8, refused)
    assert (images.shape, len(class_ids), refused.total) == ((18, 3, 8, 8), 18, 6)
    assert images[:, 0, 0, 0].tolist() == (10 * class_ids + 1).tolist()
    refused.publish(run)
    assert run.names("quarantine/*") == ["quarantine/val-shard-000001.jsonl"]
    lines = [json.loads(line) for line in run.read("quarantine/val-shard-000001.jsonl").splitlines()]
    assert [line["key"] for line in lines] == ["s1", "s3", "s5", "s7", "s9", "s11"]
    assert all("undecodable" in line["reason"] for line in lines) and "undecodable image: 6" in refused.reasons
    Refused().publish(run)  # mended shards: what an earlier reading named goes
    assert run.names("quarantine/*") == []


def test_the_teacher_check_and_the_students_score_the_same_images(shards: list[ShardInfo]) -> None:
    one, two = Refused(), Refused()
    streamed = list(scored_images(validation(shards), 8, 1.0, one))
    images, class_ids = load_scored(validation(shards), 8, two)
    np.testing.assert_array_equal(np.stack([x for x, _ in streamed]), images)
    assert [c for _, c in streamed] == class_ids.tolist() and one == two


def test_images_that_the_index_knows_and_nobody_sees_count_too(shards: list[ShardInfo]) -> None:
    """A shard that was damaged after it was indexed: its tar breaks off, which is one refusal and eight images."""
    path = Path(shards[0].path)
    path.write_bytes(path.read_bytes()[: 4 * 2048 + 100])
    refused = Refused()
    _, class_ids = load_scored(validation(shards[:1]), 8, refused)
    assert len(class_ids) + refused.total == 12 and refused.total >= 8
    assert "cannot be read any more" in refused.reasons


def test_too_many_refused_stop_a_run_and_the_limit_is_the_users(tmp_path: Path) -> None:
    run = Folder(str(tmp_path))
    config = load_config()
    with pytest.raises(ValueError, match=r"12 of 24 validation images refused.*0\.01 \(why\).*val-\*\.jsonl"):
        check_refused(config, run, 12, 12, "why")
    check_refused(dataclasses.replace(config, max_bad_fraction=0.5), run, 12, 12)
    with pytest.raises(ValueError, match="no usable validation image"):
        check_refused(dataclasses.replace(config, max_bad_fraction=1.0), run, 0, 12)


def test_without_anyone_who_counts_a_refusal_is_an_error(shards: list[ShardInfo]) -> None:
    with pytest.raises(ValueError, match=r"v-1\.tar: sample s1 cannot be used: undecodable"):
        load_arrays([s.path for s in shards], 8, 3)


def test_a_class_without_a_place_in_the_teacher_is_not_left_out() -> None:
    classes = (ClassInfo(0, "cat", "cat", 5), ClassInfo(1, "dog", "dog", None))
    data = Data(Folder("/nowhere"), classes, (), ())
    with pytest.raises(ValueError, match=r"teacher_index \(dog\)"):
        teacher_columns(data)
    assert teacher_columns(dataclasses.replace(data, classes=classes[:1])) == (5,)


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (256, 256), (800, 301), (30, 41), (3000, 20)])
def test_scored_images_are_torchvisions_resize_and_crop(size: tuple[int, int]) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    made = middle_square(picture, 224, 0.875)
    if min(size) >= 256:
        reference = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
        np.testing.assert_array_equal(made, np.asarray(reference(picture)))
    assert made.shape == (224, 224, 3)


def test_small_pictures_are_enlarged_as_training_pictures_are_and_those_of_that_size_are_not_touched() -> None:
    small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    np.testing.assert_array_equal(middle_square(small, 16, 1.0), to_square(small, 16))
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    np.testing.assert_array_equal(middle_square(Image.fromarray(pixels), 16, 1.0), pixels)


def test_protocols_say_how_images_are_prepared() -> None:
    for name, crop, stored in (("d4m", 0.875, 256), ("ddoq-v1", 0.875, 256), ("digits", 1.0, 224)):
        protocol = load_config([f"protocol={name}"]).protocol
        assert (protocol.val_crop, protocol.stored_side(224)) == (crop, stored)
    assert teacher_crop("shipped:digits-teacher", load_config().protocol) == 1.0
    assert teacher_crop("torchvision:resnet18", load_config().protocol) == 224 / 256
    with pytest.raises(ValueError, match=r"protocol\.val_crop=0"):
        load_config(["protocol.val_crop=0"])
