"""Every loop of the driver at the size of ImageNet-21K, with stubs for what tasks, actors and networks do.

    python -m benchmarks.driver --shards 14200 --classes 21841 --json FILE

Records, indices, manifests and codebook parts are made up and written by their own writers: 1,000 images a shard, and
`--ipc` centroids a class of few dimensions (parts are cut as if they had 4,096). `sorted` shards hold a class or two
each, `mixed` ones a thousand classes. Each loop is run once at a quarter of the size and once at all of it: where
`times` is about 4, it is linear. `peak_bytes` is the process's high-water mark in the loop, `added_bytes` what of it
the loop brought. Loops that begin with `ray:` run on a local Ray of one CPU: they are how long 14,200 tasks take that
do nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.provenance import finish, parser, peak_bytes
from ddoq_ray.artifacts import Artifact, Folder
from ddoq_ray.config.compose import load_config
from ddoq_ray.records import ChunkRecord, ClassCounts, ClassInfo, Codebook, ShardDone, ShardInfo, shard_lines

PER_SHARD, DIM, SMALL = 1000, 4096, 4
EPOCHS, PUBLISHED = 300, 4  # of labels; those that a run that goes on finds there
ACTORS = 8
NODE = [256 << 30]  # bytes of memory of a node


class Case:
    """Data of one layout and size, made up; the loops share it.

    Attributes:
        held: What each shard holds.
    """

    def __init__(self, layout: str, shards: int, classes: int, ipc: int, run: Folder) -> None:
        self.layout, self.shards, self.classes, self.ipc, self.run = layout, shards, classes, ipc, run
        self.config = load_config([f"ipc={ipc}", "baselines=[]", f"quantizer.num_shards={ACTORS}"])
        rng = np.random.default_rng(0)
        labels = np.sort(rng.integers(0, classes, shards * PER_SHARD)).astype(np.int32)
        if layout == "mixed":
            rng.shuffle(labels)
        self.held = [ClassCounts(Counter(part.tolist())) for part in labels.reshape(shards, PER_SHARD)]
        self.infos = [
            ShardInfo(f"/data/{i:06d}.tar", PER_SHARD, 1, held, f"digest-{i}") for i, held in enumerate(self.held)
        ]
        self.names = tuple(ClassInfo(c, f"n{c}", f"class {c}", c, c) for c in range(classes))

    @cached_property
    def data(self) -> Any:
        from ddoq_ray.stages.prepared import Data

        return Data(self.run, self.names, tuple(self.infos), tuple(self.infos[::20]))

    @cached_property
    def latents(self) -> Folder:
        """The done records of a finished log; none of its files."""
        log = self.run / "latents"
        for i, held in enumerate(self.held):
            chunk = ChunkRecord(f"shard-{i:06d}/chunk-00000.parquet", held.total, held, "0" * 64)
            path = Path(log.path(f"shard-{i:06d}/done.json"))
            path.parent.mkdir(parents=True)
            path.write_bytes(ShardDone(i, (chunk,), held, 0).dumps())  # `publish` would wait for the disk each time
        log.publish_json("manifest.json", {"identity": {"prior": "none"}, "digest": self.layout})
        return log

    @cached_property
    def index(self) -> Any:
        from ddoq_ray.stages.latent_index import latent_index

        return latent_index(self.latents, self.shards)

    @cached_property
    def parts(self) -> list[list[int]]:
        from ddoq_ray.stages.codebook import part_classes

        return part_classes(self.classes, self.ipc, DIM)

    @cached_property
    def codebook(self) -> Folder:
        from ddoq_ray.stages.codebook import write_part

        folder, ones = self.run / "codebook", np.ones(self.ipc, np.int64)
        facts: dict[str, Any] = {"dropped": [], "algorithms": {}, "warnings": []}
        for number, part in enumerate(self.parts):
            books = [Codebook(c, np.zeros((self.ipc, SMALL), np.float32), ones, 1.0, ones) for c in part]
            write_part(folder, number, books, latent_shape=(SMALL,), prior_id="none", **facts)
        Artifact(folder, "quantize").finish({}, digest="codebook")
        return folder

    @cached_property
    def image_shards(self) -> list[dict[str, Any]]:
        size = self.config.synthesizer.shard_images
        return [{"name": f"images-{i:06d}", "images": size} for i in range(self.classes * self.ipc // size)]


Loop = Callable[[], object]


def writing(case: Case) -> Loop:
    def loop() -> None:
        with (case.run / "data").writing("shards.json") as f:
            f.writelines(shard_lines(case.infos))

    return loop


def loading(case: Case) -> Loop:
    from ddoq_ray.stages.prepared import Data

    folder = case.run / "data"
    writing(case)()
    folder.publish_json("source-classes.json", [c.to_json() for c in case.names])
    folder.publish_json("val-shards.json", [])
    Artifact(folder, "prepare").finish({})
    return lambda: Data.load(case.run).counts


def summing(case: Case) -> Loop:
    from ddoq_ray.stages.prepared import Packed, summary

    return lambda: summary(Packed(list(case.names), case.infos, case.infos[::20]))


def listing(case: Case) -> Loop:
    from ddoq_ray.shard_index import train_and_val

    place = Path(case.run.path("shards"))
    place.mkdir(parents=True)
    for i in range(case.shards):
        (place / f"{'train' if i % 20 else 'test'}-{i:06d}.tar").touch()
    val = case.run.path("shards/test-*.tar")
    return lambda: train_and_val(str(place), val, [])


def records(case: Case) -> Loop:
    from ddoq_ray.stages.encode import done_records, done_shards

    log = case.latents
    return lambda: sum(done.classes.total for done in done_records(log, sorted(done_shards(log))))


def indexing(case: Case) -> Loop:
    from ddoq_ray.stages.latent_index import LatentIndex, done_records

    log = case.latents
    return lambda: LatentIndex.of(done.classes for done in done_records(log, range(case.shards)))


def planning(case: Case) -> Loop:
    from ddoq_ray.stages.quantize_memory import plan_memory

    actors = [{p: c for p, c in enumerate(case.parts) if p % ACTORS == i} for i in range(ACTORS)]
    return lambda: plan_memory(case.config, case.config.quantizer, case.data, DIM, PER_SHARD, actors)


def starting(case: Case) -> Loop:
    from ddoq_ray.stages.quantize_worker import _index

    writing(case)()
    mine = np.array([c for part in case.parts[::ACTORS] for c in part], np.int64)
    return lambda: _index(case.run / "data", mine)


def news(case: Case) -> Loop:
    """Each shard's news at an actor that holds all classes, whose classes wait for their next shards."""
    from ddoq_ray.stages.quantize_worker import Waiting

    def loop() -> None:
        waiting, cursor = Waiting(case.shards), [0] * case.classes
        shards = [case.index.pairs(c)[0] for c in range(case.classes)]
        for c, mine in enumerate(shards):
            if len(mine):
                waiting.add(c, int(mine[0]))
        done = np.zeros(case.shards, np.uint8)
        for shard in range(case.shards):
            done[shard] = 1
            for new in waiting.news(np.unpackbits(np.packbits(done))):
                for c in waiting.classes.pop(new):
                    cursor[c] += 1
                    if cursor[c] < len(shards[c]):
                        assert not waiting.add(c, int(shards[c][cursor[c]]))
        assert not waiting.classes

    assert case.index is not None
    return loop


