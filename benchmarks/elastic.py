"""synthesize on a cluster whose nodes come and go: is every image made once, in the same bytes, and in how much time?

    python -m benchmarks.elastic --json benchmarks/results/elastic.json

The nodes are Ray nodes of this machine, each with one CPU and one GPU in name only. The stage is the project's own,
with its pool, on the shipped digits prior (a small diffusers network); only its decoder is slowed, so that each unit
takes the same time on a worker and this machine's cores are no limit. One node works alone, two more join, one of the
three is killed (SIGKILL, in the middle of a unit), and two bring it to the end.

* `expected`, `unique`: images asked for, and different (class_id, centroid_id) that are there; none is there twice.
* `same_bytes`: every tar is that of a run with one worker that nothing disturbed.
* `redone`: units that were begun after they had been finished.
* `join_s`: from asking for a node to the beginning of the first unit on it, the longer of two.
* `start_s`: from the first worker that is asked for to the first one that is ready. It counts in `total_s`.
* `ideal_s`: the time in which workers that are ready with their nodes and lose nothing would make all units, over the
  same comings and goings; `total_over_ideal` is the time that it took beside that.

A plot of images a second over time (.svg) is written beside the rows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from benchmarks.provenance import finish, parser
from ddoq_ray import pipeline
from ddoq_ray.config.compose import load_config
from ddoq_ray.data.image_set import read_images
from ddoq_ray.stages.synthesize import step as synthesize

NODE: dict[str, Any] = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 100 << 20}
HEAD: dict[str, Any] = {"num_cpus": 4, "object_store_memory": 200 << 20, "include_dashboard": False}
SHARD_IMAGES, CLASSES = 2, 10
COLUMNS = ["expected", "unique", "same_bytes", "redone", "join_s", "start_s", "total_s", "ideal_s", "total_over_ideal"]


@dataclass
class Marks:
    """What decoders leave in a folder: a file when a unit begins, another when it ends."""

    folder: Path

    def read(self) -> list[dict[str, Any]]:
        """A record an execution: unit, node, start, and end where there is one."""
        found = []
        for begun in self.folder.glob("*.begun"):
            row = json.loads(begun.read_text())
            ended = begun.with_suffix(".ended")
            found.append(row | {"end": float(ended.read_text()) if ended.exists() else None})
        return sorted(found, key=lambda row: row["start"])

    def at_work(self, node: str, seconds: float) -> bool:
        """Whether a unit on this node has begun so long ago, and is not at its end."""
        now = time.time()
        return any(r["node"] == node and r["end"] is None and now - r["start"] > seconds for r in self.read())


@dataclass
class Slowed:
    """The decoder of the stage, whose units take `unit_s` each; notes when workers are asked for."""

    actor: Any
    marks: Marks
    unit_s: float
    asked: list[float] = field(default_factory=list)

    def options(self, **options: Any) -> Any:
        self.asked.append(time.time())
        return self._class().options(**options)

    def _class(self) -> Any:
        folder, unit_s = str(self.marks.folder), self.unit_s

        class Decoder(self.actor.__ray_actor_class__):  # type: ignore[misc, name-defined]
            def __init__(self, *given: Any) -> None:
                super().__init__(*given)
                self.one_at_a_time = threading.Lock()

            def run(self, job: Any) -> dict[str, Any]:
                with self.one_at_a_time:
                    start, mark = time.time(), os.path.join(folder, uuid.uuid4().hex)
                    about = {"unit": job.name, "node": ray.get_runtime_context().get_node_id(), "start": start}
                    Path(f"{mark}.tmp").write_text(json.dumps(about))
                    os.replace(f"{mark}.tmp", f"{mark}.begun")
                    time.sleep(unit_s / 2)
                    record: dict[str, Any] = super().run(job)
                    time.sleep(max(0.0, start + unit_s - time.time()))
                    Path(f"{mark}.tmp").write_text(str(time.time()))
                    os.replace(f"{mark}.tmp", f"{mark}.ended")
                    return record

        return ray.remote(Decoder)


def ideal_end(nodes: Sequence[tuple[float, float]], work: float) -> float:
    """When nodes that are there from..until have given `work` node-seconds together.

    >>> ideal_end([(0, 9e9), (10, 9e9), (10, 20)], 60)
    30.0
    """
    moments = sorted({t for node in nodes for t in node})
    for here, there in itertools.pairwise(moments):
        working = sum(begin <= here < end for begin, end in nodes)
        if working * (there - here) >= work:
            return float(here + work / working)
        work -= working * (there - here)
    raise ValueError("these nodes never finish the work")


def run_stage(place: Path, stages: str, ipc: int, workers: int) -> None:
    keys = [
        f"run_dir={place}", "experiment=digits", "baselines=[]", f"ipc={ipc}", f"stages=[{stages}]",
        f"synthesizer.shard_images={SHARD_IMAGES}", f"synthesizer.max_workers={workers}", "cluster.decoder.num_gpus=1",
    ]  # fmt: skip
    pipeline.run(load_config(keys))


def in_thread(work: Callable[[], None]) -> tuple[threading.Thread, list[BaseException]]:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, errors


@dataclass
class Story:
    """What happened to the nodes: (node id, from, until), times in seconds of time.time."""

    nodes: list[tuple[str, float, float]]
    asked: dict[str, float]
    killed: str


def disturbed(cluster: Any, first: str, marks: Marks, work: Callable[[], None], given: argparse.Namespace) -> Story:
    """Run `work` while nodes come and go. Nodes are added by the main thread: Ray sets a signal handler there."""
    thread, errors = in_thread(work)

    def wait_for(moment: Callable[[], Any]) -> Any:
        while not (found := moment()):
            if not thread.is_alive():
                raise RuntimeError("the work ended before the moment came") from (errors[0] if errors else None)
            time.sleep(0.05)
        return found

    forever = float("inf")
    start = wait_for(lambda: marks.read())[0]["start"]
    wait_for(lambda: time.time() - start >= given.join_s)
    asked, nodes, added = {}, {first: (0.0, forever)}, []
    for _ in range(2):
        now = time.time()
        node = cluster.add_node(**NODE)
        asked[node.node_id] = now
        nodes[node.node_id] = (now, forever)
        added.append(node)
    wait_for(lambda: time.time() - start >= given.kill_s)
    wait_for(lambda: marks.at_work(added[0].node_id, given.unit_s / 4))
    nodes[added[0].node_id] = (nodes[added[0].node_id][0], time.time())
    cluster.remove_node(added[0], allow_graceful=False)
    thread.join()
    if errors:
        raise errors[0]
    return Story([(node, *times) for node, times in nodes.items()], asked, added[0].node_id)


def tars(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((place / "images").glob("images-*.tar"))}


def events(place: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (place / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if row.get("stage") == "synthesize"]


def measure(given: argparse.Namespace, scratch: Path) -> tuple[dict[str, Any], Story, list[dict[str, Any]]]:
    """The row, what happened to the nodes, and the executions; in a scratch folder and a Ray of its own."""
    from ray.cluster_utils import Cluster

    ipc = -(-given.units * SHARD_IMAGES // CLASSES)
    units, load = ipc * CLASSES // SHARD_IMAGES, os.getloadavg()[0]
    calm, place, marks = scratch / "calm", scratch / "disturbed", Marks(scratch / "marks")
    marks.folder.mkdir()
    cluster = Cluster(initialize_head=True, head_node_args=HEAD)
    decoder = synthesize.Decoder
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # the stages' own lines are enough
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        first = cluster.add_node(**NODE)
        run_stage(calm, "prepare,encode,quantize,synthesize", ipc, 1)
        shutil.copytree(calm, place, ignore=shutil.ignore_patterns("images", "events.jsonl", "lease.json"))
        slowed = Slowed(decoder, marks, given.unit_s)
        synthesize.Decoder = slowed  # type: ignore[assignment, misc]
        story = disturbed(cluster, first.node_id, marks, lambda: run_stage(place, "synthesize", ipc, 3), given)
    finally:
        synthesize.Decoder = decoder  # type: ignore[misc]
        ray.shutdown()
        cluster.shutdown()

    happened, done = events(place), marks.read()
    start = slowed.asked[0]
    ready = next(row["time"] for row in happened if row["event"] == "worker joined")
    end = next(row["time"] for row in happened if row["event"] == "stage finished")
    begun = {node: min(r["start"] for r in done if r["node"] == node) for node in story.asked}
    first_end: dict[str, float] = {}
    for r in sorted((r for r in done if r["end"] is not None), key=lambda r: r["end"]):
        first_end.setdefault(r["unit"], r["end"])
    times = [(max(a, start) - start, min(b, start + 1e9) - start) for _, a, b in story.nodes]
    ideal = ideal_end(times, units * given.unit_s)
    keys = [(i.class_id, i.centroid_id) for i in read_images([str(p) for p in sorted(place.glob("images/*.tar"))])]
    row = {
        "expected": units * SHARD_IMAGES,
        "unique": len(set(keys)) if len(set(keys)) == len(keys) else -1,
        "same_bytes": tars(place) == tars(calm),
        "redone": sum(r["start"] > first_end.get(r["unit"], float("inf")) for r in done),
        "join_s": max(begun[node] - story.asked[node] for node in story.asked),
        "start_s": ready - start,
        "total_s": end - start,
        "ideal_s": ideal,
        "total_over_ideal": (end - start) / ideal,
        "units": units,
        "unit_s": given.unit_s,
        "executions": len(done),
        "workers_lost": sum(e["event"] == "worker lost" for e in happened),
        "requeued": sum(e["event"] == "unit requeued" for e in happened),
        "copied": sum(e["event"] == "unit copied" for e in happened),
        "nodes": [[round(a, 1), round(b, 1) if b < 1e8 else None] for a, b in times],
        "load_before": load,
    }
    for r in done:
        r["start"] -= start
        r["end"] = None if r["end"] is None else r["end"] - start
    return row, story, done


def plot(row: dict[str, Any], done: Sequence[dict[str, Any]], path: Path) -> None:
    """Images a second over time, with what the nodes that were there could make."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "elastic"
    from matplotlib import pyplot

    width, end = 4 * row["unit_s"], row["total_s"]
    bins = [width * i for i in range(int(end / width) + 2)]
    figure, axes = pyplot.subplots(figsize=(7.5, 3.2))
    ends = [r["end"] for r in done if r["end"] is not None]
    weights = [SHARD_IMAGES / width] * len(ends)
    axes.hist(ends, bins=bins, weights=weights, color="tab:blue", alpha=0.7, label=f"made, in steps of {width:g} s")
    moments = sorted({0.0, end, *(t for node in row["nodes"] for t in node if t is not None and t < end)})
    rate = SHARD_IMAGES / row["unit_s"]
    could = [rate * sum(a <= t and (b is None or t < b) for a, b in row["nodes"]) for t in moments]
    axes.step(
        moments, [*could[:-1], could[-2]], where="post", color="black", linewidth=1, label="the nodes that were there"
    )
    axes.set(xlabel="s since the first worker was asked for", ylabel="images a second", xlim=(0, end))
    axes.legend(fontsize=8, loc="upper left")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--units", type=int, default=240, help=f"image shards of {SHARD_IMAGES} images, about so many")
    options.add_argument("--unit-s", type=float, default=3.0, help="seconds that a worker takes for a unit")
    options.add_argument("--join-s", type=float, default=60.0, help="two nodes join so long after the first unit began")
    options.add_argument("--kill-s", type=float, default=180.0, help="one of them is killed so long after it")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        row, _, done = measure(given, Path(scratch))
    finish([row], COLUMNS, given.json)
    if given.json:
        plot(row, done, Path(given.json).with_suffix(".svg"))


if __name__ == "__main__":
    main()
