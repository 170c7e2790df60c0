"""The quantize stage on a latent log that the test writes: against a fold of the same log in one process."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import threadpoolctl

from ddoq_ray.artifacts import Artifact, Folder, digest_of
from ddoq_ray.config import RunConfig
from ddoq_ray.config.compose import load_config
from ddoq_ray.core.baselines import faiss_kmeans, lloyd, minibatch_kmeans
from ddoq_ray.core.clvq import Clvq
from ddoq_ray.core.distortion import assign
from ddoq_ray.core.gram_kmeans import gram_kmeans
from ddoq_ray.records import (
    ChunkRecord,
    ClassCounts,
    CodebookWarning,
    ShardDone,
    ShardInfo,
    binary_rows,
    fixed_binary,
    latent_schema,
)
from ddoq_ray.runtime import Events
from ddoq_ray.stages.codebook import part_classes
from ddoq_ray.stages.networks import Networks
from ddoq_ray.stages.prepare import Data
from ddoq_ray.stages.quantize import Quantizers
from ddoq_ray.stages.quantize_memory import check_memory, plan_memory

pytestmark = pytest.mark.usefixtures("ray_here")

SHAPE = (2, 3, 3)
DIM = 18
FACTS = Networks("prior-1", SHAPE, 16, None, 10, None, None, None, 0, 0, {})


def write_log(
    run: Path,
    classes: int,
    shards: Sequence[Sequence[Sequence[int]]],
    latent: Callable[[int, int, np.ndarray], np.ndarray] = lambda class_id, index, x: x,
) -> dict[int, np.ndarray]:
    """A run directory with prepared data and a finished latent log.

    Args:
        shards: For each shard its chunks, each the class of every sample in reading order.
        latent: Changes a sample's latent: class_id, index in the chunk, the latent as drawn.

    Returns:
        class_id -> its latents float32 [n, D] in the log's order.
    """
    folder = Folder(str(run))
    rng = np.random.default_rng(0)
    middle = rng.standard_normal((classes, DIM))
    stream: dict[int, list[np.ndarray]] = {c: [] for c in range(classes)}
    infos = []
    for shard, chunks in enumerate(shards):
        records = []
        for chunk, class_ids in enumerate(chunks):
            ids = np.asarray(class_ids, np.int32)
            latents = (middle[ids] + 0.5 * rng.standard_normal((len(ids), DIM))).astype(np.float16)
            for i, c in enumerate(ids.tolist()):
                latents[i] = latent(c, i, latents[i])
            order = np.argsort(ids, kind="stable")
            for i in order:
                stream[int(ids[i])].append(latents[i].astype(np.float32))
            keys = pa.array([f"s{shard}c{chunk}i{i}" for i in order], pa.string())
            columns = [keys, pa.array(ids[order]), fixed_binary(latents[order])]
            out = io.BytesIO()
            pq.write_table(pa.Table.from_arrays(columns, schema=latent_schema(SHAPE, "prior-1")), out)
            name = f"shard-{shard:06d}/chunk-{chunk:05d}.parquet"
            (folder / "latents").publish(name, out.getvalue())
            records.append(ChunkRecord(name, len(ids), ClassCounts(Counter(ids.tolist())), digest_of(out.getvalue())))
        counts = Counter(c for chunk in chunks for c in chunk)
        done = ShardDone(shard, tuple(records), ClassCounts(counts), 0)
        (folder / "latents").publish(f"shard-{shard:06d}/done.json", done.dumps())
        infos.append(ShardInfo(f"/data/{shard}.tar", sum(counts.values()), 1, done.classes, f"digest-{shard}"))
    data = folder / "data"
    names = [{"class_id": c, "name": f"n{c}", "prompt": f"n{c}"} for c in range(classes)]
    data.publish_json("source-classes.json", names)
    data.publish_json("shards.json", [i.to_json() for i in infos])
    data.publish_json("val-shards.json", [])
    Artifact(data, "prepare").finish({})
    return {c: np.stack(rows) if rows else np.empty((0, DIM), np.float32) for c, rows in stream.items()}


def settings(*overrides: str, **quantizer: Any) -> RunConfig:
    """A configuration with one quantizer actor unless the test asks for more."""
    config = load_config(["baselines=[]", "ipc=3", "quantizer.num_shards=1", *overrides])
    return dataclasses.replace(config, quantizer=dataclasses.replace(config.quantizer, **quantizer))


class Running:
    """Quantizers at work on the log of `run`, closed at the end of the block."""

    def __init__(self, run: Path, place: str, config: RunConfig) -> None:
        self.run = Folder(str(run))
        self.place = self.run / place / "codebook"
        latents = self.run / "latents"
        self.handle = Quantizers(config, self.run, place, config.quantizer, Data.load(self.run), latents, FACTS)

    def __enter__(self) -> Running:
        self.handle.launch()
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.close()

    def finish(self, order: Sequence[int]) -> dict[str, bytes]:
        for shard in order:
            self.handle.shard_done(shard)
        self.handle.finish(Events(self.run))
        return {name: self.place.read(name) for name in self.place.names("part-*.parquet")}


def quantize(run: Path, place: str, config: RunConfig, order: Sequence[int] | None = None) -> dict[str, bytes]:
    with Running(run, place, config) as running:
        return running.finish(order if order is not None else range(len(running.handle.done)))


def rows_of(parts: dict[str, bytes]) -> dict[int, dict[str, np.ndarray]]:
    """class_id -> its columns, from the bytes of codebook parts."""
    table = pa.concat_tables(pq.read_table(io.BytesIO(parts[name])) for name in sorted(parts))
    columns = {name: table[name].to_numpy() for name in table.column_names if name != "centroid"}
    columns["centroid"] = binary_rows(table["centroid"], "<f4")
    ids = columns.pop("class_id")
    return {int(c): {name: column[ids == c] for name, column in columns.items()} for c in np.unique(ids)}


def check_class(row: dict[str, np.ndarray], x: np.ndarray, centroids: np.ndarray, stream_counts: np.ndarray) -> None:
    """A class of the codebook is exactly these centroids, with the exact Voronoi masses of `x`."""
    labels, squared = assign(x, centroids)
    assert row["centroid"].tobytes() == centroids.astype("<f4").tobytes()
    assert row["count"].tolist() == np.bincount(labels, minlength=len(centroids)).tolist()
    assert row["count"].sum() == len(x)
    assert row["stream_count"].tolist() == stream_counts.tolist()
    assert row["centroid_id"].tolist() == list(range(len(centroids)))
    assert (row["weight"] == row["count"] / len(x)).all() and row["weight"].sum() == pytest.approx(1, abs=1e-12)
    assert row["distortion"] == pytest.approx(np.full(len(centroids), squared.mean()), rel=1e-12)


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


def fold(stream: dict[int, np.ndarray], config: RunConfig, **clvq: Any) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """The same log through core.clvq, one class after another, one update a class."""
    made = {}
    for c, x in stream.items():
        quantizer = Clvq(config.ipc, DIM, seed=config.seed, class_id=c, **clvq)
        quantizer.update(x)
        made[c] = quantizer.result()
    return made


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


@pytest.mark.parametrize(("num_shards", "order"), [(1, "shuffled"), (3, "reversed")])
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


class TestSmallClasses:
    SIZES: ClassVar = {0: 12, 1: 2, 2: 5, 3: 1, 4: 30}  # and class 5 has none

    @pytest.fixture(scope="class")
    def ragged(self, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, np.ndarray]]:
        ids = np.random.default_rng(3).permutation([c for c, n in self.SIZES.items() for _ in range(n)]).tolist()
        run = tmp_path_factory.mktemp("ragged")
        return run, write_log(run, 6, [[ids[:20]], [ids[20:]]])

    def test_cap(self, ragged: tuple[Path, dict[int, np.ndarray]]) -> None:
        config = settings("ipc=5", "small_class=cap")
        books = rows_of(quantize(ragged[0], "cap", config))
        assert {c: len(book["count"]) for c, book in books.items()} == {c: min(5, n) for c, n in self.SIZES.items()}
        for c in books:
            check_class(books[c], ragged[1][c], *fold(ragged[1], config)[c])

    def test_drop(self, ragged: tuple[Path, dict[int, np.ndarray]]) -> None:
        books = rows_of(quantize(ragged[0], "drop", settings("ipc=5", "small_class=drop")))
        assert {c: len(book["count"]) for c, book in books.items()} == {0: 5, 2: 5, 4: 5}
        manifest = Artifact(Folder(str(ragged[0])) / "drop" / "codebook", "quantize").require()
        assert manifest["dropped_classes"] == [1, 3, 5]

    def test_error(self, ragged: tuple[Path, dict[int, np.ndarray]]) -> None:
        with pytest.raises(ValueError, match=r"class [135] has \d usable images, fewer than ipc=5"):
            quantize(ragged[0], "error", settings("ipc=5"))

    def test_cap_with_an_exact_algorithm(self, ragged: tuple[Path, dict[int, np.ndarray]]) -> None:
        books = rows_of(quantize(ragged[0], "cap-gram", settings("ipc=5", "small_class=cap", "quantizer=gram")))
        assert {c: len(book["count"]) for c, book in books.items()} == {c: min(5, n) for c, n in self.SIZES.items()}


class TestWhatIsNotAsAsked:
    """Typed warnings: the codebook is exact, but a class has fewer centroids than ipc."""

    @pytest.fixture(scope="class")
    def repeated(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Class 0 has 12 latents, class 1 the same two over and over, class 2 none at all."""
        run = tmp_path_factory.mktemp("repeated")
        two = np.random.default_rng(9).standard_normal((2, DIM))
        write_log(run, 3, [[[0, 1] * 6], [[0, 1] * 6]], latent=lambda c, i, x: two[i % 4 // 2] if c == 1 else x)
        return run

    @pytest.mark.parametrize("quantizer", ["clvq", "gram", "kmeans"])
    def test_repeated_latents(self, repeated: Path, quantizer: str) -> None:
        config = settings("ipc=4", "small_class=cap", f"quantizer={quantizer}")
        with pytest.warns(CodebookWarning, match=r"class 1: 2 of 4 centroids.*repeated images"):
            books = rows_of(quantize(repeated, f"repeated-{quantizer}", config))
        assert sorted(books) == [0, 1] and (books[0]["count"] > 0).all()
        assert sorted(books[1]["count"][books[1]["count"] > 0].tolist()) == [6, 6]
        assert books[1]["distortion"][0] == pytest.approx(0, abs=1e-12)
        manifest = Artifact(Folder(str(repeated)) / f"repeated-{quantizer}" / "codebook", "quantize").require()
        assert manifest["dropped_classes"] == [2] and len(manifest["warnings"]) == 1

    @pytest.mark.parametrize(
        ("bound", "algorithm"),
        [("max_gram_gb=1e-9", "faiss"), ("max_class_gb=1e-9", "clvq")],
    )
    def test_a_class_too_large_for_the_gram_space(
        self, log: tuple[Path, dict[int, np.ndarray]], bound: str, algorithm: str
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


class TestMemory:
    def test_only_open_classes_count(self, tmp_path: Path) -> None:
        """Class-sorted shards keep one class open at a time; the same samples mixed keep them all open."""
        order = [c for c in range(40) for _ in range(8)]
        needs = {}
        for name, ids in (("sorted", order), ("mixed", np.random.default_rng(0).permutation(order).tolist())):
            write_log(tmp_path / name, 40, [[ids[first : first + 8]] for first in range(0, 320, 8)])
            config = settings("ipc=4")
            data = Data.load(Folder(str(tmp_path / name)))
            actors = [dict(enumerate(part_classes(40, 4, 1 << 20)))]
            (needs[name],) = plan_memory(config, config.quantizer, data, 1 << 20, 8, actors)
        one = 4 * (1 << 20) * 8  # D values of 4 bytes, 8 samples in a buffer
        part, ahead = (
            3,
            2 * config.encoder.workers,
        )  # classes of a part are written together; encoders may be two shards ahead
        rest = needs["mixed"] - 40 * one
        assert needs["sorted"] - rest == pytest.approx((part + ahead) * one, rel=0.01)

    def test_what_no_node_can_hold_is_refused_before_it_starts(self, tmp_path: Path) -> None:
        write_log(tmp_path, 2, [[[0, 1] * 10]])
        config = settings("ipc=3")
        networks = dataclasses.replace(FACTS, latent_shape=(1 << 20, 1 << 20))
        run = Folder(str(tmp_path))
        made = Quantizers(config, run, "", config.quantizer, Data.load(run), run / "latents", networks)
        with pytest.raises(ValueError, match=r"4 x D x max\(buffer, ipc\)") as error:
            check_memory(made.needs)
        for words in ("quantizer actors need", "GiB", "class-sorted", "quantizer.num_shards", "quantizer.buffer=ipc"):
            assert words in str(error.value)


@pytest.mark.parametrize(
    ("damage", "quantizer", "words"),
    [
        ("missing", "clvq", "is missing"),
        ("truncated", "clvq", "another digest"),
        ("other", "clvq", "another digest"),
        ("missing", "gram", "is missing"),
        ("not finite", "clvq", "not finite (row 1, class 0)"),
        ("another dimension", "gram", "latents of 20 values, the prior of this run makes 18"),
    ],
)
def test_a_damaged_log_is_named(tmp_path: Path, damage: str, quantizer: str, words: str) -> None:
    write_log(tmp_path, 2, [[[0, 1] * 10] * 3] * 3)
    chunk = tmp_path / "latents" / "shard-000001" / "chunk-00001.parquet"
    data = chunk.read_bytes()
    chunk.unlink()
    if damage == "truncated":
        chunk.write_bytes(data[: len(data) // 2])
    elif damage == "other":
        table = pq.read_table(io.BytesIO(data))
        pq.write_table(table.slice(0, 7), chunk)
    elif damage in ("not finite", "another dimension"):  # with a record that fits it: the encoder's own fault
        table = pq.read_table(io.BytesIO(data))
        latents = binary_rows(table["latent"], "<f2").copy()
        latents[1, 3] = np.inf if damage == "not finite" else 0
        wide = np.pad(latents, ((0, 0), (0, 2 if damage == "another dimension" else 0)))
        pq.write_table(table.select(["key", "class_id"]).append_column("latent", fixed_binary(wide)), chunk)
        done = chunk.with_name("done.json")
        record = json.loads(done.read_text())
        record["chunks"][1]["sha256"] = digest_of(chunk.read_bytes())
        done.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"latents/shard-000001/chunk-00001\.parquet") as error:
        quantize(tmp_path, "", settings(f"quantizer={quantizer}"))
    assert "encode again" in str(error.value) and words in str(error.value)
    assert not (tmp_path / "codebook" / "manifest.json").exists()


def test_a_failure_is_not_run_over(tmp_path: Path) -> None:
    """A file that cannot be read for a while: half of its shard is consumed, so going on would count it twice."""
    write_log(tmp_path, 2, [[[0, 1] * 5, [1, 0] * 5]])
    chunk = tmp_path / "latents" / "shard-000000" / "chunk-00001.parquet"
    with Running(tmp_path, "", settings()) as running:
        chunk.rename(tmp_path / "away")
        running.handle.shard_done(0)
        ray.wait(running.handle._calls)
        (tmp_path / "away").rename(chunk)
        with pytest.raises(ValueError, match=r"chunk-00001\.parquet is missing"):
            running.finish([])
    books = rows_of(quantize(tmp_path, "", settings()))  # the same command again
    assert all(book["count"].sum() == 10 == book["stream_count"].sum() for book in books.values())


@pytest.mark.parametrize(
    ("overrides", "algorithm"),
    [
        (["quantizer=gram"], gram_kmeans),
        (["quantizer=gram", "quantizer.hartigan=false"], lambda *a, **k: gram_kmeans(*a, hartigan=False, **k)),
        (["quantizer=minibatch_kmeans"], minibatch_kmeans),
        (["quantizer=kmeans"], lloyd),
        (["quantizer=faiss"], faiss_kmeans),
    ],
    ids=["gram", "gram-lloyd", "d4m", "kmeans", "faiss"],
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
