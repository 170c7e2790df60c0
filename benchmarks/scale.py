"""encode and synthesize at the size of ImageNet-21K on one machine: the project's scheduling, of work that sleeps.

    python -m benchmarks.scale --json benchmarks/results/scale.json

The stages are the project's own: Ray Data's stream of chunks with its pool of encoders, done records and manifest; the
elastic pool of decoders with image shards laid out from a codebook. What a worker does with a chunk is a sleep
(`scale_stubs`), so that 16 simulated workers fit two cores and any time that is lost is the scheduler's.

Shards have 1,000 samples in one chunk; classes lie in order, as `prepare` writes them. Rows:

* `part` scaling: `workers` with `units_per_worker` chunks or image shards each. `efficiency`: their rate beside as many
  times that of one worker. `of_ideal`: beside workers that would do nothing but their units. Both from the moment at
  which all have begun to the last end. `start_s`: from the first worker's beginning to the last one's.
* `part` death: the same load, one worker killed (SIGKILL) half way; `lost_s` is what that cost each worker of the time
  that units took, `units_per_worker` times the difference of their overheads.
* `part` keys: a tenth of the data, and all. `driver_peak_bytes`: resident memory of the driver at its highest;
  `growth` is the whole's beside the tenth's.

`overhead_ms_per_chunk`: time of a worker from one unit to the next beyond the unit's own. `driver_ms_per_chunk`: CPU
time of the driver. Rows of other stages and parts that the file holds already stay. A plot (.svg) lies beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.driver_records import SHAPE, class_counts, write_codebook
from benchmarks.provenance import finish, parser, peak_bytes
from benchmarks.scale_stubs import CHUNK_BYTES, decoder, encoder, reader, worker_marks
from ddoq_ray.config.cluster import ClusterConfig
from ddoq_ray.config.compose import load_config
from ddoq_ray.execution.networks import Networks
from ddoq_ray.execution.run import Run
from ddoq_ray.execution.session import ray_session
from ddoq_ray.execution.workers import Events, say
from ddoq_ray.pipeline import of_kind, steps
from ddoq_ray.stages.encode import step as encode
from ddoq_ray.stages.encode import stream
from ddoq_ray.stages.synthesize import step as synthesize
from ddoq_ray.storage.artifact import Artifact
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.prepared import Data
from ddoq_ray.storage.records import ClassInfo, ShardInfo

COLUMNS = [
    "stage", "part", "workers", "keys", "chunks", "unit_s", "efficiency", "of_ideal", "overhead_ms_per_chunk",
    "driver_ms_per_chunk", "driver_peak_bytes", "growth", "lost_s", "start_s",
]  # fmt: skip
SAMPLES = 1000  # of a shard
SHARD_BYTES = 84 << 20  # 1.2 TB in 14,200
IPC = 50  # and the images of an image shard
CPUS = 6  # of the simulated cluster: readers take one each, encoders a fifth


@dataclass(frozen=True)
class Load:
    """What is run: `units` chunks or image shards of `unit_s` each on `workers`; whether one worker is killed."""

    stage: str
    workers: int
    units: int
    unit_s: float
    classes: int
    ipc: int
    death: bool = False

    @property
    def keys(self) -> int:
        return self.units * SAMPLES if self.stage == "encode" else self.classes * self.ipc


def run_of(load: Load, place: Folder) -> Run:
    """A run whose earlier stages have left what this one asks for: an index of shards, or a codebook."""
    keys = [
        f"run_dir={place.uri}", "baselines=[]", f"ipc={load.ipc}", "small_class=cap", f"encoder.workers={load.workers}",
        f"encoder.chunk_samples={SAMPLES}", f"synthesizer.max_workers={load.workers}", "cluster.reader.num_cpus=1",
        f"synthesizer.min_workers={load.workers}", "cluster.decoder.num_cpus=0.2", "cluster.give_up_s=600",
    ]  # fmt: skip
    names = tuple(f"n{c:08d}, class number {c}" for c in range(load.classes))
    listed = tuple(ClassInfo(c, f"n{c:08d}", f"class number {c}") for c in range(load.classes))
    networks = Networks("prior", SHAPE, 256, names, load.classes, "teacher", "resnet18", names, load.classes, 512, {})
    counted = class_counts("sorted", load.units, load.classes, SAMPLES) if load.stage == "encode" else iter(())
    train = tuple(
        ShardInfo(f"shards/{shard:06d}.tar", SAMPLES, SHARD_BYTES, counts, f"{shard:016x}")
        for shard, counts in enumerate(counted)
    )
    if load.stage == "synthesize":
        write_codebook(place / "codebook", load.classes, load.ipc, int(np.prod(SHAPE)))
        Artifact(place / "codebook", "quantize").finish({}, digest="codebook")
    return Run(load_config(keys), place, Data(place, listed, train, ()), networks, Events(place))


@contextlib.contextmanager
def stubbed(load: Load, marks: Path) -> Iterator[None]:
    """The stage's workers are stubs while the block runs."""
    there = (stream.read_tables, stream.Encoder, stream.CHUNK_BYTES, synthesize.Decoder)
    stream.read_tables = reader(SAMPLES, load.units, load.classes)  # type: ignore[assignment]
    stream.Encoder = encoder(str(marks), load.unit_s)  # type: ignore[assignment, misc]
    stream.CHUNK_BYTES = CHUNK_BYTES
    synthesize.Decoder = decoder(str(marks), load.unit_s)  # type: ignore[misc]
    try:
        yield
    finally:
        stream.read_tables, stream.Encoder, stream.CHUNK_BYTES, synthesize.Decoder = there  # type: ignore[misc]


