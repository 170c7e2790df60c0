"""What each stage asks of Ray at the least, held at one time: compared with the cluster before work starts.

A pure function of the configuration; nothing of Ray is in it. A pool that could be smaller is fitted to a machine that
does not grow; what cannot fit is an error that names the key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from ddoq_ray.config import RunConfig
from ddoq_ray.config.cluster import TrainerResources, WorkerResources

Node = dict[str, float]  # resource -> what a node has of it: CPU, GPU


@dataclass(frozen=True)
class Demand:
    """Workers of one kind that a stage holds.

    Attributes:
        what: In words.
        key: The configuration key that says what one asks for.
        cpus, gpus: Of one worker.
        count: How many are held at one time, at the least.
    """

    what: str
    key: str
    cpus: float
    gpus: float
    count: int = 1

    @property
    def words(self) -> str:
        asks = " and ".join(f"{v:g} {k}" for v, k in ((self.cpus, "CPU"), (self.gpus, "GPU")) if v)
        return f"{self.count} {self.what} ({asks or 'nothing'}{' each' if self.count > 1 else ''}; {self.key})"


def demands(config: RunConfig, quantizers: int) -> dict[str, list[Demand]]:
    """stage -> what it holds at one time at the least, for the wanted stages.

    Args:
        quantizers: Codebooks that are made (the run's own, and D4M's).
    """
    c = config.cluster
    held: dict[str, list[Demand]] = {"prepare": [Demand("task", "dataset", 1.0, 0.0)]}
    quantize = [_of(c.quantizer, "quantizer", "cluster.quantizer", quantizers * config.quantizer.num_shards)]
    if "encode" in config.stages and config.latents.path is None:
        reader = _of(c.reader, "reader", "cluster.reader")
        held["encode"] = [_of(c.encoder, "encoder", "cluster.encoder"), reader]
        if "quantize" in config.stages:
            held["encode"] += quantize
    elif "quantize" in config.stages:
        held["quantize"] = quantize
    if "synthesize" in config.stages:
        held["synthesize"] = [_of(c.decoder, "decoder", "cluster.decoder")]
    if "label" in config.stages:
        held["label"] = [_of(c.teacher, "teacher", "cluster.teacher")]
    if "train" in config.stages:
        held["train"] = [_of(c.trainer, "trainer", "cluster.trainer", c.trainer.workers)]
    if "evaluate" in config.stages:
        held["evaluate"] = [_of(c.teacher, "evaluation task", "cluster.teacher")]
    return held


def _of(resources: WorkerResources | TrainerResources, what: str, key: str, count: int = 1) -> Demand:
    return Demand(what, key, resources.num_cpus, resources.num_gpus, count)


def fits(held: Sequence[Demand], nodes: Sequence[Node]) -> bool:
    """Whether all of it finds room at one time: the largest first, each on the fullest node that still takes it.

    >>> two = [{"CPU": 1.0}, {"CPU": 1.0}]
    >>> fits([Demand("a", "k", 1, 0, 2)], two), fits([Demand("a", "k", 2, 0)], two)
    (True, False)
    """
    free = [[node.get("CPU", 0.0), node.get("GPU", 0.0)] for node in nodes]
    workers = sorted(((d.gpus, d.cpus) for d in held for _ in range(d.count)), reverse=True)
    for gpus, cpus in workers:
        room = [f for f in free if f[0] >= cpus - 1e-9 and f[1] >= gpus - 1e-9]
        if not room:
            return False
        tightest = min(room, key=lambda f: (f[1], f[0]))
        tightest[0] -= cpus
        tightest[1] -= gpus
    return True


def short_of(held: dict[str, list[Demand]], nodes: Sequence[Node]) -> dict[str, str]:
    """stage -> in words what it needs and what there is, for each stage that does not fit."""
    cpus, gpus = (sum(n.get(k, 0.0) for n in nodes) for k in ("CPU", "GPU"))
    there = f"{cpus:g} CPU and {gpus:g} GPU" + (f" on {len(nodes)} nodes" if len(nodes) > 1 else "")
    return {
        stage: f"{stage} holds at one time {', '.join(d.words for d in mine)}, and there are {there}"
        for stage, mine in held.items()
        if not fits(mine, nodes)
    }


def fitted(config: RunConfig, quantizers: int, nodes: Sequence[Node]) -> tuple[RunConfig, list[str]]:
    """The configuration with pools no larger than a machine that does not grow holds, and a line for each change.

    No output byte depends on the size of a pool.
    """
    told: list[str] = []
    held = demands(config, quantizers)
    encode = held.get("encode")
    if encode:
        workers = config.encoder.workers
        while workers > 1 and not fits([dataclasses.replace(encode[0], count=workers), *encode[1:]], nodes):
            workers -= 1
        if workers < config.encoder.workers and fits(encode, nodes):
            told.append(
                f"encoder.workers={config.encoder.workers}: {workers} fit this machine beside what else it holds"
            )
            most = max(workers, min(config.encoder.max_workers, workers)) if config.encoder.max_workers else 0
            config = dataclasses.replace(
                config, encoder=dataclasses.replace(config.encoder, workers=workers, max_workers=most)
            )
    if "synthesize" in held:
        least = config.synthesizer.min_workers
        while least > 1 and not fits([dataclasses.replace(held["synthesize"][0], count=least)], nodes):
            least -= 1
        if least < config.synthesizer.min_workers:
            told.append(f"synthesizer.min_workers={config.synthesizer.min_workers}: {least} fit this machine")
            config = dataclasses.replace(config, synthesizer=dataclasses.replace(config.synthesizer, min_workers=least))
    return config, told


def asks(held: dict[str, list[Demand]]) -> dict[str, str]:
    """stage -> what one worker of each kind asks for, for the line that says what is waited for."""
    return {stage: ", ".join(dict.fromkeys(d.words for d in mine)) for stage, mine in held.items()}
