"""How much work the steps of a run are, in what `calibrate` measures, and how long that takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ddoq_ray.config import RunConfig
from ddoq_ray.stages.sizes import Sizes
from ddoq_ray.stages.step import Step
from ddoq_ray.stages.synthesize.step import Synthesize
from ddoq_ray.storage.calibration import asked_of, default_file, rates_for, read_rates


@dataclass(frozen=True)
class Work:
    """What of a stage is measured by rates: what -> items; whose resources its workers have, and how many there are."""

    items: Mapping[str, float]
    group: str
    workers: int


def work_of(config: RunConfig, steps: Sequence[Step], sizes: Sizes) -> dict[str, Work]:
    count: Callable[[str], int] = lambda name: sum(s.name == name for s in steps)
    made = denoised = 0
    for step in (s for s in steps if isinstance(s, Synthesize)):
        making = step.making(config)
        own, images = making.settings, making.tiles * sizes.centroids * making.settings.candidates
        run = own.steps if own.start in ("noise", "guided") else math.floor(own.steps * own.strength + 1e-9)
        made, denoised = made + images, denoised + images * run
    views = count("label") * sizes.centroids * sizes.epochs
    full = sum(s.name == "train" and getattr(s, "source", None) is None for s in steps)
    trained = (count("train") - full) * sizes.centroids * sizes.epochs
    images = sum(sizes.data.counts.values())
    if full:
        trained += full * images * config.protocol.epochs_for(images, full=True)
    found = {}
    if count("encode"):
        found["encode"] = Work({"encode": images}, "encoder", config.encoder.pool[1])
    if made:
        items = {"decode": made} | ({"denoise": denoised} if denoised else {})
        found["synthesize"] = Work(items, "decoder", config.synthesizer.max_workers)
    if views and config.labels.stored:
        found["label"] = Work({"label": views}, "teacher", config.labels.workers)
    if trained:
        found["train"] = Work(
            {"train": trained}, "trainer", config.cluster.trainer.workers * config.cluster.trainer.groups
        )
    return found


def estimate(config: RunConfig, steps: Sequence[Step], sizes: Sizes) -> tuple[float, set[str]]:
    """(Seconds of the clock by the measured rates, what is not measured), without reading, start-up and evaluation.

    Where several devices are measured, it is the first one in the file.
    """
    rates = read_rates(config.cluster.calibration or default_file())
    total, unknown = 0.0, set()
    for work in work_of(config, steps, sizes).values():
        gpu = getattr(config.cluster, work.group).num_gpus > 0
        found = next(iter(rates_for(rates, asked_of(config), gpu=gpu).values()), {})
        unknown |= set(work.items) - set(found)
        total += sum(n / found[what]["per_second"] for what, n in work.items.items() if what in found) / work.workers
    return total, unknown