def passes(case: Case) -> Loop:
    from ddoq_ray.stages.class_tasks import readings

    index = case.index

    def loop() -> str:
        made = readings(index, case.parts, DIM, NODE)
        opened = sum(len(r.shards) for r in made) / case.shards
        return f"{len(made)} tasks for {len(case.parts)} parts open each shard {opened:.2f} times"

    return loop


def picking(case: Case) -> Loop:
    from ddoq_ray.stages import select

    index = case.index
    return lambda: select.where(index, select.draw(case.config, dict(enumerate(index.counts.tolist())), 0))


def shares(case: Case) -> Loop:
    from ddoq_ray.stages import heldout

    return lambda: heldout.shares(case.data, 50)


def jobs(case: Case) -> Loop:
    from ddoq_ray.stages.synthesize import image_jobs

    assert case.codebook is not None
    return lambda: image_jobs(case.run, "", case.config.synthesizer.shard_images)


def layouts(case: Case) -> Loop:
    from ddoq_ray.stages.codebook import parts_with_classes

    folder = case.codebook
    return lambda: parts_with_classes(folder)


def units(case: Case) -> Loop:
    from ddoq_ray.stages.label import _units

    config = load_config(["baselines=[]", "protocol.steps=null", f"protocol.epochs={EPOCHS}"])
    for epoch in range(PUBLISHED):
        place = Path(case.run.path(f"labels/epoch-{epoch:04d}"))
        place.mkdir(parents=True)
        for shard in case.image_shards:
            (place / f"{shard['name']}.parquet").touch()
    manifest = {"items": case.classes * case.ipc, "shards": case.image_shards}
    return lambda: len(_units(config, case.run, {"": manifest}))


