"""A run that was cut off knows its finished image shards by their records, and reads those that have none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from support.counted_store import Counted, counted_store

from ddoq_ray.data.image_set import NewImage, write_images
from ddoq_ray.data.pictures import encode_png
from ddoq_ray.stages.synthesize.constant_images import constant_facts
from ddoq_ray.stages.synthesize.jobs import ClassRange, ImageUnit, Job
from ddoq_ray.stages.synthesize.shard_records import publish_record, published
from ddoq_ray.storage.folder import Folder

JOBS = [Job("", ImageUnit(i, (ClassRange(i, 0, 2), ClassRange(i + 1, 0, 1))), (), "the set") for i in range(3)]


def picture(c: int, k: int) -> np.ndarray:
    made = np.full((8, 8, 3), 10 * c + k, np.uint8)
    made[0, 0, 0] += k  # the first of a class is of one colour
    return made


def publish(run: Folder, job: Job, record: bool = True) -> dict[str, Any]:
    """As a decoder does; without the record: cut off between the two."""
    pictures = {key: picture(*key) for key in job.unit.keys}
    images = [NewImage(c, k, 0.5, "", 0, encode_png(p), {"attempt": 1} if k else {}) for (c, k), p in pictures.items()]
    made = write_images(run / "images", job.unit.name, images) | constant_facts(pictures.items()) | {"retried": 1}
    return publish_record(run, job, made) if record else made


@pytest.fixture
def run() -> Folder:
    return Folder(counted_store())


def test_finished_shards_are_known_without_being_opened(run: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    assert published(run, JOBS) == {}
    made = {job.name: publish(run, job) for job in JOBS}
    Counted.reads.clear()
    Counted.listings = 0
    assert published(run, JOBS) == made
    assert Counted.read_of(".tar") == [] and len(Counted.read_of(".json")) == 3 and Counted.listings == 2
    assert made[JOBS[1].name] | {"bytes": 0, "sha256": ""} == {
        "name": "images-000001", "images": 3, "bytes": 0, "sha256": "", "constant": 2, "first_constant": [1, 0],
        "retried": 1,
    }  # fmt: skip
    assert not capsys.readouterr().err


def test_a_shard_without_a_record_is_read_once(run: Folder) -> None:
    made = {job.name: publish(run, job, record=job is not JOBS[1]) for job in JOBS}
    Counted.reads.clear()
    assert published(run, JOBS) == made
    assert {name for name, _ in Counted.reads if name.endswith(".tar")} == {"images-000001.tar"}
    Counted.reads.clear()
    assert published(run, JOBS) == made and Counted.read_of(".tar") == []


@pytest.mark.parametrize("damage", ["cut", "longer", "of another set", "of another unit", "no json"])
def test_a_record_is_not_trusted_where_it_does_not_fit(
    run: Folder, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {job.name: publish(run, job) for job in JOBS}
    store, jobs = MemoryFileSystem(), list(JOBS)
    tar = "/store/images/images-000001.tar"
    data = store.cat_file(tar)
    if damage in ("cut", "longer"):
        store.pipe_file(tar, data[:-512] if damage == "cut" else data + bytes(512))
    elif damage == "of another set":
        jobs[1] = Job("", JOBS[1].unit, (), "another")
    elif damage == "of another unit":
        jobs[1] = Job("", ImageUnit(1, (ClassRange(1, 0, 3),)), (), "the set")
    else:
        store.pipe_file("/store/images/.records/images-000001.json", b"{")
    found = published(run, jobs)
    if damage == "no json":  # as one without
        assert found == made
        return
    assert found == {name: record for name, record in made.items() if name != JOBS[1].name}
    said = capsys.readouterr().err
    assert "1 of the image shards" in said and "images-000001" in said and "made anew" in said
    publish(run, jobs[1])
    assert published(run, jobs).keys() == made.keys() and not capsys.readouterr().err


def test_a_record_without_its_shard_counts_for_nothing(run: Folder) -> None:
    publish(run, JOBS[0])
    MemoryFileSystem().rm("/store/images/images-000000.tar")
    assert published(run, JOBS) == {}


def test_on_a_disk_too(tmp_path: Any) -> None:
    run = Folder(str(tmp_path))
    made = {job.name: publish(run, job, record=job is not JOBS[2]) for job in JOBS}
    (tmp_path / "images/images-000000.tar").write_bytes(bytes(made[JOBS[0].name]["bytes"]))  # nobody looks into it
    assert published(run, JOBS) == made
    assert (run / "images").sizes("*.tar") == {f"{r['name']}.tar": r["bytes"] for r in made.values()}
