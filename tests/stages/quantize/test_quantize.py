"""The quantize stage on a latent log that the test writes: against a fold of the same log in one process."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import threadpoolctl
from support.latent_logs import SHAPE, Running, check_class, fold, quantize, rows_of, settings, write_log

from ddoq_ray.core.baselines import d4m_kmeans, faiss_kmeans, lloyd, minibatch_kmeans
from ddoq_ray.core.distortion import assign
from ddoq_ray.core.gram_kmeans import KMeansSettings, gram_kmeans
from ddoq_ray.core.pooling import Pooling
from ddoq_ray.core.shrinkage import shrunk, shrunk_means
from ddoq_ray.storage.artifact import Artifact
from ddoq_ray.storage.folder import Folder

pytestmark = pytest.mark.usefixtures("ray_here")

CLASSES = 5


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, np.ndarray]]:
    """Nine shards of mixed classes, of one to three chunks; one is empty, and one class is in a single shard."""
    rng = np.random.default_rng(1)
    shards: list[list[list[int]]] = []
    for shard in range(9):
        low = 1 if shard != 4 else 0  # class 0 is in shard 4 only
        sizes = [] if shard == 6 else [60] if shard == 4 else rng.integers(10, 40, size=1 + shard % 3).tolist()
        shards.append([rng.integers(low, CLASSES, size=n).tolist() for n in sizes] or [[]])
    run = tmp_path_factory.mktemp("log")
    return run, write_log(run, CLASSES, shards)


@pytest.fixture(scope="module")
def reference(log: tuple[Path, dict[int, np.ndarray]]) -> dict[str, bytes]:
    return quantize(log[0], "reference", settings(num_shards=2))


def test_codebook_is_the_fold_of_the_log(log: tuple[Path, dict[int, np.ndarray]], reference: dict[str, bytes]) -> None:
    run, stream = log
    books = rows_of(reference)
    assert sorted(books) == list(range(CLASSES))
    for c, (centroids, counts) in fold(stream, settings()).items():
        check_class(books[c], stream[c], centroids, counts)
    manifest = Artifact(Folder(str(run)) / "reference" / "codebook", "quantize").require()
    assert manifest["items"] == sum(map(len, stream.values()))
    assert not (run / "reference" / "codebook" / "snapshots").exists()


def test_options_reach_the_algorithm(log: tuple[Path, dict[int, np.ndarray]]) -> None:
    run, stream = log
    config = settings("seed=7", winner="paper", batch=4, buffer=9)
    books = rows_of(quantize(run, "paper", config))
    for c, (centroids, counts) in fold(stream, config, winner="paper", batch=4, buffer=9).items():
        check_class(books[c], stream[c], centroids, counts)


@pytest.mark.parametrize(
    ("num_shards", "order"), [(1, "shuffled"), pytest.param(3, "reversed", marks=pytest.mark.slow)]
)
def test_neither_order_nor_number_of_actors_matters(
    log: tuple[Path, dict[int, np.ndarray]], reference: dict[str, bytes], num_shards: int, order: str
) -> None:
    shards = np.arange(9)
    shards = shards[::-1] if order == "reversed" else np.random.default_rng(num_shards).permutation(shards)
    config = settings(num_shards=num_shards, snapshot_every=num_shards)
    assert quantize(log[0], f"{order}-{num_shards}", config, shards.tolist()) == reference


def test_killed_quantizers_give_the_same_bytes(
    log: tuple[Path, dict[int, np.ndarray]], reference: dict[str, bytes]
) -> None:
    with Running(log[0], "killed", settings(num_shards=2, snapshot_every=2)) as running:
        actors = running.handle.actors
        for shard in (0, 1, 2, 5):
            running.handle.shard_done(shard)
        ray.get(running.handle._calls)
        assert running.place.names("snapshots/*.arrow")  # there is a state to go on from
        ray.kill(actors[0], no_restart=False)
        for shard in (8, 3):
            running.handle.shard_done(shard)
        ray.get(running.handle._calls)
        for actor in actors:  # and a SIGKILL with a call on its way
            process = ray.get(actor.__ray_call__.remote(lambda self: os.getpid()))
            call = actor.advance.remote(np.packbits(np.ones(9, np.uint8)).tobytes())
            os.kill(process, signal.SIGKILL)
            del call
        assert running.finish([4, 6, 7]) == reference


def test_a_new_driver_goes_on_with_another_number_of_actors(
    log: tuple[Path, dict[int, np.ndarray]], reference: dict[str, bytes]
) -> None:
    """What a killed run leaves: snapshots and some parts. The finished parts are not written again."""
    run, place = log[0], "cut-off"
    with Running(run, place, settings(num_shards=3, snapshot_every=1)) as running:
        for shard in (4, 0, 1, 2):
            running.handle.shard_done(shard)
        bitmap = np.packbits(running.handle.done).tobytes()
        ray.get([actor.advance.remote(bitmap) for actor in running.handle.actors])
    part = run / place / "codebook" / "part-00000.parquet"  # class 0 is only in shard 4
    before = part.stat()
    assert quantize(run, place, settings(num_shards=2)) == reference
    assert (part.stat().st_ino, part.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_snapshot_of_another_configuration_is_refused(log: tuple[Path, dict[int, np.ndarray]]) -> None:
    run, place = log[0], "foreign"
    with Running(run, place, settings(snapshot_every=1)) as running:
        running.handle.shard_done(0)
        ray.get(running.handle._calls)
    (run / place / "codebook" / "started.json").unlink()
    with pytest.raises(ray.exceptions.RayError, match="belongs to another configuration"):
        quantize(run, place, settings("seed=1"))


def test_another_configuration_in_the_same_place_is_refused(log: tuple[Path, dict[int, np.ndarray]]) -> None:
    with pytest.raises(ValueError, match=r"ipc: 3 there, 4 now"):
        quantize(log[0], "reference", settings("ipc=4"))


@pytest.mark.parametrize(
    ("overrides", "algorithm"),
    [
        (["quantizer=gram"], gram_kmeans),
        pytest.param(
            ["quantizer=gram", "quantizer.hartigan=false"],
            partial(gram_kmeans, settings=KMeansSettings(hartigan=False)),
            marks=pytest.mark.slow,
        ),
        (["quantizer=minibatch_kmeans"], d4m_kmeans),
        pytest.param(
            ["quantizer=minibatch_kmeans", "quantizer.variant=sklearn"], minibatch_kmeans, marks=pytest.mark.slow
        ),
        (["quantizer=kmeans"], lloyd),
        (["quantizer=faiss"], faiss_kmeans),
    ],
    ids=["gram", "gram-lloyd", "d4m", "minibatch", "kmeans", "faiss"],
)
def test_exact_algorithms_give_what_core_gives(
    log: tuple[Path, dict[int, np.ndarray]], overrides: list[str], algorithm: Any
) -> None:
    run, stream = log
    books = rows_of(quantize(run, "-".join(overrides), settings(*overrides)))
    with threadpoolctl.threadpool_limits(1):
        for c, x in stream.items():
            centroids, counts = algorithm(x, 3, seed=0, class_id=c)
            check_class(books[c], x, centroids, counts)


def test_shrunk_codebooks_are_exact_too(log: tuple[Path, dict[int, np.ndarray]]) -> None:
    """Of a streamed quantizer and of an exact one: core's centroids, shrunk, with the counts that these have."""
    run, stream = log
    streamed = fold(stream, settings())
    for name in ("clvq", "gram"):
        books = rows_of(quantize(run, f"shrunk-{name}", settings(f"quantizer={name}", "quantizer.shrink=true")))
        for c, x in stream.items():
            own = streamed[c] if name == "clvq" else gram_kmeans(x, 3, seed=0, class_id=c)
            nearest, squared = assign(x, own[0])
            measured = shrunk(own[0], np.bincount(nearest, minlength=3), float(squared.mean()))
            expected = measured if name == "clvq" else shrunk_means(x, *own)
            np.testing.assert_allclose(expected, measured, atol=1e-5)
            check_class(books[c], x, expected, own[1])


