"""Where a student's images are kept, and which validation images a rank scores: never what comes out of it."""

from __future__ import annotations

import dataclasses
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.students import IMAGES, Apart, small_job

from ddoq_ray.core.views.params import ViewSpec
from ddoq_ray.data.pictures import encode_png
from ddoq_ray.data.tar_writing import write_tar
from ddoq_ray.stages.evaluate.validation import Validation
from ddoq_ray.stages.train.memory import Room
from ddoq_ray.stages.train.ranks import Ranks
from ddoq_ray.stages.train.sets import Real, Set, Sets
from ddoq_ray.stages.train.worker import Trainer
from ddoq_ray.storage.artifact import Artifact

ONE = Ranks(0, 1, torch.device("cpu"))


def test_where_images_are_kept_by_the_rule() -> None:
    on_gpu = Room(host=100.0, device=80.0, sharing=2)
    assert [on_gpu.place(n) for n in (40, 41, 25)] == ["device", "file", "device"]
    assert [Room(host=100.0, device=8.0, sharing=2).place(n) for n in (25, 26)] == ["host", "file"]
    assert [Room(host=100.0).place(n) for n in (50, 51)] == ["host", "file"]
    with pytest.raises(ValueError, match=r"251,887\.7 GB fit neither .*\(256\.0 GB for 2 workers\).*GB free.*scratch"):
        Room(host=256e9, sharing=2).folder(1_281_167_000 * 3 * 256 * 256)


def real_images(folder: Path, digit_members: Any, shards: int, per_shard: int = 20) -> Real:
    folder.mkdir()
    for shard in range(shards):
        members = [m for i in range(per_shard) for m in digit_members[(shard * per_shard + i) % len(digit_members)]]
        (folder / f"{shard}.tar").write_bytes(write_tar(members))
    return Real(tuple(str(folder / f"{s}.tar") for s in range(shards)), (per_shard,) * shards)


@pytest.mark.parametrize("what", ["images", "full"])
def test_a_set_in_a_file_is_the_set_in_memory_and_goes_with_its_row(
    tmp_path: Path, what: str, digit_members: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    scratch = tmp_path / "scratch"
    job = small_job(tmp_path, "cluster.trainer.num_cpus=2", "max_bad_fraction=0.2")
    made = real_images(tmp_path / "real", digit_members, 2)
    broken = Path(made.urls[0]).read_bytes().replace(b"IDAT", b"IDxT", 3)
    Path(made.urls[0]).write_bytes(broken)
    Artifact(job.run / "images", "synthesize").finish({}, items=IMAGES)
    of = None if what == "full" else "images"

    def sets(room: Room) -> Sets:
        return Sets(job.run, job.config, 10, ONE, room)

    def views(found: Set) -> torch.Tensor:
        spec = ViewSpec(size=8, min_scale=0.5)
        return next(found.images.views([np.array([1, 4, 2])], spec, 0, 3)).pixels

    memory = sets(Room()).get(of, made, "digest")
    small = Room(host=1.0, scratch=str(scratch))
    first = sets(small)
    file = first.get(of, made, "digest")
    assert "are kept in a file on each node's disk" in capsys.readouterr().err
    for other in (sets(dataclasses.replace(small, first=False)), sets(small)):  # a neighbour; one that starts again
        there = other.get(of, made, "digest")
        assert there.images.shape == memory.images.shape and torch.equal(views(there), views(memory))
        assert (there.refused, there.class_ids.tolist()) == (memory.refused, memory.class_ids.tolist())
        np.testing.assert_array_equal(there.weights, memory.weights)
    assert torch.equal(views(file), views(memory)) and memory.refused == (3 if what == "full" else 0)
    assert len(list(scratch.iterdir())) == 2
    first.close()
    assert not list(scratch.iterdir())
    if what == "full":
        with pytest.raises(ValueError, match=r"3 of 40 training images cannot be read for the row `full`"):
            Sets(job.run, dataclasses.replace(job.config, max_bad_fraction=0.01), 10, ONE, small).get(None, made)
        with pytest.raises(ValueError, match=r"1\.tar holds more than the 19 samples of its index"):
            sets(Room()).get(None, Real(made.urls, (20, 19)))


def test_full_in_a_file_takes_as_much_memory_for_many_images_as_for_few(tmp_path: Path, digit_members: Any) -> None:
    """What numpy and torch allocate, at its highest, while the images are decoded and views of them are cut."""
    job = small_job(tmp_path, "student.image_size=64")
    peaks = []
    for shards in (2, 8):
        made = real_images(tmp_path / str(shards), digit_members, shards, per_shard=30)
        sets = Sets(job.run, job.config, 10, ONE, Room(host=1.0, scratch=str(tmp_path / "scratch")))
        tracemalloc.start()
        found = sets.get(None, made)
        batches = np.arange(len(found.class_ids)).reshape(-1, 10)
        for _ in found.images.views(batches, ViewSpec(size=64, min_scale=0.5), 0, 0):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert found.images.shape == (shards * 30, 3, 64, 64)
        sets.close()
    assert peaks[1] < peaks[0] + 100_000  # 180 pictures more are 2.2 MB


@pytest.mark.parametrize("shards", [1, 9])
def test_every_number_of_ranks_counts_the_same(tmp_path: Path, shards: int) -> None:
    """As many right among the same images, each scored by one rank: their sums are whole numbers."""
    job = small_job(tmp_path)
    rng = np.random.default_rng(0)
    urls = []
    for shard in range(shards):
        pictures = [encode_png(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(7)]
        members = [m for i, p in enumerate(pictures) for m in ((f"v{i}.png", p), (f"v{i}.cls", str(i % 2).encode()))]
        job.run.publish(f"val-{shard}.tar", write_tar(members))
        urls.append(job.run.path(f"val-{shard}.tar"))
    job = dataclasses.replace(job, validation=Validation(tuple(urls), (7,) * shards, 2, 1.0))

    class Counted(Apart):
        def total(self, counts: Any) -> list[int]:
            added.append(counts)
            return [1, 1, 1]

    found = []
    for world in (1, 2, 4, 8):
        added: list[torch.Tensor] = []
        for rank in range(world):
            trainer = Trainer(job, Counted(rank, world, torch.device("cpu")))
            trainer._wrap = lambda model: model  # type: ignore[method-assign]
            trainer.evaluate(trainer._begin(job.rows[0][0], None).training)
        assert world > 4 or max(int(a[2]) for a in added) < 7 * shards / world + 7
        found.append(torch.stack(added).sum(0).tolist())
    assert found == [found[0]] * 4 and found[0][2] == 7 * shards
