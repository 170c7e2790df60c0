"""The quantize stage where classes are small or repeat themselves, memory is short, or the log is damaged."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from support.latent_logs import (
    DIM,
    FACTS,
    Running,
    check_class,
    fold,
    planned,
    quantize,
    rows_of,
    settings,
    write_log,
)

from ddoq_ray.core.pooling import Pooling
from ddoq_ray.core.sizing import GIB
from ddoq_ray.stages.prepare.step import Data
from ddoq_ray.stages.quantize.memory import Census, check_memory, plan_memory
from ddoq_ray.storage.artifact import Artifact, digest_of, with_check
from ddoq_ray.storage.codebook import part_classes
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.records import CodebookWarning, binary_rows, fixed_binary

pytestmark = pytest.mark.usefixtures("ray_here")


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

    @pytest.mark.parametrize("quantizer", ["clvq", "gram", pytest.param("kmeans", marks=pytest.mark.slow)])
    def test_repeated_latents(self, repeated: Path, quantizer: str) -> None:
        config = settings("ipc=4", "small_class=cap", f"quantizer={quantizer}")
        with pytest.warns(CodebookWarning, match=r"class 1: 2 of 4 centroids.*repeated images"):
            books = rows_of(quantize(repeated, f"repeated-{quantizer}", config))
        assert sorted(books) == [0, 1] and (books[0]["count"] > 0).all()
        assert sorted(books[1]["count"][books[1]["count"] > 0].tolist()) == [6, 6]
        assert books[1]["distortion"][0] == pytest.approx(0, abs=1e-12)
        manifest = Artifact(Folder(str(repeated)) / f"repeated-{quantizer}" / "codebook", "quantize").require()
        assert manifest["dropped_classes"] == [2] and len(manifest["warnings"]) == 1


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
            (needs[name],) = plan_memory(config, config.quantizer, Census(data), Pooling((1 << 20,)), 8, actors)
        one = 4 * (1 << 20) * 8  # D values of 4 bytes, 8 samples in a buffer
        part, ahead = (
            3,
            2 * config.encoder.workers,
        )  # classes of a part are written together; encoders may be two shards ahead
        rest = needs["mixed"] - 40 * one
        assert needs["sorted"] - rest == pytest.approx((part + ahead) * one, rel=0.01)

    def test_a_class_that_is_streamed_instead_is_never_whole_in_memory(self, tmp_path: Path) -> None:
        """Above max_class_gb a class goes to clvq, however large it is: the plan must not count all of it."""
        write_log(tmp_path, 2, [[[0] * 4 + [1] * 4000]])
        config = settings("ipc=4", "quantizer=gram", "quantizer.max_class_gb=0.01")
        data = Data.load(Folder(str(tmp_path)))
        actors = [dict(enumerate(part_classes(2, 4, 1 << 16)))]
        (need,) = plan_memory(config, config.quantizer, Census(data), Pooling((1 << 16,)), 8, actors)
        assert need < 500 << 20  # 2 n D = 500 MiB is what the large class alone has in fp16

    def test_what_no_node_can_hold_is_refused_before_it_starts(self, tmp_path: Path) -> None:
        write_log(tmp_path, 2, [[[0, 1] * 10]])
        config = settings("ipc=3")
        networks = dataclasses.replace(FACTS, latent_shape=(1 << 20, 1 << 20))
        run = Folder(str(tmp_path))
        made = planned(config, run, "", networks)
        with pytest.raises(ValueError, match=r"4 x D x max\(buffer, ipc\)") as error:
            check_memory(made.needs)
        for words in ("quantizer actors need", "GiB", "class-sorted", "quantizer.num_shards", "quantizer.buffer=ipc"):
            assert words in str(error.value)
        waits = check_memory(made.needs, may_grow=True)  # a node that holds them may join
        assert waits == str(error.value)

    def test_a_head_without_cpus_is_no_place(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A cluster of which only the head is there yet: its memory counts for none, and the others are waited for."""
        head = {"Alive": True, "Resources": {"memory": 64.0 * GIB}}
        monkeypatch.setattr(ray, "nodes", lambda: [head])
        assert check_memory([GIB]) == ""
        assert "have no CPUs for them" in check_memory([GIB], cpus=1.0, may_grow=True)
        worker = {"Alive": True, "Resources": {"memory": 2.0 * GIB, "CPU": 1.0}}
        monkeypatch.setattr(ray, "nodes", lambda: [head, worker])
        assert check_memory([GIB, GIB], cpus=1.0) == ""
        with pytest.raises(ValueError, match=r"need 2\.0, 2\.0 GiB of memory, and the nodes offer 2\.0 GiB"):
            check_memory([2 * GIB, 2 * GIB], cpus=1.0)


@pytest.mark.parametrize(
    ("damage", "quantizer", "words"),
    [
        ("missing", "clvq", "is missing"),
        ("truncated", "clvq", "another digest"),
        pytest.param("other", "clvq", "another digest", marks=pytest.mark.slow),
        pytest.param("missing", "gram", "is missing", marks=pytest.mark.slow),
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
        done.write_text(json.dumps(with_check(record)))
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
