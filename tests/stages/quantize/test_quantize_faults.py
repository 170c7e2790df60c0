"""The quantize stage when its actors die of their own work, or when what it published or saved is damaged."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import ray
from support.latent_logs import Running, quantize, rows_of, settings, write_log

from ddoq_ray.stages.quantize import step as stage
from ddoq_ray.stages.quantize.deaths import Deaths, too_many
from ddoq_ray.stages.synthesize.step import image_jobs
from ddoq_ray.storage.artifact import Artifact
from ddoq_ray.storage.codebook import read_layout, read_part
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.snapshots import read_snapshots, write_snapshot

SHARDS = 8
LAYOUT = [[[0, 1, 2] * 4]] * SHARDS


def deadly(monkeypatch: pytest.MonkeyPatch, shards: list[int], antidotes: Path) -> None:
    """The stage's actors kill themselves when they consume one of `shards`; with a folder of antidotes only once."""
    plain = stage.Quantizer.__ray_metadata__.modified_class

    class Deadly(plain):  # inside a function: it travels to the workers whole
        def _consume(self, shard: int, takers: np.ndarray) -> None:
            taken = antidotes / str(shard)
            if shard in shards and not taken.exists():
                if antidotes.exists():
                    taken.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            super()._consume(shard, takers)

    monkeypatch.setattr(stage, "Quantizer", ray.remote(max_restarts=-1, max_task_retries=-1)(Deadly))


