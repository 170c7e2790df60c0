"""``ddoq-ray plan``: what a run will write, move and take, and what stands in its way, before anything is spent."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ddoq_ray import pipeline
from ddoq_ray.config import RunConfig
from ddoq_ray.config.quantizer import ClvqConfig
from ddoq_ray.core.pooling import Pooling
from ddoq_ray.core.sizing import GIB
from ddoq_ray.execution import networks, places
from ddoq_ray.execution.session import own_node
from ddoq_ray.execution.streams import emit
from ddoq_ray.stages import demands
from ddoq_ray.stages.encode.stream import file_rows
from ddoq_ray.stages.prepare.mapping import resolve_mapping
from ddoq_ray.stages.prepare.step import check_small_classes
from ddoq_ray.stages.quantize.memory import Census, log_readings, plan_memory
from ddoq_ray.stages.quantize.step import Quantize, actors_parts
from ddoq_ray.stages.sizes import Sizes
from ddoq_ray.stages.step import Step
from ddoq_ray.stages.work import work_of
from ddoq_ray.storage import layout
from ddoq_ray.storage.artifact import Artifact
from ddoq_ray.storage.calibration import BATCHES, Rate, asked_of, default_file, rates_for, read_rates
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.prepared import Data

GB = 10**9
SHARED = 10**9  # bytes of pixels from which on it is said where they lie
CONTEXT = 600_000_000  # of a GPU's memory, that CUDA and its libraries take in each process, about
# What is measured -> the group of the workers that do it.
WORKERS = {"encode": "encoder", "decode": "decoder", "denoise": "decoder", "label": "teacher", "train": "trainer"}


@dataclass
class Plan:
    """What is known of a run before it starts.

    Attributes:
        written: What is written -> bytes, by the names of the steps.
        lines: For the user.
        problems: What would end the run, in the run's own words.
    """

    written: dict[str, int] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """What a check refuses is a problem; the plan goes on."""
        try:
            yield
        except ValueError as error:
            self.problems.append(str(error))

    def say(self, name: str, text: str) -> None:
        self.lines.append(f"{name:<10} {text}")


def main(config: RunConfig) -> None:
    """Print the plan.

    Raises:
        ValueError: The data is not prepared; or the run would end by a problem that is seen already.
    """
    made = plan(config)
    emit("\n".join(made.lines), sys.stdout)
    if made.problems:
        found = "".join(f"\n  {problem}" for problem in made.problems)
        raise ValueError(f"{len(made.problems)} problem{'s' * (len(made.problems) > 1)} to mend before the run:{found}")


def plan(config: RunConfig) -> Plan:
    """Look at the index of the data, the networks' facts and the configuration; nothing is written.

    Raises:
        ValueError: The data is not prepared.
    """
    made, run_dir = Plan(), Folder(config.folder)
    if Artifact(run_dir / layout.DATA, "prepare").manifest() is None:
        raise ValueError(
            f"{run_dir.uri} holds no prepared data: plan reads its index; make it first, by `ddoq-ray prepare` with "
            "the same dataset keys and run_dir"
        )
    data = Data.load(run_dir)
    steps = pipeline.steps(config)
    with made.looking():
        places.check_lasting(config.folder, "run_dir")
        places.check_apart(config)
    with made.looking():
        pipeline.check_run_dir(config, run_dir, steps)
    with made.looking():
        check_small_classes(config, data.counts, data.classes)
    _data(made, data)
    known = _networks(made, config, data)
    if known is None:
        return made
    wanted = [step for step in steps if step.wanted(config)]
    sizes = Sizes(config, data, known)
    _bytes(made, config, wanted, sizes)
    census = Census(data) if any(isinstance(step, Quantize) for step in wanted) else None
    _traffic(made, config, wanted, sizes, census)
    _room(made, run_dir, sizes)
    if census is not None:
        with made.looking():
            _quantizers(made, config, census, known, wanted)
    _workers(made, config, steps)
    _time(made, config, wanted, sizes)
    return made


def _data(made: Plan, data: Data) -> None:
    images = list(data.counts.values())
    smallest = min(data.counts, key=lambda c: data.counts[c])
    made.say(
        "data",
        f"{sum(images):,} images of {len(images):,} classes in {len(data.train):,} shards, "
        f"{_size(sum(s.bytes for s in data.train))}; the smallest class has {min(images):,} "
        f"({data.classes[smallest].name}), the largest {max(images):,}; {sum(s.samples for s in data.val):,} "
        "validation images",
    )


def _networks(made: Plan, config: RunConfig, data: Data) -> networks.Networks | None:
    """The networks' facts; None where they cannot be had. Their places for the classes are looked up too."""
    if config.prior.path is None:
        made.problems.append("prior.path=null: a plan needs a prior")
        return None
    known = None
    with made.looking():
        known = networks.Inspection(config, teacher=networks.asks_teacher(config)).result()
    if known is None:
        return None
    with made.looking():
        networks.check_methods(config, known)
    if "prior_label" in known.prior_needs:
        with made.looking():
            resolve_mapping(data.classes, "prior_label", "prior", known.prior_classes, known.prior_labels)
    if known.teacher_id is not None:
        with made.looking():
            resolve_mapping(data.classes, "teacher_index", "teacher", known.teacher_classes, known.teacher_outputs)
        with made.looking():
            networks.check_batches(pipeline.set_sizes(config, data.counts), config, known)
    return known


