"""How a codebook is laid out as image shards: every centroid once, in order, in memory of the shards' number."""

from __future__ import annotations

import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from benchmarks.synthesize_layout import write_codebook
from ddoq_ray.stages.synthesize.jobs import ClassRange, image_jobs
from ddoq_ray.storage.codebook import Account, read_part, write_part
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.records import Codebook

RAGGED = {0: {0: 3, 2: 1}, 1: {3: 7}, 2: {}, 3: {5: 2, 6: 2, 9: 4}}  # part -> class -> centroids


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    run = Folder(str(tmp_path_factory.mktemp("ragged")))
    for part, classes in RAGGED.items():
        books = [
            Codebook(c, np.full((k, 4), c, np.float32), np.ones(k, np.int64), 0.0, np.ones(k, np.int64))
            for c, k in classes.items()
        ]
        write_part(run / "codebook", part, books, Account([], {}, []), latent_shape=(4, 1, 1), prior_id="prior")
    return run


@pytest.mark.parametrize("shard_images", [1, 2, 3, 5, 18, 19, 20, 100])
def test_shards_are_the_rows_of_the_parts_in_order(ragged: Folder, shard_images: int) -> None:
    """Against the rows themselves, as the parts' tables have them."""
    rows = []
    for part in RAGGED:
        name = f"part-{part:05d}.parquet"
        table = read_part(ragged / "codebook", name)
        rows += [
            (c, k, name) for c, k in zip(*(table[n].to_pylist() for n in ("class_id", "centroid_id")), strict=True)
        ]
    jobs = image_jobs(ragged, "", shard_images)
    assert [job.unit.index for job in jobs] == list(range(-(-len(rows) // shard_images)))
    for i, job in enumerate(jobs):
        mine = rows[i * shard_images : (i + 1) * shard_images]
        assert job.unit.keys == [(c, k) for c, k, _ in mine] and len(job.unit) == len(mine)
        # One without rows may stand between two that have some.
        assert [p for p in job.parts if p != "part-00002.parquet"] == sorted({name for *_, name in mine})
        assert len({r.class_id for r in job.unit.ranges}) == len(job.unit.ranges)
    assert jobs[-1] == list(jobs)[-1] and jobs[1:] == list(jobs)[1:] and jobs.images == len(rows)


def test_a_codebook_without_centroids_has_no_shards(tmp_path: Path) -> None:
    assert list(image_jobs(Folder(str(tmp_path)), "", 5)) == []
    write_part(
        Folder(str(tmp_path)) / "codebook", 0, [], Account([0], {}, []), latent_shape=(4, 1, 1), prior_id="prior"
    )
    assert list(image_jobs(Folder(str(tmp_path)), "", 5)) == []


def test_a_tenth_of_imagenet_21k_takes_little(tmp_path: Path) -> None:
    """At the whole size: `python -m benchmarks.synthesize_layout`."""
    run, classes, ipc = Folder(str(tmp_path)), 2184, 50
    write_codebook(run / "codebook", classes, ipc)
    tracemalloc.start()
    try:
        jobs = image_jobs(run, "", 50)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(jobs) == classes and sum(len(job.unit) for job in jobs) == classes * ipc
    assert jobs[-1].unit.ranges == (ClassRange(classes - 1, 0, ipc),)
    assert held < 100 * classes and peak < 3000 * classes, "jobs are made when they are asked for"
    assert len(pickle.dumps(jobs[7])) < 600