class TestDeaths:
    @pytest.mark.usefixtures("ray_here")
    def test_an_actor_that_dies_three_times_in_one_place_ends_the_run_in_words(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_log(tmp_path, 3, LAYOUT)
        with monkeypatch.context() as patched:
            deadly(patched, [4], tmp_path / "there are none")
            with pytest.raises(ValueError, match=r"quantizer of classes 0 to 2 .* died 3 times") as told:
                quantize(tmp_path, "", settings(snapshot_every=2))
        for words in ("memory", "GiB", "quantizer.num_shards", "ipc", "goes on"):
            assert words in str(told.value)
        # The same command, once the cause is mended, gets new trials and goes on.
        books = rows_of(quantize(tmp_path, "", settings(snapshot_every=2)))
        assert all(book["count"].sum() == 4 * SHARDS for book in books.values())

    @pytest.mark.slow
    @pytest.mark.usefixtures("ray_here")
    def test_one_that_gets_on_may_die_as_often_as_it_likes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_log(tmp_path, 3, LAYOUT)
        expected = quantize(tmp_path, "calm", settings())
        (tmp_path / "antidotes").mkdir()
        deadly(monkeypatch, list(range(1, SHARDS)), tmp_path / "antidotes")
        assert quantize(tmp_path, "", settings(snapshot_every=1)) == expected
        assert len(list((tmp_path / "antidotes").iterdir())) == SHARDS - 1

    def test_what_counts(self, tmp_path: Path) -> None:
        def start() -> Deaths:
            return Deaths(Folder(str(tmp_path)), "snapshots/00000.deaths.json", "this run")

        first = start()
        first.work(True)
        first.got_on()
        assert not (tmp_path / "snapshots").exists()  # one that never died writes nothing
        assert start().restarted() == 1  # loading its state: that may be what kills
        second = start()
        assert second.restarted() == 2
        second.work(False)
        for _ in range(5):  # deaths under an actor that waits prove nothing
            idle = start()
            assert idle.restarted() == 2
            idle.work(False)
        idle.work(True)
        last = start()
        assert too_many(last.restarted())
        last.got_on()
        assert start().restarted() == 1
        assert Deaths(Folder(str(tmp_path)), "snapshots/00000.deaths.json", "the next run").restarted() == 1
        (tmp_path / "snapshots" / "00000.deaths.json").write_text("{")
        assert start().restarted() == 1


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
        return
    if how == "cut off":
        del data[len(data) // 2 :]
    elif how == "empty":
        data.clear()
    else:
        at = {"first byte": 0, "flipped byte": len(data) // 2, "last byte": len(data) - 1}[how]
        data[at] ^= 0x10
    path.write_bytes(bytes(data))


WAYS = ["gone", "cut off", "empty", "first byte", "flipped byte", "last byte"]


class TestParts:
    @pytest.fixture(scope="class")
    def made(self, ray_here: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
        run = tmp_path_factory.mktemp("parts")
        write_log(run, 3, LAYOUT)
        return run, quantize(run, "", settings())

    @pytest.mark.parametrize("how", WAYS)
    @pytest.mark.parametrize("file", ["part-00001.parquet", "part-00001.json"])
    def test_a_damaged_part_is_refused_by_name(self, made: tuple[Path, dict[str, bytes]], file: str, how: str) -> None:
        if file.endswith("json") and how == "last byte":
            return  # that of a line end
        run, parts = made
        place = run / "codebook" / file
        before = place.read_bytes()
        try:
            damage(place, how)
            # Where file and record disagree, nothing says which of the two has changed.
            either = "part-00001.(json|parquet)" if how == "flipped byte" else file
            with pytest.raises(ValueError, match=rf"{either} is (missing|damaged)") as told:
                read_part(Folder(str(run)) / "codebook", "part-00001.parquet")
            assert "run the quantize stage" in str(told.value) and "\n" not in str(told.value)
            if file.endswith("parquet") and how in ("gone", "cut off", "empty", "last byte"):
                with pytest.raises(ValueError, match=rf"{file} is (missing|damaged)"):
                    image_jobs(Folder(str(run)), "", 2)
        finally:
            place.write_bytes(before)
        assert read_part(Folder(str(run)) / "codebook", "part-00001.parquet").num_rows == 3
        assert set(parts) == {f"part-{p:05d}.parquet" for p in range(3)}

    def test_the_way_out_that_is_named_leads_out(self, made: tuple[Path, dict[str, bytes]]) -> None:
        run, parts = made
        for name in ("part-00001.parquet", "part-00001.json", "manifest.json"):
            (run / "codebook" / name).unlink()
        kept = (run / "codebook" / "part-00000.parquet").stat().st_mtime_ns
        digest = Artifact(Folder(str(run)) / "codebook", "quantize")
        assert quantize(run, "", settings()) == parts and digest.require()
        assert (run / "codebook" / "part-00000.parquet").stat().st_mtime_ns == kept

    def test_a_layout_is_that_of_the_part(self, made: tuple[Path, dict[str, bytes]]) -> None:
        codebook = Folder(str(made[0])) / "codebook"
        for name in made[1]:
            assert read_layout(codebook, name).equals(read_part(codebook, name).select(["class_id", "centroid_id"]))


class TestSnapshots:
    STATE: ClassVar = [(c, {"cursor": np.array(c), "state/x": np.arange(500.0) + c}) for c in range(4)]

    @pytest.mark.parametrize("how", WAYS)
    def test_a_damaged_snapshot_is_left_out_and_named(self, tmp_path: Path, how: str) -> None:
        folder, damaged = Folder(str(tmp_path)), []
        for name, classes in (("one", self.STATE[:2]), ("two", self.STATE[2:])):
            write_snapshot(folder, f"snapshots/{name}.arrow", "me", classes)
        damage(tmp_path / "snapshots" / "one.arrow", how)
        there = {c: arrays["state/x"].tolist() for c, arrays in read_snapshots(folder, "me", damaged)}
        assert there == {c: arrays["state/x"].tolist() for c, arrays in self.STATE[2:]}
        assert damaged == ([] if how == "gone" else [str(tmp_path / "snapshots" / "one.arrow")])

    @pytest.mark.usefixtures("ray_here")
    def test_a_run_goes_on_without_it_to_the_same_bytes(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        write_log(tmp_path, 3, LAYOUT)
        expected = quantize(tmp_path, "calm", settings())
        with Running(tmp_path, "", settings(snapshot_every=1)) as running:
            running.handle.shard_done(0)
            running.handle.shard_done(1)
            ray.get(running.handle._calls)
        (snapshot,) = (tmp_path / "codebook" / "snapshots").glob("*.arrow")
        damage(snapshot, "flipped byte")
        assert quantize(tmp_path, "", settings()) == expected
        assert f"{snapshot} was damaged and left out" in capfd.readouterr().err
