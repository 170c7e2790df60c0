"""Every loop of the driver process at the size of ImageNet-21K: is it linear, and how long and how large is it?

    python -m benchmarks.driver --json benchmarks/results/driver.json

The driver goes through shards, classes, (class, shard) pairs, codebook parts, image shards and class rows; a loop that
takes their square is a day at this size and nothing in a test. So the records of 14,200 shards of 1,000 samples and
21,841 classes are written by the project's own types, with no picture, no latent and no Ray behind them, and every loop
is called as the stages call it. What it would ask of a cluster or a network is left out: the tasks themselves.

Each loop is measured at a quarter of both shards and classes and at the whole. `growth` is their ratio: 4 is linear.
`peak_bytes` is the process's resident memory at its highest while the loop ran, with all that the loops before it left.
`order`: a class-sorted log, where a shard holds two classes, and a class-mixed one, where it holds nearly 1,000.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import multiprocessing
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.driver_records import (
    ACTORS,
    LABELLED,
    NODES,
    SHAPE,
    World,
    make_world,
)
from benchmarks.provenance import finish, parser, peak_bytes
from ddoq_ray.data.collections.listing import Listing, Survey
from ddoq_ray.data.image_set import shard_record
from ddoq_ray.data.samples import encode_png, read_classes
from ddoq_ray.execution.class_tasks import readings
from ddoq_ray.execution.run import Run
from ddoq_ray.execution.workers import Events, say
from ddoq_ray.page import render_page
from ddoq_ray.pipeline import of_kind, steps
from ddoq_ray.stages.encode import heldout
from ddoq_ray.stages.encode import step as encode
from ddoq_ray.stages.encode.stream import shard_done
from ddoq_ray.stages.evaluate.validation import Validation, teacher_columns
from ddoq_ray.stages.label import step as label
from ddoq_ray.stages.prepare import mapping
from ddoq_ray.stages.prepare.given_shards import check_unchanged
from ddoq_ray.stages.prepare.pack import make_plans
from ddoq_ray.stages.prepare.step import check_small_classes
from ddoq_ray.stages.quantize.class_quantizers import Settings
from ddoq_ray.stages.quantize.step import Quantize, Quantizers
from ddoq_ray.stages.quantize.worker import Quantizer
from ddoq_ray.stages.report import step as report
from ddoq_ray.stages.select import images as select
from ddoq_ray.stages.select.random import draw
from ddoq_ray.stages.synthesize import step as synthesize
from ddoq_ray.stages.synthesize.shard_records import published
from ddoq_ray.stages.train.sets import Real
from ddoq_ray.stages.train.step import Train
from ddoq_ray.stages.train.worker import Job
from ddoq_ray.storage.artifact import Artifact, digest_of
from ddoq_ray.storage.codebook import parts_with_classes
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.json_rows import Rows, digest_of_each
from ddoq_ray.storage.latent_index import done_records, latent_index
from ddoq_ray.storage.prepared import Data, Packed, summary
from ddoq_ray.storage.records import shard_lines

COLUMNS = ["what", "order", "shards", "classes", "seconds", "peak_bytes", "growth"]


# ---------------------------------------------------------------------- the loops


def run_of(w: World) -> Run:
    return Run(w.config, w.run, w.data, w.networks, Events(w.run))


def write_index(w: World) -> None:
    for name, shards in (("shards.json", w.train), ("val-shards.json", w.val)):
        with (w.run / "data").writing(name) as f:
            f.writelines(shard_lines(shards))


def load_data(w: World) -> None:
    w.data = Data.load(w.run)
    assert len(read_classes(w.run.path("data/source-classes.json"))) == len(w.classes)


def count_data(w: World) -> None:
    summary(Packed(list(w.data.classes), list(w.data.train), list(w.data.val)))
    assert sum(w.data.counts.values()) == sum(s.samples for s in w.train) and w.data.digest
    check_small_classes(w.config, w.data.counts, w.data.classes)


def look_at_shards(w: World) -> None:
    check_unchanged(w.data)


def plan_shards(w: World) -> None:
    ids = np.repeat(np.arange(len(w.classes), dtype=np.int32), list(w.data.counts.values()))
    make_plans(w.config, Survey(w.classes, Listing([], ids, np.full(len(ids), 100_000, np.int64)), None))


def resolve_classes(w: World) -> None:
    classes = w.data.classes
    for field, network, names in (
        ("prior_label", "prior", w.networks.prior_classes),
        ("teacher_index", "teacher", w.networks.teacher_classes),
    ):
        classes = tuple(mapping.resolve_mapping(classes, field, network, names, len(classes)))
        assert not mapping.contradictions(classes, field, network, names)
    w.data = dataclasses.replace(w.data, classes=classes)


def end_encode(w: World) -> None:
    """What a log that was cut off is asked, and the manifest of one that is whole."""
    images, digests = 0, []
    for done in done_records(w.latents, sorted(encode.done_shards(w.latents))):
        images += shard_done(done.shard, done.chunks, done.refused).classes.total
        digests.append([c.sha256 for c in done.chunks])
    facts = encode.Encode().identity(run_of(w))
    Artifact(w.latents, "encode").finish(facts, digest=digest_of(digests), kept=True, items=images)


def read_quarantine(w: World) -> None:
    assert encode.quarantine_reasons(w.run).total() == 2 * len(w.train)
    assert len(select.not_encoded(w.latents)) == len(w.train)


def plan_quantizers(w: World) -> None:
    run = run_of(w)
    w.quantizers = Quantizers(run, of_kind(Quantize, steps(run.config))[0])
    w.quantizers.plan()


def tell_quantizers(w: World) -> None:
    for shard in range(len(w.train)):
        w.quantizers.shard_done(shard)


class Bookkeeper(Quantizer.__ray_actor_class__):  # type: ignore[misc,name-defined]
    """A quantizer actor that keeps its books, and makes neither codebooks nor snapshots (a fixed share of its time)."""

    def _take_up(self) -> None:
        for c, at in self.cursor.items():
            self._wait_for_next(c, at)

    def _snapshot_if_due(self) -> None:
        pass

    def _books(self, wanted: list[int]) -> Iterator[Any]:
        return iter(wanted)

    def _publish(self, part: int, classes: list[int], books: list[Any]) -> None:
        assert len(classes) == len(books)


def keep_books(w: World) -> None:
    """One of the actors, told of each shard as it is done. No part of the driver, but as often as the driver speaks."""
    keys = {"ipc": w.config.ipc, "seed": 0, "small_class": "cap", "prior_id": "prior", "identity": "books"}
    told = Settings(threads=1, latent_shape=SHAPE, num_actors=ACTORS, **keys)  # type: ignore[arg-type]
    actor = Bookkeeper(w.run / "books", w.latents, w.run / "data", w.quantizers.parts[0], w.exact, told)
    done = np.zeros(len(w.train), np.uint8)
    for shard in range(len(w.train)):
        done[shard] = 1
        actor.advance(np.packbits(done).tobytes())
    assert not actor.parts


def end_quantize(w: World) -> None:
    w.quantizers._write_manifest(1.0)


def index_log(w: World) -> None:
    w.index = latent_index(w.latents, len(w.train))


def plan_readings(w: World) -> None:
    _, classes, _ = parts_with_classes(w.run / "codebook")
    readings(w.index, classes, w.dim, NODES)


def draw_images(w: World) -> None:
    picks = draw(w.config, dict(enumerate(w.index.counts.tolist())), 0)
    select.where(w.index, picks)


def plan_images(w: World) -> None:
    jobs = synthesize.image_jobs(w.run, "", w.config.synthesizer.shard_images)
    assert not published(w.run, jobs)
    records = Rows(len(jobs))
    for job in jobs:
        records.put(job.unit.index, shard_record(job.unit.name, len(job.unit), b""))
    digest_of_each(record["sha256"] for record in records)


def plan_heldout(w: World) -> None:
    heldout.shares(w.data, w.config.report.heldout_images)
    heldout.EncodeHeldout().identity(run_of(w))


def plan_labels(w: World) -> None:
    step = of_kind(label.Label, steps(w.config))[0]
    run = run_of(w)
    grid = step.grid(run)
    assert len(label._units(run, step, grid)) == max(0, grid.files - LABELLED)


def plan_students(w: World) -> None:
    run, counts = run_of(w), w.data.counts
    job = Job(
        run=w.run,
        config=w.config,
        rows=tuple((step.cell, step.identity(run)) for step in of_kind(Train, steps(w.config))),
        real=Real(tuple(w.data.train_urls), tuple(s.expected for s in w.data.train)),
        validation=Validation.of(w.config, w.data),
        teacher_index=teacher_columns(w.data),
        class_counts=tuple(counts[c.class_id] for c in w.data.classes),
        outputs=w.networks.teacher_outputs,
    )
    pickle.dumps(job)


def write_report(w: World) -> None:
    measured = ("distortion", "w2_voronoi", "w2_uniform", "w2_sqrt", "heldout_distortion", "heldout_w2_voronoi")
    rows = [
        {"method": m, "ipc": w.config.ipc, "name": c.name, "class_id": c.class_id, "n": 650, "k": w.config.ipc}
        | dict.fromkeys(measured, 1.0 + c.class_id / 7)
        for m in ("ddoq", "d4m")
        for c in w.data.classes
    ]
    results = report.finite({"name": "scale", "ipc": w.config.ipc, "own_method": "ddoq", "classes": rows})
    (w.run / "report").publish_json("results.json", results)
    side, one = 32, {"method": "ddoq", "class_name": "n", "weight": 0.02, "width": 32, "height": 32}
    png = encode_png(np.zeros((side, side, 3), np.uint8))
    images = [one | {"class_id": i // 50, "centroid_id": i % 50, "png": png} for i in range(600)]
    (w.run / "report").publish("index.html", render_page(results, images).encode())


# In the order of a run. What asks more of a cluster than of the driver (tasks, pools) is not here.
LOOPS: dict[str, Callable[[World], None]] = {
    "prepare: shards.json written": write_index,
    "prepare: shards.json and class list read": load_data,
    "prepare: counts, digest, summary": count_data,
    "prepare: shards still there": look_at_shards,
    "prepare: a collection cut into shards": plan_shards,
    "prepare: classes found in prior and teacher": resolve_classes,
    "encode: done records, manifest": end_encode,
    "encode: quarantine read": read_quarantine,
    "quantize: memory planned": plan_quantizers,
    "quantize: news of each shard": tell_quantizers,
    f"quantize: books of one of {ACTORS} actors": keep_books,
    "quantize: records of parts, manifest": end_quantize,
    "latent index": index_log,
    "herding, medoids, report: readings planned": plan_readings,
    "random: images drawn and found": draw_images,
    "synthesize: image shards planned": plan_images,
    "heldout: shares": plan_heldout,
    "label: units": plan_labels,
    "train: what workers are told": plan_students,
    "report: class rows, results.json, page": write_report,
}


# ---------------------------------------------------------------------- the measurement


def measure(order: str, shards: int, classes: int, samples: int, ipc: int, scratch: str | None) -> list[dict[str, Any]]:
    """A row a loop, in a scratch folder that goes."""
    rows = []
    with tempfile.TemporaryDirectory(dir=scratch) as place:
        world = make_world(Folder(place), order, shards, classes, samples, ipc)
        say(f"{order:<10} {shards:,} shards: records are written")
        for what, loop in LOOPS.items():
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
            start = time.perf_counter()
            loop(world)
            seconds = time.perf_counter() - start
            row = {"what": what, "order": order, "shards": shards, "classes": classes, "samples": samples, "ipc": ipc}
            rows.append(row | {"seconds": seconds, "peak_bytes": peak_bytes()})
            say(f"{order:<10} {shards:,} shards: {what}: {seconds:.2f} s")  # before the next, which may not end
    return rows


def apart(*arguments: Any) -> list[dict[str, Any]]:
    """The rows of `measure` in a process of their own, so that its memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(measure, *arguments).result()


def compare(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Every order at a quarter and at the whole; the rows of the whole say how much longer it took."""
    rows = []
    for order in given.orders:
        fixed = (given.samples, given.ipc, given.scratch)
        quarter = apart(order, given.shards // 4, given.classes // 4, *fixed)
        whole = apart(order, given.shards, given.classes, *fixed)
        for before, after in zip(quarter, whole, strict=True):
            after["growth"] = after["seconds"] / before["seconds"]
        rows += quarter + whole
    return rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--orders", nargs="+", choices=["sorted", "mixed"], default=["sorted", "mixed"])
    options.add_argument("--shards", type=int, default=14_200)
    options.add_argument("--classes", type=int, default=21_841)
    options.add_argument("--samples", type=int, default=1000, help="in a shard")
    options.add_argument("--ipc", type=int, default=50)
    options.add_argument("--scratch", help="folder for the records, some 3 GB; removed at the end")
    given = options.parse_args()
    finish(compare(given), COLUMNS, given.json)


if __name__ == "__main__":
    main()
