"""Nodes that come late, go for good, are slow or have little memory: the work goes on, or says what it waits for."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from ddoq_ray import pipeline
from ddoq_ray.config.compose import load_config
from ddoq_ray.data.samples import encode_png
from ddoq_ray.data.tar_writing import write_tar
from ddoq_ray.execution import console
from ddoq_ray.execution.pool import Elastic, run_elastic
from tests.chaos.cells import NODE, WORKS, Lab, content
from tests.support.deaths import InThread, workers
from tests.support.tiny_networks import tiny_taesd

pytestmark = [pytest.mark.slow, pytest.mark.chaos]
GIVES_UP_S = 10.0


@ray.remote(num_cpus=1)
class Slow:
    def run(self, unit: int) -> tuple[int, str]:
        time.sleep(0.5)
        return unit, ray.get_runtime_context().get_node_id()


def test_a_pool_grows_with_a_late_node_and_outlives_a_lost_one(here: Lab) -> None:
    """One worker fits each node, and only one node is there at first."""
    units = list(range(80))  # enough for a node that takes long to come
    here.remove(here.nodes[0])
    first, events, results = here.nodes[0].node_id, [], {}
    added: Any = None
    lost = False
    spawn = Slow.options(num_cpus=NODE["num_cpus"]).remote
    # The generator runs in this thread, which is the one that may add a node.
    how = Elastic("test", 1, 2, room={"CPU": NODE["num_cpus"]})
    for unit, (echo, node) in run_elastic(spawn, units, how, on_event=lambda event, **_: events.append(event)):
        assert unit == echo and unit not in results
        results[unit] = node
        if added is None and len(results) == 2:
            assert set(results.values()) == {first}
            added = here.add()
        elif added is not None and not lost and list(results.values()).count(first) < len(results) - 1:
            here.remove(added)  # SIGKILL, with a unit on it
            lost = True
    here.add()
    assert sorted(results) == units
    assert lost and len(set(results.values())) == 2
    assert events.count("worker joined") >= 2 and "worker lost" in events


@pytest.mark.parametrize("stage", WORKS)
def test_a_node_that_never_returns_ends_the_run_in_words(here: Lab, stage: str, tmp_path: Path) -> None:
    """All nodes go while the stage is at work: exit code 3, with the resource that is waited for."""
    place, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(here.base / stage, place)
    words = [*here.keys(place, stage), f"cluster.address={here.cluster.address}", f"cluster.give_up_s={GIVES_UP_S}"]
    with log.open("wb") as out:
        command = subprocess.Popen([sys.executable, "-m", "ddoq_ray", *words], stdout=out, stderr=out)
    try:
        works = WORKS[stage]
        while not here.at_work(*works.tasks, *works.actors):
            assert command.poll() is None, log.read_text()
            time.sleep(0.01)
        for node in list(here.nodes):
            here.remove(node)
        gone = time.monotonic()
        assert command.wait(90) == 3, log.read_text()
        took = time.monotonic() - gone
    finally:
        command.kill()
        for _ in range(2 - len(here.nodes)):
            here.add()
    told = log.read_text().splitlines()[-1]
    assert told.startswith("ddoq-ray: error: ") and ("no node has room" in told or "no worker could be placed" in told)
    assert "a worker asks for" in told and "the cluster has" in told and "no CPU" in told
    assert took < GIVES_UP_S + 45
    here.run(place, stage)  # nodes are there again: the same command goes on
    assert content(place, stage) == content(here.after(stage), stage)


def test_without_a_limit_a_run_says_what_it_waits_for_and_goes_on_when_a_node_comes(
    here: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "SILENCE_SECONDS", 4.0)
    place = tmp_path / "run"
    shutil.copytree(here.base / "evaluate", place)
    work = InThread(lambda: here.run(place, "evaluate"))
    work.wait_for(lambda: here.at_work("_evaluate"))
    for node in list(here.nodes):
        here.remove(node)
    told: list[str] = []
    try:
        end = time.monotonic() + 60
        while not any("waits for" in line for line in told):
            assert time.monotonic() < end, told
            time.sleep(0.2)
            told += capfd.readouterr().err.splitlines()
    finally:
        here.add()
        here.add()
    work.join(120)
    assert any("0.5 GPU, 0 free" in line for line in told), told
    assert content(place, "evaluate") == content(here.after("evaluate"), "evaluate")


@contextmanager
def slowed(node: Any, times: float = 10.0) -> Iterator[None]:
    """The workers of a node have one tenth of the time: they are stopped and continued (SIGSTOP, SIGCONT)."""
    over = threading.Event()

    def signal_all(number: int) -> None:
        for process in workers(node, ""):
            try:
                os.kill(process, number)
            except ProcessLookupError:
                continue

    def throttle() -> None:
        while not over.is_set():
            signal_all(signal.SIGSTOP)
            over.wait(0.2 * (1 - 1 / times))
            signal_all(signal.SIGCONT)
            time.sleep(0.2 / times)

    thread = threading.Thread(target=throttle, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        signal_all(signal.SIGCONT)


@pytest.mark.parametrize("stage", ["encode", "synthesize", "label"])
def test_a_node_that_is_ten_times_slower_does_not_stall_the_others(here: Lab, stage: str, tmp_path: Path) -> None:
    """Beside the time that the other node takes alone. Each has an encoder: a run's only one might be a slow one."""
    seconds = {}
    more = ["encoder.workers=2", "cluster.encoder.num_gpus=0.6"] if stage == "encode" else []
    for how in ("alone", "beside a slow one"):
        place = tmp_path / how.replace(" ", "-")
        shutil.copytree(here.base / stage, place)
        if how == "alone":
            here.remove(here.nodes[1])
        else:
            here.add()
        start = time.monotonic()
        with slowed(here.nodes[1]) if how != "alone" else nullcontext():
            here.run(place, stage, *more)
        seconds[how] = time.monotonic() - start
        assert content(place, stage) == content(here.after(stage), stage)
    print(stage, seconds)
    assert seconds["beside a slow one"] < 2 * seconds["alone"] + 15, seconds