def kill_one(marks: Path, after: int, done: threading.Event) -> None:
    """SIGKILL to the stub that has done the most, once `after` units are done in all."""
    while not done.wait(0.05):
        workers = worker_marks(marks)
        if sum(len(units) for _, units in workers) >= after:
            os.kill(max(workers, key=lambda worker: len(worker[1]))[0], signal.SIGKILL)
            return


def measured(load: Load, scratch: str | None) -> dict[str, Any]:
    """Run the load in this process, in a Ray session that is up; its row, without what compares rows."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        marks = Path(folder) / "marks"
        marks.mkdir()
        run = run_of(load, Folder(f"{folder}/run"))
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        over, cpu = threading.Event(), time.process_time()
        killer = threading.Thread(target=kill_one, args=(marks, load.units // 2, over))
        if load.death:
            killer.start()
        with stubbed(load, marks):
            if load.stage == "encode":
                encode.run(run, lambda shard: None)
            else:
                synthesize.synthesize([(run, of_kind(synthesize.Synthesize, steps(run.config)))])
        cpu = time.process_time() - cpu
        over.set()
        workers = [units for _, units in worker_marks(marks) if units]
    return {
        "stage": load.stage,
        "workers": load.workers,
        "keys": load.keys,
        "chunks": load.units,
        "classes": load.classes,
        "unit_s": load.unit_s,
        **rates(workers, load),
        "driver_ms_per_chunk": 1000 * cpu / load.units,
        "driver_peak_bytes": peak_bytes(),
    }


def rates(workers: Sequence[Sequence[tuple[float, float]]], load: Load) -> dict[str, float]:
    """Of (begin, end) of each worker's units, from the moment at which `load.workers` have begun to the last end.

    >>> load = Load("encode", 2, 4, 1.0, 1, 1)
    >>> found = rates([[(0.0, 1.0), (1.5, 2.5)], [(0.5, 1.5), (1.5, 2.5)]], load)
    >>> found["of_ideal"], found["overhead_ms_per_chunk"], found["span_s"], found["start_s"]
    (0.875, 142.85714285714286, 2.0, 0.5)
    """
    begun = sorted(units[0][0] for units in workers)[: load.workers]
    start, end = begun[-1], max(units[-1][1] for units in workers)
    done = sum(max(0.0, there - max(here, start)) / (there - here) for units in workers for here, there in units)
    of_ideal = done * load.unit_s / (load.workers * (end - start))
    return {
        "of_ideal": of_ideal,
        "overhead_ms_per_chunk": 1000 * load.unit_s * (1 / of_ideal - 1),
        "span_s": end - start,
        "start_s": begun[-1] - begun[0],
    }


def in_session(loads: Sequence[Load], scratch: str | None) -> list[dict[str, Any]]:
    """The rows of some loads, one after another in one Ray of their own."""
    rows = []
    with ray_session(ClusterConfig(address="local", num_cpus=CPUS)):
        for load in loads:
            rows.append(measured(load, scratch))
            say(f"scale      {load}: {rows[-1]}")
    return rows


def apart(*arguments: Any) -> list[dict[str, Any]]:
    """The same in a process of its own, so that its memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(in_session, *arguments).result()


