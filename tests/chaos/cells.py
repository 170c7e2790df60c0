"""A cell of the chaos matrix: one stage, one kind of death, one seed; and whether what is made is what it always is.

A small run of the digits is made once without a death, stage by stage, with a copy of the run directory before each.
A cell runs its stage alone, in a copy, on a Ray cluster of this machine: a head that holds no work and two nodes with
CPUs and a GPU in name only. At a seeded moment, when the stage is seen at work, something is killed (SIGKILL):

* `worker`: the process of a task; of a stage that has no tasks, its actor's and then that of the actor in its place.
* `actor`: the process of an actor; of a stage that has none, its task's and then that of the same task's next try.
* `node`: a node that works for the stage, with all its processes; another one joins.
* `driver`: the process of the command. The same command is given again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ddoq_ray import pipeline
from ddoq_ray.commands import verify
from ddoq_ray.config.compose import load_config
from ddoq_ray.config.run import STAGES
from ddoq_ray.data.collections import DIGIT_NAMES, digits
from ddoq_ray.data.samples import encode_png
from ddoq_ray.storage.at_rest import Seen
from ddoq_ray.storage.folder import Folder
from tests.support.deaths import InThread, Over, title, workers_of

DEATHS = ("worker", "actor", "node", "driver")
HEAD = {"num_cpus": 0, "object_store_memory": 100 << 20, "include_dashboard": False}
NODE = {"num_cpus": 2, "num_gpus": 1, "object_store_memory": 100 << 20}
KEYS = [
    "experiment=digits", "dataset=imagefolder", "dataset.shard_samples=50", "ipc=2",
    "baselines=[random]", "num_seeds=2",
    "encoder.chunk_samples=10", "encoder.batch=10", "encoder.workers=1", "quantizer.snapshot_every=1",
    "quantizer.num_shards=2", "synthesizer.shard_images=1", "synthesizer.max_workers=2", "labels.file_labels=40",
    "labels.workers=2", "protocol.steps=60", "protocol.eval_every=20", "cluster.encoder.num_gpus=0.2",
    "cluster.quantizer.num_cpus=0.2", "cluster.decoder.num_gpus=0.5", "cluster.teacher.num_gpus=0.5",
    "cluster.evaluator.num_gpus=0.5", "cluster.trainer.groups=1",
]  # fmt: skip
HANGS_S = 600.0  # a stage that is not over by then hangs: with a death in it, it takes a minute or three, by the load
TRIES = 4  # of a cell whose stage was over before its moment came, each with an earlier moment


@dataclass(frozen=True)
class Works:
    """How a stage is seen at work.

    Attributes:
        tasks, actors: Words in the titles of the processes that work for it; empty where it has none.
        units: What it publishes piece by piece, below the run directory; a seeded number of them is waited for.
        later_s: Then a seeded time passes, at most this.
        result: Files whose bytes are compared.
    """

    tasks: tuple[str, ...]
    actors: tuple[str, ...]
    units: tuple[str, ...]
    later_s: float
    result: tuple[str, ...]


WORKS = {
    "prepare": Works(("_pack_shard",), (), ("data/records/*.json",), 0.1, ("data/*/*.tar", "data/*shards.json")),
    "encode": Works(
        ("read_tables", "join_chunks"),
        ("Encoder",),
        ("latents/parts/*/chunk-*.parquet", "latents/shard-*/done.json"),
        0.1,
        ("latents/shard-*/*",),
    ),
    "quantize": Works((), ("Quantizer",), ("codebook/snapshots/*", "codebook/part-*.json"), 0.3, ("codebook/part-*",)),
    "synthesize": Works(
        ("_compose", "_extract"), ("Decoder",), ("images/images-*.tar",), 0.1, ("**/images/images-*.tar",)
    ),
    "label": Works((), ("Teacher",), ("**/labels/*/labels-*.json",), 0.1, ("**/labels-*.parquet",)),
    "train": Works(
        ("RayTrainWorker",), ("TrainController",), ("**/students/*/manifest.json",), 0.5,
        ("**/model.safetensors", "**/metrics.jsonl"),
    ),
    "evaluate": Works(("_evaluate",), (), (), 1.0, ("report/rows.json",)),
    "report": Works(("_distances", "_encode"), (), (), 1.0, ("heldout/shard-*/*",)),
}  # fmt: skip


def content(place: Path, stage: str) -> dict[str, str]:
    """Name -> digest of what a stage has made; of the report what it measured, for its page tells times."""
    files = sorted({p for pattern in WORKS[stage].result for p in place.glob(pattern)})
    found = {str(p.relative_to(place)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    if stage == "report":
        results = json.loads((place / "report/results.json").read_text())
        told = {key: results[key] for key in ("rows", "paired", "classes", "heldout", "quarantine", "counts")}
        found["report/results.json"] = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    return found


def write_photos(place: Path) -> None:
    """The digits as a folder of pictures, which tasks pack; a split of their own would be written by the driver."""
    for split in ("train", "val"):
        for number, (pixels, class_id) in enumerate(zip(*digits()[split], strict=True)):
            file = place / split / DIGIT_NAMES[int(class_id)] / f"{number:04d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encode_png(pixels))


@dataclass
class Lab:
    """The cluster, and the run directory as it was before each stage.

    Attributes:
        base: Holds a copy of the run directory by stage, and one of the finished run.
    """

    base: Path
    cluster: Any
    nodes: list[Any] = field(default_factory=list)

    def prepare(self) -> None:
        """Make the undisturbed run, unless it is there."""
        if (self.base / "finished").exists():
            return
        write_photos(self.base / "photos")
        run = self.base / "calm"
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir(parents=True)
        for stage in STAGES:
            shutil.rmtree(self.base / stage, ignore_errors=True)
            shutil.copytree(run, self.base / stage)
            self.run(run, stage)
        run.rename(self.base / "finished")

    def after(self, stage: str) -> Path:
        """The undisturbed run as it was after a stage."""
        later = STAGES[STAGES.index(stage) + 1 :]
        return self.base / (later[0] if later else "finished")

    def keys(self, place: Path, stage: str) -> list[str]:
        return [*KEYS, f"dataset.path={self.base / 'photos'}", f"run_dir={place}", f"stages=[{stage}]"]

    def run(self, place: Path, stage: str, *more: str) -> None:
        import ray

        assert ray.is_initialized(), "this process has left the lab's cluster: the run would start a Ray of its own"
        pipeline.run(load_config([*self.keys(place, stage), *more]))

    def at_work(self, *words: str) -> list[tuple[Any, int]]:
        """(node, process) of what works on the nodes and has one of the words in its title."""
        there = workers_of([*self.nodes, self.cluster.head_node])
        return [(node, process) for process, (node, told) in there.items() if any(word in told for word in words)]

    def remove(self, node: Any) -> None:
        """SIGKILL a node with all its processes."""
        self.cluster.remove_node(node, allow_graceful=False)
        self.nodes.remove(node)

    def add(self) -> Any:
        """Let another node join; in the main thread only, where Ray sets a signal handler."""
        self.nodes.append(self.cluster.add_node(**NODE))
        return self.nodes[-1]

    def replace(self, node: Any) -> None:
        self.remove(node)
        self.add()


@contextlib.contextmanager
def lab(base: Path) -> Iterator[Lab]:
    """A cluster of this machine, with the undisturbed run in `base`."""
    import ray
    import ray.data
    from ray.cluster_utils import Cluster

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args=HEAD)
    try:
        found = Lab(base, cluster, [cluster.add_node(**NODE) for _ in range(2)])
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        cluster.wait_for_nodes()
        found.prepare()
        yield found
    finally:
        ray.shutdown()
        cluster.shutdown()


class Moment:
    """When something is killed: so many units after the stage began, and then a time.

    Attributes:
        number, total: Units that are waited for, and that the undisturbed stage publishes.
        later: Seconds.
    """

    def __init__(self, here: Lab, stage: str, place: Path, rng: np.random.Generator, earlier: float) -> None:
        self.works, self.place = WORKS[stage], place
        self.begun = self._units(place)
        self.total = self._units(here.after(stage)) - self.begun
        self.number = int(earlier * rng.integers(self.total)) if self.total > 1 else 0
        self.later = earlier * float(rng.uniform(0, self.works.later_s))

    def _units(self, place: Path) -> int:
        return sum(1 for pattern in self.works.units for _ in place.glob(pattern))

    def come(self) -> bool:
        return self._units(self.place) - self.begun >= self.number

    def __str__(self) -> str:
        units = f"{self.number} of {self.total} units and " if self.total > 1 else ""
        return f"{units}{self.later:.2f} s"


def cell(here: Lab, stage: str, death: str, seed: int, place: Path) -> dict[str, Any]:
    """Run a stage in a copy at `place` with a death in it; the cell's row.

    Raises:
        Over: Its moment never came.
        TimeoutError: The stage hangs.
    """
    for turn in range(TRIES):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(here.base / stage, place)
        rng = np.random.default_rng([seed, STAGES.index(stage), DEATHS.index(death), turn])
        moment = Moment(here, stage, place, rng, 0.5**turn)
        start = time.monotonic()
        try:
            killed, ended = (_without_driver if death == "driver" else _without)(here, stage, death, moment, rng)
        except Over:
            if turn + 1 == TRIES:
                raise
            continue
        seconds = time.monotonic() - start
        made, expected = {} if ended else content(place, stage), content(here.after(stage), stage)
        damaged = [d.file for d in verify.look(Folder(str(place)), Seen())[1]]
        return {
            "stage": stage,
            "death": death,
            "seed": seed,
            "equal": bool(expected) and made == expected and not damaged,
            "killed": killed,
            "moment": str(moment),
            "seconds": round(seconds, 1),
            "ended": ended or ("by the same command again" if death == "driver" else "by itself"),
            "files": len(expected),
        }
    raise AssertionError(TRIES)


def _without(here: Lab, stage: str, death: str, moment: Moment, rng: np.random.Generator) -> tuple[list[str], str]:
    """Run a stage and kill what works for it; titles of what was killed, and the error that the run ended with."""
    works, place = moment.works, moment.place
    words = {
        "worker": works.tasks or works.actors,
        "actor": works.actors or works.tasks,
        "node": works.tasks + works.actors,
    }[death]
    twice = (death == "worker" and not works.tasks) or (death == "actor" and not works.actors)

    def there() -> list[tuple[Any, int]]:
        return [found for found in here.at_work(*words) if death != "node" or found[0] in here.nodes]

    work = InThread(lambda: here.run(place, stage))
    killed: list[str] = []
    try:
        work.wait_for(moment.come)
        work.wait_for(there)
        time.sleep(moment.later)
        for _ in range(2 if twice else 1):
            found = work.wait_for(there)
            node, process = found[int(rng.integers(len(found)))]
            killed.append(title(process))
            if death == "node":
                here.replace(node)
                killed[-1] += ", with its node"
            else:
                os.kill(process, signal.SIGKILL)
                work.wait_for(lambda process=process: not title(process))
    except Over:
        if work.errors and not killed:
            raise work.errors[0] from None
        if not killed:
            raise
    return killed, _end(work)


def _without_driver(
    here: Lab, stage: str, death: str, moment: Moment, rng: np.random.Generator
) -> tuple[list[str], str]:
    """Run a stage by its command and kill that, then give the command again."""
    del death, rng
    place, works = moment.place, moment.works
    words = [*here.keys(place, stage), f"cluster.address={here.cluster.address}"]
    with Path(f"{place}.log").open("wb") as log:
        command = subprocess.Popen([sys.executable, "-m", "ddoq_ray", *words], stdout=log, stderr=log)
    try:
        end = time.monotonic() + HANGS_S
        while not (moment.come() and here.at_work(*works.tasks, *works.actors)):
            if command.poll() is not None:
                raise Over(Path(log.name).read_text()[-2000:])
            if time.monotonic() > end:
                raise TimeoutError(f"{stage} by its command: not at work after {HANGS_S:.0f} s")
            time.sleep(0.01)
        time.sleep(moment.later)
        if command.poll() is not None:
            raise Over("the command had ended")
    finally:
        command.kill()
        command.wait()
    return [f"ddoq-ray stages=[{stage}]"], _end(InThread(lambda: here.run(place, stage)))


def _end(work: InThread) -> str:
    """Wait for the end; the error in one line, empty where there is none.

    Raises:
        TimeoutError: There is no end.
    """
    if not work.ended(HANGS_S):
        raise TimeoutError(f"the stage is not over after {HANGS_S:.0f} s")
    return " ".join(f"{type(error).__name__}: {error}"[:300] for error in work.errors)
