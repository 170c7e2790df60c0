"""The quantize stage at the size of ImageNet-21K, on synthetic latents: memory and rate of its actors.

    python -m benchmarks.quantize_scale --layout sorted --classes 21841 --k 50 --dim 4096 --per-class 60 --json FILE

A log of latents is written (a pool of random latents, drawn anew for every class), then

* `fold`: one bare process reads it, folds every class through `core.clvq`, assigns and writes the codebook; no Ray;
* `actors`: the stage itself on a local Ray, for each number of `--actors`.

Both have one thread a process. The ratios say how fast the actors are beside the fold: by the clock (1 actor has one
core as the fold has, 2 actors have two), and by CPU time, which other work on the machine disturbs less. Peak memory is
the process's own high-water mark (VmHWM); `stated_bytes` is what `plan_memory` asked of Ray for the largest actor.
`--chunk-rows` changes the number of files for the same latents.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.provenance import finish, parser, peak_bytes
from ddoq_ray.storage.artifact import Artifact, digest_of
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.parquet import table_bytes
from ddoq_ray.storage.records import ChunkRecord, ClassCounts, ShardDone, ShardInfo, fixed_binary, latent_schema

POOL = 16_384


def write_log(run: Folder, layout: str, classes: int, per_class: int, dim: int, chunk_rows: int, seed: int) -> None:
    """Prepared data and a finished latent log of classes x per_class latents; a shard has four chunks."""
    rng = np.random.default_rng(seed)
    pool = rng.standard_normal((POOL, dim), np.float32).astype(np.float16)
    order = np.repeat(np.arange(classes, dtype=np.int32), per_class)
    if layout == "mixed":
        rng.shuffle(order)
    schema = latent_schema((dim,), "synthetic")
    infos = []
    per_shard = 4 * chunk_rows
    for shard, first in enumerate(range(0, len(order), per_shard)):
        ids = order[first : first + per_shard]
        records = []
        for chunk, start in enumerate(range(0, len(ids), chunk_rows)):
            mine = np.sort(ids[start : start + chunk_rows], kind="stable")
            latents = pool[rng.integers(POOL, size=len(mine))]
            columns = [pa.array([""] * len(mine), pa.string()), pa.array(mine), fixed_binary(latents)]
            data = table_bytes(pa.Table.from_arrays(columns, schema=schema))
            name = f"shard-{shard:06d}/chunk-{chunk:05d}.parquet"
            (run / "latents").publish(name, data)
            counts = ClassCounts(Counter(mine.tolist()))
            records.append(ChunkRecord(name, len(mine), counts, digest_of(data)))
        counts = ClassCounts(Counter(ids.tolist()))
        (run / "latents").publish(f"shard-{shard:06d}/done.json", ShardDone(shard, tuple(records), counts, 0).dumps())
        infos.append(ShardInfo(f"/data/{shard}.tar", len(ids), 1, counts, str(shard)))
    prepared = run / "data"
    names = [{"class_id": c, "name": f"n{c}", "prompt": f"n{c}"} for c in range(classes)]
    prepared.publish_json("source-classes.json", names)
    prepared.publish_json("shards.json", [i.to_json() for i in infos])
    prepared.publish_json("val-shards.json", [])
    Artifact(prepared, "prepare").finish({})
    Artifact(run / "latents", "encode").finish({"prior": "synthetic", "data": "synthetic"}, kept=True)


def cpu_seconds(process: int | str = "self") -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def fold(run: Folder, k: int, buffer: int, dim: int, sorted_log: bool) -> dict[str, Any]:
    """The same work in one bare process: a class is freed as soon as it is written, if the log's order allows."""
    from ddoq_ray.core.clvq import Clvq
    from ddoq_ray.core.distortion import assign
    from ddoq_ray.storage.codebook import Account, write_part
    from ddoq_ray.storage.latent_log import LatentLog
    from ddoq_ray.storage.records import Codebook, read_shards

    shards = list(read_shards((run / "data").read("shards.json")))
    total: Counter[int] = Counter()
    for shard in shards:
        total.update(shard.images)
    log = LatentLog(run / "latents", dim)
    start, worked = time.monotonic(), cpu_seconds()
    state: dict[int, Clvq] = {}
    grids: dict[int, np.ndarray] = {}
    held: dict[int, list[int]] = {}
    seen: Counter[int] = Counter()
    counts: dict[int, np.ndarray] = {}
    every = np.array(sorted(total), np.int64)

    def write(ready: list[int]) -> None:
        where = sorted({s for c in ready for s in held[c]})
        for c in ready:
            grids[c] = state.pop(c).result()[0]
            counts[c] = np.zeros(len(grids[c]), np.int64)
        for s in where:
            for chunk in log.done(s).chunks:
                for c, latents in log.read(chunk, ready):
                    counts[c] += np.bincount(assign(latents, grids[c])[0], minlength=len(grids[c]))
        books = [Codebook(c, grids.pop(c), counts.pop(c), 0.0, np.zeros(k, np.int64)) for c in ready]
        account = Account(dropped=[], algorithms={}, warnings=[])
        write_part(run / "fold", ready[0], books, account, latent_shape=(dim,), prior_id="synthetic")
        for book in books:
            assert book.counts.sum() == total[book.class_id]
            del held[book.class_id]

    complete: list[int] = []
    for index in range(len(shards)):
        for chunk in log.done(index).chunks:
            for c, latents in log.read(chunk, every):
                if c not in state:
                    state[c], held[c] = Clvq(k, dim, buffer=buffer, seed=0, class_id=c), []
                state[c].update(latents)
                seen[c] += len(latents)
                if not held[c] or held[c][-1] != index:
                    held[c].append(index)
                if seen[c] == total[c]:
                    complete.append(c)
        if sorted_log and len(complete) >= 64:
            write(complete)
            complete = []
    if complete:
        write(complete)
    return {"seconds": time.monotonic() - start, "cpu_s": cpu_seconds() - worked, "peak_bytes": peak_bytes()}