@pytest.mark.parametrize("shrink", [pytest.param(False, marks=pytest.mark.slow), True])
def test_pooled_codebooks_are_means_of_the_whole_latents_of_their_cells(
    log: tuple[Path, dict[int, np.ndarray]], shrink: bool
) -> None:
    run, stream = log
    pooling = Pooling(SHAPE, 3)
    pooled = {c: pooling(x.astype(np.float16)).astype(np.float32) for c, x in stream.items()}
    streamed = fold(pooled, settings())
    for name in ("clvq", "gram"):
        keys = [f"quantizer={name}", "quantizer.pool=3", f"quantizer.shrink={str(shrink).lower()}"]
        books = rows_of(quantize(run, f"pooled-{name}-{shrink}", settings(*keys)))
        for c, x in stream.items():
            own = streamed[c] if name == "clvq" else gram_kmeans(pooled[c], 3, seed=0, class_id=c)
            cells, _ = assign(pooled[c], own[0])
            expected = np.stack([x[cells == k].mean(0, dtype=np.float64) for k in range(3)]).astype(np.float32)
            if shrink:
                nearest, squared = assign(x, expected)
                expected = shrunk(expected, np.bincount(nearest, minlength=3), float(squared.mean()))
            check_class(books[c], x, expected, own[1])


def test_with_a_gpu_classes_go_together(log: tuple[Path, dict[int, np.ndarray]]) -> None:
    """The GPU of the tests' Ray is one in name only: torch then works on the CPU, by the same code."""
    run, stream = log
    overrides = ["quantizer=gram", "cluster.quantizer.num_gpus=0.5"]
    books = rows_of(quantize(run, "together", settings(*overrides)))
    for c, x in stream.items():
        labels, squared = assign(x, books[c]["centroid"])
        assert books[c]["count"].tolist() == np.bincount(labels, minlength=3).tolist()
        alone = assign(x, gram_kmeans(x, 3, seed=0, class_id=c)[0])[1].mean()
        assert books[c]["distortion"][0] == pytest.approx(squared.mean(), rel=1e-12)
        assert squared.mean() == pytest.approx(alone, rel=0.05)


@pytest.mark.parametrize(
    ("bound", "algorithm"),
    [("max_gram_gb=1e-9", "faiss"), ("max_class_gb=1e-9", "clvq")],
)
def test_a_class_too_large_for_the_gram_space(
    log: tuple[Path, dict[int, np.ndarray]], bound: str, algorithm: str
) -> None:
    run, stream = log
    config = settings("quantizer=gram", f"quantizer.{bound}")
    books = rows_of(quantize(run, f"too-large-{algorithm}", config))
    with threadpoolctl.threadpool_limits(1):
        expected = fold(stream, config) if algorithm == "clvq" else {
            c: faiss_kmeans(x, 3, seed=0, class_id=c) for c, x in stream.items()
        }  # fmt: skip
    for c, x in stream.items():
        check_class(books[c], x, *expected[c])
    manifest = Artifact(Folder(str(run)) / f"too-large-{algorithm}" / "codebook", "quantize").require()
    assert manifest["classes_by_algorithm"] == {algorithm: CLASSES}
    assert "classes too large for the Gram space" in (run / "events.jsonl").read_text()
