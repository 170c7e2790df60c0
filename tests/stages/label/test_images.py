"""An image set for teachers: the pixels that students see, from tars that are the ones that were made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ddoq_ray.data.image_set import NewImage, encode_picture, load_image_arrays, write_images
from ddoq_ray.stages.label.images import SharedImages, check_shard, decoded
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.manifests import ImageShard


def written(folder: Folder, *sides: tuple[int, int]) -> list[ImageShard]:
    rng = np.random.default_rng(0)
    pictures = [encode_picture(rng.integers(0, 256, (*side, 3), dtype=np.uint8)) for side in sides]
    made = [NewImage(0, i, 1 / len(sides), "", 0, data) for i, data in enumerate(pictures)]
    shards = [write_images(folder, f"images-{k:06d}", made[k::2]) for k in range(2)]
    return [ImageShard(**shard) for shard in shards]


@pytest.mark.parametrize(
    "sides", [[(8, 8)] * 4, [(12, 9)] * 3, [(4, 6)] * 2, [(8, 8), (9, 8), (20, 30)], [(4, 4), (9, 9)]]
)
def test_pixels_are_those_that_students_see(tmp_path: Path, sides: list[tuple[int, int]]) -> None:
    images = Folder(str(tmp_path))
    shards = written(images, *sides)
    tars = [images.path(f"{shard['name']}.tar") for shard in shards]
    found = decoded(images, shards, 8, 10)
    assert type(found) is np.ndarray  # pickled for Ray without a copy
    assert np.array_equal(found, load_image_arrays(tars, 8, 10).images)
    whole = len(set(sides)) == 1
    height, width = sides[0] if whole and min(sides[0]) >= 8 else (8, 8) if whole else (10, 10)
    assert found.shape == (len(sides), 3, height, width)


def test_a_tar_with_other_bytes_is_refused_by_name(tmp_path: Path) -> None:
    images = Folder(str(tmp_path))
    shards = written(images, *[(8, 8)] * 4)
    whole = bytearray(images.read("images-000001.tar"))
    check_shard(images, shards[1])
    for at in (0, 700, len(whole) // 2, len(whole) - 1):  # a header, a picture, the end's zeros
        turned = bytearray(whole)
        turned[at] ^= 1
        images.publish("images-000001.tar", bytes(turned))
        with pytest.raises(ValueError, match=r"images-000001\.tar is damaged.*run the stage again that made it"):
            decoded(images, shards, 8, 8)
    images.remove("images-000001.tar")
    with pytest.raises(ValueError, match=r"images-000001\.tar is missing, with 2 images"):
        check_shard(images, shards[1])


def test_a_set_is_decoded_when_it_is_first_sent_and_once() -> None:
    asked = []
    shared = SharedImages(lambda: asked.append(1) or f"reference {len(asked)}")
    assert not asked
    sent = [shared.__reduce__()[1] for _ in range(3)]
    assert sent == [(None, "reference 1")] * 3
    shared.release()
    assert shared.__reduce__()[1] == (None, "reference 2")  # a unit that is done again after all