SHARDS, PER_SHARD, SIDE = 4, 480, 256  # a shard's pixels are 94 MB, and a node's store holds 100 MB


def test_large_chunks_in_small_stores_spill_and_finish(here: Lab, tmp_path: Path) -> None:
    """A shard is one chunk: two are more than a store holds. The latents are those of small chunks."""
    tiny_taesd().save_pretrained(tmp_path / "autoencoder")
    shards = tmp_path / "shards"
    shards.mkdir()
    rng = np.random.default_rng(0)
    for shard in range(SHARDS):
        members = []
        for i in range(PER_SHARD):
            pixels = np.broadcast_to(rng.integers(256, size=3, dtype=np.uint8), (SIDE, SIDE, 3))
            members += [(f"{shard}-{i}.png", encode_png(pixels)), (f"{shard}-{i}.cls", str(i % 2).encode())]
        (shards / f"{shard}.tar").write_bytes(write_tar(members))
    (shards / "classes.json").write_text('["even", "odd"]')
    made, spilled = {}, {}
    for chunk_samples in (25, PER_SHARD):
        place = tmp_path / f"run-{chunk_samples}"
        keys = [
            f"run_dir={place}", "dataset=webdataset", f"dataset.path={shards}", "stages=[prepare,encode]", "ipc=2",
            "baselines=[]", "prior=autoencoder", f"prior.path={tmp_path / 'autoencoder'}", f"prior.image_size={SIDE}",
            f"encoder.chunk_samples={chunk_samples}", "encoder.batch=25", "encoder.workers=1",
        ]  # fmt: skip
        before = spilled_bytes()
        pipeline.run(load_config(keys))
        made[chunk_samples] = rows_of_shards(place / "latents")
        spilled[chunk_samples] = spilled_bytes() - before
    assert len(made[25]) == SHARDS and made[PER_SHARD] == made[25]
    assert spilled[PER_SHARD] > 0, spilled


def rows_of_shards(latents: Path) -> dict[str, Any]:
    """Shard -> the rows of its files by their keys, since each file has its own classes after one another."""
    tables = {d.name: [pq.read_table(f) for f in sorted(d.glob("*.parquet"))] for d in latents.glob("shard-*")}
    return {name: pa.concat_tables(parts).sort_by("key").combine_chunks() for name, parts in tables.items()}


def spilled_bytes() -> int:
    """What the living nodes have spilled to disk since they started."""
    from ray._private.internal_api import node_stats

    stats = [node_stats(n["NodeManagerAddress"], n["NodeManagerPort"]).store_stats for n in ray.nodes() if n["Alive"]]
    return sum(s.spilled_bytes_total for s in stats)