def _bytes(made: Plan, config: RunConfig, steps: Sequence[Step], sizes: Sizes) -> None:
    """What each kind of step writes."""
    of: dict[str, list[int]] = {}
    for step in steps:
        of.setdefault(step.name, []).append(sizes.of(step))
    for name, each in of.items():
        if sum(each):
            made.written[name] = sum(each)
            made.say("bytes", f"{name:<10} {_size(sum(each))}" + (f" in {len(each)} sets" if len(each) > 1 else ""))
    if "label" in of and config.labels.stored:
        by_codec = ", ".join(f"{codec} {_size(sizes.labels(n))}" for codec, n in sizes.codec_bytes.items())
        made.say(
            "labels", f"{sizes.epochs:,} epochs of {sizes.centroids:,} images a set: {by_codec}; codec {sizes.codec}"
        )
        if (shared := sizes.pixels) > SHARED:
            made.say(
                "labels",
                f"teachers of a node share {_size(shared)} of pixels a set in Ray's object store (30 % of its "
                "memory if nothing else is asked for); what is beyond that lies on its disk",
            )
    made.say("bytes", f"in all     {_size(sum(made.written.values()))}")


def _traffic(made: Plan, config: RunConfig, steps: Sequence[Step], sizes: Sizes, census: Census | None) -> None:
    """Bytes that cross the network where data and run directory are on other machines than the workers."""
    read: dict[str, float] = {}
    written = made.written
    if "encode" in written:
        read["images for encode"] = sum(s.bytes for s in sizes.data.train)
    log = sizes.latents([s.samples for s in sizes.data.train])
    quantizers = [s for s in steps if isinstance(s, Quantize)]
    for step in quantizers:
        algorithm, ipc = step.algorithm(config), step.sized(config).ipc
        times = (
            2.0
            if isinstance(algorithm, ClvqConfig) or census is None
            else log_readings(
                census,
                Pooling(tuple(sizes.networks.latent_shape), algorithm.pool),
                actors_parts(algorithm, len(sizes.data.classes), ipc, sizes.dim),
            )
        )
        read["latents for quantize"] = read.get("latents for quantize", 0.0) + times * log
    sets = sum(written.get(name, 0) for name in ("synthesize", "select", "recover", "given"))
    if "label" in written:
        read["images for label"] = sets * config.labels.workers
    trained = [s for s in steps if s.name == "train"]
    if trained:
        read["images and labels for train"] = config.cluster.trainer.workers * (
            sets + config.num_seeds * written.get("label", 0)
        )
    told = ", ".join(f"{what} {_size(amount)}" for what, amount in read.items())
    out = sum(amount for name, amount in written.items() if name != "prepare")
    made.say("traffic", f"read {_size(sum(read.values()))} ({told}); written {_size(out)}")


def _room(made: Plan, run_dir: Folder, sizes: Sizes) -> None:
    """Whether what is still to be written fits a local disk."""
    if not run_dir.local:
        return
    place = run_dir.uri
    while not os.path.exists(place):
        place = os.path.dirname(place)
    free = shutil.disk_usage(place).free
    need = sum(amount for name, amount in made.written.items() if name != "prepare")  # which is there already
    passing = sizes.checkpoints if "train" in made.written else 0
    need += passing
    made.say("disk", f"{_size(free)} are free at {place}; checkpoints, which go, take up to {_size(passing)} more")
    if need > free:
        made.problems.append(
            f"run_dir={run_dir.uri}: the run writes {_size(need)} and {_size(free)} are free; choose another run_dir, "
            "latents.keep=false, labels.mode=features or online, or a smaller ipc"
        )