def actors(run: Folder, k: int, buffer: int, dim: int, number: int) -> dict[str, Any]:
    """The stage: its wall seconds (Ray's own start left out), peaks of actors and driver, and what was stated."""
    import ray

    from ddoq_ray.config.compose import load_config
    from ddoq_ray.config.methods import SPECS
    from ddoq_ray.execution.networks import Networks
    from ddoq_ray.execution.run import Run
    from ddoq_ray.execution.workers import Events
    from ddoq_ray.stages.quantize.memory import check_memory
    from ddoq_ray.stages.quantize.step import Quantize, Quantizers
    from ddoq_ray.storage.layout import Place
    from ddoq_ray.storage.prepared import Data

    config = load_config(
        [
            f"ipc={k}", "baselines=[]", f"quantizer.num_shards={number}", f"quantizer.buffer={buffer}",
            f"latents.path={run.path('latents')}",
        ]
    )  # fmt: skip
    networks = Networks("synthetic", (dim,), 16, None, 0, None, None, None, 0, 0, {})
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    data = Data.load(run)
    made = Quantizers(Run(config, run, data, networks, Events(run)), Quantize(SPECS["ddoq"], Place(f"actors-{number}")))
    made.plan()
    check_memory(made.needs)
    made.launch()
    pids = ray.get([a.__ray_call__.remote(lambda self: os.getpid()) for a in made.actors])
    start, worked = time.monotonic(), sum(map(cpu_seconds, pids))
    for shard in range(len(data.train)):
        made.shard_done(shard)
    ray.get([call for call in made._calls if call is not None])
    bitmap = np.packbits(made.done).tobytes()
    ray.get([a.advance.remote(bitmap) for a in made.actors])
    seconds = time.monotonic() - start
    worked = sum(map(cpu_seconds, pids)) - worked
    peaks = [peak_bytes(pid) for pid in pids]
    manifest = made.finish()
    assert manifest["items"] == sum(s.samples for s in data.train)
    return {
        "seconds": seconds,
        "cpu_s": worked,
        "peak_bytes": max(peaks),
        "stated_bytes": max(made.needs),
        "driver_peak_bytes": peak_bytes(),
        "codebook_bytes": manifest["bytes"],
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--layout", choices=["sorted", "mixed"], default="sorted")
    options.add_argument("--classes", type=int, default=21_841)
    options.add_argument("--k", type=int, default=50)
    options.add_argument("--dim", type=int, default=4096)
    options.add_argument("--per-class", type=int, default=60)
    options.add_argument("--buffer", type=int, default=50, help="quantizer.buffer")
    options.add_argument("--chunk-rows", type=int, default=2048)
    options.add_argument("--actors", type=int, nargs="*", default=[1, 2])
    options.add_argument("--no-fold", action="store_true")
    options.add_argument("--scratch", help="folder for the log and the codebooks; removed at the end")
    options.add_argument("--one", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.one:  # one measurement in a process of its own, so that its peak memory is its own
        run = Folder(given.scratch)
        if given.one == "write":
            write_log(run, given.layout, given.classes, given.per_class, given.dim, given.chunk_rows, seed=0)
            return
        if given.one == "fold":
            row = fold(run, given.k, given.buffer, given.dim, given.layout == "sorted")
        else:
            row = actors(run, given.k, given.buffer, given.dim, int(given.one))
        print(json.dumps(row))
        return
    scratch = tempfile.mkdtemp(dir=given.scratch)
    rows = []
    try:
        words = [w for w in sys.argv[1:] if w != "--no-fold"] + ["--scratch", scratch, "--one"]

        def one(what: str) -> dict[str, Any]:
            threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "benchmarks.quantize_scale", *words, what]
            out = subprocess.run(command, env=os.environ | threads, stdout=subprocess.PIPE, text=True, check=True)
            return json.loads(out.stdout.splitlines()[-1]) if out.stdout.strip() else {}

        one("write")
        latents = given.classes * given.per_class
        facts = {
            "layout": given.layout, "classes": given.classes, "k": given.k, "dim": given.dim,
            "buffer": given.buffer, "latents": latents, "chunks": -(-latents // given.chunk_rows),
        }  # fmt: skip
        base = None
        for what in ([] if given.no_fold else ["fold"]) + [str(n) for n in given.actors]:
            row = facts | {"what": what if what == "fold" else f"{what} actors"} | one(what)
            row["latents_per_s"] = latents / row["seconds"]
            if what == "fold":
                base = row
            elif base:
                row["ratio_to_fold"] = base["seconds"] / row["seconds"]
                row["cpu_ratio_to_fold"] = base["cpu_s"] / row["cpu_s"]
            if "stated_bytes" in row:
                row["peak_over_stated"] = row["peak_bytes"] / row["stated_bytes"]
            rows.append(row)
            for done in Path(scratch).glob("fold*"), Path(scratch).glob("actors-*"):
                for folder in done:
                    shutil.rmtree(folder)
    finally:
        shutil.rmtree(scratch)
    columns = ["layout", "classes", "k", "dim", "chunks", "what", "seconds", "cpu_s", "latents_per_s",
               "ratio_to_fold", "cpu_ratio_to_fold",
               "peak_bytes", "stated_bytes", "peak_over_stated", "driver_peak_bytes"]  # fmt: skip
    finish(rows, columns, given.json)


if __name__ == "__main__":
    main()