def mapped(case: Case) -> Loop:
    from ddoq_ray.stages.mapping import resolve_mapping

    unknown = [ClassInfo(c.class_id, c.name, c.prompt) for c in case.names]
    outputs = [f"n{c}, class {c}" for c in range(case.classes)]
    return lambda: resolve_mapping(unknown, "teacher_index", "teacher", outputs, case.classes)


def judged(case: Case) -> Loop:
    from ddoq_ray.core.confusion import swapped_classes

    rng = np.random.default_rng(0)
    ids = np.repeat(np.arange(case.classes), 50)
    named = np.where(rng.random(len(ids)) < 0.7, ids, rng.integers(0, case.classes, len(ids)))
    return lambda: swapped_classes(ids, named, named, range(case.classes))


def page(case: Case) -> Loop:
    from ddoq_ray.page import render_page
    from ddoq_ray.stages.report import finite

    measures = ("n", "k", "distortion", "w2_voronoi", "w2_uniform", "w2_sqrt", "heldout_distortion", "heldout_n")
    rows = [
        {"method": method, "ipc": case.ipc, "class_id": c, "name": f"n{c}", **dict.fromkeys(measures, 1.5)}
        for method in ("ddoq-sqrt", "d4m")
        for c in range(case.classes)
    ]

    def loop() -> None:
        results = finite({"own_method": "ddoq-sqrt", "ipc": case.ipc, "classes": rows})
        (case.run / "report").publish_json("results.json", results)
        render_page(results, [])

    return loop


def tasks(case: Case) -> Loop:
    import ray

    from ddoq_ray.runtime import in_tasks
    from ddoq_ray.stages.given_shards import INDEXED_AT_ONCE

    stub = ray.remote(num_cpus=0.5)(lambda: None)
    list(in_tasks([stub.remote] * 100, INDEXED_AT_ONCE))
    return lambda: sum(1 for _ in in_tasks([stub.remote] * case.shards, INDEXED_AT_ONCE))


class Stub:
    """Does nothing of what a decoder, a teacher or a quantizer does."""

    def run(self, unit: int) -> int:
        return unit

    def advance(self, done: bytes) -> float:
        return 0.0


def elastic(case: Case) -> Loop:
    import ray

    from ddoq_ray.elastic import run_elastic

    stub = ray.remote(num_cpus=0.5)(Stub)
    count = len(case.image_shards)
    return lambda: sum(1 for _ in run_elastic(stub.remote, range(count), min_workers=1, max_workers=2))


def told(case: Case) -> Loop:
    """What the driver tells quantizers while shards come one by one."""
    import ray

    from ddoq_ray.stages.quantize import Quantizers

    stub = ray.remote(num_cpus=0)(Stub)
    handle = object.__new__(Quantizers)
    handle.done, handle.actors = np.zeros(case.shards, np.uint8), [stub.remote() for _ in range(ACTORS)]
    handle._calls = [None] * ACTORS
    ray.get([actor.advance.remote(b"") for actor in handle.actors])

    def loop() -> None:
        for shard in range(case.shards):
            handle.shard_done(shard)

    return loop