def _quantizers(made: Plan, config: RunConfig, census: Census, known: networks.Networks, steps: Sequence[Step]) -> None:
    """Memory of the quantizer actors of each codebook."""
    shape, rows = tuple(known.latent_shape), file_rows(config, known)
    for step in (s for s in steps if isinstance(s, Quantize)):
        algorithm, sized = step.algorithm(config), step.sized(config)
        parts = actors_parts(algorithm, len(census.images), sized.ipc, int(np.prod(shape)))
        needs = plan_memory(sized, algorithm, census, Pooling(shape, algorithm.pool), rows, parts)
        made.say("quantizer", f"{step.place}: {len(needs)} actors of up to {max(needs) / GIB:,.2f} GiB")


def _workers(made: Plan, config: RunConfig, steps: Sequence[Step]) -> None:
    """What the stages hold at the same time; on this machine's own Ray, whether it fits."""
    for stage, asks in demands.table(config, steps).items():
        told = ", ".join(f"{a.count} {a.what}{'s' * (a.count > 1)} of {demands.in_words(a.room)}" for a in asks)
        made.say("workers", f"{stage:<10} {told}")
    address = config.cluster.address or os.environ.get("RAY_ADDRESS") or "local"
    if address != "local":
        return  # it may be another cluster than the run's, and nodes may join
    node = own_node(config.cluster)
    with made.looking():
        _, words = demands.plan(config, steps, [node], may_grow=False)
        made.lines += words


def _time(made: Plan, config: RunConfig, steps: Sequence[Step], sizes: Sizes) -> None:
    """Seconds of a device and of the clock, by measured rates."""
    path = config.cluster.calibration or default_file()
    cluster = config.cluster
    work = work_of(config, steps, sizes)
    for gpu in (True, False):
        mine = {s: w for s, w in work.items() if (getattr(cluster, w.group).num_gpus > 0) == gpu}
        found = rates_for(read_rates(path), asked_of(config), gpu=gpu) if mine else {}
        if gpu:
            _gpu_memory(made, config, found)
        for device, rates in found.items():
            total = 0.0
            for stage, w in mine.items():
                seconds = sum(n / rates[what]["per_second"] for what, n in w.items.items() if what in rates)
                if not set(w.items) <= set(rates):
                    made.say("time", f"{stage:<10} not measured on {device}")
                    continue
                share = getattr(cluster, w.group).num_gpus if gpu else 1.0
                total += seconds / w.workers
                made.say(
                    "time",
                    f"{stage:<10} {seconds * share:,.0f} {'GPU' if gpu else 'worker'}-seconds, "
                    f"{_clock(seconds / w.workers)} with {w.workers} workers ({device})",
                )
            made.say("time", f"in all     {_clock(total)} on {device}, without reading, start-up and evaluation")
        if mine and not found:
            made.say(
                "time",
                f"{', '.join(mine)}: no {'GPU' if gpu else 'processor'} rates of these settings in {path}; "
                "`ddoq-ray calibrate` with the same keys measures them in a minute",
            )


def _gpu_memory(made: Plan, config: RunConfig, found: Mapping[str, Mapping[str, Rate]]) -> None:
    """Whether each worker's part of a GPU holds its network and batch, by what was measured."""
    for device, rates in found.items():
        for what, rate in rates.items():
            group, peak = WORKERS[what], rate["peak_bytes"]
            given = config.cluster.gpu_gb
            whole = given * GB if given is not None else rate["memory_bytes"]
            share = min(1.0, getattr(config.cluster, group).num_gpus)
            if not peak or not whole:
                continue
            made.say("gpu", f"{what:<10} {_size(peak)} of {_size(whole * share)}, measured on {device}")
            if peak + CONTEXT > whole * share:
                part = "" if share == 1 else f" times cluster.{group}.num_gpus={share:g}"
                made.problems.append(
                    f"{what} takes {_size(peak)} of a GPU's memory (measured on {device}) and some {_size(CONTEXT)} "
                    f"beside, and a worker has {_size(whole)}{part}: choose a smaller {BATCHES[what]}, or larger GPUs"
                )


def _size(amount: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if amount >= size:
            return f"{amount / size:,.3g} {unit}"
    return f"{amount / 1e3:,.3g} kB"


def _clock(seconds: float) -> str:
    return (
        f"{seconds:,.0f} s"
        if seconds < 120
        else f"{seconds / 60:,.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:,.1f} h"
    )
