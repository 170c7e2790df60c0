"""The baseline `random`: real images, drawn anew for every seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ddoq_ray.artifacts import Folder
from ddoq_ray.config.compose import load_config
from ddoq_ray.distilled import DistilledImage, read_images
from ddoq_ray.records import ShardDone
from ddoq_ray.runtime import Events
from ddoq_ray.samples import decode_rgb
from ddoq_ray.stages import prepare, select

pytestmark = pytest.mark.usefixtures("ray_here")

SHARDS, PER_SHARD, IPC = 4, 30, 4


@pytest.fixture(scope="module")
def draws(
    tmp_path_factory: pytest.TempPathFactory, write_corpus: Callable[..., Path]
) -> dict[str, tuple[list[DistilledImage], dict]]:
    base = tmp_path_factory.mktemp("random")
    shards = write_corpus(base / "shards", SHARDS, PER_SHARD)
    run = Folder(str(base / "run"))
    source = ["dataset=webdataset", f"dataset.path={shards}", "stages=[prepare,encode,quantize,synthesize]"]
    config = load_config([*source, f"ipc={IPC}", "synthesizer.shard_images=7"])
    events = Events(run)
    data = prepare.run(config, run, events)
    for i, shard in enumerate(data.train):  # all that the stage reads of the log is how many of each class are usable
        (run / "latents").publish(f"shard-{i:06d}/done.json", ShardDone(i, (), shard.images, 0).dumps())
    made = {}
    for name, place, index in (("first", "a", 0), ("again", "b", 0), ("other", "c", 1)):
        manifest = select.run(config, run, place, data, run / "latents", events, index)
        images = run / place / "images"
        made[name] = (list(read_images([images.path(n) for n in images.names("*.tar")])), manifest)
    return made


@pytest.fixture(scope="module")
def pool(digit_members: list[list[tuple[str, bytes]]]) -> dict[bytes, tuple[str, int]]:
    """Pixels -> (key, class_id) of every image that could be drawn."""
    samples = digit_members[: SHARDS * PER_SHARD]
    return {np.asarray(decode_rgb(png[1])).tobytes(): (png[0], int(label[1])) for png, label in samples}


def keys_of(images: list[DistilledImage], pool: dict[bytes, tuple[str, int]]) -> list[str]:
    found = [pool[np.asarray(decode_rgb(item.data)).tobytes()] for item in images]  # KeyError: not a real image
    assert [class_id for _, class_id in found] == [item.class_id for item in images]
    return [key for key, _ in found]


def test_ipc_real_images_of_each_class_without_repeats(draws: dict, pool: dict) -> None:
    for images, manifest in draws.values():
        keys = keys_of(images, pool)
        assert len(set(keys)) == len(keys) == 10 * IPC == manifest["items"]
        assert Counter(item.class_id for item in images) == dict.fromkeys(range(10), IPC)
        assert all(item.weight == 1 / IPC for item in images)
        assert [item.key for item in images] == [f"{c:05d}-{k:04d}" for c in range(10) for k in range(IPC)]


def test_a_draw_can_be_repeated_and_another_differs(draws: dict, pool: dict) -> None:
    assert draws["first"][1]["digest"] == draws["again"][1]["digest"]
    first, other = (set(keys_of(draws[name][0], pool)) for name in ("first", "other"))
    assert len(first & other) < len(first) * 0.7  # by chance about a third


def test_every_image_of_a_class_can_be_drawn() -> None:
    config = load_config([f"ipc={IPC}"])
    drawn = Counter(int(i) for k in range(200) for i in select.draw(config, {0: 9}, k)[0])
    assert sorted(drawn) == list(range(9))
    expected = 200 * IPC / 9
    assert max(abs(n - expected) for n in drawn.values()) < 5 * np.sqrt(expected)


def test_small_classes() -> None:
    counts = {0: 9, 1: 2, 2: 0}
    cap = select.draw(load_config([f"ipc={IPC}", "small_class=cap"]), counts, 0)
    drop = select.draw(load_config([f"ipc={IPC}", "small_class=drop"]), counts, 0)
    assert {c: len(p) for c, p in cap.items()} == {0: 4, 1: 2}
    assert {c: len(p) for c, p in drop.items()} == {0: 4}
    assert cap[1].tolist() == [0, 1]