LOOPS: dict[str, Callable[[Case], Loop]] = {
    "prepare: list shards": listing,
    "prepare: write shards.json": writing,
    "prepare: figures": summing,
    "prepare: read shards.json": loading,
    "mapping: classes by name": mapped,
    "encode: done records": records,
    "quantize: plan of memory": planning,
    "quantize: an actor's start": starting,
    "quantize: news of shards": news,
    "log: index": indexing,
    "log: what tasks read": passes,
    "select: random images": picking,
    "synthesize: jobs": jobs,
    "codebook: classes of parts": layouts,
    "label: units": units,
    "label: teacher's classes": judged,
    "heldout: shares": shares,
    "report: results and page": page,
    "ray: tasks": tasks,
    "ray: elastic pool": elastic,
    "ray: quantizers told": told,
}
EITHER = ("mapping", "synthesize", "codebook", "label", "report", "ray", "prepare: list")  # alike in both layouts


def measured(case: Case, wanted: list[str]) -> Iterator[dict[str, Any]]:
    """A row a loop; the inputs of a loop are made before its clock starts."""
    for what, prepare in LOOPS.items():
        if (case.layout == "mixed" and what.startswith(EITHER)) or (wanted and what not in wanted):
            continue
        loop = prepare(case)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before, start = peak_bytes(field="VmRSS"), time.perf_counter()
        note = loop()
        row: dict[str, Any] = {"what": what, "layout": case.layout, "shards": case.shards, "classes": case.classes}
        row |= {"seconds": time.perf_counter() - start, "peak_bytes": peak_bytes()}
        row["added_bytes"] = max(0, row["peak_bytes"] - before)
        yield row | ({"note": note} if isinstance(note, str) else {})


def one(given: argparse.Namespace) -> None:
    """All loops of one layout and size, in this process."""
    layout, quarter = given.one.split(":")
    shards, classes = (max(20, n // int(quarter)) for n in (given.shards, given.classes))
    if any(not given.loops or what in given.loops for what in LOOPS if what.startswith("ray:")) and layout == "sorted":
        import ray

        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with tempfile.TemporaryDirectory(dir=given.scratch) as place:
        for row in measured(Case(layout, shards, classes, given.ipc, Folder(place)), given.loops):
            print(json.dumps(row), flush=True)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--shards", type=int, default=14_200)
    options.add_argument("--classes", type=int, default=21_841)
    options.add_argument("--ipc", type=int, default=50)
    options.add_argument("--layouts", nargs="+", default=["sorted", "mixed"])
    options.add_argument("--loops", nargs="*", default=[], help="only these; all by default")
    options.add_argument("--scratch", help="folder for what is made up; removed at the end")
    options.add_argument("--one", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.one:
        one(given)
        return
    scratch = tempfile.mkdtemp(dir=given.scratch)
    rows: list[dict[str, Any]] = []
    try:
        for layout in given.layouts:
            quarter: dict[str, float] = {}
            for part in (4, 1):
                words = [*sys.argv[1:], "--scratch", scratch, "--one", f"{layout}:{part}"]
                command = [sys.executable, "-m", "benchmarks.driver", *words]
                out = subprocess.run(command, env=os.environ, stdout=subprocess.PIPE, text=True, check=True)
                for line in out.stdout.splitlines():
                    row = json.loads(line)
                    if part == 1:
                        row["times"] = row["seconds"] / quarter[row["what"]]
                    quarter[row["what"]] = row["seconds"]
                    rows.append(row)
    finally:
        shutil.rmtree(scratch)
    finish(rows, ["what", "layout", "shards", "classes", "seconds", "times", "peak_bytes", "added_bytes", "note"],
           given.json)  # fmt: skip


if __name__ == "__main__":
    main()