def scaling(stage: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """One worker to many, and a death among some of them."""

    def load(workers: int, death: bool = False) -> Load:
        units = workers * given.units_per_worker
        # As many classes of one image shard each as there are units.
        return Load(stage, workers, units, given.unit_s, units, IPC, death)

    loads = [load(workers) for workers in given.workers] + [load(given.death_workers, death=True)]
    rows = apart(loads, given.scratch)
    alone = rows[0]["of_ideal"]
    for row in rows:
        row |= {"part": "scaling", "efficiency": row["of_ideal"] / alone}
    calm = next(row for row in rows if row["workers"] == given.death_workers)
    more_ms = rows[-1]["overhead_ms_per_chunk"] - calm["overhead_ms_per_chunk"]
    rows[-1] |= {"part": "death", "lost_s": more_ms / 1000 * given.units_per_worker}
    return rows


def keys(stage: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """A tenth of the data, and all of it, of the same classes."""
    workers, rows = given.workers_of_keys, []
    for part in (10, 1):
        ipc = IPC if stage == "encode" else IPC // part
        units = given.shards // part if stage == "encode" else -(-given.classes * ipc // IPC)
        rows += apart([Load(stage, workers, units, given.unit_s_of_keys, given.classes, ipc)], given.scratch)
        rows[-1] |= {"part": "keys"}
    rows[-1]["growth"] = rows[-1]["driver_peak_bytes"] / rows[0]["driver_peak_bytes"]
    return rows


PARTS = {"scaling": scaling, "keys": keys}
ORDER = ("scaling", "death", "keys")


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """What workers do of what they could, over their number; a line a stage."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "scale"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.2))
    for stage in dict.fromkeys(row["stage"] for row in rows):
        mine = [row for row in rows if row["stage"] == stage and row["part"] == "scaling"]
        axes.plot([r["workers"] for r in mine], [r["of_ideal"] for r in mine], marker="o", label=stage)
    axes.axhline(0.9, color="black", linewidth=0.8, linestyle="--")
    axes.set_xscale("log", base=2)
    ticks = sorted({row["workers"] for row in rows if row["part"] == "scaling"})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set(xlabel="simulated workers", ylabel="of ideal", ylim=(0, 1.1))
    axes.legend(fontsize=8, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def keep(earlier: Sequence[dict[str, Any]], path: str) -> None:
    """Put rows that were not measured anew back into the file, and plot."""
    rows = json.loads(Path(path).read_text())
    new = {(row["stage"], row["part"]) for row in rows}
    rows += [row for row in earlier if (row["stage"], row["part"]) not in new]
    rows.sort(key=lambda row: (ORDER.index(row["part"]), row["stage"]))
    Path(path).write_text(json.dumps(rows, indent=1) + "\n")
    if any(row["part"] == "scaling" for row in rows):
        plot(rows, Path(path).with_suffix(".svg"))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--stages", nargs="+", choices=["encode", "synthesize"], default=["encode", "synthesize"])
    options.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options.add_argument("--workers", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    options.add_argument("--units-per-worker", type=int, default=40)
    options.add_argument("--unit-s", type=float, default=0.75, help="seconds of a chunk or image shard on a worker")
    options.add_argument("--death-workers", type=int, default=4, help="workers of which one is killed")
    options.add_argument("--shards", type=int, default=14_200, help=f"of {SAMPLES:,} samples")
    options.add_argument("--classes", type=int, default=21_841)
    options.add_argument("--workers-of-keys", type=int, default=8)
    options.add_argument("--unit-s-of-keys", type=float, default=0.1, help="the same where keys are many")
    options.add_argument("--scratch", help="folder for the records; removed at the end")
    given = options.parse_args()
    earlier = json.loads(Path(given.json).read_text()) if given.json and Path(given.json).exists() else []
    rows = [row for stage in given.stages for part in given.parts for row in PARTS[part](stage, given)]
    finish(rows, COLUMNS, given.json)
    if given.json:
        keep(earlier, given.json)


if __name__ == "__main__":
    main()
