"""select: baselines made of real images, as image sets.

`random` draws anew for each student; the others choose once: in latent space, from the run's latents, or by what the
teacher says of the images. All but `confident` weigh their images alike, as these baselines are used elsewhere: so a
row tells what the choice of images is worth.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from ddoq_ray.config import RunConfig
from ddoq_ray.config.methods import MethodSpec
from ddoq_ray.execution.console import doing
from ddoq_ray.execution.run import Run
from ddoq_ray.stages.cells import own_set
from ddoq_ray.stages.encode.step import Encode
from ddoq_ray.stages.select.choice import Choice, Selection
from ddoq_ray.stages.select.images import publish
from ddoq_ray.stages.step import Ask, ImageSetStep
from ddoq_ray.storage import layout
from ddoq_ray.storage.artifact import Artifact, digest_of
from ddoq_ray.storage.latent_index import latent_index
from ddoq_ray.storage.layout import Place

AT_ONCE = 1_000_000  # images of sets that are made together: the driver holds where each one lies


@dataclass(frozen=True)
class Select(ImageSetStep):
    """An image set of chosen real images.

    Attributes:
        method: What chooses.
        draw: Which of the method's draws it is; 0 for one that chooses once.
    """

    stage = "synthesize"
    name = "select"

    method: MethodSpec
    at: Place
    draw: int = 0

    @property
    def chooser(self) -> ModuleType:
        """The module of the method."""
        return import_module(f"ddoq_ray.stages.select.{self.method.name}")

    def settings(self, config: RunConfig) -> dict[str, Any]:
        """The draw, and the size of the files."""
        facts: dict[str, Any] = {
            self.method.name: self.draw,
            "seed": config.seed,
            "ipc": config.ipc,
            "resize": config.encoder.resize,
            "shard_images": config.synthesizer.shard_images,
        }
        if self.method.reads or config.small_class != "error":
            facts["small_class"] = config.small_class  # which classes are drawn from, and how many images
        if "teacher" in self.method.reads:
            facts["teacher_batch"] = config.teacher.batch
        own = getattr(self.chooser, "settings", None)
        return facts if own is None else facts | own(config)

    def inputs(self, run: Run) -> dict[str, Any]:
        facts: dict[str, Any] = {"data": run.data.digest}
        if self.method.reads:  # how many images there are to choose from, too
            facts["latents"] = run.finished(Artifact(run.latents, Encode.name))["digest"]
        if "codebook" in self.method.reads:
            facts["codebook"] = run.finished(Artifact(run.dir / own_set(run.config).codebook, "quantize"))["digest"]
        if "teacher" in self.method.reads:
            facts["teacher"] = run.networks.scorer_id
            facts["teacher_outputs"] = digest_of([c.teacher_index for c in run.data.classes])[:32]
        return facts

    def asks(self, config: RunConfig) -> list[Ask]:
        if "teacher" in self.method.reads:  # before readers copy what was chosen, and gone by then
            return [Ask.of(config, "teacher", "teacher", config.labels.workers, "labels.workers")]
        return [Ask.of(config, "reader", "reader")]


def run(of: Sequence[tuple[Run, Select]]) -> None:
    """Choose real images, each set of its run, and publish them as image sets: those of a method together.

    Raises:
        ValueError: When the latents or the codebook that a method needs are not there.
    """
    by_method: dict[str, list[tuple[Run, Select]]] = {}
    for run, step in of:
        by_method.setdefault(step.method.name, []).append((run, step))
    for method, sets in by_method.items():
        with doing(method):
            _one_method(sets)


def _one_method(of: Sequence[tuple[Run, Select]]) -> None:
    chosen: list[Chosen] = []
    for run, step in of:
        facts = step.identity(run)
        if step.artifact(run.dir).begin(facts, overwrite=run.config.overwrite) == "done":
            continue
        chosen.append(_chosen(run, step, facts))
        if sum(c.images for c in chosen) >= AT_ONCE:
            _publish(chosen)
            chosen = []
    _publish(chosen)


@dataclass(frozen=True)
class Chosen:
    """A set that was chosen, and what that took."""

    run: Run
    step: Select
    facts: dict[str, Any]
    choice: Choice
    selection: Selection
    seconds: float

    @property
    def images(self) -> int:
        return sum(self.selection.images.values())


def _chosen(run: Run, step: Select, facts: dict[str, Any]) -> Chosen:
    start = time.time()
    index = latent_index(run.latents, len(run.data.train))
    usable = index.counts.tolist()
    counts = {c.class_id: usable[c.class_id] if c.class_id < len(usable) else 0 for c in run.data.classes}
    choice = Choice(run, step.method.name, index, counts, step.at, step.draw, digest_of(facts))
    selection = step.chooser.choose(choice)
    return Chosen(run, step, facts, choice, selection, time.time() - start)


def _publish(sets: Sequence[Chosen]) -> None:
    start = time.time()
    published = publish([(c.choice, c.selection) for c in sets])
    seconds, total = time.time() - start, max(1, sum(c.images for c in sets))
    for c, shards in zip(sets, published, strict=True):
        artifact = c.step.artifact(c.run.dir)
        for passing in (layout.EXCERPTS, layout.SCORES):
            artifact.folder.remove(passing)
        artifact.finish(
            c.facts,
            seconds=round(c.seconds + seconds * c.images / total, 3),  # the sets share the workers
            items=c.images,
            unit="images",
            bytes=sum(s["bytes"] for s in shards),
            shards=shards,
            digest=digest_of([s["sha256"] for s in shards]),
        )
        c.run.events.add("stage finished", stage="select", folder=c.step.at.root, images=c.images)
